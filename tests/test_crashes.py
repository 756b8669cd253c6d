"""Killed at any moment, a run goes on as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, check_files, parameters_of

import gpt

FLAGS = [*TINY, "--data", "prose.txt", "--max_steps", "60", "--eval_interval", "3", "--dropout", "0.1"]


def started(argv, main=gpt.main):
    """gpt.py in a process that starts at once, as it is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt", "matplotlib.figure"])
    process = context.Process(target=main, args=(argv,))
    process.start()
    return process


def finished(folder):
    return (folder / gpt.STATE).exists() and gpt.load_run(folder)[0]["step"] == 60


def result_of(folder):
    """All that a run ends with, except for the seconds it took and its own name."""
    run, tensors, best = gpt.load_run(folder)
    config = json.loads((folder / gpt.CONFIG).read_text())
    log = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    for part in (run["config"], best["training"], config["training"]):
        del part["out"]
    for row in (run, *run["rows"]):
        del row["seconds"]
    facts = json.dumps([run, best, config, [line[:2] + line[3:] for line in log]])  # text, as NaN differs from itself
    return facts, tensors | {f"best {name}": p for name, p in parameters_of(folder).items()}


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(prose, kills):
    whole = started([*FLAGS, "--out", "whole"])
    whole.join(120)
    assert whole.exitcode == 0
    facts, tensors = result_of(Path("whole"))
    seconds = gpt.load_run("whole")[0]["seconds"]
    chance = random.Random(kills)
    killed = number = 0
    folder = Path("run0")
    while killed < kills or not finished(folder):
        if finished(folder):
            number += 1
            folder = Path(f"run{number}")
        resume = ["--resume", "--out", str(folder)]
        process = started(resume if (folder / gpt.STATE).exists() else [*FLAGS, "--out", str(folder), "--overwrite"])
        process.join(chance.uniform(0, seconds / 2) if killed < kills else 120)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
        if folder.exists():
            check_files(folder, interval=3)
    for folder in Path().glob("run*"):
        assert not list(folder.glob(".*.part")), "a half-written file was left"
        ours, weights = result_of(folder)
        assert ours == facts and weights.keys() == tensors.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, tensors[name]), name


def main_killed_at_last_save(argv):
    """gpt.main, killed as soon as the file argv[0] of the save at step 12 has been written under its temporary name."""
    name, *argv = argv
    replace = Path.replace

    def killed(part, path):
        if path.name == name and (Path("here") / gpt.STATE).exists() and gpt.load_run("here")[0]["step"] >= 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(part, path)

    Path.replace = killed
    gpt.main(argv)


@pytest.mark.parametrize("name", [gpt.MODEL, gpt.VOCABULARY, gpt.CONFIG, "log.csv", gpt.STATE, "loss.png"])
def test_a_run_killed_between_any_two_files_of_a_save_ends_as_an_undisturbed_one(prose, name):
    flags = [*FLAGS, "--max_steps", "12"]
    gpt.main([*flags, "--out", "whole"])
    process = started([name, *flags, "--out", "here"], main_killed_at_last_save)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and Path(f"here/.{name}.part/{name}").exists()
    check_files(Path("here"), interval=3)
    gpt.main(["--resume", "--out", "here"])
    assert not list(Path("here").glob(".*.part")), "a half-written file was left"
    (ours, weights), (facts, tensors) = result_of(Path("here")), result_of(Path("whole"))
    assert ours == facts and all(torch.equal(weights[name], tensors[name]) for name in tensors)
