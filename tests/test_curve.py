import functools
import math
from pathlib import Path

import pytest
from conftest import rows_of, run_main

import gpt
from debug import curve

run = functools.partial(run_main, curve.main)
NAN = math.nan
CURVES = [  # validation losses, training losses (or the same), finding, where it begins
    ([6.0 - 0.3 * i for i in range(12)], None, "still falling", 11),
    ([6, 5, 4, 3.5, 3, 2.8, 2.9], [6, 5, 4, 3.5, 3, 2.8, 2.7], "still falling", 6),  # one worse validation
    ([6, 4, 3, 2.5, 2.3, 2.21, 2.205, 2.203, 2.202, 2.201, 2.2, 2.2], None, "plateau", 8),
    ([2.300, 2.3003, 2.2998, 2.3001, 2.2999, 2.3002, 2.2997, 2.3], None, "plateau", 5),  # noise
    ([6, 5, 4, 3.5, 3.4, 3.5, 3.7, 3.9, 4.1], [6, 5, 4, 3, 2.5, 2, 1.5, 1.2, 1], "overfitting", 4),
    ([3.0, 2.8, 2.7, 2.75, 2.9, 3.1, 3.3], [NAN, 2.9, 2.4, 2.0, 1.7, 1.4, 1.2], "overfitting", 2),
    ([6, 5, 7, 4, 3.5, 3, 2.5, 2.4, 2.35, 2.34, 2.34, 2.34], None, "too fast at the start", 2),
    ([6, 5, 4, 5, 7, 9, 9], None, "diverged", 2),
    ([10.9, 6, 4, 3.5, 7.1, 7.1, 7.1], [NAN, 8, 5, 4, 7, 7.1, 7.1], "diverged", 3),  # still below the start
    ([6, 5, NAN, 4, 3, 2], None, "diverged", 2),
    ([5.5, 30, 20, 12, 9, 7, 6.5], [NAN, 28, 22, 14, 10, 7.5, 6.6], "diverged", 0),
    ([6, 5, 4], None, "too short to tell", 2),
]


@pytest.mark.parametrize(("val", "train", "finding", "at"), CURVES)
def test_the_shape_of_a_curve_is_named(val, train, finding, at):
    best, found = curve.read_curve(rows_with(val, train or val))
    assert found[0] == (finding, at)
    assert val[best] == min(loss for loss in val if not math.isnan(loss))


def rows_with(val, train, lr=0.001, last_lr=0.001):
    rows = [{"lr": lr, "train_loss": t, "val_loss": v} for t, v in zip(train, val, strict=True)]
    rows[-1]["lr"] = last_lr
    return rows


LATE = [(0.1, 0.001, "still falling"), (0.1, 0.0, "ended by its schedule"), (1.2, 0.0, "memorizing")]


@pytest.mark.parametrize(("gap", "last_lr", "finding"), LATE)
def test_a_late_fall_is_judged_by_the_gap_and_by_the_learning_rate(gap, last_lr, finding):
    val = [6.0 - 0.2 * i for i in range(12)]
    _, found = curve.read_curve(rows_with(val, [loss - gap for loss in val], last_lr=last_lr))
    assert found == [(finding, 11)]


SHORT = "--tokenizer bytes --warmup_steps 10 --dropout 0 --max_steps 100 --eval_interval 10"
FEW = "--data few.txt --vocab_size 300 --n_layer 2 --n_embd 64 --warmup_steps 10 --eval_interval 40 --dropout 0"
REAL = [  # flags, what is found, what to change, whether it helps
    (SHORT, "ended by its schedule", "--max_steps 200", True),
    (f"{SHORT} --min_lr 1", "still falling", "--max_steps 200", True),
    (f"{FEW} --max_steps 400", "memorizing", "--max_steps 800", False),
    (f"{FEW} --max_steps 400", "memorizing", "--max_steps 800 --weight_decay 1", True),
    (f"{FEW} --max_steps 400", "memorizing", "--max_steps 1600 --dropout 0.15", True),
    (f"{SHORT} --lr 10 --grad_clip 0", "diverged, or too fast at the start", "--lr 0.01 --grad_clip 1", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "expected", "change", "helps"), REAL)
def test_the_verdicts_on_real_runs_are_right_and_their_advice_helps(flags, expected, change, helps, capsys):
    Path("few.txt").write_text("".join(gpt.load_texts(["pydoc"]))[:20_000], encoding="utf-8")
    small = "--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 16 --overwrite --out run --dtype float32"
    results = []
    for line in (flags, f"{flags} {change}"):
        gpt.main(f"{small} --weight_decay 0.1 {line}".split())
        capsys.readouterr()
        run("run", "--json")
        results.append(rows_of(capsys)[:2])
    (before, found), (after, _) = results
    assert found["finding"] in expected
    assert (after["val_loss"] < before["val_loss"] - 0.05) == helps


def test_the_log_of_a_real_run_is_read(mine, capsys):
    rows = rows_with([4.0, 3.0, 2.9, 3.2, 3.5], [4.0, 3.0, 2.0, 1.0, 0.0])
    for i, row in enumerate(rows):
        row |= {"step": 100 * i, "val_bits_per_byte": row["val_loss"] / 2}
    gpt.save_run({"rows": rows}, mine, [], Path("checkpoints/mine"))
    run("mine", "--json")
    best, found = rows_of(capsys)
    assert best["val_loss"] == 2.9 and (found["finding"], found["step"]) == ("overfitting", 200)


@pytest.mark.parametrize("log", [None, b"", b"step,lr,train_loss,val_loss,val_bits_per_byte\n1,0,x,2,3\n", b"\xff\xfe"])
def test_an_unreadable_log_is_one_line_and_status_2(mine, log, capsys):
    if log is not None:
        Path("checkpoints/mine/log.csv").write_bytes(log)
    run("mine", expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "checkpoints/mine/log.csv" in error
