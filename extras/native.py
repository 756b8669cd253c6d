"""Generation in C: native.c computes all blocks of a GPT for a token of each stream in one call, and its head. Prompts
are read by PyTorch, with C around its products of int8.

For each token, PyTorch starts some thirty operations per block, eighty in int8, which can take longer than the
arithmetic. `speed_up(model)` returns a NativeGPT, which generates the same in less time. Where C does not apply (no
compiler with OpenMP, a GPU, an adapter), it returns the model itself. Everything but generation stays with the model.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

import gpt
from gpt import GPT

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ["-O3", "-march=native", "-fopenmp"]
FLAGS += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]  # sums may be reordered
FLAGS += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MOST_ROWS, STORE, ADD, GELU = 8, 0, 1, 2  # as in native.c


# ---- The library: compiled once, then kept in the user's cache ----
def run_compiler(*arguments):
    """-> what the compiler prints; $CC names it."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *arguments]
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60).stdout


def cache_folder():
    """~/.cache/gpt-native, made if missing. Raises OSError unless it is this user's alone: a library is code."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "gpt-native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()  # of a link itself, not of its target
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to others")
    return folder


def open_library(folder):
    """native.c as a library of this process, compiled into a folder unless it is there already."""
    macros = run_compiler("-dM", "-E", SOURCE)  # among them the compiler's version and the processor's instructions
    key = hashlib.sha256(SOURCE.read_bytes() + macros + " ".join(FLAGS).encode()).hexdigest()
    path = folder / f"{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as part:
            run_compiler("-shared", "-fPIC", SOURCE, "-o", Path(part, path.name), "-lm")
            Path(part, path.name).replace(path)
    return ctypes.CDLL(str(path))


@functools.cache
def load():
    """The library, or None if it can't be compiled. Without a private cache, it is compiled for this process alone."""
    # ValueError if $CC can't be parsed, RuntimeError without a home, AttributeError on Windows, which has no getuid
    unavailable = (OSError, subprocess.SubprocessError, ValueError, RuntimeError, AttributeError)
    with suppress(*unavailable):
        return open_library(cache_folder())
    with suppress(*unavailable), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return open_library(Path(folder))  # stays in memory when its file is gone
    return None


def call(function, *arguments):
    """Call a function of native.c with addresses of tensors, whole numbers as long, and the number of threads."""
    converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in (*converted, torch.get_num_threads())]
    getattr(load(), function)(*converted)


# ---- The structures of native.c ----
class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("type", "n_in", "n_out")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("weight", "bias", "scales", "sums")]


class Block(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("n_head", "n_embd")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("ln_1_weight", "ln_1_bias", "ln_2_weight", "ln_2_bias")]
    _fields_ += [(name, Linear) for name in ("c_attn", "attn_proj", "c_fc", "mlp_proj")]


def pointer(tensor, dtype, kept):
    """The address of a tensor's numbers; the list `kept` holds the tensor, so that they stay there."""
    if tensor is None:
        return None
    kept.append(tensor.detach().to(dtype).contiguous())  # shares memory where it is of this type already
    return kept[-1].data_ptr()


def linear(layer, kept):
    """nn.Linear or Int8Linear -> its structure."""
    n_out, n_in = layer.weight.shape
    dtypes = {"weight": layer.weight.dtype, "bias": torch.float32, "scales": torch.float32, "sums": torch.int32}
    addresses = [pointer(getattr(layer, name, None), dtype, kept) for name, dtype in dtypes.items()]
    return Linear(TYPES[layer.weight.dtype], n_in, n_out, *addresses)


def layers_of(block):
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


def structure(block, kept):
    """gpt.Block -> its structure."""
    norms = [pointer(p, torch.float32, kept) for p in (*block.ln_1.parameters(), *block.ln_2.parameters())]
    layers = [linear(layer, kept) for layer in layers_of(block)]
    return Block(block.attn.n_head, len(block.ln_1.weight), *norms, *layers)


def multiply(layer, x):
    """A linear layer's product in C: x (B, n_in), at most MOST_ROWS rows -> (B, n_out), of x's type."""
    x32 = x.float().contiguous()
    y = x32.new_empty(len(x), layer.n_out)
    call("gpt_linear", ctypes.byref(layer), len(x), x32, y, x32.new_empty(16 + x.numel()))
    return y.to(x.dtype)


def multiply_many(layer, weight, x, y=None, after=STORE):
    """The same for many rows, but y += product after ADD: PyTorch adds up the products, C does the rest."""
    x = x.float().flatten(0, -2).contiguous()
    if weight.dtype == torch.int8:
        integers, steps = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x))
        call("gpt_quantize", x, *x.shape, integers, steps)
        sums = torch._int_mm(integers, weight.T)
    else:
        sums, steps = x @ weight.float().T, None  # bfloat16 is widened once for all rows
    y = sums.view(torch.float32) if y is None else y
    call("gpt_finish", ctypes.byref(layer), len(x), sums, steps, y, after)
    return y


