"""The notes say what the code does: their Python blocks print what is below them, and their links lead somewhere."""

import sys

import pytest
import regex
import torch
from conftest import CODE, ROOT

sys.path.append(str(ROOT / "notes"))
from reprint import BLOCKS, run_blocks

NOTES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "notes").glob("*.md"))}
LESSONS = [name for name, text in NOTES.items() if BLOCKS.search(text)]


@pytest.fixture
def one_thread():
    """Small tensors are faster so, above all where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NUMBER = r"-?\d+\.\d+"


def same(printed, below):
    """Equal texts, but the last digit of a number with decimals may differ by one: processors round differently."""
    if regex.sub(NUMBER, "#", printed) != regex.sub(NUMBER, "#", below):
        return False
    pairs = zip(regex.findall(NUMBER, printed), regex.findall(NUMBER, below), strict=True)
    return all(abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(b.split(".")[1]) for a, b in pairs)


def test_a_wrong_digit_is_noticed():
    assert same("loss 3.1416", "loss 3.1417") and same("-0.0000", "0.0000")
    assert not same("loss 3.1416", "loss 3.1418") and not same("12 of 16", "13 of 16") and not same("1.5 a", "1.5 b")


@pytest.mark.parametrize("name", LESSONS)
def test_a_block_prints_what_is_below_it(name, one_thread, request):
    if "get_encoding" in NOTES[name]:
        request.getfixturevalue("gpt2_vocabulary")  # or the test is skipped
    for code, below, printed in run_blocks(NOTES[name], name):
        assert same(printed, below), f"{code}\n{printed}"


@pytest.mark.parametrize("name", NOTES)
def test_links_and_names_of_files_lead_somewhere(name):
    for target in regex.findall(r"\]\((?!http)([^)#]+)", NOTES[name]):
        assert (ROOT / "notes" / target).exists(), target
    for file in regex.findall(r"`((?:\w+/)?\w+\.(?:py|md))`", NOTES[name]):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", LESSONS)
def test_functions_that_are_explained_exist(name):
    """The first paragraphs name what the note is about."""
    opening = NOTES[name].split("\n## ")[0]
    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    names = [word for word in regex.findall(r"`(\w+)`", opening)]
    for word in names:
        assert regex.search(rf"^\s*(?:def|class) {word}\b", code, regex.MULTILINE), word


def test_the_index_links_to_every_note():
    assert set(regex.findall(r"\]\((\w+\.md)\)", NOTES["README.md"])) == NOTES.keys() - {"README.md"}
