"""The pictures of the notes are drawn, and say what they should."""

import matplotlib.image
import pytest
import regex
import torch
from conftest import ROOT, TINY

import gpt
from notes import pictures

NAMES = {"mask.png", "schedule.png", "tokens.png", "sampling.png", "attention.png", "dropout.png"}


@pytest.fixture
def trained(prose):
    for name, dropout in (("with", "0.2"), ("without", "0")):
        gpt.main([*TINY, "--data", str(prose), "--dropout", dropout, "--out", name])


def test_all_are_drawn_and_not_empty(trained, own_folder):
    pictures.main(["--model", "with", "--curves", "with", "without", "--out", "."])
    for name in NAMES:
        image = matplotlib.image.imread(name)
        assert image.std() > 0.05 and image.shape[1] > 600 and (own_folder / name).stat().st_size < 100_000, name
    assert {path.name for path in own_folder.glob("*.png")} == NAMES


def test_the_curves_are_those_of_the_log(trained, own_folder):
    dropout, steps, train, val = pictures.read_run(own_folder / "with")
    rows = gpt.load_run("with")[0]["rows"]
    assert (
        dropout == 0.2
        and steps == [0, 4, 8, 12]
        and val == [row["val_loss"] for row in rows]
        and train[1:] == [row["train_loss"] for row in rows][1:]
    )


def test_the_mask_is_that_of_attention():
    """What a query sees, by the gradient of what it gives."""
    for T, S in ((8, 8), (3, 8)):
        v = torch.randn(1, 1, S, 4, requires_grad=True)
        gpt.attention(torch.randn(1, 1, T, 4), torch.randn(1, 1, S, 4), v)[0, 0, 0].sum().backward()
        assert (
            (v.grad[0, 0].abs().sum(1) > 0).tolist()
            == [s <= S - T for s in range(S)]
            == (torch.ones(T, S).tril(S - T)[0] > 0).tolist()
        )


def test_the_pictures_in_the_notes_are_drawn_by_this_script_or_by_a_named_command():
    shown = set()
    for note in (ROOT / "notes").glob("*.md"):
        shown |= set(regex.findall(r"!\[[^\]]*\]\((\w+\.png)\)", note.read_text(encoding="utf-8")))
    assert shown <= NAMES | {"scaling.png", "bench.png", "loss_shakespeare.png"}
