"""Closed-book drills: write a part of the GPT from memory, and let this script check your file.

    python notes/drills.py my_attention.py

A drill ends at the first mistake, since its checks build on each other. Your file defines one or more of these:
    attention(q, k, v)            causal; q, k, v (B, H, T, D) -> (B, H, T, D)
    class Block(nn.Module)        Block(config), with config.n_embd and config.n_head; the parameters have GPT-2's names
    train(model, batches, lr)     batches of token ids (B, T + 1) -> the list of losses, one float per batch;
                                  AdamW with PyTorch's defaults except lr, the gradient's norm clipped to 1.0
"""

import argparse
import copy
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))
import gpt

CONFIG = gpt.GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=3, n_embd=24)


def same(a, b):
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5)


def check_attention(attention):
    """Yield (what is checked, is it right, what to do if not)."""
    q, k, v = torch.randn(3, 2, 3, 5, 16, requires_grad=True)  # each (B, H, T, D)
    out = attention(q, k, v)
    shape = tuple(out.shape)
    yield "shape", shape == (2, 3, 5, 16), f"it is {shape}, expected that of q, (2, 3, 5, 16): return weights @ v"
    sums = attention(q, k, torch.ones_like(v))
    hint = f"rows sum to {sums.min():.2f} to {sums.max():.2f}, not to 1: softmax over the keys, dim=-1, after the mask"
    if sums.isnan().any():
        hint = "NaN: don't mask the diagonal; the first token sees only itself, and its softmax would have nothing left"
    yield "weights", same(sums, torch.ones_like(v)), hint
    last = torch.arange(5)[:, None] == 4  # (T, 1)
    changed = attention(q, torch.where(last, 9.0, k), torch.where(last, 9.0, v))
    hint = "changing the last token changes earlier outputs: set the scores of the future to -inf, before the softmax"
    yield "causality", same(out[:, :, :4], changed[:, :, :4]), hint
    weights = attention(q, k, torch.eye(5, 16).expand(2, 3, 5, 16))[:, :, -1, :2].detach()  # the last query sees all
    scores = (q[:, :, -1:] @ k.mT)[:, :, 0, :2].detach()
    scales = weights.log().diff() / scores.diff()  # all the same, if the scores are a multiple of q kᵀ
    right = scales.std() > 1e-3 or abs(scales.mean() - 0.25) < 1e-3
    yield "scale", right, f"you multiply q kᵀ by {scales.mean():.3f}, but 1 / √D = 1 / √16 = 0.250"
    expected = gpt.attention(q, k, v, fused=False)
    hint = f"differs from gpt.py's by up to {(out - expected).abs().max():.3f}: score [i, j] is query i times key j"
    yield "result", same(out, expected), hint
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    ours = (torch.zeros(1),) * 3
    if out.requires_grad:
        ours = torch.autograd.grad(out.square().sum(), (q, k, v), allow_unused=True)
    right = all(a is not None and same(a, b) for a, b in zip(ours, theirs, strict=True))
    yield "gradient", right, "q, k or v gets no gradient, or a wrong one: no detach, no .data, no torch.no_grad"


def check_block(block_class):
    """Yield (what is checked, is it right, what to do if not)."""
    block, reference = block_class(CONFIG), gpt.Block(CONFIG)
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in (block, reference)]
    wrong = [f"{name} {shape}" for name, shape in shapes[1].items() if shapes[0].get(name) != shape]
    extra = [name for name in shapes[0] if name not in shapes[1]]
    yield "parameters", not wrong + extra, f"missing, or of another shape: {wrong}; not in GPT-2: {extra}"
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.5)
    weights = reference.state_dict()
    x = torch.randn(2, 7, 24)  # (B, T, C)

    def compare(*silenced):
        """Both blocks with the parameters of some branches at zero."""
        for name, p in reference.named_parameters():
            p.data = torch.zeros_like(p) if name.startswith(silenced) else weights[name].clone()
        block.load_state_dict(reference.state_dict(), strict=False)
        return block(x), reference(x)

    ours, theirs = compare("attn", "mlp")
    yield "shape", ours.shape == theirs.shape, f"it is {tuple(ours.shape)}, expected that of x, (2, 7, 24)"
    hint = "with both branches at zero, a block returns x itself: x = x + branch(ln(x)), no LayerNorm on the stream"
    yield "residual", same(ours, theirs), hint
    ours, theirs = compare("mlp")
    changed = block(torch.cat([x[:, :-1], torch.randn(2, 1, 24)], dim=1))
    hint = "changing the last token changes earlier outputs: mask the future; to join heads, transpose(1, 2) first"
    yield "causality", same(ours[:, :-1], changed[:, :-1]), hint
    hint = "split as view(B, T, 3, H, D), move H before T, and back with transpose(1, 2) before reshape; then c_proj"
    yield "attention", same(ours, theirs), hint
    ours, theirs = compare("attn")
    hidden = reference.mlp.c_fc(reference.ln_2(x))
    exact = same(ours, x + reference.mlp.c_proj(F.gelu(hidden)))
    hint = 'this is the exact GELU; GPT-2 has approximate="tanh"' if exact else "add c_proj(gelu(c_fc(ln_2(x)))) to x"
    yield "MLP", same(ours, theirs), hint
    ours, theirs = compare("nothing")
    yield "result", same(ours, theirs), "the MLP reads the stream to which attention has been added"


