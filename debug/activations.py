"""What goes into and comes out of a model's modules while it computes, seen through hooks.

    with hooked({"head": (model.lm_head, "out")}) as seen:
        model(idx)
    logits = seen["head"][0]

The modules of GPT and of transformers' GPT-2 have the same names, so their `activations` can be compared one by one.
"""

from contextlib import contextmanager

import torch

STEPS = [
    ("ln_1", "in", "the residual stream"),
    ("ln_1", "out", "LayerNorm 1"),
    ("attn.c_attn", "out", "queries, keys, values"),
    ("attn.c_proj", "in", "attention: scores, scaling, mask, softmax"),
    ("attn.c_proj", "out", "attention's projection"),
    ("ln_2", "in", "the residual sum after attention"),
    ("ln_2", "out", "LayerNorm 2"),
    ("mlp.c_fc", "out", "the MLP's first layer"),
    ("mlp.c_proj", "in", "GELU"),
    ("mlp.c_proj", "out", "the MLP's second layer"),
]


@contextmanager
def hooked(modules):
    """Record the inputs or outputs of modules: {key: (module, "in" or "out")} -> {key: [tensor, ...]}."""
    seen = {key: [] for key in modules}
    hooks = []
    for key, (module, side) in modules.items():

        def note(_, inputs, output=None, key=key):
            seen[key].append(inputs[0] if output is None else output)

        hooks.append(module.register_forward_pre_hook(note) if side == "in" else module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def steps(n_layer):
    """What to compare, in the order of the computation: (module, side, what is computed there)."""
    yield "transformer.wte", "out", "token embedding"
    yield "transformer.drop", "out", "token plus position embedding"
    for i in range(n_layer):
        yield from ((f"transformer.h.{i}.{module}", side, f"block {i}, {what}") for module, side, what in STEPS)
    yield "transformer.ln_f", "in", "the residual stream after the last block"
    yield "transformer.ln_f", "out", "the final LayerNorm"
    yield "lm_head", "out", "the head"


@torch.no_grad()
def activations(model, idx):
    """The inputs and outputs of these modules: {(module, side): tensor}."""
    watched = {(name, side): (model.get_submodule(name), side) for name, side, _ in steps(model.config.n_layer)}
    with hooked(watched) as seen:
        model(idx)
    return {key: tensors[0].detach().clone() for key, tensors in seen.items()}


def relative_error(ours, reference):
    """max |difference| / max |reference|, in float64."""
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def entropy(logits):
    """(..., V) -> (...), in nats: the uncertainty of the next token; exp of it is the number of equal candidates."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
