"""When a process is stopped or killed, when the disk is full, when numbers go wrong: nothing is lost, and one line says why."""

import ctypes
import errno
import itertools
import math
import multiprocessing
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
import torch
from conftest import ROOT, TINY, check_files, parameters_of, published, script
from matplotlib.figure import Figure
from safetensors import SafetensorError

import convert_gpt2
import finetune
import gpt
import sample

FLAGS = [*TINY, "--data", "prose.txt", "--dropout", "0.1"]  # 12 steps, a validation every 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "gpt.py")]


@pytest.fixture
def runs(prose):
    """`whole`, which nothing disturbed, and `part`, which ended after step 4."""
    gpt.main([*FLAGS, "--out", "whole"])
    gpt.main([*FLAGS, "--out", "part", "--max_steps", "4", "--lr", "1e-3"])


def failed(capsys, argv):
    """Run gpt.py in this process -> its one error line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        gpt.main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


def same_weights(one, other):
    assert all(torch.equal(weight, parameters_of(other)[name]) for name, weight in parameters_of(one).items())


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and killed

SLOW_TO_SAVE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import gpt

forward_backward, save_file = gpt.forward_backward, gpt.save_file

def interrupted(model, data, step, config, dtype):
    if step == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return forward_backward(model, data, step, config, dtype)

def slow(tensors, path, metadata):
    if path.name == gpt.STATE and '"step": 7' in metadata["metadata"]:
        path.write_bytes(b"half")
        print("saving", flush=True)
        time.sleep(60)
    save_file(tensors, path, metadata)

gpt.forward_backward, gpt.save_file = interrupted, slow
gpt.main()
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint(prose, second):
    command = [sys.executable, "-c", SLOW_TO_SAVE, str(ROOT), *FLAGS, "--out", "here"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "saving\n"
        began = time.monotonic()
        process.send_signal(second)
        assert process.wait(30) == 128 + second and time.monotonic() - began < 20  # the save alone would take sixty
    check_files(Path("here"))
    assert gpt.load_run("here")[0]["step"] == 4 and Path(f"here/.{gpt.STATE}.part").exists()
    gpt.main(["--resume", "--out", "here"])
    gpt.main([*FLAGS, "--out", "whole"])
    same_weights("here", "whole")


@pytest.mark.parametrize("step", [0, 4, 12])
def test_a_signal_breaks_off_a_validation_and_nothing_is_missing_afterwards(runs, step, monkeypatch, capsys):
    batch, pressed = gpt.TokenDataset.batch, []

    def in_the_middle(data, windows):
        steps = (
            gpt.load_run("here")[0]["rows"][-1]["step"] + 4 if Path("here/training_state.safetensors").exists() else 0
        )
        if len(data) < 100 and windows[0] > 0 and steps == step and not pressed:  # the validation's second batch
            pressed.append(steps)
            os.kill(os.getpid(), signal.SIGINT)
        assert not pressed or windows[0] <= 4, "it went on"
        return batch(data, windows)

    with monkeypatch.context() as patched:
        patched.setattr(gpt.TokenDataset, "batch", in_the_middle)
        with pytest.raises(SystemExit) as end:
            gpt.main([*FLAGS, "--out", "here"])
    assert end.value.code == 130 and pressed == [step]
    if step == 0:
        assert "nothing was saved" in capsys.readouterr().err and not Path("here/config.json").exists()
        return
    check_files(Path("here"))
    assert gpt.load_run("here")[0]["step"] == step and gpt.load_run("here")[0]["rows"][-1]["step"] == step - 4
    gpt.main(["--resume", "--out", "here"])
    same_weights("here", "whole")
    assert len(Path("here/log.csv").read_text().splitlines()) == 5


def under_torchrun(out, until):
    """Start a long run of two processes -> torchrun, and its workers, as soon as `until` lines are in the log."""
    flags = [*FLAGS, "--out", out, "--max_steps", "1000000", "--optimizer", "adamw"]
    process = subprocess.Popen(
        [*TORCHRUN, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not Path(out, "log.csv").exists() or len(Path(out, "log.csv").read_text().splitlines()) < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children()


def test_ctrl_c_reaches_two_processes_twice_and_both_save_first(prose):
    """A terminal signals the whole group; torchrun then signals its workers once more."""
    process, _ = under_torchrun("here", 3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("stopped at step") == 1
    saved = int(err.split("stopped at step ")[1].split(";")[0].replace(",", ""))
    assert gpt.load_run("here")[0]["step"] == saved
    check_files(Path("here"))


# ---------------------------------------------------------------------------------------------------------------------
# Writes that fail


class Disk:
    """All that writes files, counted; call number `full_at` finds the disk full, in the middle of a file where it writes one."""

    def __init__(self, monkeypatch, full_at=math.inf):
        self.calls, self.full_at = 0, full_at
        for place, name in [(Path, "replace"), (os, "fsync"), (Path, "chmod"), (Path, "mkdir"), (Path, "write_bytes"),
                            (Path, "write_text"), (gpt, "save_file"), (Figure, "savefig")]:  # fmt: skip
            monkeypatch.setattr(place, name, self.watched(getattr(place, name), name))
        monkeypatch.setattr(
            gpt, "open", lambda *args: (watched if set("wa+") & set(args[1]) else open)(*args), raising=False
        )
        watched = self.watched(open, "open")

    def watched(self, original, name):
        def call(*args, **options):
            self.calls += 1
            if self.calls != self.full_at:
                return original(*args, **options)
            part = args[0] if name.startswith("write_") else args[1] if name in ("save_file", "savefig") else None
            if part:
                with open(part, "wb") as file:
                    file.write(b"half")
            if name == "save_file":  # this is what it makes of it
                raise SafetensorError("Error while serializing: No space left on device")
            raise OSError(errno.ENOSPC, "No space left on device")

        return call


def test_a_disk_that_is_full_at_any_write_leaves_what_was_there(runs, monkeypatch, capsys):
    argv = ["--resume", "--out", "here", "--max_steps", "8", "--lr", "4e-3"]
    monkeypatch.setattr(
        Figure, "savefig", lambda self, part, **_: Path(part).write_bytes(b"IEND\xaeB\x60\x82")
    )  # drawing takes long
    shutil.copytree("part", "here")
    with monkeypatch.context() as patched:
        writes = Disk(patched)
        gpt.main(argv)
    whole = parameters_of("here")
    assert writes.calls > 20  # two saves of five files, and a picture
    for full_at in range(1, writes.calls + 1):
        shutil.rmtree("here")
        shutil.copytree("part", "here")
        shutil.rmtree(".cache", ignore_errors=True)
        with monkeypatch.context() as patched:
            Disk(patched, full_at)
            error = failed(capsys, argv)
        assert "No space left on device" in error, (full_at, error)
        check_files(Path("here"))
        gpt.load_checkpoint("here")
        assert gpt.load_run("here")[0]["step"] in (4, 8) and not list(Path("here").glob(".*.part"))
        gpt.main(argv)
        assert all(torch.equal(weight, whole[name]) for name, weight in parameters_of("here").items()), full_at


def test_a_file_that_the_system_cuts_short_is_an_error_and_the_old_one_stays(runs):
    """Not injected: the kernel refuses to let any file grow beyond 50 kB."""
    before = Path("part", gpt.STATE).read_bytes()
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    done = script("gpt.py", "--resume", "--out", "part", "--max_steps", "8", **limit)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and error.startswith("error: ") and "could not be written" in error, done.stderr
    assert before == Path("part", gpt.STATE).read_bytes() and not list(Path("part").glob(".*.part"))
    gpt.load_checkpoint("part")
    gpt.main(["--resume", "--out", "part", "--max_steps", "8"])


def without_privileges():
    """From here on, permissions bind root too: it gives up CAP_DAC_OVERRIDE, capability number 1."""
    if os.geteuid() == 0:
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << 1)
        assert libc.capset(header, sets) == 0


def losing_permission(folder, argv, lose_at, status):
    """gpt.py in a folder that turns read-only at a step; its exit status goes to `status`."""
    os.chdir(folder)
    without_privileges()
    forward_backward = gpt.forward_backward

    def losing(model, data, step, config, dtype):
        if step == lose_at:
            os.chmod("here", 0o500)
        return forward_backward(model, data, step, config, dtype)

    gpt.forward_backward = losing
    sys.stderr = open("err.txt", "w", buffering=1)  # noqa: SIM115  (until the process ends)
    try:
        gpt.main(argv)
    except SystemExit as end:
        status.value = end.code


@pytest.mark.parametrize("lose_at", [0, 6])
def test_a_folder_that_is_read_only_or_becomes_so_is_an_error(prose, lose_at):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt", "matplotlib.figure"])
    status = context.Value("i", -1)
    Path("sealed").mkdir(mode=0o500)
    out = "here" if lose_at else "sealed/here"
    process = context.Process(target=losing_permission, args=(Path.cwd(), [*FLAGS, "--out", out], lose_at, status))
    process.start()
    process.join(120)
    error = Path("err.txt").read_text().splitlines()[-1]
    assert status.value == 2 and error.startswith("error: ") and "Permission denied" in error, error
    if lose_at:
        Path("here").chmod(0o700)
        assert "could not be written" in error and gpt.load_run("here")[0]["step"] == 4
        check_files(Path("here"))


def test_a_folder_that_vanishes_is_an_error_and_where_it_went_the_run_goes_on(runs, monkeypatch, capsys):
    forward_backward = gpt.forward_backward

    def losing(model, data, step, config, dtype):
        if step == 6 and Path("here").exists():
            Path("here").rename("there")
        return forward_backward(model, data, step, config, dtype)

    monkeypatch.setattr(gpt, "forward_backward", losing)
    error = failed(capsys, [*FLAGS, "--out", "here"])
    assert "could not be written" in error and "No such file" in error and not Path("here").exists()
    check_files(Path("there"))
    gpt.main(["--resume", "--out", "there"])
    same_weights("there", "whole")


def in_a_full_disk(monkeypatch, capsys, main, argv, *made):
    """At each of its writes in turn the script fails with one line, and leaves nothing that is half there or in its way."""
    shutil.rmtree(".cache", ignore_errors=True)
    with monkeypatch.context() as patched:
        writes = Disk(patched)
        main(argv)
    for full_at in range(1, writes.calls + 1):
        for path in (*made, ".cache"):
            shutil.rmtree(path, ignore_errors=True)
        with monkeypatch.context() as patched:
            Disk(patched, full_at)
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main(argv)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and len(errors) == 1 and "No space left on device" in errors[0], (full_at, errors)
        for path in made:
            assert not list(Path(path).rglob("*.part")) and all(
                file.read_bytes() != b"half" for file in Path(path).rglob("*") if file.is_file()
            )
    main([*argv, "--overwrite"])


def test_converting_and_adapting_on_a_full_disk_leave_nothing_half_done(runs, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda self, part, **_: Path(part).write_bytes(b"IEND\xaeB\x60\x82"))
    published("hf")
    in_a_full_disk(monkeypatch, capsys, convert_gpt2.main, ["hf", "--out", "converted"], "converted")
    argv = [
        "--model",
        "part",
        "--data",
        "prose.txt",
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--out",
        "tuned",
        "--save_adapter",
        "adapter",
    ]
    in_a_full_disk(monkeypatch, capsys, finetune.main, argv, "tuned", "adapter")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "weights", "validation"])
def test_a_number_that_goes_wrong_stops_the_run_at_its_step_and_poisons_nothing(
    prose, where, value, monkeypatch, capsys
):
    gradients, evaluate = gpt.forward_backward, gpt.evaluate

    def poisoned(model, data, step, config, dtype):
        if step == 6 and where == "weights":
            next(model.parameters()).data[:] = value
        loss, tokens = gradients(model, data, step, config, dtype)
        if step == 6 and where == "gradient":
            next(model.parameters()).grad[0, 0] = value
        return value if step == 6 and where == "loss" else loss, tokens

    def misjudged(model, *rest):
        figures = evaluate(model, *rest)
        return figures | {"loss": value} if where == "validation" and gpt.load_run("here")[0]["step"] == 4 else figures

    monkeypatch.setattr(gpt, "forward_backward", poisoned)
    if where == "validation":
        gpt.main([*FLAGS, "--out", "here", "--max_steps", "4"])
        monkeypatch.setattr(gpt, "evaluate", misjudged)
        error = failed(capsys, ["--resume", "--out", "here", "--max_steps", "12"])
    else:
        error = failed(capsys, [*FLAGS, "--out", "here"])
    what = {"loss": "loss", "weights": "loss", "gradient": "norm of the gradient", "validation": "validation loss"}[
        where
    ]
    assert (
        f"the {what} is " in error
        and f"at step {8 if where == 'validation' else 6}" in error
        and "here keeps the last checkpoint" in error
    )
    check_files(Path("here"))  # all weights are finite
    run, tensors, best = gpt.load_run("here")
    assert run["step"] == best["step"] == 4 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_that_go_wrong_where_no_loss_sees_them_are_not_saved(prose, monkeypatch, capsys):
    """Spoiled by the update after which Ctrl-C is heard, so that no other step follows."""
    step = gpt.Muon.step

    def spoiling(optimizer):
        step(optimizer)
        spoiling.calls += 1
        if spoiling.calls == 6:
            os.kill(os.getpid(), signal.SIGINT)
            optimizer.param_groups[0]["params"][0].data[0, 0] = math.nan

    spoiling.calls = 0
    monkeypatch.setattr(gpt.Muon, "step", spoiling)
    error = failed(capsys, [*FLAGS, "--out", "here"])
    assert "holds numbers that are not finite" in error
    check_files(Path("here"))
    assert gpt.load_run("here")[0]["step"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# The same again, and for a long time


def test_the_same_seed_gives_the_same_weights_and_the_same_text_twice(prose, capsys):
    done = script("gpt.py", *FLAGS, "--out", "one")
    assert done.returncode == 0, done.stderr
    gpt.main([*FLAGS, "--out", "two"])
    same_weights("one", "two")
    flags = ["--prompt", "The", "--max_new_tokens", "40", "--temperature", "1"]
    text = script("sample.py", "--model", "one", *flags).stdout
    capsys.readouterr()
    sample.main(["--model", "two", *flags])
    assert capsys.readouterr().out == text and len(text) > 10
    gpt.main([*FLAGS, "--out", "other", "--seed", "1"])
    assert not torch.equal(
        parameters_of("other")["transformer.wte.weight"], parameters_of("one")["transformer.wte.weight"]
    )


def test_memory_does_not_grow_with_the_steps(prose, monkeypatch):
    """After a beginning in which caches fill, 28 saves keep no more than 3 MB; a figure that stayed each time would be 40 MB."""
    forward_backward, resident = gpt.forward_backward, {}

    def noting(model, data, step, config, dtype):
        resident[step] = psutil.Process().memory_info().rss
        return forward_backward(model, data, step, config, dtype)

    monkeypatch.setattr(gpt, "forward_backward", noting)
    gpt.main([*FLAGS, "--out", "here", "--max_steps", "200", "--eval_interval", "5"])
    later = [resident[step] for step in range(61, 200, 20)]
    growth = [b - a for a, b in itertools.pairwise(later)]
    assert later[-1] - later[0] < 3 * 2**20, growth
