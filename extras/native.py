"""Generation in C: native.c computes all blocks of a GPT for a token of each stream in one call, and its head.

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
MOST_ROWS = 8  # as in native.c


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
    library, number, pointer = ctypes.CDLL(str(path)), ctypes.c_long, ctypes.c_void_p
    library.gpt_linear.argtypes = [pointer, number, *[pointer] * 3, ctypes.c_int]
    library.gpt_blocks.argtypes = [pointer, *[number] * 2, *[pointer] * 3, *[number] * 3, pointer, ctypes.c_int]
    library.gpt_linear.restype = library.gpt_blocks.restype = None
    return library


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
    weight = pointer(layer.weight, layer.weight.dtype, kept)
    bias = pointer(layer.bias, torch.float32, kept)
    scales = pointer(getattr(layer, "scales", None), torch.float32, kept)
    sums = pointer(getattr(layer, "sums", None), torch.int32, kept)
    return Linear(TYPES[layer.weight.dtype], n_in, n_out, weight, bias, scales, sums)


def layers_of(block):
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


def structure(block, kept):
    """gpt.Block -> its structure."""
    norms = [*block.ln_1.parameters(), *block.ln_2.parameters()]  # weight and bias of each
    norms = [pointer(p, torch.float32, kept) for p in norms]
    layers = [linear(layer, kept) for layer in layers_of(block)]
    return Block(block.attn.n_head, len(block.ln_1.weight), *norms, *layers)


def multiply(layer, x):
    """A linear layer's product in C: x (B, n_in), at most MOST_ROWS rows -> (B, n_out), of x's type."""
    x32 = x.float().contiguous()
    y = x32.new_empty(len(x), layer.n_out)
    work = x32.new_empty(MOST_ROWS + x.numel())
    addresses = [tensor.data_ptr() for tensor in (x32, y, work)]
    load().gpt_linear(ctypes.byref(layer), len(x), *addresses, torch.get_num_threads())
    return y.to(x.dtype)


# ---- Generation ----
def resolve_dtype(name, device):
    """As gpt.resolve_dtype, but auto is bfloat16 on every processor that has its instructions.

    A generated token reads all weights once, so their size counts, even where products of bfloat16 are slow.
    """
    has_bfloat16 = any(value and "bf16" in key for key, value in torch.cpu.get_capabilities().items())
    if name == "auto" and device.type == "cpu" and has_bfloat16:
        return torch.bfloat16
    return gpt.resolve_dtype(name, device)


def applies(model):
    """Whether C can generate: in eval mode, on a CPU, with ordinary or int8 layers and no adapter."""
    layers = [model.lm_head, *(layer for block in model.transformer.h for layer in layers_of(block))]
    plain = all(type(layer) is nn.Linear or hasattr(layer, "scales") for layer in layers)
    known = plain and all(layer.weight.dtype in TYPES and layer.weight.device.type == "cpu" for layer in layers)
    return known and not model.training and load() is not None


class Generation:
    """The weights of a GPT as they are now, and the two of its parts that GPT.stream calls."""

    def __init__(self, model):
        self.model, self.config, self.transformer = model, model.config, model.transformer
        self.kept = []
        blocks = [structure(block, self.kept) for block in model.transformer.h]
        self.blocks = (Block * len(blocks))(*blocks)
        self.head = linear(model.lm_head, self.kept)
        emulated = gpt.resolve_dtype("auto", torch.device("cpu")) != torch.bfloat16
        self.most_rows = MOST_ROWS if emulated or model.lm_head.weight.dtype != torch.bfloat16 else 2  # C is faster

    def hidden(self, idx, caches):
        """GPT.hidden: the prompt in PyTorch, the tokens after it, idx (B, 1), in C."""
        B, past = len(idx), caches[0].length
        if past == 0 or self.most_rows < B or caches[0].k.dtype not in TYPES:
            return self.model.hidden(idx, caches)
        embedded = self.transformer.wte(idx) + self.transformer.wpe.weight[past : past + 1]  # (B, 1, C) + (1, C)
        x = embedded.float().contiguous()
        work = x.new_empty(MOST_ROWS + 6 * x.numel())
        pointers = ctypes.c_void_p * len(caches)
        keys = pointers(*[cache.k.data_ptr() for cache in caches])
        values = pointers(*[cache.v.data_ptr() for cache in caches])
        cached = (keys, values, TYPES[caches[0].k.dtype], past, caches[0].max_length)
        rest = (work.data_ptr(), torch.get_num_threads())
        load().gpt_blocks(self.blocks, len(caches), B, x.data_ptr(), *cached, *rest)
        for cache in caches:
            cache.length += 1
        return self.transformer.ln_f(x.to(embedded.dtype))

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
