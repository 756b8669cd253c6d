"""Killed at any moment, a run goes on as if nothing had happened."""

import multiprocessing
import random
from pathlib import Path

import pytest
import torch
from conftest import TINY, check_files, parameters_of

import gpt

FLAGS = [*TINY, "--data", "prose.txt", "--max_steps", "60", "--eval_interval", "3", "--dropout", "0.1", "--n_embd", "32"]


def started(argv):
    """gpt.py in a process that starts at once, as it is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt", "matplotlib.figure"])
    process = context.Process(target=gpt.main, args=(argv,))
    process.start()
    return process


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_left_in_peace(prose, kills):
    whole = started([*FLAGS, "--out", "whole"])
    whole.join(120)
    assert whole.exitcode == 0
    seconds, chance, killed, halves, folder, number = gpt.load_run("whole")["seconds"], random.Random(kills), 0, 0, Path("run0"), 0
    while killed < kills or not (folder / "training_state.pt").exists() or gpt.load_run(folder)["step"] < 60:
        if folder.exists() and (folder / "training_state.pt").exists() and gpt.load_run(folder)["step"] == 60:
            number += 1
            folder = Path(f"run{number}")
        again = (folder / "training_state.pt").exists()
        process = started(["--resume", "--out", str(folder)] if again else [*FLAGS, "--out", str(folder), "--overwrite"])
        process.join(chance.uniform(0, seconds / 2) if killed < kills else 120)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            halves += len(list(folder.glob(".*.part")))
        else:
            assert process.exitcode == 0
        if folder.exists():
            check_files(folder, interval=3)
    assert kills < 50 or halves > 0, "no kill has met a file that was being written"
    for folder in Path().glob("run*"):
        for name, weight in parameters_of(folder).items():
            assert torch.equal(weight, parameters_of("whole")[name]), name
        logs = [[line.split(",")[:2] + line.split(",")[3:] for line in Path(f"{name}/log.csv").read_text().splitlines()] for name in ("whole", folder)]
        assert logs[0] == logs[1]
        assert not list(folder.glob(".*.part")), "what a crash has left half-written is cleared away"


@pytest.mark.parametrize("left", ["nothing", "half a file"])
def test_what_a_crash_has_left_half_written_is_cleared_away(prose, left):
    gpt.main([*FLAGS, "--out", "here", "--max_steps", "3"])
    stray = Path("here/.model.safetensors.123.part")
    if left == "half a file":
        stray.write_bytes(b"half")
    gpt.main(["--resume", "--out", "here", "--max_steps", "6"])
    assert not stray.exists() and gpt.load_run("here")["step"] == 6
