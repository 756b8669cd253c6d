"""When a run is stopped or killed, or the disk is full, nothing is lost, and one line says why."""

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, after_backward, parameters_of, run_main, started
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

import gpt

FLAGS = [*TINY, "--data", "prose.txt", "--dropout", "0.1"]  # 12 steps, a validation every 4


@pytest.fixture(autouse=True)
def draw_nothing(prose, monkeypatch):
    """A picture takes longer than the tiny run that it is of."""
    monkeypatch.setattr(Figure, "savefig", lambda self, part, **_: Path(part).write_bytes(b"IEND\xaeB\x60\x82"))


def check_files(folder):
    """Every file that has its final name is whole."""
    for path in Path(folder).glob("[!.]*.*"):
        if path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = [line.split(",") for line in path.read_text().splitlines()]
            assert len(rows) > 1 and all(len(row) == len(rows[0]) for row in rows)
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB\x60\x82")


def result_of(folder):
    """Everything that a run ends with, except the seconds it took -> facts, tensors."""
    run, tensors, best = gpt.load_run(folder)
    lines = [line.split(",") for line in Path(folder, "log.csv").read_text().splitlines()]
    rows = [line[:2] + line[3:] for line in lines]
    facts = [run["step"], run["tokens"], best["step"], best["validation"], rows]
    return facts, tensors | {f"best {name}": weight for name, weight in parameters_of(folder).items()}


def assert_resumes_as_if_never_stopped(folder, flags=FLAGS):
    begun = Path(folder, gpt.STATE).exists()
    gpt.main([*(["--resume"] if begun else [*flags, "--overwrite"]), "--out", str(folder)])
    if not Path("whole").exists():
        gpt.main([*flags, "--out", "whole"])
    (facts, tensors), (expected, whole) = result_of(folder), result_of("whole")
    assert facts == expected and tensors.keys() == whole.keys() and not list(Path(folder).glob(".*.part"))
    assert all(tensor.equal(whole[name]) for name, tensor in tensors.items())


# ---- Killed ----
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_random_moment_resumes_as_if_never_stopped(kills):
    flags = [*FLAGS, "--max_steps", "40"]
    gpt.main([*flags, "--out", "whole"])
    chance = random.Random(kills)
    for i in range(kills):
        folder = Path(f"run{i}")
        process = started([*flags, "--out", str(folder)])
        while not folder.exists():
            time.sleep(0.01)
        process.join(chance.uniform(0, gpt.load_run("whole")[0]["seconds"]))
        process.kill()
        process.join()
        check_files(folder)
        assert_resumes_as_if_never_stopped(folder, flags)


# ---- Stopped ----
@pytest.mark.parametrize(
    ("number", "during", "call", "step", "validated"),
    [
        (signal.SIGINT, "forward_backward", 5, 6, 4),
        (signal.SIGTERM, "forward_backward", 5, 6, 4),
        (signal.SIGINT, "evaluate", 1, 4, 0),  # a validation breaks off
    ],
)
def test_a_signal_stops_a_run_that_resumes_bit_for_bit(monkeypatch, capsys, number, during, call, step, validated):
    original, calls = getattr(gpt, during), itertools.count()

    def interrupted(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(gpt, during, interrupted)
        run_main(gpt.main, *FLAGS, "--out", "here", expect=128 + number)
    assert signal.getsignal(number) == before and "--resume --out here" in capsys.readouterr().err
    run = gpt.load_run("here")[0]
    assert run["step"] == step and run["rows"][-1]["step"] == validated and Path("here/loss.png").exists()
    torch.manual_seed(99)
    assert_resumes_as_if_never_stopped("here")


def interrupted_in_a_save_that_takes_a_minute(argv):
    save_file = gpt.save_file

    def slow(tensors, path, metadata):
        if path.name == gpt.STATE and '"step": 7' in metadata["metadata"]:
            path.write_bytes(b"half")
            Path("saving").touch()
            time.sleep(60)
        save_file(tensors, path, metadata)

    gpt.save_file = slow
    after_backward(pytest.MonkeyPatch(), lambda model, step: os.kill(os.getpid(), signal.SIGINT) if step == 6 else None)
    gpt.main(argv)


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint():
    process = started([*FLAGS, "--out", "here"], interrupted_in_a_save_that_takes_a_minute)
    while not Path("saving").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    check_files("here")
    assert gpt.load_run("here")[0]["step"] == 4
    assert_resumes_as_if_never_stopped("here")


@pytest.mark.slow
def test_ctrl_c_reaches_two_processes_twice_and_both_save_first():
    """A terminal signals the whole group; torchrun then signals its workers once more."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "gpt.py"), *FLAGS, "--max_steps", "1000000", "--optimizer", "adamw"]
    process = subprocess.Popen(
        [*command, "--out", "here"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not Path("here", gpt.STATE).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("stopped at step") == 1
    saved = int(err.split("stopped at step ")[1].split(";")[0].replace(",", ""))
    assert gpt.load_run("here")[0]["step"] == saved


# ---- Writes that fail ----
WRITES = {"replace": Path, "fsync": os, "mkdir": Path, "write_text": Path, "save_file": gpt, "savefig": Figure}


class Disk:
    """Counts everything that writes; call number `full_at` finds the disk full, in the middle of a file."""

    def __init__(self, monkeypatch, full_at=math.inf):
        self.calls, self.full_at = 0, full_at
        for name, owner in WRITES.items():
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, original, name):
        def call(*args, **options):
            self.calls += 1
            if self.calls != self.full_at:
                return original(*args, **options)
            if name in ("write_text", "save_file", "savefig"):
                with open(args[0 if name == "write_text" else 1], "wb") as file:
                    file.write(b"half")
            if name == "save_file":  # how safetensors reports it
                raise SafetensorError("Error while serializing: No space left on device")
            raise OSError(errno.ENOSPC, "No space left on device")

        return call


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(own_folder, every, monkeypatch, capsys):
    """Every write of a run fails once (in the fast test, every ninth)."""
    flags = ["--resume", "--out", "part", "--max_steps", "8"]
    gpt.main([*FLAGS, "--out", "part", "--max_steps", "4"])
    shutil.copytree(".", "before")
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        gpt.main(flags)
    weights = parameters_of("part")
    assert disk.calls > 10
    for full_at in range(1, disk.calls + 1, every):
        monkeypatch.chdir(shutil.copytree(own_folder / "before", own_folder / f"full{full_at}"))
        with monkeypatch.context() as patched:
            Disk(patched, full_at)
            run_main(gpt.main, *flags, expect=2)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "No space left on device" in errors[0], full_at
        check_files("part")
        assert not any(path.read_bytes() == b"half" for path in Path().rglob("*") if path.is_file())
        gpt.main(flags)
        assert all(weight.equal(weights[key]) for key, weight in parameters_of("part").items()), full_at


def test_a_folder_that_cannot_be_written_any_more_keeps_the_last_checkpoint(monkeypatch, capsys):
    def move(model, step):
        if step == 6:
            Path("here").rename("there")

    with monkeypatch.context() as patched:
        after_backward(patched, move)
        run_main(gpt.main, *FLAGS, "--out", "here", expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: here/") and "could not be written" in error
    assert gpt.load_run("there")[0]["step"] == 4
    check_files("there")
    assert_resumes_as_if_never_stopped("there")
