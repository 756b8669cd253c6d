"""When a run is stopped or killed, or the disk is full, nothing is lost, and one line says why."""

import csv
import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, after_backward, parameters_of, published, run_main, started
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

import convert_gpt2
import finetune
import gpt

FLAGS = [*TINY, "--data", "prose.txt", "--dropout", "0.1", "--grad_accum", "2"]  # 12 steps, a validation every 4


@pytest.fixture
def draw_nothing(monkeypatch):
    """A picture takes longer than the tiny run that it is of."""
    monkeypatch.setattr(Figure, "savefig", lambda self, part, **_: Path(part).write_bytes(b"IEND\xaeB\x60\x82"))


def failed(capsys, main, argv):
    """Run a script's main in this process -> its one error line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1
    return errors[0]


def check_files(folder, interval=4):
    """Every file that has its final name is whole."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(path.open()))
            assert [int(row["step"]) for row in rows] == list(range(0, interval * len(rows), interval))
            assert None not in rows[-1].values()
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB\x60\x82")


def result_of(folder):
    """Everything that a run ends with, except the seconds it took -> log, tensors."""
    run, tensors, best = gpt.load_run(folder)
    rows = [row | {"seconds": 0} for row in run["rows"]]
    facts = json.dumps([run["step"], run["tokens"], rows, best["validation"]])  # text, as NaN differs from itself
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
def test_a_run_killed_at_a_random_moment_resumes_as_if_never_stopped(prose, draw_nothing, kills):
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
    ("number", "during", "call", "steps"),
    [
        (signal.SIGINT, "forward_backward", 5, 6),
        (signal.SIGTERM, "forward_backward", 5, 6),
        (signal.SIGINT, "evaluate", 1, 4),  # a validation breaks off
    ],
)
def test_a_signal_stops_a_run_that_resumes_bit_for_bit(prose, monkeypatch, capsys, number, during, call, steps):
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
    assert gpt.load_run("here")[0]["step"] == steps and Path("here/loss.png").exists()
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


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint(prose, draw_nothing):
    process = started([*FLAGS, "--out", "here"], interrupted_in_a_save_that_takes_a_minute)
    while not Path("saving").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    check_files(Path("here"))
    assert gpt.load_run("here")[0]["step"] == 4
    assert_resumes_as_if_never_stopped("here")


@pytest.mark.slow
def test_ctrl_c_reaches_two_processes_twice_and_both_save_first(prose):
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
    check_files(Path("here"))


# ---- Writes that fail ----
class Disk:
    """Counts everything that writes; call number `full_at` finds the disk full, in the middle of a file."""

    def __init__(self, monkeypatch, full_at=math.inf):
        self.calls, self.full_at = 0, full_at
        for owner, name in [(Path, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "write_bytes"),
                            (Path, "write_text"), (gpt, "save_file"), (Figure, "savefig")]:  # fmt: skip
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, original, name):
        def call(*args, **options):
            self.calls += 1
            if self.calls != self.full_at:
                return original(*args, **options)
            part = args[0] if name.startswith("write_") else args[1] if name in ("save_file", "savefig") else None
            if part:
                with open(part, "wb") as file:
                    file.write(b"half")
            if name == "save_file":  # how safetensors reports it
                raise SafetensorError("Error while serializing: No space left on device")
            raise OSError(errno.ENOSPC, "No space left on device")

        return call


SCRIPTS = {
    "gpt": (gpt.main, ["--resume", "--out", "part", "--max_steps", "8"], ["part"]),
    "convert": (convert_gpt2.main, ["hf", "--out", "converted"], ["converted"]),
    "finetune": (
        finetune.main,
        ["--model", "part", "--data", "prose.txt", "--max_steps", "1", "--batch_size", "2"]
        + ["--out", "tuned", "--method", "lora", "--save_adapter", "adapter"],
        ["tuned", "adapter"],
    ),
}


@pytest.mark.parametrize(
    ("name", "every"), [("gpt", 9), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in SCRIPTS)]
)
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(
    prose, draw_nothing, name, every, monkeypatch, capsys
):
    """Every write of a script fails once (in the fast test, every ninth)."""
    main, argv, outputs = SCRIPTS[name]
    gpt.main([*FLAGS, "--out", "part", "--max_steps", "4"])
    if name == "convert":
        published("hf")
    shutil.copytree(".", "before")
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        main(argv)
    weights = parameters_of(outputs[0])
    assert disk.calls > 10
    for full_at in range(1, disk.calls + 1, every):
        for output in outputs:
            shutil.rmtree(output)
            if Path("before", output).exists():
                shutil.copytree(Path("before", output), output)
        with monkeypatch.context() as patched:
            Disk(patched, full_at)
            assert "No space left on device" in failed(capsys, main, argv), full_at
        for output in outputs:
            Path(output).mkdir(exist_ok=True)
            check_files(Path(output), interval=1 if name == "finetune" else 4)
            assert not any(path.read_bytes() == b"half" for path in Path(output).rglob("*") if path.is_file())
        main(argv if name == "gpt" else [*argv, "--overwrite"])
        assert all(weight.equal(weights[key]) for key, weight in parameters_of(outputs[0]).items()), full_at


def limit_file_sizes():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def move_away():
    Path("here").rename("there")


def with_misfortune(argv):
    act, *argv = argv
    after_backward(pytest.MonkeyPatch(), lambda model, step: act() if step == 6 else None)
    sys.stderr = open("errors.txt", "w", buffering=1)  # noqa: SIM115  (until the process ends)
    gpt.main(argv)


@pytest.mark.parametrize("act", [limit_file_sizes, move_away])
def test_a_folder_that_cannot_be_written_any_more_keeps_the_last_checkpoint(prose, draw_nothing, act):
    """No mock: the kernel refuses, in a process of its own."""
    process = started([act, *FLAGS, "--out", "here"], with_misfortune)
    process.join(60)
    error = Path("errors.txt").read_text().splitlines()[-1]
    assert process.exitcode == 2 and error.startswith("error: here/") and "could not be written" in error
    folder = "there" if act is move_away else "here"
    assert gpt.load_run(folder)[0]["step"] == 4
    check_files(Path(folder))
    assert_resumes_as_if_never_stopped(folder)
