"""What a model sees and expects while it reads a text, token by token and block by block.

    python explore.py --prompt "The import statement"                 attention of every head -> attention.png
    python explore.py --model gpt2 --prompt "Learning is" --text      probabilities, attention and logit lens, in words
    python explore.py --prompt "The import statement" --json          the same as one JSON object

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") reads the residual stream after each block with
the head, as if that block were the last.
"""

import math
from pathlib import Path

import numpy as np
import torch

import gpt
from debug.activations import entropy, hooked
from extras.tables import show
from gpt import command, load_checkpoint, log, require


def spell(tokenizer, i):
    return tokenizer.decode([i]) if i < tokenizer.vocab_size else f"[{i}]"


@torch.no_grad()
def inspect(model, tokenizer, prompt, top=5):
    """What the model makes of a prompt, by token and by block -> a dict of figures, and attention (L, H, T, T)."""
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
    print(f"Where each head of the last token looks, among the last {min(64, len(tokens))} tokens, {SHADES!r}:")
    rows = []
    for block, heads in enumerate(attention):
        for head, weights in enumerate(heads[:, -1]):
            bar = "".join(SHADES[min(4, round(4 * w / weights.max().item()))] for w in weights[-64:].tolist())
            row = {"block": block, "head": head, "tokens": f"|{bar}|"}
            rows.append(row | {"most at": repr(tokens[weights.argmax()]), "weight": weights.max().item()})
    show(rows)
    print("\nThe residual stream: mean norms, and the next token if the head read it after each block (logit lens):")
    parts = {"attention_norm": None, "mlp_norm": None}
    columns = {"after": "after", "norm": "norm", "attention_norm": "attention adds", "mlp_norm": "MLP adds"}
    columns["next"] = "next token"
    show([parts | row | {"next": listed(row["says"][:3])} for row in found["stream"]], columns=columns)
    print("\nToken by token: its probability and rank, the entropy before it (nats), and the expected tokens:")
    rows = []
    for row in found["tokens"]:
        token = "next" if row["token"] is None else repr(row["token"])
        p = math.exp(row["log_probability"]) if "rank" in row else None
        known = {"position": row["position"], "token": token, "p": p, "rank": row.get("rank")}
        rows.append(known | {"entropy": row.get("entropy"), "expected": listed(row.get("expected", []))})
    show(rows)


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
        return show([found | {"attention": attention[:, :, -1].tolist()}], True)
    plot_attention(attention, [row["token"] for row in found["tokens"][:-1]], out)
    return log(f"attention of every head: {out}")


if __name__ == "__main__":
    main()
