"""The notes say what the code does: their Python blocks run, and print what stands below them; their links lead somewhere."""

import contextlib
import io
from pathlib import Path

import pytest
import regex
from conftest import ROOT

import bench

NOTES = sorted((ROOT / "notes").glob("*.md"))
BLOCKS = regex.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", regex.MULTILINE | regex.DOTALL)


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.name)
def test_what_a_block_prints_stands_below_it(path):
    names, blocks = {"__name__": "note"}, BLOCKS.findall(path.read_text(encoding="utf-8"))
    assert blocks
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, path.name, "exec"), names)  # noqa: S102  (our own notes)
        assert printed.getvalue() == expected, code


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.name)
def test_links_and_names_of_files_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in regex.findall(r"\]\((?!http)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for name in regex.findall(r"`((?:tests/|notes/)?\w+\.(?:py|md))`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.name)
def test_functions_that_are_explained_exist(path):
    """The first paragraphs name what the note is about."""
    opening = path.read_text(encoding="utf-8").split("\n## ")[0]
    code = "".join(script.read_text(encoding="utf-8") for script in ROOT.glob("*.py"))
    names = [name for name in regex.findall(r"`(\w+)`", opening) if not Path(name).suffix]
    assert names and all(regex.search(rf"^\s*(?:def|class) {name}\b", code, regex.MULTILINE) for name in names), names


def test_the_table_of_the_plan_is_the_one_that_is_printed(capsys):
    bench.main(["--plan"])
    assert f"```\n{capsys.readouterr().out}```\n" in (ROOT / "notes/performance.md").read_text(encoding="utf-8")
