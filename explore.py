"""What a model sees and expects while it reads a text, token by token and block by block.

    python explore.py --prompt "The import statement"                 attention of every head -> attention.png
    python explore.py --model gpt2 --prompt "Learning is" --text      probabilities, attention and logit lens, in words
    python explore.py --prompt "The import statement" --json          the same as one JSON object

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") reads the residual stream after each block with
the head, as if that block were the last.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

import gpt
from debug.activations import entropy, hooked
from gpt import command, load_checkpoint, log, require


def spell(tokenizer, i):
    return tokenizer.decode([i]) if i < tokenizer.vocab_size else f"[{i}]"


@torch.no_grad()
def inspect(model, tokenizer, prompt, top=5):
    """What the model makes of a prompt, token by token and block by block -> a dict of figures, and attention (L, H, T, T)."""
    ids, context = tokenizer.encode(prompt), model.config.block_size
    require(ids, "--prompt needs a text of at least one token")
    if len(ids) > context:
        log(f"the text has {len(ids):,} tokens, only the last {context:,} fit into the context")
    ids = ids[-context:]
    idx, blocks = torch.tensor([ids], device=next(model.parameters()).device), model.transformer.h
    names = {"embedding": model.transformer.drop} | {f"block {i}": block for i, block in enumerate(blocks)}
    parts = {(part, i): module for i, block in enumerate(blocks) for part, module in
             (("qkv", block.attn.c_attn), ("attention", block.attn), ("mlp", block.mlp))}  # fmt: skip
    with hooked({key: (module, "out") for key, module in (names | parts).items()}) as seen:
        logs = model(idx)[0][0].float().log_softmax(-1)  # (T, V)

    def candidates(logs):
        best = logs.topk(min(top, len(logs)))
        return [
            {"token": spell(tokenizer, i), "p": math.exp(p)}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    tokens = []
    for at, i in enumerate([*ids, None]):
        row = {"position": at, "token": None if i is None else spell(tokenizer, i)}
        if at:
            row |= {"entropy": entropy(logs[at - 1]).item(), "expected": candidates(logs[at - 1])}
        if at and i is not None:
            row |= {"log_probability": logs[at - 1, i].item(), "rank": 1 + int((logs[at - 1] > logs[at - 1, i]).sum())}
        tokens.append(row)
    stream, attention = [], []
    for name in names:
        x = seen[name][0][0]  # (T, C)
        row = {"after": name, "norm": x.norm(dim=-1).mean().item()}
        if name != "embedding":
            i = int(name.split()[1])
            row |= {f"{part}_norm": seen[part, i][0][0].norm(dim=-1).mean().item() for part in ("attention", "mlp")}
            attention.append(weights_of(seen["qkv", i][0][0], blocks[i].attn.n_head))
        stream.append(row | {"says": candidates(model.lm_head(model.transformer.ln_f(x[-1])).float().log_softmax(-1))})
    return {"tokens": tokens, "stream": stream}, torch.stack(attention).cpu()


def weights_of(qkv, n_head):
    """Queries, keys and values of a text (T, 3C) -> how much each token looks at each (H, T, T)."""
    T = len(qkv)
    q, k, _ = qkv.float().view(T, 3, n_head, -1).permute(1, 2, 0, 3)  # each (H, T, D)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf).softmax(-1)


SHADES = " ░▒▓█"


def show_inspection(found, attention):
    tokens = [row["token"] for row in found["tokens"][:-1]]
    print(
        f"Where the last token looks, a line for each head, a sign for each of the last {min(64, len(tokens))} tokens, {SHADES!r}:"
    )
    for block, heads in enumerate(attention):
        for head, weights in enumerate(heads[:, -1]):
            bar = "".join(SHADES[min(4, round(4 * w / weights.max().item()))] for w in weights[-64:].tolist())
            print(
                f"  block {block:>2} head {head:>2} |{bar}| most at {tokens[weights.argmax()]!r} ({weights.max():.2f})"
            )
    print(
        "\nThe residual stream: mean norms, and what the head would say of the last token after each block (logit lens):"
    )
    print(f"  {'after':<10} {'norm':>7} {'attention adds':>14} {'the MLP adds':>12}  what comes next")
    for row in found["stream"]:
        added = [f"{row[key]:.2f}" if key in row else "" for key in ("attention_norm", "mlp_norm")]
        print(f"  {row['after']:<10} {row['norm']:>7.2f} {added[0]:>14} {added[1]:>12}  {listed(row['says'][:3])}")
    print("\nToken by token: probability and rank of what came, entropy before it (nats), and what the model expected:")
    for row in found["tokens"]:
        if row["token"] is None:
            came = f"{'what comes next':<34}"
        else:
            known = f"{math.exp(row['log_probability']):>7.2%} {row['rank']:>6,}" if "rank" in row else f"{'':>14}"
            came = f"{row['token']!r:<19} {known}"
        print(
            f"  {row['position']:>4} {came} "
            + (f"{row['entropy']:>6.2f}  {listed(row['expected'])}" if row["position"] else "")
        )


def listed(candidates):
    return "  ".join(f"{one['token']!r} {one['p']:.2f}" for one in candidates)


def plot_attention(attention, tokens, path):
    """A picture for each head of each block: rows look at columns."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers, heads, T, _ = attention.shape
    side = min(2.0, 60 / max(layers, heads))
    figure = Figure(figsize=(side * heads + 1.2, side * layers + 1.2), layout="constrained")
    for (layer, head), axes in np.ndenumerate(figure.subplots(layers, heads, squeeze=False)):
        axes.imshow(attention[layer, head].numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # small weights show, too
        axes.set(xticks=[], yticks=[])
        if layer == 0:
            axes.set_title(f"head {head}", fontsize=8)
        if head == 0:
            axes.set_ylabel(f"block {layer}", fontsize=8)
        if T <= 24 and head == 0:
            axes.set_yticks(
                range(T),
                [repr(token)[1:-1] for token in tokens],
                fontsize=max(2, min(6, 70 * side / T)),
                parse_math=False,
            )
    figure.suptitle("attention: each row a token, each column a token it looks at", fontsize=9)
    with gpt.replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")


@command
def main(argv=None):
    parser = gpt.Parser(prog="explore.py", description="What a model sees and expects while it reads a text.")
    add = parser.add_argument
    add("--model", default="scratch", help="a folder, or a name under checkpoints/ (default: scratch)")
    add("--prompt", required=True, help="the text to read")
    add("--out", default="attention.png", help="the picture of every head's attention (default: attention.png)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print what there is to see, and draw no picture")
    form.add_argument("--json", action="store_true", help="print it as one JSON object, and draw no picture")
    args = parser.parse_args(argv)
    out = Path(args.out)
    require(out.name, f"--out {args.out!r} names no file")
    require(out.parent.is_dir(), f"there is no folder {out.parent} for --out")
    model, tokenizer = load_checkpoint(args.model, gpt.resolve_device(args.device))
    found, attention = inspect(model, tokenizer, args.prompt)
    if args.text:
        return show_inspection(found, attention)
    if args.json:
        return print(json.dumps(found | {"attention": attention[:, :, -1].tolist()}))
    plot_attention(attention, [row["token"] for row in found["tokens"][:-1]], out)
    return log(f"attention of every head: {out}")


if __name__ == "__main__":
    main()
