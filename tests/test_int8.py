"""int8 weights: what they cost in precision, in products, in a model, and in its loss."""

import copy
import json

import pytest
import torch
from conftest import TINY, enlarge

import evaluate
import gpt
from extras import int8
from extras.int8 import Int8Linear

VNNI = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni"))


def test_each_weight_is_off_by_half_a_step_at_most():
    weight = torch.randn(30, 40) * torch.logspace(-3, 3, 30)[:, None]
    rounded, scales = int8.to_int8(weight)
    assert rounded.dtype == torch.int8 and (rounded.abs().amax(1) == 127).all()
    assert ((rounded * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert (int8.to_int8(torch.zeros(2, 3))[0] == 0).all(), "a row of zeros stays one"


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_add_up(rows, sign):
    """3,072 products of 127 and 127, on this processor: two of them overflow sixteen bits."""
    x, weight = sign * torch.ones(rows, 3072), torch.full((40, 3072), 127, dtype=torch.int8)
    found = Int8Linear(weight, torch.full((40,), 1 / 127), None)(x)
    assert (found - sign * 3072).abs().max() < 0.01 * 3072


@pytest.mark.parametrize(("vnni", "bf16", "integers"), [(1, 0, True), (0, 0, False), (1, 1, False)])
def test_integers_are_for_processors_that_add_them_up_right_and_lack_bfloat16(vnni, bf16, integers, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": vnni, "amx_bf16": bf16})
    assert Int8Linear(torch.ones(2, 3, dtype=torch.int8), torch.ones(2), None).integers == integers


@pytest.mark.parametrize("width", [64, 40])
def test_many_rows_are_multiplied_in_bfloat16_where_it_is_native(width, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    layer, x = Int8Linear(*int8.to_int8(torch.randn(48, width)), torch.randn(48)), torch.randn(100, width)
    weight, tokens = layer.weight.double() * layer.scales[:, None], x.bfloat16().double()
    off = (layer(x) - (tokens @ weight.T + layer.bias)).abs() / (tokens.abs() @ weight.abs().T + 1)
    assert layer(x).dtype == torch.float32 and 0 < off.max() < 0.004


@pytest.mark.parametrize("integers", [pytest.param(True, marks=pytest.mark.skipif(not VNNI, reason="no VNNI")), False])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize(("width", "out"), [(64, 48), (32, 257), (96, 1), (40, 257), (1, 5)])
def test_a_product_is_that_of_the_rounded_weights(width, out, rows, integers):
    """With integers, exactly that of rounded tokens; otherwise nearly, by PyTorch's kernel or unpacked weights."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(width, out), torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]
    layer = Int8Linear(*int8.to_int8(linear.weight.detach()), linear.bias)
    layer.integers = integers
    tokens = x.double()
    if integers and width > 1:
        rounded, steps = int8.to_int8(x)
        tokens = rounded.double() * steps[:, None].double()
    weight = layer.weight.double() * layer.scales[:, None].double()
    off = (layer(x) - (tokens @ weight.T + linear.bias.double())).abs() / (tokens.abs() @ weight.abs().T + 1)
    assert layer(x).dtype == torch.float32 and off.max() < (1e-6 if integers else 0.004)


def test_a_model_in_int8_predicts_nearly_the_same(small):
    idx = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    model = int8.quantize(copy.deepcopy(small))
    before, after = small(idx)[0], model(idx)[0]
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()
    assert model.lm_head.weight is model.transformer.wte.weight, "one tensor, as before"
    matrices = [module.weight for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(matrices) == 4 * 3 + 1 and all(weight.dtype == torch.int8 for weight in matrices)


def test_generating_in_int8_is_the_same_with_and_without_the_cache():
    config = gpt.GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model, idx = int8.quantize(enlarge(gpt.GPT(config))), torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = idx
    for _ in range(10):
        whole = torch.cat([whole, model(whole)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(model.generate(idx, 10, temperature=0), whole)


def test_the_loss_of_a_trained_model_stays_within_half_a_percent(prose, capsys):
    gpt.main([*TINY, "--data", str(prose), "--n_embd", "64", "--max_steps", "60", "--eval_interval", "60"])
    capsys.readouterr()
    losses = []
    for dtype in ("float32", "int8"):
        evaluate.main(["--model", "prose", "--dtype", dtype, "--batch_size", "1", "--device", "cpu", "--json"])
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] < 3.5 and losses[0] != losses[1] == pytest.approx(losses[0], rel=0.005)
