import copy
import functools
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, enlarge

import gpt
import sample
from extras import compiled, int8, lora, native

if compiled.load() is None:
    pytest.skip("there is no C compiler with OpenMP", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions in C, each time one is called."""
    found, lib = [], native.load()

    class Recorder:
        def __getattr__(self, name):
            found.append(name)
            return getattr(lib, name)

    monkeypatch.setattr(native, "load", Recorder)
    return found


def shaped(C, H, block_size=24, n_layer=2):
    return enlarge(
        gpt.GPT(gpt.GPTConfig(block_size=block_size, vocab_size=97, n_layer=n_layer, n_head=H, n_embd=C)), seed=C
    )


def rounded(model):
    """A float32 model with the weights that int8 stands for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "wpe" not in name:
                weight, scales = int8.to_int8(p)
                p.copy_(weight * scales[:, None])
    return model


@torch.no_grad()
def through(model, idx, prompt, step):
    """Logits (B, T - prompt, V) for the tokens after the prompt, `step` of them at a time, by way of the caches."""
    caches = [gpt.KVCache(idx.shape[1]) for _ in model.transformer.h]
    model.hidden(idx[:, :prompt], caches)
    return torch.cat(
        [model.lm_head(model.hidden(part, caches)).float() for part in idx[:, prompt:].split(step, dim=1)], dim=1
    )


SHAPES = [(8, 2), (16, 16), (40, 5), (96, 3), (144, 2), (768, 12)]


@pytest.mark.parametrize(("B", "step"), [(1, 1), (1, 7), (3, 1), (3, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(("C", "H"), SHAPES)
def test_in_float32_the_logits_are_those_of_gpt(C, H, B, step, calls):
    """They are about as far from those in float64 as PyTorch's own in float32: 0.5 to 1.1 times on one processor."""
    model, idx = shaped(C, H), torch.randint(97, (B, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(idx)[0][:, 10:]
        own = (model(idx)[0][:, 10:] - exact).square().mean().sqrt()
    found = through(native.speed_up(model), idx, 10, step)
    assert (found - exact).square().mean().sqrt() <= 2 * own < 1e-4 * exact.std()
    assert calls == ["gpt_blocks", "gpt_linear"] * -(-14 // step)


def test_large_scores_do_not_overflow(calls):
    model, idx = shaped(16, 2, n_layer=1), torch.arange(24)[None]
    attn = model.transformer.h[0].attn
    attn.c_attn.weight.data[:32] *= 5  # queries and keys
    with torch.no_grad():
        x = model.transformer.wte(idx) + model.transformer.wpe.weight[:24]
        q, k, _ = attn.c_attn(model.transformer.h[0].ln_1(x)).view(24, 3, 2, 8).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / 8**0.5
        assert (scores - scores[:, :, :1]).tril().amax() > 100, "more than exp can do beyond the first one"
        exact = copy.deepcopy(model).double()(idx)[0][:, 10:]
    assert (through(native.speed_up(model), idx, 10, 1) - exact).abs().max() < 1e-3 * exact.std() and calls


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize(("C", "H"), SHAPES)
def test_in_bfloat16_the_logits_are_as_near_as_those_of_gpt(C, H, B, calls, capsys):
    model, idx = shaped(C, H).bfloat16(), torch.randint(97, (B, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(idx)[0][:, 10:]
    own = (through(model, idx, 10, 1) - exact).square().mean().sqrt()
    found = (through(native.speed_up(model), idx, 10, 1) - exact).square().mean().sqrt()
    assert found <= 1.2 * own < 0.1 * exact.std() and len(calls) == 28


@pytest.mark.parametrize(("B", "step"), [(1, 1), (1, 7), (3, 2), (8, 1)])
@pytest.mark.parametrize(("C", "H"), SHAPES)
def test_in_int8_the_logits_are_nearly_those_of_the_rounded_weights(C, H, B, step, calls):
    model, idx = shaped(C, H, n_layer=1), torch.randint(97, (B, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = rounded(model).double()(idx)[0][:, 10:]
    found = through(native.speed_up(int8.quantize(model)), idx, 10, step)
    assert (found - exact).square().mean().sqrt() < 0.03 * exact.std() and len(calls) == 2 * -(-14 // step)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
@pytest.mark.parametrize(("width", "out"), [(1, 5), (2, 1), (7, 9), (64, 48), (100, 3), (768, 257), (3072, 33)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_product_is_that_of_what_is_stored(dtype, width, out, rows, calls):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(width, out), torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]
    stands_for, tokens = layer.weight.detach().double(), x.double()
    if dtype == "int8":
        weight, scales = int8.to_int8(layer.weight.detach())
        whole, steps = int8.to_int8(x)
        stands_for, tokens = weight.double() * scales[:, None].double(), whole.double() * steps[:, None].double()
        layer = int8.Int8Linear(weight, scales, layer.bias)
    elif dtype == "bfloat16":
        layer.weight.data = layer.weight.data.bfloat16()
        stands_for = layer.weight.detach().double()
    exact, terms = tokens @ stands_for.T + layer.bias.double(), tokens.abs() @ stands_for.abs().T + 1
    tie = (
        0.02 if dtype == "int8" else 0
    )  # a number half way between two whole ones may go to either, one in hundreds does
    layer.forward = native.native_linear(layer)
    if dtype == "bfloat16" and rows > native.most_rows(torch.bfloat16):
        pytest.skip("PyTorch's turn")
    with torch.no_grad():
        found = layer(x)
    assert (
        found.shape == (rows, out) and ((found - exact).abs() <= (1e-6 + tie) * terms).all() and calls == ["gpt_linear"]
    )
    if dtype == "int8":
        assert ((found - exact).abs() <= 1e-6 * terms).double().mean() >= 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_whole_numbers_add_up(sign):
    layer = int8.Int8Linear(torch.full((40, 3072), 127, dtype=torch.int8), torch.full((40,), 1 / 127), None)
    with torch.no_grad():
        assert (native.native_linear(layer)(sign * torch.ones(5, 3072)) - sign * 3072).abs().max() < 0.01


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_not_finite_stays_so(dtype, damage, calls):
    x, layer = torch.ones(1, 40), torch.nn.Linear(40, 3).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if dtype == "int8":
        layer = int8.Int8Linear(*int8.to_int8(layer.weight.detach()), layer.bias)
    x[0, 17] = damage
    with torch.no_grad():
        assert not native.native_linear(layer)(x).isfinite().any() and calls
    model = shaped(40, 5)
    model.transformer.h[1].ln_2.bias.data[3] = damage
    model = int8.quantize(model) if dtype == "int8" else model.to(layer.bias.dtype)
    assert not through(native.speed_up(model), torch.arange(5)[None], 3, 1).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("B", [1, 8, 9])
def test_generating_goes_on_past_the_context_and_is_the_same_as_before(dtype, B, calls):
    model, idx = shaped(40, 5, block_size=12), torch.randint(97, (B, 3), generator=torch.Generator().manual_seed(0))
    model = int8.quantize(model) if dtype == torch.int8 else model
    before = model.generate(idx, 30, temperature=0)
    assert torch.equal(native.speed_up(model).generate(idx, 30, temperature=0), before)
    assert ("gpt_blocks" in calls) == ("gpt_linear" in calls) == (B <= 8)


def test_the_number_of_threads_changes_nothing(calls):
    model, idx, threads = native.speed_up(shaped(96, 3)), torch.arange(24)[None], torch.get_num_threads()
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append(through(model, idx, 20, 1))
    torch.set_num_threads(threads)
    prompts_apart = (found[0] - found[1]).abs().max()  # these are PyTorch's, whose sums may depend on the threads
    assert prompts_apart < 1e-4 and torch.allclose(found[0], found[2], atol=1e-4) and calls
    layer = torch.nn.Linear(100, 30)
    x, results = torch.randn(3, 100), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        with torch.no_grad():
            results.append(native.native_linear(layer)(x))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_training_and_what_asks_for_gradients_is_left_alone(calls):
    model, idx = native.speed_up(shaped(16, 2)), torch.arange(8)[None]
    model(idx, idx)[1].backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0 and calls == []
    caches = [gpt.KVCache(24) for _ in model.transformer.h]
    model.hidden(idx, caches)
    assert model.hidden(idx[:, :1], caches).requires_grad
    model.requires_grad_(False).train()
    with torch.no_grad():
        model.hidden(idx[:, :1], caches)
    assert calls == [] and caches[0].length == 10


def test_bad_input_is_refused_as_before(calls):
    model = native.speed_up(shaped(16, 2))
    caches = [gpt.KVCache(24) for _ in model.transformer.h]
    with torch.no_grad():
        model.hidden(torch.arange(24)[None], caches)
        with pytest.raises(gpt.InputError, match="25 tokens do not fit into the context of 24"):
            model.hidden(torch.tensor([[1]]), caches)
        caches = [gpt.KVCache(8) for _ in model.transformer.h]
        model.hidden(torch.arange(8)[None], caches)
        with pytest.raises(gpt.InputError, match="9 tokens do not fit into a cache for 8"):
            model.hidden(torch.tensor([[1]]), caches)
    assert calls == []


def test_a_token_outside_the_vocabulary_is_refused_as_before(calls):
    model = native.speed_up(shaped(16, 2))
    with torch.no_grad(), pytest.raises(IndexError):
        through(model, torch.tensor([[1, 2, 97]]), 2, 1)
    assert calls == []


def test_a_cache_of_another_batch_is_no_place_to_write_to(calls):
    model = native.speed_up(shaped(16, 2))
    caches = [gpt.KVCache(24) for _ in model.transformer.h]
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2]]), caches)
        with pytest.raises(RuntimeError):
            model.hidden(torch.tensor([[1], [2], [3], [4]]), caches)
    assert calls == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_batch_may_lie_across_memory(dtype, calls):
    model, idx = shaped(40, 5), torch.randint(97, (6, 2), generator=torch.Generator().manual_seed(0)).T
    model = native.speed_up(int8.quantize(model) if dtype == "int8" else model)
    assert torch.allclose(through(model, idx, 2, 2), through(model, idx.contiguous(), 2, 2), atol=1e-5) and calls


@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.double], ids=["bfloat16", "float64"])
def test_what_is_converted_afterwards_does_not_lead_into_the_void(change, calls):
    """The weights of before are still there, and still used."""
    model, idx = native.speed_up(shaped(40, 5)), torch.arange(20)[None]
    before = through(model, idx, 18, 1)
    layer, x = model.lm_head, torch.ones(1, 40)
    with torch.no_grad():
        first = layer(x)
        change(model)
        clutter = [torch.full((97, 40), 7.0) for _ in range(50)]  # onto what was freed
        assert torch.equal(layer(x), first) and before.isfinite().all() and len(clutter) == 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_left_alone(dtype, calls):
    assert "hidden" not in vars(native.speed_up(shaped(16, 2).to(dtype))) and calls == []


def test_int8_beside_bfloat16_scales(calls, capsys):
    model, idx = int8.quantize(shaped(40, 5)).to(torch.bfloat16), torch.arange(20)[None]
    assert native.speed_up(model).generate(idx, 4, temperature=0).shape == (1, 24) and calls


def test_the_default_type_of_tensors_does_not_matter(calls):
    model, idx = shaped(40, 5), torch.arange(20)[None]
    before = through(native.speed_up(model), idx, 16, 1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = through(model, idx, 16, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, before) and calls


def test_a_model_with_an_adapter_is_left_alone(calls):
    model, idx = lora.adapt(shaped(16, 2)), torch.arange(8)[None]
    for p in model.parameters():
        p.data += 0.01
    before = model.generate(idx, 10, temperature=0)
    assert torch.equal(native.speed_up(model).generate(idx, 10, temperature=0), before) and calls == []


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "", "cc -no-such-flag", "echo", "gcc '"])
def test_without_a_compiler_nothing_changes(compiler, monkeypatch, capfd):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(compiled, "begin", lambda: ThreadPoolExecutor(1).submit(compiled.build))
    monkeypatch.setattr(native, "load", compiled.load.__wrapped__)
    model = native.speed_up(shaped(16, 2))
    assert "hidden" not in vars(model) and "forward" not in vars(model.lm_head)
    assert model.generate(torch.arange(4)[None], 10).shape == (1, 14) and capfd.readouterr() == ("", "")


def test_compiling_leaves_nothing_behind_and_happens_once(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    built = []
    monkeypatch.setattr(
        compiled,
        "begin",
        functools.cache(lambda: ThreadPoolExecutor(1).submit(lambda: built.append(1) or compiled.build())),
    )
    monkeypatch.setattr(compiled, "load", functools.cache(compiled.load.__wrapped__))
    compiled.begin()
    assert compiled.load() is compiled.load() is not None and built == [1] and list(tmp_path.iterdir()) == []


def test_without_room_for_the_library_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(compiled, "begin", lambda: ThreadPoolExecutor(1).submit(compiled.build))
    assert compiled.load.__wrapped__() is None


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sampling_gives_the_same_text_in_c_and_without(dtype, prose, monkeypatch, capsys, calls):
    gpt.main([*TINY, "--data", str(prose), "--max_steps", "40"])
    texts = []
    for in_c in (True, False):
        capsys.readouterr()
        with monkeypatch.context() as patched:
            if not in_c:
                patched.setattr(native, "speed_up", lambda model: model)
            sample.main(
                ["--model", "prose", "--prompt", "the", "--dtype", dtype, "--max_new_tokens", "40", "--device", "cpu"]
            )
        texts.append(capsys.readouterr().out)
        assert bool(calls) == in_c
        del calls[:]
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_the_loss_of_a_trained_model_stays_within_half_a_percent(prose, capsys):
    gpt.main([*TINY, "--data", str(prose), "--n_embd", "64", "--max_steps", "60", "--eval_interval", "60"])
    model, tokenizer = gpt.load_checkpoint("prose")
    idx = torch.tensor(tokenizer.encode(prose.read_text())[:1600]).view(-1, 16)[:96]  # windows as wide as the context
    losses = []
    for prepared in (model, native.speed_up(int8.quantize(copy.deepcopy(model)))):
        logits = torch.cat([through(prepared, rows, 1, 1)[:, :-1] for rows in idx.split(8)])  # (B, T - 2, V)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 2:].flatten()).item())
    assert losses[0] < 3.5 and losses[0] != losses[1] == pytest.approx(losses[0], rel=0.005)


def test_both_sides_agree_on_the_most_rows():
    assert f"enum {{ MOST_ROWS = {native.MOST_ROWS} }};" in compiled.SOURCE.read_text()


def test_the_compiler_has_no_complaint():
    strict = ["-Wall", "-Wextra", "-Werror", "-std=c99", "-pedantic", "-fsyntax-only"]
    done = subprocess.run(
        [*compiled.compiler(), *compiled.FLAGS, *strict, compiled.SOURCE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
