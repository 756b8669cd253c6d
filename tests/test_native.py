"""Generation in C: the numbers of PyTorch, the weights of the model, and a library that no one else can replace."""

import copy
import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import enlarge

import gpt
import sample
from extras import int8, lora, native

if native.load() is None:
    pytest.skip("there is no C compiler with OpenMP", allow_module_level=True)

SHAPES = [(16, 16), (7, 1), (40, 5), (192, 3)]  # n_embd, n_head


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions in C, each time one is called."""
    found, library = [], native.load()

    class Recorder:
        def __getattr__(self, name):
            found.append(name)
            return getattr(library, name)

    monkeypatch.setattr(native, "load", Recorder)
    return found


def make(C=40, H=5, dtype="float32", block_size=24):
    config = gpt.GPTConfig(block_size=block_size, vocab_size=97, n_layer=2, n_head=H, n_embd=C)
    model = enlarge(gpt.GPT(config))
    return int8.quantize(model) if dtype == "int8" else model.to(getattr(torch, dtype))


@torch.no_grad()
def in_float64(model, idx):
    """The logits of the stored weights, in float64."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        module.integers, module.MOST_ROWS = False, 0  # int8: ordinary products with unpacked weights
    return exact(idx)[0]


@torch.no_grad()
def step_by_step(model, idx, prompt):
    """Logits (B, T - prompt, V) of a GPT or Generation, a token at a time after the prompt."""
    caches = [gpt.KVCache(idx.shape[1]) for _ in model.transformer.h]
    model.hidden(idx[:, :prompt], caches)
    steps = idx[:, prompt:].split(1, dim=1)
    return torch.stack([model.lm_head(model.hidden(step, caches)[:, -1]).float() for step in steps], dim=1)


def random_ids(B, T):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("B", [1, 2, 5, 8])
@pytest.mark.parametrize(("C", "H"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_logits_are_as_close_to_float64_as_those_of_pytorch(dtype, C, H, B, calls):
    """In float32 they are 0.5 to 1.1 times as far off, on one processor; in int8, tokens are rounded, too."""
    model, idx = make(C, H, dtype), random_ids(B, 24)
    generation, exact = native.Generation(model), in_float64(model, idx)[:, 10:]
    found, own = ((step_by_step(each, idx, 10) - exact).square().mean().sqrt() for each in (generation, model))
    assert found < {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.04}[dtype] * exact.std()
    assert dtype == "int8" or found <= {"float32": 2, "bfloat16": 1.2}[dtype] * own
    assert [name for name in calls if name in ("gpt_blocks", "gpt_linear")] == ["gpt_blocks", "gpt_linear"] * (
        14 if generation.most_rows >= B else 0
    )


@pytest.mark.parametrize("native_bfloat16", [False, True])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 150), (9, 20)])
@pytest.mark.parametrize(("C", "H"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_prompt_is_read_as_by_pytorch(dtype, C, H, B, T, native_bfloat16, calls, monkeypatch):
    """The logits after it, and the keys and values of all its tokens; with C before and after products of int8."""
    monkeypatch.setattr(native, "native_bfloat16", lambda: native_bfloat16)
    model, idx = make(C, H, dtype, block_size=200), random_ids(B, T)
    generation, caches = native.Generation(model), [gpt.KVCache(T + 1) for _ in range(4)]
    with torch.no_grad():
        found = generation.lm_head(generation.hidden(idx, caches[:2])[:, -1])
        model.hidden(idx, caches[2:])
    exact, bound = in_float64(model, idx)[:, -1], {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.04}[dtype]
    assert (found - exact).square().mean().sqrt() < bound * exact.std()
    for cache, expected in zip(caches[:2], caches[2:], strict=True):
        off = cache.v[:, :, :T] - expected.v[:, :, :T]
        assert cache.k.dtype == expected.k.dtype and off.square().mean().sqrt() < bound * expected.v[:, :, :T].std()
    in_c = {"float32": False, "bfloat16": not native_bfloat16, "int8": int8.has_vnni()}[dtype] and T > 1
    assert calls.count("gpt_finish") == (8 if in_c else 0), "four products in each of two blocks"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_add_up(sign):
    layer = int8.Int8Linear(torch.full((40, 3072), 127, dtype=torch.int8), torch.full((40,), 1 / 127), None)
    kept = []
    assert (native.multiply(native.linear(layer, kept), sign * torch.ones(5, 3072)) - sign * 3072).abs().max() < 0.01


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_numbers_that_are_not_finite_stay_so(dtype, damage, calls):
    model = make(dtype=dtype)
    model.transformer.h[1].ln_2.bias.data[3] = damage
    assert not step_by_step(native.Generation(model), torch.arange(5)[None], 3).isfinite().any() and calls


def test_large_scores_do_not_overflow(calls):
    model, idx = make(16, 2), random_ids(1, 24)
    model.transformer.h[0].attn.c_attn.weight.data[:32] *= 5  # queries and keys: scores up to 100 above the first
    exact = in_float64(model, idx)[:, 10:]
    assert (step_by_step(native.Generation(model), idx, 10) - exact).abs().max() < 1e-3 * exact.std() and calls


@pytest.mark.parametrize(("B", "T"), [(1, 3), (8, 3), (9, 3), (8, 40)])
def test_generation_past_the_context_is_that_of_the_model(B, T, calls):
    model, idx = make(block_size=12), random_ids(B, T)
    faster = native.speed_up(model)
    assert torch.equal(faster.generate(idx, 30, temperature=0), model.generate(idx, 30, temperature=0))
    assert ("gpt_blocks" in calls) == ("gpt_linear" in calls) == (B <= 8) and faster.config is model.config


def in_place(model):
    for p in model.parameters():
        p.copy_(p.roll(1, 0))


def exchange(model):
    for p in model.parameters():
        p.data = p.data.roll(1, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [in_place, exchange])
def test_a_later_change_of_the_weights_is_seen(dtype, change, calls):
    model, idx = make(dtype=dtype), random_ids(1, 8)
    faster = native.speed_up(model)
    before = faster.generate(idx, 8, temperature=0)
    with torch.no_grad():
        change(model)
    anew = native.speed_up(copy.deepcopy(model)).generate(idx, 8, temperature=0)
    del calls[:]
    assert torch.equal(faster.generate(idx, 8, temperature=0), anew) and not torch.equal(anew, before)
    assert calls


@pytest.mark.parametrize("reason", ["float64", "float16", "adapter", "training"])
def test_where_c_does_not_apply_the_model_itself_generates(reason, calls):
    model = make()
    faster = native.speed_up(model)
    model = lora.adapt(model) if reason == "adapter" else model.train(reason == "training")
    model.to(getattr(torch, reason, torch.float32))
    faster.generate(random_ids(1, 3), 3)
    assert native.speed_up(model) is model and calls == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sample_gives_the_same_text_in_c_and_without(dtype, mine, capsys, calls):
    flags = ["--model", "mine", "--prompt", "the", "--dtype", dtype, "--max_new_tokens", "40", "--device", "cpu"]
    sample.main([*flags, "--no-native"])
    assert calls == []
    in_pytorch = capsys.readouterr().out
    sample.main(flags)
    in_c = capsys.readouterr().out
    assert calls and len(in_c) > 15 and (in_c == in_pytorch or dtype == "int8")


# ---- The library ----
@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, from which load() starts anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "FLAGS", ["-O0", "-fopenmp"])  # compiles in no time
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    return tmp_path / "cache" / "gpt-native"


@pytest.fixture
def loaded(monkeypatch):
    """The paths of the libraries that were loaded."""
    paths, load = [], ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: paths.append(Path(path)) or load(path))
    return paths


