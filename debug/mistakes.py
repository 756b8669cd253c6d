"""The known mistakes in computing GPT-2, each to be made on purpose, and undone again.

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
    """thing.name is `value` within, and what it was before afterwards."""
    before = getattr(thing, name)
    own = name in vars(thing)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)
        if not own and name in vars(thing):
            delattr(thing, name)  # it belongs to the class


def untransposed(part):
    """The published values in the order of the file: a missing transpose, where no check of shapes notices it."""

    def changes(model):
        weights = [block.get_submodule(part).weight for block in model.transformer.h]
        return [holding(weight, "data", weight.data.T.reshape(weight.shape)) for weight in weights]

    return changes


def exact_gelu(model):
    return [holding(F, "gelu", lambda x, approximate: gelu(x))]


def small_epsilon(model):
    return [holding(module, "eps", 1e-12) for module in model.modules() if isinstance(module, nn.LayerNorm)]


def untied(model):
    generator = torch.Generator().manual_seed(50257)  # not the seed of the embedding, or both would be equal
    untrained = torch.randn(model.lm_head.weight.shape, generator=generator) * 0.02
    return [holding(model.lm_head, "weight", nn.Parameter(untrained))]


def unscaled(model):
    return [holding(gpt, "attention", lambda q, *rest, **form: attention(q * q.shape[-1] ** 0.5, *rest, **form))]


def peek(q, k, v, *_, **__):
    """Attention whose mask is off by one: each token sees the next one, too."""
    T, S = q.shape[2], k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, torch.ones(T, S, dtype=torch.bool).tril(S - T + 1))


def post_norm(block, x, cache=None):
    """A block with its LayerNorms after the additions, as in the first transformer."""
    x = block.ln_1(x + block.attn(x, cache))
    return block.ln_2(x + block.mlp(x))


def shifted(model):
    wpe = model.transformer.wpe
    return [holding(wpe, "weight", nn.Parameter(wpe.weight.roll(-1, 0)))]


def dropout_on(model):
    changes = []
    for module in model.modules():
        if isinstance(module, gpt.Dropout):
            changes += [holding(module, "p", 0.1), holding(module, "training", True)]
    return changes


attention, gelu = gpt.attention, F.gelu
MISTAKES = {  # name -> its changes to the model or to gpt.py, as context managers
    "missing transpose: attn.c_attn": untransposed("attn.c_attn"),
    "missing transpose: attn.c_proj": untransposed("attn.c_proj"),
    "missing transpose: mlp.c_fc": untransposed("mlp.c_fc"),
    "missing transpose: mlp.c_proj": untransposed("mlp.c_proj"),
    "exact GELU, not tanh": exact_gelu,
    "LayerNorm eps 1e-12": small_epsilon,
    "head not tied": untied,
    "scores not divided by √D": unscaled,
    "mask off by one": lambda model: [holding(gpt, "attention", peek)],
    "post-LayerNorm": lambda model: [holding(gpt.Block, "forward", post_norm)],
    "positions shifted by one": shifted,
    "dropout left on": dropout_on,
}


@contextmanager
def making(model, mistake):
    """Within, the model and gpt.py compute with the named mistake."""
    with ExitStack() as stack:
        for change in MISTAKES[mistake](model):
            stack.enter_context(change)
        yield model
