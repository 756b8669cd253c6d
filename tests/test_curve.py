import functools
import math
from pathlib import Path

import pytest
from conftest import TINY, rows_of, run_main

import gpt
from debug import curve

run = functools.partial(run_main, curve.main)


def log(val, train=None):
    """A folder with a training log of these losses, a hundred steps apart."""
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    train = train or val
    lines = [f"{100 * i},{i},1.0,0.001,{t},{v},{v / 2},1.0" for i, (t, v) in enumerate(zip(train, val, strict=True))]
    (folder / "log.csv").write_text(
        "\n".join(["step,tokens,seconds,lr,train_loss,val_loss,val_bits_per_byte,grad_norm", *lines]) + "\n"
    )
    return folder


FALLING = [6.0 - 0.3 * i for i in range(12)]
CURVES = {
    "still falling": (FALLING, None, 1100),
    "plateau": ([6, 4, 3, 2.5, 2.3, 2.21, 2.205, 2.203, 2.202, 2.201, 2.2, 2.2], None, 800),
    "overfitting": ([6, 5, 4, 3.5, 3.4, 3.5, 3.7, 3.9, 4.1], [6, 5, 4, 3, 2.5, 2, 1.5, 1.2, 1], 400),
    "too fast at the start": ([6, 5, 7, 4, 3.5, 3, 2.5, 2.4, 2.35, 2.34, 2.34, 2.34], None, 200),
    "diverged": ([6, 5, 4, 5, 7, 9, 9], None, 200),
    "too short to tell": ([6, 5, 4], None, 200),
}


@pytest.mark.parametrize("what", CURVES)
def test_what_a_curve_shows_is_said_in_words_and_drawn(own_folder, what, capsys):
    val, train, step = CURVES[what]
    folder = log(val, train)
    run(folder, "--json")
    (found,) = rows_of(capsys)
    assert found["found"][0]["what"] == what and found["found"][0]["step"] == step
    assert found["best"]["val_loss"] == min(val)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    run(folder)
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith(f"{what}: ") and f"validation loss {min(val):.4f}" in out


MORE_CURVES = [  # validation, training, what it shows, from which step on
    (
        [6, 5, 4, 3.5, 3, 2.8, 2.9],
        [6, 5, 4, 3.5, 3, 2.8, 2.7],
        "still falling",
        600,
    ),  # one worse validation is no overfitting
    (
        [3.0, 2.8, 2.7, 2.75, 2.9, 3.1, 3.3],
        [math.nan, 2.9, 2.4, 2.0, 1.7, 1.4, 1.2],
        "overfitting",
        200,
    ),  # beyond where it began
    ([2.0, 2.2, 2.4, 2.6, 2.9], [math.nan, 1.9, 1.5, 1.2, 1.0], "overfitting", 0),
    (
        [10.9, 6, 4, 3.5, 7.4, 7.3, 7.2, 7.1, 7.0],
        [math.nan, 8, 5, 4, 7, 7.4, 7.3, 7.2, 7.1],
        "diverged",
        300,
    ),  # still below the start
    ([10.9, 6, 4, 3.5, 7.1, 7.1, 7.1, 7.1, 7.1], [math.nan, 8, 5, 4, 7, 7.1, 7.1, 7.1, 7.1], "diverged", 300),
    ([2.300, 2.3003, 2.2998, 2.3001, 2.2999, 2.3002, 2.2997, 2.3], None, "plateau", 500),  # noise
    ([math.nan, 5, 4, 3, 2], None, "diverged", 0),
]


@pytest.mark.parametrize(("val", "train", "what", "step"), MORE_CURVES)
def test_curves_that_could_be_mistaken(own_folder, capsys, val, train, what, step):
    run(log(val, train), "--json")
    found = rows_of(capsys)[0]
    assert [(one["what"], one["step"]) for one in found["found"]] == [(what, step)]
    assert found["best"]["val_loss"] == min(loss for loss in val if not math.isnan(loss))


def test_without_a_place_for_the_picture_the_words_still_come(own_folder, capsys):
    (log(FALLING) / "curve.png").mkdir()
    run("run", expect=2)
    out, err = capsys.readouterr()
    assert "still falling: " in out and err.startswith("error: ") and err.count("\n") == 1


def test_a_loss_that_is_no_number_is_a_divergence(own_folder, capsys):
    run(log([6, 5, math.nan, 4, 3, 2]), "--json")
    (found,) = rows_of(capsys)
    assert (
        found["found"][0]["what"] == "diverged" and found["found"][0]["step"] == 200 and found["best"]["val_loss"] == 2
    )


def test_the_log_of_a_real_run_is_read(words, capsys):
    gpt.main([*TINY, "--data", "words.txt", "--out", "here"])
    capsys.readouterr()
    run("here")
    assert "best at step" in capsys.readouterr().out


def test_a_name_is_looked_up_under_checkpoints(own_folder, capsys):
    Path("checkpoints").mkdir()
    log(FALLING).rename("checkpoints/scratch")
    for argv in ([], ["scratch"], ["checkpoints/scratch"]):
        run(*argv, "--json")
        assert rows_of(capsys)[0]["folder"] == "checkpoints/scratch"


LOGS = {
    "nothing": (None, "there is no run/log.csv"),
    "empty": ("", "line 1, is not that of a training log"),
    "other columns": ("a,b\n1,2\n", "line 1, is not that of a training log"),
    "words": (
        "step,train_loss,val_loss,val_bits_per_byte\n0,1,2,3\n1,x,2,3\n",
        "line 3, is not that of a training log",
    ),
    "half a line": ("step,train_loss,val_loss,val_bits_per_byte\n0,1\n", "line 2, is not that of a training log"),
    "bytes": (b"\xff\xfe\x00", "run/log.csv is not UTF-8 text"),
}


@pytest.mark.parametrize("case", LOGS)
def test_an_unreadable_log_is_one_line_and_status_2(own_folder, case, capsys):
    content, message = LOGS[case]
    Path("run").mkdir()
    if content is not None:
        Path("run/log.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    run("run", expect=2)
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and message in error
        and not Path("run/curve.png").exists()
    )
