"""The notes say what the code does: their Python blocks print what is below them, and their links lead somewhere."""

import math
import sys
from pathlib import Path

import pytest
import regex
import torch
from conftest import CODE, ROOT, SCRIPTS, script

from bench import __main__ as bench

sys.path.append(str(ROOT / "notes"))
from reprint import run_blocks

INDEX = ROOT / "notes/README.md"
NOTES = sorted(set((ROOT / "notes").glob("*.md")) - {INDEX})


@pytest.fixture
def one_thread():
    """Small tensors are faster so, above all where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.name)
def test_what_a_block_prints_stands_below_it(path, one_thread):
    blocks = 0
    for code, below, printed in run_blocks(path.read_text(encoding="utf-8"), path.name):
        assert printed == below, code
        blocks += 1
    assert blocks


@pytest.mark.parametrize("path", [INDEX, *NOTES], ids=lambda path: path.name)
def test_links_and_names_of_files_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in regex.findall(r"\]\((?!http)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for name in regex.findall(r"`((?:\w+/)?\w+\.(?:py|md))`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.name)
def test_functions_that_are_explained_exist(path):
    """The first paragraphs name what the note is about."""
    opening = path.read_text(encoding="utf-8").split("\n## ")[0]
    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    names = [name for name in regex.findall(r"`(\w+)`", opening) if not Path(name).suffix]
    assert names and all(regex.search(rf"^\s*(?:def|class) {name}\b", code, regex.MULTILINE) for name in names), names


def test_the_table_of_the_plan_is_the_one_that_is_printed(capsys):
    bench.main(["--plan"])
    assert f"```\n{capsys.readouterr().out}```\n" in (ROOT / "notes/performance.md").read_text(encoding="utf-8")


def test_the_index_names_every_note_and_how_long_it_is_to_read():
    minutes = {path.name: 5 * math.ceil(len(path.read_text(encoding="utf-8").split()) / 200 / 5) for path in NOTES}
    row = r"^\| \[[^\]]+\]\((\w+\.md)\) \| [^|]+ \| (\d+) \|$"
    rows = regex.findall(row, INDEX.read_text(encoding="utf-8"), regex.MULTILINE)
    assert {name: int(number) for name, number in rows} == minutes and len(rows) == len(minutes)


def test_every_flag_of_every_script_is_in_a_note_and_no_other():
    text = "".join(path.read_text(encoding="utf-8") for path in NOTES)
    flags = {flag for name in SCRIPTS for flag in regex.findall(r"--[\w-]+", script(name, "--help").stdout)}
    flags -= {"--help", *(flag for flag in flags if flag.startswith("--no-"))}  # the opposites of others
    named = set(regex.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", text))
    assert flags <= named, sorted(flags - named)
    of_others = {"--help", "--nproc_per_node", "--version", "--cached", "--global", "--stdin"}  # torchrun's and git's
    elsewhere = of_others | {"--n_lay", "--n_leyer"}  # cut short, and misspelt
    assert named - flags <= elsewhere, sorted(named - flags)