# ---- Generation ----
def resolve_dtype(name, device):
    """As gpt.resolve_dtype, but auto is bfloat16 on every processor with its instructions: half the bytes to read."""
    has_bfloat16 = any(value and "bf16" in key for key, value in torch.cpu.get_capabilities().items())
    smaller = name == "auto" and device.type == "cpu" and has_bfloat16
    return torch.bfloat16 if smaller else gpt.resolve_dtype(name, device)


def applies(model):
    """Whether C can generate: in eval mode, on a CPU, with ordinary or int8 layers and no adapter."""
    layers = [model.lm_head, *(layer for block in model.transformer.h for layer in layers_of(block))]
    plain = all(type(layer) is nn.Linear or hasattr(layer, "scales") for layer in layers)
    known = plain and all(layer.weight.dtype in TYPES and layer.weight.device.type == "cpu" for layer in layers)
    return known and not model.training and load() is not None


def native_bfloat16():
    return gpt.resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16


class Generation:
    """The weights of a GPT as they are now, and the two of its parts that GPT.stream calls."""

    def __init__(self, model):
        self.model, self.config, self.transformer, self.kept = model, model.config, model.transformer, []
        blocks = [structure(block, self.kept) for block in model.transformer.h]
        self.blocks = (Block * len(blocks))(*blocks)
        self.head = linear(model.lm_head, self.kept)
        dtype, fast, can = model.lm_head.weight.dtype, native_bfloat16(), torch.cpu.get_capabilities()
        vnni = can.get("avx512_vnni") or can.get("avx_vnni")  # without it, sums of int8 products overflow
        self.helps = {torch.int8: vnni, torch.bfloat16: not fast}.get(dtype, False)  # with prompts
        has_dots = dtype != torch.bfloat16 or not fast or can.get("avx512_bf16")
        self.most_rows = MOST_ROWS if has_dots else 2  # of more, PyTorch is faster

    def hidden(self, idx, caches):
        """GPT.hidden for a prompt, of which the last position is enough, or for the tokens after it, idx (B, 1)."""
        (B, T), past = idx.shape, caches[0].length
        prompt = past == 0 and self.helps and B * T > 16 and self.config.n_embd > 1  # _int_mm is wrong for one column
        token = past > 0 and T == 1 and self.most_rows >= B and caches[0].k.dtype in TYPES
        if not (prompt or token):
            return self.model.hidden(idx, caches)
        embedded = self.transformer.wte(idx) + self.transformer.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        x = embedded.float().contiguous()
        if prompt:
            x = self.read_prompt(x, caches, embedded.dtype)
        else:
            keys, values = [(ctypes.c_void_p * len(caches))() for _ in range(2)]
            for i, cache in enumerate(caches):
                keys[i], values[i] = cache.k.data_ptr(), cache.v.data_ptr()
                cache.length += 1
            cached = (keys, values, TYPES[cache.k.dtype], past, cache.max_length)
            call("gpt_blocks", self.blocks, len(caches), B, x, *cached, x.new_empty(16 + 7 * x.numel()))
        return self.transformer.ln_f(x.to(embedded.dtype))

    def read_prompt(self, x, caches, dtype):
        """x (B, T, C) through all blocks, by products of many rows, with a cache of dtype -> the last position."""
        B, T, C = x.shape
        for block, c, cache in zip(self.transformer.h, self.blocks, caches, strict=True):
            qkv = multiply_many(c.c_attn, block.attn.c_attn.weight, block.ln_1(x.to(dtype)))
            q, k, v = qkv.view(B, T, 3, c.n_head, C // c.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
            k, v = cache.append(k.to(dtype), v.to(dtype))
            if cache is caches[-1]:  # the other positions are needed no further
                q, x = q[:, :, -1:], x[:, -1:].contiguous()
            y = gpt.attention(q, k.float(), v.float()).transpose(1, 2).flatten(2)
            multiply_many(c.attn_proj, block.attn.c_proj.weight, y, x, ADD)
            y = multiply_many(c.c_fc, block.mlp.c_fc.weight, block.ln_2(x.to(dtype)), after=GELU)
            multiply_many(c.mlp_proj, block.mlp.c_proj.weight, y, x, ADD)
        return x

    def lm_head(self, x):
        return multiply(self.head, x) if len(x) <= self.most_rows else self.model.lm_head(x)


class NativeGPT:
    """A GPT that generates in C. It shares the model's weights, and each generation takes them as they are then."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def stream(self, idx, max_new_tokens, *args, **options):
        """As GPT.stream, whose loop it runs."""
        model = Generation(self.model) if applies(self.model) else self.model
        yield from GPT.stream(model, idx, max_new_tokens, *args, **options)

    generate = GPT.generate


def speed_up(model):
    """A GPT -> what generates for it: a NativeGPT, or the model itself where C does not apply."""
    return NativeGPT(model) if applies(model) else model