def test_the_library_is_compiled_once_for_each_source_and_compiler(cache, loaded, monkeypatch, tmp_path):
    run, commands = native.run_compiler, []
    monkeypatch.setattr(native, "run_compiler", lambda *arguments: commands.append(arguments[0]) or run(*arguments))
    assert native.load() and native.load()
    assert commands == ["-dM", "-shared", "-dM"] and [*cache.iterdir()] == [loaded[0]] == [loaded[1]]
    assert cache.stat().st_mode & 0o777 == 0o700
    (tmp_path / "native.c").write_text(native.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.c")
    assert native.load() and loaded[2] != loaded[0]
    monkeypatch.setenv("CC", "cc -DANOTHER_COMPILER=1")
    assert native.load() and len({*loaded}) == len([*cache.iterdir()]) == 3


@pytest.mark.parametrize("folder", ["open to others", "of someone else", "a link"])
def test_a_library_is_never_loaded_from_a_folder_that_others_can_change(folder, cache, loaded, monkeypatch, tmp_path):
    cache.parent.mkdir()
    if folder == "a link":
        cache.symlink_to(tmp_path)
    else:
        cache.mkdir(mode=0o700)
        cache.chmod(0o777 if folder == "open to others" else 0o700)
    if folder == "of someone else":
        monkeypatch.setattr(native.os, "getuid", lambda: 12345)
    assert native.load() and len(loaded) == 1
    assert not {cache, tmp_path} & {*loaded[0].parents} and not loaded[0].exists(), "its temporary folder is gone"


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "", "echo", "gcc '"])
def test_without_a_compiler_the_model_itself_generates(compiler, cache, monkeypatch, capfd):
    monkeypatch.setenv("CC", compiler)
    model = make()
    assert native.speed_up(model) is model and capfd.readouterr() == ("", "")


def test_the_compiler_has_no_complaint_and_both_sides_have_the_same_limit():
    assert f"enum {{ MOST_ROWS = {native.MOST_ROWS} }};" in native.SOURCE.read_text()
    strict = ["-Wall", "-Wextra", "-Werror", "-std=c99", "-pedantic", "-fsyntax-only", native.SOURCE]
    done = subprocess.run(["cc", *native.FLAGS, *strict], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
