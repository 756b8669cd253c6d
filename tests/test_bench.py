import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import regex
import torch
from conftest import PROSE, ROOT, TINY

import gpt
from bench import __main__ as bench
from bench import workloads

WORKLOADS = [
    pytest.param(part, name, marks=[pytest.mark.slow] if part == "compile" else [])
    for part in bench.PARTS
    if part not in ("scaling", "corpus", "quality")
    for name in bench.PARTS[part].workloads
]


@pytest.fixture(autouse=True)
def tiny_gpt2(monkeypatch):
    transformers = pytest.importorskip("transformers")
    original, tiny = transformers.GPT2Config, {"n_layer": 3, "n_head": 2, "n_embd": 32}
    monkeypatch.setitem(gpt.PRESETS, "gpt2", {"vocab_size": 50257, "block_size": 1024, **tiny})
    monkeypatch.setattr(
        transformers, "GPT2Config", lambda **fields: original(**({"n_positions": 1024} | tiny | fields))
    )
    for shape in bench.SHAPES.values():
        monkeypatch.setitem(shape, "n_embd", 24)
        monkeypatch.setitem(shape, "vocab_size", 60)
    monkeypatch.setattr(workloads, "NEW", 4)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the same


@pytest.mark.parametrize(("part", "name"), WORKLOADS, ids=str)
def test_each_workload_runs_and_is_measured(part, name, capfd):
    for peer, module in bench.OPTIONAL.items():
        if peer in name:
            pytest.importorskip(module)
    bench.main([part, "--only", name, "--steps", "2"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0 and found["memory"] >= 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_timed_is_a_generation_of_that_many_tokens(dtype, monkeypatch):
    """And step 0, which warms up, one of a few."""
    monkeypatch.setattr(workloads, "NEW", 10)
    for generate in (workloads.generate(dtype, 3), workloads.generate("float32", 3, peer="transformers")):
        assert generate(1).shape == (3, workloads.PROMPT + 10) and generate(0).shape == (3, workloads.PROMPT + 8)


@pytest.mark.parametrize("form", ["table", "json"])
def test_the_best_of_all_rounds_counts_and_ratios_are_those_to_the_peer(form, monkeypatch, capsys):
    calls = []

    def run(script, **_):
        calls.append(script[script.index("--only") + 1])
        seconds = (4.0 if "transformers" in calls[-1] else 1.0) + len(calls) / 1000
        return subprocess.CompletedProcess(
            script, 0, json.dumps({"seconds": seconds, "memory": 10**9 * (3 - len(calls) // 9)}), ""
        )

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["finetune", "--rounds", "2", *(["--json"] if form == "json" else [])])
    workloads = bench.PARTS["finetune"].workloads
    assert calls == [*workloads] * 2, "in turn"
    lines = capsys.readouterr().out.splitlines()
    if form == "json":
        rows = [json.loads(line) for line in lines]
        assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == pytest.approx(4.001 / 1.002)
    else:
        assert len(lines) == 1 + len(workloads) and lines[2].split()[-4:] == ["1.00", "3.99", "3.00", "GB"]


def test_unasked_it_trains_and_generates_and_leaves_out_what_is_not_installed(monkeypatch, capsys):
    calls = []

    def run(script, **_):
        calls.append((script[script.index("--only") - 1], script[script.index("--only") + 1]))
        return subprocess.CompletedProcess(script, 0, json.dumps({"seconds": 0.5, "memory": None}), "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.main(["--rounds", "1"])
    assert calls == [
        (part, name)
        for part in ("train", "generate")
        for name in bench.PARTS[part].workloads
        if not any(peer in name for peer in bench.OPTIONAL)
    ]
    out, err = capsys.readouterr()
    assert f"{12 * 64 / 0.5:,.0f}" in out and f"{4 * 50 / 0.5:,.0f}" in out and "tokens/s" in out and "torch" in err


def test_a_run_to_quality_is_a_whole_training_and_fails_if_it_falls_short(monkeypatch, capfd):
    monkeypatch.setattr(gpt, "SHAKESPEARE", "http://127.0.0.1:9")  # nothing is fetched
    monkeypatch.setitem(workloads.SHAPES["small"], "vocab_size", 257)
    Path(".cache").mkdir()
    Path(".cache/shakespeare.txt").write_text(PROSE)
    workloads.to_quality(peer=True, steps=120)(1)
    assert float(regex.search(r"comes to ([\d.]+) bits per byte", capfd.readouterr().err)[1]) < 6
    monkeypatch.setattr(workloads, "QUICK", [*workloads.QUICK, *TINY[2:]])
    bench.main(["quality", "--only", "gpt.py, until it is as good"])
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["seconds"] > 0
    monkeypatch.setattr(workloads, "QUALITY", 0.01)
    with pytest.raises(gpt.InputError, match="bits per byte only"):
        workloads.to_quality()(1)


def test_two_processes_are_started_by_torchrun(monkeypatch):
    scripts = []

    def run(script, **_):
        scripts.append(script)
        return subprocess.CompletedProcess(script, 0, json.dumps({"seconds": 0.5, "memory": None}), "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["processes", "--rounds", "1"])
    assert ["torch.distributed.run" in script for script in scripts] == [False, False, True]


def test_two_processes_share_a_step():
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bench"]
    done = subprocess.run(
        [*script, "processes", "--only", bench.TWO, "--steps", "2"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout)["seconds"] > 0, "one line, from the first process alone"


def test_the_profile_names_all_of_a_step(monkeypatch, capsys):
    monkeypatch.setattr(bench, "validating", lambda steps: 0.125)
    bench.main(["--profile", "--steps", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("validation") == 0.125 and found.keys() == workloads.SHAPES.keys()
    for shares in found.values():
        assert (
            sum(shares.values()) == pytest.approx(1)
            and {"matrix products", "data", "Python", "optimizer and clipping"} <= shares.keys()
        )
        assert shares.get("other", 0) < 0.25
    bench.main(["--profile", "--steps", "1"])
    out = capsys.readouterr().out
    assert "matrix products" in out and "12.5% of a run" in out


def test_the_share_of_validation_is_that_of_a_whole_run(prose, monkeypatch):
    """Nine validations and 800 steps at the defaults. Here a validation takes 1 s, its save 0.5 s and a step 0.1 s."""
    clock = [0.0]

    def taking(seconds, function):
        def taken(*args, **options):
            clock[0] += seconds
            return function(*args, **options)

        return taken

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpt, "evaluate", taking(1.0, gpt.evaluate))
    monkeypatch.setattr(gpt, "forward_backward", taking(0.1, gpt.forward_backward))
    monkeypatch.setattr(gpt, "save_run", taking(0.5, gpt.save_run))
    share = workloads.validating(20, [*TINY, "--data", str(prose), "--max_steps", "20", "--eval_interval", "20"])
    assert share == pytest.approx(9 * 1.5 / (9 * 1.5 + 800 * 0.1))


BAD = {
    "nothing": (["nothing"], "there is no part nothing: choose among finetune, train"),
    "no rounds": (["finetune", "--rounds", "0"], "--rounds is 0"),
    "no steps": (["finetune", "--steps", "0"], "--steps is 0"),
    "no steps to profile": (["--profile", "--steps", "-1"], "--steps is -1"),
    "another workload": (["finetune", "--only", "prayer"], "--only is one of 'transformers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, capsys):
    argv, message = BAD[case]
    with pytest.raises(SystemExit) as end:
        bench.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_without_the_peers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for part, peer in (("finetune", "transformers, full, float32"), ("generate", "CTranslate2, int8")):
        with pytest.raises(SystemExit) as end:
            bench.main([part, "--only", peer])
        assert end.value.code == 2 and "pip install -r requirements-dev.txt" in capsys.readouterr().err
    bench.main(["finetune", "--only", "finetune.py, bias", "--steps", "1"])  # which needs none
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
