"""What goes into and comes out of a model's modules while it computes, seen through hooks.

    with hooked({"head": (model.lm_head, "out")}) as seen:
        model(idx)
    logits = seen["head"][0]

The modules of GPT and of transformers' GPT-2 have the same names, so their `activations` can be compared one by one.
"""

import math
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


@torch.no_grad()
def inspect(model, ids):
    """ids -> logits (T, V), attention (L, H, T, T), the lens' five best (L + 1, T, 5), norms (L + 1, T) and (L, T)."""
    blocks = model.transformer.h
    watched = {("stream", 0): (model.transformer.drop, "out")}
    for i, block in enumerate(blocks):
        parts = {"stream": block, "qkv": block.attn.c_attn, "attention": block.attn, "mlp": block.mlp}
        watched |= {(part, i + (part == "stream")): (module, "out") for part, module in parts.items()}
    with hooked(watched) as seen:
        logits = model(torch.tensor([ids], device=next(model.parameters()).device))[0][0].float()  # (T, V)
    outputs = {key: tensors[0][0].float() for key, tensors in seen.items()}  # (T, C), qkv (T, 3C)
    found = {"logits": logits, "attention": []}
    for part in ("stream", "attention", "mlp"):
        found[f"{part}_norm"] = torch.stack([x.norm(dim=-1) for (key, _), x in outputs.items() if key == part])
    future = torch.ones(len(ids), len(ids), dtype=torch.bool, device=logits.device).triu(1)
    for i in range(len(blocks)):
        q, k, _ = outputs["qkv", i].view(len(ids), 3, model.config.n_head, -1).permute(1, 2, 0, 3)  # each (H, T, D)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        found["attention"].append(scores.masked_fill(future, -math.inf).softmax(-1))  # (H, T, T)
    found["attention"] = torch.stack(found["attention"])
    lens = []
    for i in range(len(blocks) + 1):
        said = model.lm_head(model.transformer.ln_f(seen["stream", i][0][0])).float()  # (T, V)
        lens.append(said.softmax(-1).topk(min(5, logits.shape[-1])))
    return found | {"lens_probs": torch.stack([x[0] for x in lens]), "lens_ids": torch.stack([x[1] for x in lens])}
