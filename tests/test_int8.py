import copy

import pytest
import torch
from conftest import TINY, enlarge

import evaluate
import gpt
import sample
from extras import int8
from extras.int8 import Int8Linear


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_whole_numbers_add_up(rows, sign):
    """3,072 products of 127 and 127, on this processor: two of them overflow sixteen bits."""
    x, weight = sign * torch.ones(rows, 3072), torch.full((40, 3072), 127, dtype=torch.int8)
    found = Int8Linear(weight, torch.full((40,), 1 / 127), None)(x)
    assert (found - sign * 3072).abs().max() < 0.01 * 3072


@pytest.mark.parametrize(
    ("capabilities", "whole"),
    [({"avx512_vnni": True}, True), ({"avx_vnni": True}, True), ({"avx512_f": True, "avx512_vnni": False}, False), ({}, False),
     ({"avx512_4vnniw": True, "avx_vnni_int16": True}, False), ({"avx512_vnni": True, "amx_bf16": True}, False)],
)  # fmt: skip
def test_whole_numbers_are_for_processors_that_add_them_up_right_and_have_nothing_better(
    monkeypatch, capabilities, whole
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert Int8Linear(torch.ones(2, 3, dtype=torch.int8), torch.ones(2), None).whole_numbers == whole


VNNI = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni"))
NEEDS_VNNI = pytest.mark.skipif(not VNNI, reason="this processor adds whole numbers up in sixteen bits")


@NEEDS_VNNI
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize(
    ("width", "out"), [(64, 48), (32, 257), (96, 1), (8, 3), (24, 32), (12, 2), (40, 257), (2, 5), (1, 5)]
)
def test_a_product_of_whole_numbers_is_that_of_rounded_weights_and_rounded_tokens(rows, width, out):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(width, out), torch.randn(2, rows, width) * torch.logspace(-3, 3, rows)[:, None]
    weight, scales = int8.to_int8(linear.weight.detach())
    layer = Int8Linear(weight, scales, linear.bias)
    layer.whole_numbers = True
    tokens, steps = int8.to_int8(x.flatten(0, 1))
    exact = (tokens.double() * steps[:, None].double() if width > 1 else x.flatten(0, 1).double()) @ (
        weight.double() * scales[:, None].double()
    ).T
    found = layer(x).flatten(0, 1)
    assert (
        found.dtype == torch.float32
        and ((found - linear.bias - exact).abs() <= 1e-5 * (exact.abs().amax(1, keepdim=True) + 1)).all()
    )


@pytest.mark.parametrize("whole_numbers", [pytest.param(True, marks=NEEDS_VNNI), False])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize(("width", "out"), [(64, 48), (32, 257), (96, 1), (8, 3), (24, 32), (12, 2), (40, 257)])
def test_a_product_is_nearly_that_of_the_rounded_weights(rows, width, out, whole_numbers):
    """Whole numbers; or few rows through the kernel for bfloat16, many or odd ones through unpacked weights."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(width, out), torch.randn(2, rows, width)
    weight, scales = int8.to_int8(linear.weight.detach())
    exact = torch.nn.functional.linear(x.double(), weight.double() * scales.double()[:, None], linear.bias.double())
    layer = Int8Linear(weight, scales, linear.bias)
    layer.whole_numbers = whole_numbers
    found = layer(x)
    most = 0.01 * exact.abs().max()
    if whole_numbers:  # tokens are rounded, too: here what counts is all terms of a sum, were they of one sign
        most = 0.008 * (x.abs() @ linear.weight.detach().abs().T).max()
    assert found.dtype == torch.float32 and (found - exact).abs().max() < most


def test_each_weight_is_off_by_half_a_step_at_most():
    weight = torch.randn(30, 40) * torch.logspace(-3, 3, 30)[:, None]
    rounded, scales = int8.to_int8(weight)
    assert rounded.dtype == torch.int8 and (rounded.abs().amax(1) == 127).all()
    assert ((rounded * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert (int8.to_int8(torch.zeros(2, 3))[0] == 0).all(), "a row of zeros stays one"


def test_a_model_in_int8_thinks_nearly_the_same(small):
    idx = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    before = small(idx)[0]
    model = int8.quantize(copy.deepcopy(small))
    after = model(idx)[0]
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
        losses.append(float(capsys.readouterr().out.split('"loss": ')[1].split(",")[0]))
    assert losses[0] < 3.5 and losses[0] != losses[1] == pytest.approx(losses[0], rel=0.005)


def test_sampling_in_int8(prose, capsys):
    gpt.main([*TINY, "--data", str(prose), "--max_steps", "4"])
    capsys.readouterr()
    sample.main(["--model", "prose", "--prompt", "the", "--dtype", "int8", "--max_new_tokens", "20", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the")
    with pytest.raises(SystemExit) as end:
        sample.main(["--model", "prose", "--prompt", "the", "--dtype", "int8", "--adapter", "x"])
    assert end.value.code == 2 and "--adapter goes with float32 or bfloat16" in capsys.readouterr().err
