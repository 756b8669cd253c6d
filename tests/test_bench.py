"""The closed forms are what PyTorch counts and keeps; each workload runs; a table compares like with like."""

import functools
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import regex
import torch
from conftest import rows_of, run_main
from torch.utils.flop_counter import FlopCounterMode

import finetune
import gpt
from bench import __main__ as bench
from bench import scaling
from gpt import GPT, GPTConfig

SHAPES = [
    GPTConfig(block_size=24, vocab_size=77, n_layer=2, n_head=5, n_embd=40),
    GPTConfig(block_size=16, vocab_size=300, n_layer=3, n_head=1, n_embd=8),
]
FAST = ["train: nanoGPT, float32", "finetune: finetune.py, lora", "generate-8: sample.py, int8", "scaling: n_embd, 64"]
FAST += ["muon: gpt.py, bfloat16", "prepare: prepare.py, file to file", "gpu: gpt.py, bfloat16"]
WORKLOADS = [
    pytest.param(part, workload, marks=[] if f"{part}: {workload}" in FAST else [pytest.mark.slow])
    for part in bench.PARTS
    for workload in bench.PARTS[part].workloads
    if workload != bench.QUALITIES[0]  # below
]


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_parameters_flops_and_memory_are_those_of_a_step(config, monkeypatch):
    monkeypatch.setattr(gpt, "attention", functools.partial(gpt.attention, fused=False))  # whose products are counted
    model, found = GPT(config), scaling.memory(config, 3, config.block_size)
    (optimizer,) = gpt.make_optimizers(model, gpt.TrainConfig(optimizer="adamw"))
    idx = torch.randint(0, config.vocab_size, (3, config.block_size))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    optimizer.step()
    averages = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim() > 0]
    assert scaling.flops(config, 3, config.block_size) == counter.get_total_flops()
    assert scaling.parameters(config) == sum(p.numel() for p in model.parameters())
    assert found["weights"] == found["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert found["averages"] == sum(average.nbytes for average in averages)


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_are_those_that_pytorch_keeps(config, bfloat16, fused, monkeypatch):
    monkeypatch.setattr(gpt, "attention", functools.partial(gpt.attention, fused=fused))
    data = finetune.Documents([(range(config.block_size + 1), 1)] * 3)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    kept = finetune.activation_bytes(GPT(config), data, gpt.TrainConfig(batch_size=3), dtype)
    assert kept == scaling.activations(config, 3, config.block_size, bfloat16, fused)


@pytest.fixture
def tiny(prose, monkeypatch):
    shape = {"vocab_size": 1100, "block_size": 1024, "n_layer": 2, "n_head": 2, "n_embd": 32}
    monkeypatch.setitem(gpt.PRESETS, "gpt2", shape)
    monkeypatch.setitem(bench.PARTS["prepare"].options, "megabytes", 1)
    monkeypatch.setattr(bench, "QUICK", f"--data {prose} --max_steps 1 --n_layer 1 --n_embd 8")
    monkeypatch.setattr(bench, "QUALITY", 9.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the parts for a GPU run on the CPU
    for name in ("synchronize", "get_rng_state", "set_rng_state"):  # torch.compile asks for the state
        monkeypatch.setattr(torch.cuda, name, lambda *_: torch.zeros(16, dtype=torch.uint8))
    for part in ("gpu", "gpu-generate"):
        monkeypatch.setitem(bench.PARTS[part].options, "device", "cpu")
    monkeypatch.setitem(bench.GPU_SHAPE, "block_size", 32)
    for shape in (*bench.SHAPES.values(), bench.GPU_SHAPE):
        monkeypatch.setitem(shape, "n_embd", 24)
        monkeypatch.setitem(shape, "vocab_size", 60)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("part", "workload"), WORKLOADS)
def test_each_workload_runs_and_is_measured(part, workload, tiny, capfd):
    pytest.importorskip(bench.LIBRARIES.get(workload.split(", ")[0], "torch"))
    if "compiled" in workload and not shutil.which("g++"):
        pytest.skip("needs a compiler")
    bench.main([part, "--only", workload, "--steps", "2"])
    (figures,) = rows_of(capfd)
    assert figures["seconds"] > 0 and figures["memory"] >= 0


def test_rates_are_those_of_the_closed_forms_and_the_share_of_a_gpus_peak_that_of_its_data_sheet(monkeypatch):
    found = scaling.closed_forms("block_size, 256", 0.5)
    assert found["gflops"] == scaling.flops(GPTConfig(256, 1024, 4, 4, 128), 16, 256) / 0.5 / 1e9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = scaling.closed_forms("", 0.5, bench.GPU_SHAPE, "cuda")
    assert found["per_second"] == 16 * 1024 / 0.5
    assert found["share_of_peak"] == pytest.approx(32768 * 0.8544e9 / 989e12, rel=1e-3)  # 0.8544 GFLOP a token


@pytest.mark.parametrize("program", ["gpt.py", "transformers"])
def test_a_step_generates_as_many_tokens_as_the_rate_assumes(program, tiny):
    step = bench.generate(program, "float32", 3, prompt=16, new=10)
    assert step(1).shape == (3, 26) and step(0).shape == (3, 24)


def test_a_checkout_of_nanogpt_takes_the_place_of_the_copy(own_folder):
    """Its model.py where a step is timed, and its train.py, with its data, where quality is."""
    Path("model.py").write_text("GPT = GPTConfig = lambda *_, **__: 1 / 0")
    with pytest.raises(ZeroDivisionError):
        bench.train("nanoGPT", "float32", bench.SHAPES["small"], folder=own_folder)
    with pytest.raises(gpt.InputError, match="prepare.py"):
        bench.quality("nanoGPT", "", own_folder)
    Path("data/shakespeare_char").mkdir(parents=True)
    Path("data/shakespeare_char/train.bin").touch()
    Path("train.py").write_text("import sys; open('flags', 'w').write(' '.join(sys.argv))")
    bench.quality("nanoGPT", "", own_folder)(1)
    assert "--device=cpu" in Path("flags").read_text()


def test_the_profile_names_nearly_all_of_a_step(tiny):
    step = bench.train("gpt.py", "bfloat16", bench.SHAPES["small"], dropout=0.1)
    shares = scaling.shares(scaling.operations(step, 2))
    assert all(shares[kind] > 0 for kind in scaling.KINDS)
    assert sum(shares.values()) == pytest.approx(1) and shares["other"] < 0.1


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run: the peer takes 4 seconds, each other a little more than 1."""
    found = []

    def run(command, **_):
        found.append(command)
        figures = {"seconds": 4.0 if "transformers" in command[-3] else 1 + len(found) / 1000, "memory": 2e6}
        return subprocess.CompletedProcess(command, 0, json.dumps(figures), "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setitem(bench.LIBRARIES, "transformers", "torch")
    return found


def test_workloads_take_turns_and_the_best_round_is_compared_to_the_peer(commands, capsys):
    bench.main(["generate-8", "--rounds", "2", "--json"])
    assert [command[-3] for command in commands] == [*bench.GENERATE] * 2
    rows = rows_of(capsys)
    assert rows[0]["per_second"] == 8 * 200 / 4 and rows[0]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(4 / 1.002) and rows[1]["megabytes"] == 2


def test_the_picture_shows_every_workload_whose_library_is_there(commands, monkeypatch):
    monkeypatch.setitem(bench.LIBRARIES, "transformers", "not_installed")
    bench.main(["generate-8", "processes", "--rounds", "1", "--picture", "bench.svg"])
    drawn = Path("bench.svg").read_text()
    assert all(f">{workload}<" in drawn for workload in (*bench.GENERATE[1:], *bench.WORKERS))
    assert "transformers" not in drawn
    assert ["torch.distributed.run" in command for command in commands[-3:]] == [False, False, True]


BAD = ["x", "gpu", "--picture bench.txt", "profile --only x", "--nanogpt x", "generate --only 'llama.cpp, q8_0'"]


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_is_one_line_and_status_2(argv, monkeypatch, capsys):
    monkeypatch.setitem(bench.LIBRARIES, "llama.cpp", "not_installed")
    run_main(bench.main, *shlex.split(argv), expect=2)
    assert regex.fullmatch(r"error: .+\n", capsys.readouterr().err)
