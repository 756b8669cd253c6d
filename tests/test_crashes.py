"""Killed at any moment, a run goes on as if nothing had happened."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from conftest import TINY, check_files, parameters_of, started

import gpt

STEPS = 30
FLAGS = [*TINY, "--data", "prose.txt", "--max_steps", str(STEPS), "--eval_interval", "3", "--dropout", "0.1"]


def result_of(folder):
    """Everything that a run ends with, except the seconds it took and its own name -> text, tensors."""
    run, tensors, best = gpt.load_run(folder)
    config = json.loads((folder / gpt.CONFIG).read_text())
    log = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    for part in (run["config"], best["training"], config["training"]):
        del part["out"]
    for row in (run, *run["rows"]):
        del row["seconds"]
    facts = json.dumps([run, best, config, [line[:2] + line[3:] for line in log]])  # text, as NaN differs from itself
    return facts, tensors | {f"best {name}": p for name, p in parameters_of(folder).items()}


def assert_same_result(folder, whole):
    assert not list(folder.glob(".*.part")), "a half-written file was left"
    (ours, weights), (facts, tensors) = result_of(folder), result_of(whole)
    assert ours == facts and weights.keys() == tensors.keys()
    assert all(weight.equal(tensors[name]) for name, weight in weights.items())


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(prose, kills):
    gpt.main([*FLAGS, "--out", "whole"])
    chance = random.Random(kills)
    for i in range(kills):
        folder = Path(f"run{i}")
        process = started([*FLAGS, "--out", str(folder)])
        process.join(chance.uniform(0.2, 3))
        process.kill()
        process.join()
        if folder.exists():
            check_files(folder, interval=3)
        flags = ["--resume"] if (folder / gpt.STATE).exists() else [*FLAGS, "--overwrite"]
        gpt.main([*flags, "--out", str(folder)])
        assert_same_result(folder, Path("whole"))


def main_killed_at_last_save(argv):
    """gpt.main, killed when the file argv[0] of the last save has been written, but not yet renamed."""
    name, *argv = argv
    replace = Path.replace

    def killed(part, path):
        if path.name == name and (Path("here") / gpt.STATE).exists() and gpt.load_run("here")[0]["step"] >= STEPS - 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(part, path)

    Path.replace = killed
    gpt.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("name", [gpt.MODEL, gpt.VOCABULARY, gpt.CONFIG, "log.csv", gpt.STATE, "loss.png"])
def test_a_run_killed_between_any_two_files_of_a_save_ends_as_an_undisturbed_one(prose, name):
    gpt.main([*FLAGS, "--out", "whole"])
    process = started([name, *FLAGS, "--out", "here"], main_killed_at_last_save)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and Path(f"here/.{name}.part/{name}").exists()
    check_files(Path("here"), interval=3)
    gpt.main(["--resume", "--out", "here"])
    assert_same_result(Path("here"), Path("whole"))
