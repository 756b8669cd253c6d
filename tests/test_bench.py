import json
import subprocess
import sys

import pytest

import bench
import gpt


@pytest.fixture(autouse=True)
def tiny_gpt2(monkeypatch):
    monkeypatch.setitem(gpt.PRESETS, "gpt2", {"vocab_size": 50257, "block_size": 128, "n_layer": 3, "n_head": 2, "n_embd": 8})
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_positions=128, n_layer=3, n_head=2, n_embd=8)
    monkeypatch.setattr(transformers, "GPT2Config", lambda: config)


@pytest.mark.parametrize("name", bench.PARTS["finetune"])
def test_each_workload_runs_and_is_measured(name, capsys):
    bench.main(["finetune", "--only", name, "--steps", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and found["memory"] >= 0


@pytest.mark.parametrize("form", ["table", "json"])
def test_the_best_of_all_rounds_counts_and_ratios_are_those_to_the_peer(form, monkeypatch, capsys):
    calls = []

    def run(script, **_):
        calls.append(script[script.index("--only") + 1])
        seconds = (4.0 if "transformers" in calls[-1] else 1.0) + len(calls) / 1000
        return subprocess.CompletedProcess(script, 0, json.dumps({"seconds": seconds, "memory": 10**9 * (3 - len(calls) // 8)}), "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(["finetune", "--rounds", "2", *(["--json"] if form == "json" else [])])
    assert calls == [*bench.PARTS["finetune"]] * 2, "in turn"
    lines = capsys.readouterr().out.splitlines()
    if form == "json":
        rows = [json.loads(line) for line in lines]
        assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == pytest.approx(4.001 / 1.002)
    else:
        assert len(lines) == 1 + len(bench.PARTS["finetune"]) and lines[2].split()[-4:] == ["1.00", "3.99", "3.00", "GB"]


@pytest.mark.parametrize("argv", [[], ["nothing"], ["finetune", "--rounds", "0"], ["finetune", "--only", "prayer"]], ids=str)
def test_bad_input_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_without_the_peers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as end:
        bench.main(["finetune", "--only", "finetune.py, full"])
    assert end.value.code == 2 and "pip install -r requirements-dev.txt" in capsys.readouterr().err
