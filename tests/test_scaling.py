"""The closed forms are what PyTorch counts and keeps; the measurements are drawn as they are."""

import functools
import json
import subprocess
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpt
from bench import __main__ as bench
from bench import scaling
from gpt import GPT, GPTConfig

SHAPES = [GPTConfig(block_size=24, vocab_size=77, n_layer=2, n_head=5, n_embd=40),
          GPTConfig(block_size=16, vocab_size=300, n_layer=3, n_head=1, n_embd=8),
          GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=4, n_embd=64)]  # fmt: skip


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_parameters_are_those_of_the_model(config):
    assert scaling.parameters(config) == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("B", [1, 3])
def test_flops_are_those_that_pytorch_counts(config, B, monkeypatch):
    monkeypatch.setattr(gpt, "attention", functools.partial(gpt.attention, fused=False))
    model, idx = GPT(config), torch.randint(0, config.vocab_size, (B, config.block_size))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == scaling.flops(config, B, config.block_size)


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_are_those_that_pytorch_keeps(config, bfloat16, fused, monkeypatch):
    monkeypatch.setattr(gpt, "attention", functools.partial(gpt.attention, fused=fused))
    model, sizes = GPT(config).train(), {}
    idx, own = (
        torch.randint(0, config.vocab_size, (2, 3, config.block_size)),
        {p.untyped_storage().data_ptr() for p in model.parameters()},
    )

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        _, loss = model(*idx)
    assert sum(sizes.values()) == scaling.activations(config, 3, config.block_size, bfloat16, fused) and loss.isfinite()


def test_weights_gradients_and_averages_are_those_of_a_step():
    model, found = GPT(SHAPES[0]), scaling.memory(SHAPES[0], 3, 24)
    (optimizer,) = gpt.make_optimizers(model, gpt.TrainConfig(optimizer="adamw"))
    idx = torch.randint(0, 77, (3, 24))
    model(idx, idx)[1].backward()
    optimizer.step()
    tensors = list(model.parameters())
    averages = [average for state in optimizer.state.values() for average in state.values() if average.dim()]
    assert found["weights"] == sum(p.nbytes for p in tensors) and found["gradients"] == sum(
        p.grad.nbytes for p in tensors
    )
    assert found["averages"] == sum(average.nbytes for average in averages)


def test_the_plan_is_that_of_the_published_run(capsys):
    bench.main(["--plan", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["parameters"] for row in rows] == [124439808, 354823168, 774030080, 1557611200]
    assert 90 < rows[0]["hours"]["8"] < 100  # nanoGPT: about four days
    assert all(
        row["hours"]["8"] == pytest.approx(8 * row["hours"]["64"]) and row["fixed"] == 16 * row["parameters"]
        for row in rows
    )
    assert rows[0]["flops_per_token"] == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 1024 * 768
    bench.main(["--plan"])
    assert "gpt2-xl" in capsys.readouterr().out


@pytest.fixture
def measured(monkeypatch):
    """Processes that take a made-up time."""
    calls = []

    def run(script, **_):
        calls.append(script[script.index("--only") + 1])
        return subprocess.CompletedProcess(
            script, 0, json.dumps({"seconds": 0.5 * len(calls), "memory": 10**8 * len(calls)}), ""
        )

    monkeypatch.setattr(bench.subprocess, "run", run)
    return calls


@pytest.mark.parametrize("form", ["table", "json"])
def test_scaling_measures_every_point_and_draws_them(measured, form, capsys):
    bench.main(["--scaling", "--rounds", "1", "--picture", "drawn.png", *(["--json"] if form == "json" else [])])
    points = [f"{name} {n}" for name, (values, _) in scaling.SWEEPS.items() for n in values] + [
        f"corpus {n}" for n in scaling.CORPUS
    ]
    assert measured == points
    lines = capsys.readouterr().out.splitlines()
    if form == "json":
        rows = [json.loads(line) for line in lines]
        assert rows[0]["tokens_per_second"] == 4096 / 0.5 and rows[-1]["megabytes_per_second"] == scaling.CORPUS[-1] / (
            0.5 * len(points)
        )
        config = GPTConfig(**(scaling.BASE | {"block_size": 64}))
        assert rows[0]["gflops"] == pytest.approx(scaling.flops(config, 64, 64) / 0.5 / 1e9)
    else:
        assert len(lines) == len(points) + 5 and lines[1].split()[:3] == ["64", "500.0", "8,192.0"]
    assert matplotlib.image.imread("drawn.png").shape[1] > 1000


def test_unasked_the_ratios_are_drawn(measured):
    bench.main(["train", "--rounds", "1"])
    assert matplotlib.image.imread("bench.png").std() > 0.1


@pytest.mark.parametrize("point", ["context 64", "width 64", "depth 1", "batch 1"])
def test_a_point_is_measured_for_real(point, monkeypatch, capfd):
    monkeypatch.setitem(scaling.BASE, "n_embd", 16)
    bench.main(["scaling", "--only", point, "--steps", "1"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert scaling.figures(point, found)["tokens_per_second"] > 0


def test_a_text_is_tokenized_anew_at_each_step(monkeypatch, own_folder):
    sizes, load_data = [], gpt.load_data
    monkeypatch.setattr(gpt, "load_data", lambda names: sizes.append(Path(names[0]).stat().st_size) or load_data(names))
    step = scaling.tokenizing(2)
    for number in range(3):
        step(number)
    assert sizes[1] == sizes[2] and 1.5e6 < sizes[1] < 2.5e6 and 0.5e6 < sizes[0] < 1.5e6
