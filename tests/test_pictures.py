"""The pictures of the notes are drawn from our own models, and the notes show no others."""

import matplotlib.image
import pytest
import regex
from conftest import PROSE, ROOT, TINY

import gpt
from notes import pictures

NAMES = {"mask.png", "schedule.png", "tokens.png", "sampling.png", "attention.png", "dropout.png"}


@pytest.fixture(scope="module")
def run(module_folder):
    """A run with dropout, for curves and attention."""
    (module_folder / "prose.txt").write_text(PROSE)
    gpt.main([*TINY, "--data", "prose.txt", "--dropout", "0.2", "--out", "run"])
    return module_folder / "run"


def test_all_are_drawn_and_not_empty(run, own_folder):
    pictures.main(["--model", str(run), "--curves", str(run), "--out", "."])
    assert {path.name for path in own_folder.glob("*.png")} == NAMES
    for name in NAMES:
        image = matplotlib.image.imread(name)
        assert image.std() > 0.05 and image.shape[1] > 600, name


def test_the_curves_are_those_of_the_log(run):
    dropout, steps, train, val = pictures.read_run(run)
    rows = gpt.load_run(run)[0]["rows"]
    assert dropout == 0.2 and steps == [0, 4, 8, 12]
    assert train[1:] == [row["train_loss"] for row in rows[1:]] and val == [row["val_loss"] for row in rows]


def test_the_notes_show_only_pictures_of_this_script_or_of_a_named_command():
    shown = set()
    for note in (ROOT / "notes").glob("*.md"):
        shown |= set(regex.findall(r"!\[[^\]]*\]\((\w+\.png)\)", note.read_text(encoding="utf-8")))
    assert shown <= NAMES | {"loss_shakespeare.png", "loss_tiny.png"}