def loop(model, batches, lr, shift=1, zero="before", clip=True, optimizer=torch.optim.AdamW):
    """The training loop, or one with a mistake."""
    model.train()
    optimizer, losses = optimizer(model.parameters(), lr), []
    for ids in batches:
        _, loss = model(ids[:, :-1], ids[:, shift : ids.shape[1] - 1 + shift])
        if zero == "before":
            optimizer.zero_grad()
        loss.backward()
        if zero == "after":
            optimizer.zero_grad()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


MISTAKES = {  # what to do, and the options of a loop with that mistake
    "the targets are the inputs themselves: ids[:, :-1] predicts ids[:, 1:]": {"shift": 0},
    "gradients of earlier steps add up: call optimizer.zero_grad() in every step": {"zero": "never"},
    "zero_grad() between backward() and step() throws the gradient away": {"zero": "after"},
    "the gradient is not clipped: call clip_grad_norm_(parameters, 1.0) between backward() and step()": {"clip": False},
    "this is Adam without weight decay; AdamW's default is 0.01": {"optimizer": torch.optim.Adam},
    "this is plain gradient descent, not AdamW": {"optimizer": torch.optim.SGD},
}


def check_train(train):
    """Yield (what is checked, is it right, what to do if not)."""
    original = gpt.GPT(CONFIG).double().eval()
    batches = torch.randint(32, (4, 3, 9))  # four batches (B, T + 1)
    modes = []

    def result(function, **options):
        model = copy.deepcopy(original)
        model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
        losses = function(model, batches, 0.1, **options)
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    losses, weights = result(train)
    right = isinstance(losses, list) and len(losses) == 4 and all(isinstance(loss, float) for loss in losses)
    yield "losses", right, "return a list of loss.item(), one per batch; a tensor would keep its graph in memory"
    yield "mode", bool(modes) and all(modes), "the model came in eval mode: call model.train(), or dropout stays off"
    expected_losses, expected = result(loop)
    hint = "the order is forward, zero_grad, backward, clip, step"
    for reason, options in MISTAKES.items():
        if same(weights, result(loop, **options)[1]):
            hint = reason
    yield "weights", same(weights, expected), f"they differ after four batches: {hint}"
    right = same(torch.tensor(losses), torch.tensor(expected_losses))
    yield "result", right, "the losses differ from gpt.py's: return the one of each batch before its step"


DRILLS = {"attention": check_attention, "Block": check_block, "train": check_train}


@gpt.command
def main(argv=None):
    parser = gpt.Parser("drills.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    path = parser.parse_args(argv).file
    gpt.require(Path(path).is_file(), f"there is no file {path}: give a Python file of yours")
    file = runpy.run_path(path)
    found = [name for name in DRILLS if name in file]
    gpt.require(found, f"{path} defines none of {', '.join(DRILLS)}: see --help")
    mistakes = 0
    for name in found:
        torch.manual_seed(0)
        for what, right, hint in DRILLS[name](file[name]):
            print(f"{name:9}  {what:10}  {'right' if right else 'wrong: ' + hint}")
            if not right:
                mistakes += 1
                break
    sys.exit(min(mistakes, 1))


if __name__ == "__main__":
    main()
