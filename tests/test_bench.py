import json
import subprocess
import sys

import pytest

import bench
import gpt

WORKLOADS = [(part, name) for part in bench.PARTS if part not in ("scaling", "corpus") for name in bench.PARTS[part].workloads]


@pytest.fixture(autouse=True)
def tiny_gpt2(monkeypatch):
    transformers = pytest.importorskip("transformers")
    original, tiny = transformers.GPT2Config, {"n_layer": 3, "n_head": 2, "n_embd": 32}
    monkeypatch.setitem(gpt.PRESETS, "gpt2", {"vocab_size": 50257, "block_size": 1024, **tiny})
    monkeypatch.setattr(transformers, "GPT2Config", lambda **fields: original(**({"n_positions": 1024} | tiny | fields)))
    for shape in bench.SHAPES.values():
        monkeypatch.setitem(shape, "n_embd", 24)
        monkeypatch.setitem(shape, "vocab_size", 60)
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(gpt, "Muon", gpt.Muon)  # which a workload replaces, in a process of its own


@pytest.mark.parametrize(("part", "name"), WORKLOADS, ids=str)
def test_each_workload_runs_and_is_measured(part, name, capfd):
    if "llama" in name:
        pytest.importorskip("llama_cpp")
    bench.main([part, "--only", name, "--steps", "2"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0 and found["memory"] >= 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_timed_is_a_generation_of_that_many_tokens(dtype):
    assert bench.generate(dtype, 3)(0).shape == (3, bench.PROMPT + 4)
    assert bench.generate("float32", 3, peer="transformers")(0).shape == (3, bench.PROMPT + 4)


@pytest.mark.parametrize("form", ["table", "json"])
def test_the_best_of_all_rounds_counts_and_ratios_are_those_to_the_peer(form, monkeypatch, capsys):
    calls = []

    def run(script, **_):
        calls.append(script[script.index("--only") + 1])
        seconds = (4.0 if "transformers" in calls[-1] else 1.0) + len(calls) / 1000
        return subprocess.CompletedProcess(script, 0, json.dumps({"seconds": seconds, "memory": 10**9 * (3 - len(calls) // 9)}), "")

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
        calls.append((script[2], script[script.index("--only") + 1]))
        return subprocess.CompletedProcess(script, 0, json.dumps({"seconds": 0.5, "memory": None}), "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.main(["--rounds", "1"])
    assert calls == [(part, name) for part in ("train", "generate") for name in bench.PARTS[part].workloads if "llama" not in name]
    out, err = capsys.readouterr()
    assert f"{12 * 64 / 0.5:,.0f}" in out and f"{4 * 50 / 0.5:,.0f}" in out and "tokens/s" in out and "torch" in err


BAD = {
    "nothing": (["nothing"], "there is no part nothing: choose among finetune, train"),
    "no rounds": (["finetune", "--rounds", "0"], "--rounds is 0"),
    "no steps": (["finetune", "--steps", "0"], "--steps is 0"),
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
    with pytest.raises(SystemExit) as end:
        bench.main(["finetune", "--only", "finetune.py, full"])
    assert end.value.code == 2 and "pip install -r requirements-dev.txt" in capsys.readouterr().err
