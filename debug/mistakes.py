"""The known mistakes in computing GPT-2, each ready to be put into a model on purpose, and taken out again.

    with making(model, "mask off by one"):
        logits, _ = model(idx)

python -m debug.verify_gpt2 --diagnose shows what each of them does to the logits, the loss and the text.
"""

from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

import gpt


@contextmanager
def holding(thing, name, value):
    before, own = getattr(thing, name), name in vars(thing)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)
        if not own and name in vars(thing):
            delattr(thing, name)  # it was the class's


def untransposed(part):
    """The published numbers, read in their own order: what a missing transpose gives where no shape check stops it."""

    def changes(model):
        weights = [block.get_submodule(part).weight for block in model.transformer.h]
        return [holding(weight, "data", weight.data.T.reshape(weight.shape)) for weight in weights]

    return changes


def moved(model):
    wpe = model.transformer.wpe
    return [holding(wpe, "weight", nn.Parameter(wpe.weight.roll(-1, 0)))]


def untied(model):
    generator = torch.Generator().manual_seed(50257)  # no seed that made the embedding, or the two would agree
    untrained = torch.randn(model.lm_head.weight.shape, generator=generator) * 0.02
    return [holding(model.lm_head, "weight", nn.Parameter(untrained))]


def peek(q, k, v, *_, **__):
    T, S = q.shape[2], k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, torch.ones(T, S, dtype=torch.bool).tril(S - T + 1))


def post_norm(block, x, cache=None):
    x = block.ln_1(x + block.attn(x, cache))
    return block.ln_2(x + block.mlp(x))


def drop(model):
    drops = [module for module in model.modules() if isinstance(module, gpt.Dropout)]
    return [holding(drop, key, value) for drop in drops for key, value in (("p", 0.1), ("training", True))]


attention, gelu = gpt.attention, F.gelu
MISTAKES = {  # name -> what it changes in the model or in gpt.py, for as long as it is held
    "missing transpose: attn.c_attn": untransposed("attn.c_attn"),
    "missing transpose: attn.c_proj": untransposed("attn.c_proj"),
    "missing transpose: mlp.c_fc": untransposed("mlp.c_fc"),
    "missing transpose: mlp.c_proj": untransposed("mlp.c_proj"),
    "exact GELU, not tanh": lambda model: [holding(F, "gelu", lambda x, approximate: gelu(x))],
    "LayerNorm eps 1e-12": lambda model: [
        holding(m, "eps", 1e-12) for m in model.modules() if isinstance(m, nn.LayerNorm)
    ],
    "head not tied": untied,
    "scores not divided by √D": lambda model: [
        holding(gpt, "attention", lambda q, *kv, **form: attention(q * q.shape[-1] ** 0.5, *kv, **form))
    ],
    "mask off by one": lambda model: [holding(gpt, "attention", peek)],
    "post-LayerNorm": lambda model: [holding(gpt.Block, "forward", post_norm)],
    "positions shifted by one": moved,
    "dropout left on": drop,
}


@contextmanager
def making(model, mistake):
    """The model, and gpt.py, compute with the named mistake for as long as this is held."""
    with ExitStack() as stack:
        for change in MISTAKES[mistake](model):
            stack.enter_context(change)
        yield model
