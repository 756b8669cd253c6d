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
from conftest import ROOT, TINY, check_files, parameters_of, script
from matplotlib.figure import Figure

import gpt
import sample

FLAGS = [*TINY, "--data", "prose.txt", "--dropout", "0.1"]  # 12 steps, a validation every 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "gpt.py")]


@pytest.fixture
def runs(prose):
    """`whole`, which nothing disturbed, and `part`, which ended after step 4 and has a saved learning rate for 12."""
    gpt.main([*FLAGS, "--out", "whole"])
    gpt.main([*FLAGS, "--out", "part", "--max_steps", "4", "--lr", "1e-3"])


def failed(capsys, argv, status=2):
    """Run gpt.py in this process -> its one error line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        gpt.main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == status and len(lines) == 1
    return lines[0]


def same_weights(one, other):
    assert all(torch.equal(weight, parameters_of(other)[name]) for name, weight in parameters_of(one).items())


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and killed

SLOW_TO_SAVE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import gpt

gradients, save_run = gpt.gradients, gpt.save_run

def interrupted(model, data, step, config, dtype):
    if step == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return gradients(model, data, step, config, dtype)

def slow(run, *rest):
    if run["step"] == 7:
        print("saving", flush=True)
        time.sleep(60)
    save_run(run, *rest)

gpt.gradients, gpt.save_run = interrupted, slow
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
    assert gpt.load_run("here")["step"] == 4
    gpt.main(["--resume", "--out", "here"])
    gpt.main([*FLAGS, "--out", "whole"])
    same_weights("here", "whole")


def under_torchrun(out, until):
    """Start a long run of two processes -> torchrun, and its workers, as soon as `until` lines are in the log."""
    flags = [*FLAGS, "--out", out, "--max_steps", "1000000", "--optimizer", "adamw"]
    process = subprocess.Popen([*TORCHRUN, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not Path(out, "log.csv").exists() or len(Path(out, "log.csv").read_text().splitlines()) < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children()


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_of_two_killed_ends_the_other_and_says_so(prose, victim):
    process, workers = under_torchrun("here", 4)
    workers[victim].kill()
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and not any(worker.is_running() for worker in workers)
    assert err.count("error: another process of this run has died: --resume goes on from the last save") == 1
    check_files(Path("here"))
    step = gpt.load_run("here")["step"]
    gpt.main(["--resume", "--out", "here", "--max_steps", str(step + 3)])


def test_ctrl_c_reaches_two_processes_twice_and_both_save_first(prose):
    """A terminal signals the whole group; torchrun then signals its workers once more."""
    process, _ = under_torchrun("here", 3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("stopped and saved at step") == 1
    saved = int(err.split("stopped and saved at step ")[1].split(" ")[0].replace(",", ""))
    assert gpt.load_run("here")["step"] == saved
    check_files(Path("here"))


# ---------------------------------------------------------------------------------------------------------------------
# Writes that fail


class Disk:
    """All that writes files, counted; call number `full_at` finds the disk full, in the middle of a file where it writes one."""

    def __init__(self, monkeypatch, full_at=math.inf):
        self.calls, self.full_at = 0, full_at
        for place, name in [(os, "replace"), (os, "fsync"), (os, "chmod"), (Path, "touch"), (Path, "mkdir"), (Path, "write_bytes"),
                            (torch, "save"), (gpt, "save_file"), (Figure, "savefig")]:  # fmt: skip
            monkeypatch.setattr(place, name, self.watched(getattr(place, name), name))

    def watched(self, original, name):
        def call(*args, **options):
            self.calls += 1
            if self.calls != self.full_at:
                return original(*args, **options)
            part = args[0] if name == "write_bytes" else args[1] if name in ("save", "save_file", "savefig") else None
            if part:
                with open(part, "wb") as file:
                    file.write(b"half")
            if name in ("save", "save_file"):  # this is what they make of it
                raise RuntimeError("unexpected pos 64 vs 0: No space left on device")
            raise OSError(errno.ENOSPC, "No space left on device")

        return call


def test_a_disk_that_is_full_at_any_write_leaves_what_was_there(runs, monkeypatch, capsys):
    argv = ["--resume", "--out", "here", "--max_steps", "8", "--lr", "4e-3"]
    monkeypatch.setattr(Figure, "savefig", lambda self, part, **_: Path(part).write_bytes(b"IEND\xaeB\x60\x82"))  # drawing takes long
    shutil.copytree("part", "here")
    with monkeypatch.context() as patched:
        writes = Disk(patched)
        gpt.main(argv)
    whole = parameters_of("here")
    assert writes.calls > 50  # two saves of six files
    for full_at in range(1, writes.calls + 1):
        shutil.rmtree("here")
        shutil.copytree("part", "here")
        with monkeypatch.context() as patched:
            Disk(patched, full_at)
            error = failed(capsys, argv)
        assert "No space left on device" in error, (full_at, error)
        check_files(Path("here"))
        gpt.load_checkpoint("here")
        assert gpt.load_run("here")["step"] in (4, 8) and not list(Path("here").glob(".*.part"))
        gpt.main(argv)
        assert all(torch.equal(weight, whole[name]) for name, weight in parameters_of("here").items()), full_at


def test_a_file_that_the_system_cuts_short_is_an_error_and_the_old_one_stays(runs):
    """Not injected: the kernel refuses to let any file grow beyond 50 kB."""
    before = {path.name: path.read_bytes() for path in Path("part").iterdir()}
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    done = script("gpt.py", "--resume", "--out", "part", "--max_steps", "8", **limit)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and error.startswith("error: ") and "could not be written" in error, done.stderr
    assert before == {path.name: path.read_bytes() for path in Path("part").iterdir()}
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
    gradients = gpt.gradients

    def losing(model, data, step, config, dtype):
        if step == lose_at:
            os.chmod("here", 0o500)
        return gradients(model, data, step, config, dtype)

    gpt.gradients = losing
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
        assert "step 8 could not be saved" in error and gpt.load_run("here")["step"] == 4
        check_files(Path("here"))


def test_a_folder_that_vanishes_is_made_again_and_nothing_is_missing(runs, monkeypatch):
    gradients = gpt.gradients

    def losing(model, data, step, config, dtype):
        if step == 6:
            shutil.rmtree("here")
        return gradients(model, data, step, config, dtype)

    monkeypatch.setattr(gpt, "gradients", losing)
    gpt.main([*FLAGS, "--out", "here"])
    same_weights("here", "whole")
    assert len(Path("here/log.csv").read_text().splitlines()) == 5 and {path.name for path in Path("here").iterdir()} >= set(gpt.FILES)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "weights", "validation"])
def test_a_number_that_goes_wrong_stops_the_run_at_its_step_and_poisons_nothing(prose, where, value, monkeypatch, capsys):
    gradients, evaluate = gpt.gradients, gpt.evaluate

    def poisoned(model, data, step, config, dtype):
        if step == 6 and where == "weights":
            next(model.parameters()).data[:] = value
        loss, tokens = gradients(model, data, step, config, dtype)
        if step == 6 and where == "gradient":
            next(model.parameters()).grad[0, 0] = value
        return value if step == 6 and where == "loss" else loss, tokens

    def misjudged(model, *rest):
        figures = evaluate(model, *rest)
        return figures | {"loss": value} if where == "validation" and gpt.load_run("here")["step"] == 4 else figures

    monkeypatch.setattr(gpt, "gradients", poisoned)
    if where == "validation":
        gpt.main([*FLAGS, "--out", "here", "--max_steps", "4"])
        monkeypatch.setattr(gpt, "evaluate", misjudged)
        error = failed(capsys, ["--resume", "--out", "here", "--max_steps", "12"], status=1)
    else:
        error = failed(capsys, [*FLAGS, "--out", "here"], status=1)
    what = {"loss": "loss", "weights": "loss", "gradient": "gradient's norm", "validation": "validation loss"}[where]
    assert f"the {what} is " in error and f"at step {8 if where == 'validation' else 6}" in error and "here holds the best checkpoint" in error
    check_files(Path("here"))  # all weights are finite
    run = gpt.load_run("here")
    assert run["step"] == run["best"]["step"] == 4 and all(w.isfinite().all() for w in (*run["weights"].values(), *run["best_weights"].values()))


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
    assert not torch.equal(parameters_of("other")["transformer.wte.weight"], parameters_of("one")["transformer.wte.weight"])


def test_memory_does_not_grow_with_the_steps(prose, monkeypatch):
    """After a beginning in which caches fill, 28 saves keep no more than 3 MB; a figure that stayed each time would be 40 MB."""
    gradients, resident = gpt.gradients, {}

    def noting(model, data, step, config, dtype):
        resident[step] = psutil.Process().memory_info().rss
        return gradients(model, data, step, config, dtype)

    monkeypatch.setattr(gpt, "gradients", noting)
    gpt.main([*FLAGS, "--out", "here", "--max_steps", "200", "--eval_interval", "5"])
    later = [resident[step] for step in range(61, 200, 20)]
    growth = [b - a for a, b in itertools.pairwise(later)]
    assert later[-1] - later[0] < 3 * 2**20, growth
