"""Generation in C: native.c computes the blocks of a GPT and its head for the few tokens of a step.

For each token, PyTorch starts some thirty operations per block, eighty in int8, which can take longer than the
arithmetic. If native.c compiles, `speed_up` makes it compute the steps after the prompt. Otherwise, and for everything
but generation, the model stays as it was.
"""

import ctypes

import torch
from torch import nn

from extras.compiled import load
from gpt import resolve_dtype

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MOST_ROWS = 8  # as in native.c


class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("type", "n_in", "n_out")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("weight", "bias", "scales", "sums")]


class Block(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("n_head", "n_embd")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("ln_1_weight", "ln_1_bias", "ln_2_weight", "ln_2_bias")]
    _fields_ += [(name, Linear) for name in ("c_attn", "attn_proj", "c_fc", "mlp_proj")]


def most_rows(dtype):
    """Up to how many tokens at a time C is faster than PyTorch."""
    return 2 if dtype == torch.bfloat16 == resolve_dtype("auto", torch.device("cpu")) else MOST_ROWS


def addresses(tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def linear(layer):
    """The structure of a linear layer, and the tensors it points to, which must live as long."""
    bias, scales = (
        None if part is None else part.detach().float() for part in (layer.bias, getattr(layer, "scales", None))
    )
    weight = layer.weight.detach().contiguous()  # a tensor of its own: that of a parameter may be exchanged
    tensors = [weight, bias, scales, None if scales is None else weight.sum(1, dtype=torch.int32)]
    return Linear(TYPES[layer.weight.dtype], *reversed(layer.weight.shape), *addresses(tensors)), tensors


def block(block):
    """The structure of a Block, and the tensors that it points to."""
    norms = [p.detach().float() for p in (block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias)]
    layers, tensors = zip(
        *map(linear, (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)), strict=True
    )
    return Block(block.attn.n_head, len(norms[0]), *addresses(norms), *layers), (norms, tensors)


def native_hidden(model):
    """-> GPT.hidden(idx, caches), its blocks in C where idx (B, T) goes on after what is in the caches."""
    original, parts, n_layer = model.hidden, model.transformer, len(model.transformer.h)
    most, (structures, tensors) = most_rows(parts.h[0].attn.c_attn.weight.dtype), zip(*map(block, parts.h), strict=True)
    blocks, pointers = (Block * n_layer)(*structures), ctypes.c_void_p * n_layer
    blocks.tensors = tensors  # kept alive

    def hidden(idx, caches=None):
        B, T = idx.shape
        past, room = (caches[0].length, caches[0].max_length) if caches else (0, 0)
        begun = past > 0 and len(caches[0].k) == B and caches[0].k.dtype in (torch.float32, torch.bfloat16)
        fits = past + T <= min(room, model.config.block_size) and idx.max() < model.config.vocab_size and most >= B * T
        if not (begun and fits) or torch.is_grad_enabled() or model.training:
            return original(idx, caches)
        embedded = parts.wte(idx) + parts.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        x, work = embedded.float().contiguous(), torch.empty(MOST_ROWS + 6 * embedded.numel(), dtype=torch.float32)
        keys, values = (
            pointers(*addresses(tensors)) for tensors in zip(*((cache.k, cache.v) for cache in caches), strict=True)
        )
        load().gpt_blocks(blocks, n_layer, x.data_ptr(), keys, values, TYPES[caches[0].k.dtype], B, T, past,
                             room, work.data_ptr(), torch.get_num_threads())  # fmt: skip
        for cache in caches:
            cache.length += T
        return parts.ln_f(x.to(embedded.dtype))

    return hidden


def native_linear(layer):
    """-> forward(x) of a linear layer, in C where x (..., C) has few rows."""
    original, most = layer.forward, most_rows(layer.weight.dtype)
    facts, tensors = linear(layer)
    facts.tensors = tensors  # kept alive

    def forward(x):
        rows = x.shape[:-1].numel()
        if rows > most or torch.is_grad_enabled():
            return original(x)
        x32 = x.float().contiguous()
        y, work = x32.new_empty(*x.shape[:-1], facts.n_out), x32.new_empty(MOST_ROWS + x.numel())
        load().gpt_linear(ctypes.byref(facts), *addresses([x32, y]), rows, work.data_ptr(), torch.get_num_threads())
        return y.to(x.dtype)

    return forward


@torch.no_grad()
def speed_up(model):
    """Let native.c compute the generation steps of a GPT, in place, if possible.

    Call it last: a model that is changed, converted or copied afterwards goes on with the present weights.
    """
    layers = [layer for block in model.transformer.h for layer in (*block.attn.children(), *block.mlp.children())]
    layers = [layer for layer in [*layers, model.lm_head] if hasattr(layer, "weight")]
    known = [type(layer) is nn.Linear or hasattr(layer, "scales") for layer in layers]  # or of int8, without an adapter
    plain = all(known) and all(layer.weight.dtype in TYPES for layer in layers)
    if plain and model.transformer.wpe.weight.device.type == "cpu" and load():
        model.hidden = native_hidden(model)
        model.lm_head.forward = native_linear(model.lm_head)
    return model
