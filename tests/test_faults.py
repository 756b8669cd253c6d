"""When a run is stopped, when the disk is full, when numbers go wrong: nothing is lost, and one line says why."""

import errno
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, check_files, parameters_of, published, started
from matplotlib.figure import Figure
from safetensors import SafetensorError

import convert_gpt2
import finetune
import gpt

FLAGS = [*TINY, "--data", "prose.txt", "--dropout", "0.1"]  # 12 steps, a validation every 4


@pytest.fixture
def draw_nothing(monkeypatch):
    """A picture takes longer than the tiny run that it is of."""
    monkeypatch.setattr(Figure, "savefig", lambda self, part, **_: Path(part).write_bytes(b"IEND\xaeB\x60\x82"))


def at_step(monkeypatch, step, act):
    """Call act() before the forward pass of a training step."""
    original = gpt.forward_backward

    def hooked(model, data, at, config, dtype):
        if at == step:
            act()
        return original(model, data, at, config, dtype)

    monkeypatch.setattr(gpt, "forward_backward", hooked)


def failed(capsys, main, argv):
    """Run a script's main in this process -> its one error line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1
    return errors[0]


def assert_same_weights(one, other):
    others = parameters_of(other)
    assert all(weight.equal(others[name]) for name, weight in parameters_of(one).items())


def assert_resumes_as_if_never_stopped(folder):
    gpt.main(["--resume", "--out", folder])
    gpt.main([*FLAGS, "--out", "whole"])
    assert_same_weights(folder, "whole")


# ---- Stopped ----
def interrupted_in_a_save_that_takes_a_minute(argv):
    save_file = gpt.save_file

    def slow(tensors, path, metadata):
        if path.name == gpt.STATE and '"step": 7' in metadata["metadata"]:
            path.write_bytes(b"half")
            Path("saving").touch()
            time.sleep(60)
        save_file(tensors, path, metadata)

    gpt.save_file = slow
    at_step(pytest.MonkeyPatch(), 6, lambda: os.kill(os.getpid(), signal.SIGINT))
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


@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_breaks_off_a_validation_and_nothing_is_missing_afterwards(prose, draw_nothing, step, monkeypatch):
    evaluate = gpt.evaluate
    validations = itertools.count(0, 4)

    def interrupted(*arguments):
        if next(validations) == step:
            os.kill(os.getpid(), signal.SIGINT)
            assert evaluate(*arguments) is None, "the validation went on"
            return None
        return evaluate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(gpt, "evaluate", interrupted)
        with pytest.raises(SystemExit) as end:
            gpt.main([*FLAGS, "--out", "here"])
    assert end.value.code == 128 + signal.SIGINT
    if step == 0:
        assert not Path("here/config.json").exists()
    else:
        run = gpt.load_run("here")[0]
        assert run["step"] == step and run["rows"][-1]["step"] == step - 4
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
            check_files(Path(output))
            assert not any(path.read_bytes() == b"half" for path in Path(output).rglob("*") if path.is_file())
        main(argv if name == "gpt" else [*argv, "--overwrite"])
        assert all(weight.equal(weights[key]) for key, weight in parameters_of(outputs[0]).items()), full_at


def limit_file_sizes():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def move_away():
    Path("here").rename("there")


def with_misfortune(argv):
    act, *argv = argv
    at_step(pytest.MonkeyPatch(), 6, act)
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


# ---- Numbers that go wrong ----
@pytest.mark.parametrize(
    ("what", "value"),
    [("loss", math.inf), ("weights", math.nan), ("norm of the gradient", math.nan), ("validation loss", math.inf)],
)
def test_a_number_that_is_not_finite_stops_the_run_and_is_never_saved(
    prose, draw_nothing, what, value, monkeypatch, capsys
):
    forward_backward, evaluate = gpt.forward_backward, gpt.evaluate
    validations = itertools.count(0, 4)

    def poisoned(model, data, step, config, dtype):
        if step == 6 and what == "weights":
            next(model.parameters()).data[:] = value
        loss, tokens = forward_backward(model, data, step, config, dtype)
        if step == 6 and what == "norm of the gradient":
            next(model.parameters()).grad[0, 0] = value
        return value if step == 6 and what == "loss" else loss, tokens

    def misjudged(*arguments):
        wrong = {"loss": value} if what == "validation loss" and next(validations) == 8 else {}
        return evaluate(*arguments) | wrong

    monkeypatch.setattr(gpt, "forward_backward", poisoned)
    monkeypatch.setattr(gpt, "evaluate", misjudged)
    error = failed(capsys, gpt.main, [*FLAGS, "--out", "here"])
    named, step = ("loss" if what == "weights" else what), (8 if what == "validation loss" else 6)
    assert f"the {named} is " in error and f"at step {step}" in error
    check_files(Path("here"))  # all weights are finite
    run, tensors, best = gpt.load_run("here")
    assert run["step"] == best["step"] == 4 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_that_no_loss_has_seen_yet_are_not_saved_either(prose, draw_nothing, monkeypatch, capsys):
    """The update after which Ctrl-C is heard makes them NaN, so that no other step follows."""
    step, calls = gpt.Muon.step, itertools.count(1)

    def spoiling(optimizer):
        step(optimizer)
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            optimizer.param_groups[0]["params"][0].data[0, 0] = math.nan

    monkeypatch.setattr(gpt.Muon, "step", spoiling)
    assert "not finite" in failed(capsys, gpt.main, [*FLAGS, "--out", "here"])
    check_files(Path("here"))
    assert gpt.load_run("here")[0]["step"] == 4


# ---- The same again, and for a long time ----
def test_the_same_seed_gives_the_same_weights_in_another_process(prose, draw_nothing):
    process = started([*FLAGS, "--out", "one"])
    process.join(60)
    gpt.main([*FLAGS, "--out", "two"])
    assert_same_weights("one", "two")
    gpt.main([*FLAGS, "--out", "other", "--seed", "1"])
    name = "transformer.wte.weight"
    assert not parameters_of("other")[name].equal(parameters_of("one")[name])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(prose, draw_nothing, monkeypatch):
    """After a beginning in which caches fill: 28 saves keep no more than 3 MB."""
    resident = {}
    for step in (60, 199):
        at_step(monkeypatch, step, lambda step=step: resident.update({step: psutil.Process().memory_info().rss}))
    gpt.main([*FLAGS, "--out", "here", "--max_steps", "200", "--eval_interval", "5"])
    assert resident[199] - resident[60] < 3 * 2**20
