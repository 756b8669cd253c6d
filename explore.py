"""What a model thinks while it reads, and what is wrong with the text it writes; for evaluate.py.

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") reads the residual stream after each block with
the head, as if that block were the last. distinct-n is from Li et al. 2016, "A Diversity-Promoting Objective Function".
"""

import math
from contextlib import contextmanager

import numpy as np
import torch

import gpt

# ---------------------------------------------------------------------------------------------------------------------
# Looking inside.


@contextmanager
def hooked(modules):
    """Within, what each of the modules puts out: {name: [output, ...]}."""
    seen = {name: [] for name in modules}
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: seen[name].append(out)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def entropy(logits):
    """(..., V) -> (...), in nats: how unsure the model is; e to that power is the number of equally good candidates."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def spell(tokenizer, i):
    return tokenizer.decode([i]) if i < tokenizer.vocab_size else f"[{i}]"


@torch.no_grad()
def inspect(model, tokenizer, prompt, top=5):
    """What the model makes of a prompt, token by token and block by block -> a dict of figures, and attention (L, H, T, T)."""
    ids, context = tokenizer.encode(prompt), model.config.block_size
    gpt.require(ids, "--inspect needs a text of at least one token")
    if len(ids) > context:
        gpt.log(f"the text has {len(ids):,} tokens, only the last {context:,} fit into the context")
    ids = ids[-context:]
    idx, blocks = torch.tensor([ids], device=next(model.parameters()).device), model.transformer.h
    names = {"embedding": model.transformer.drop} | {f"block {i}": block for i, block in enumerate(blocks)}
    parts = {(part, i): module for i, block in enumerate(blocks) for part, module in
             (("qkv", block.attn.c_attn), ("attention", block.attn), ("mlp", block.mlp))}  # fmt: skip
    with hooked(names | parts) as seen:
        logs = model(idx)[0][0].float().log_softmax(-1)  # (T, V)

    def candidates(logs):
        best = logs.topk(min(top, len(logs)))
        return [{"token": spell(tokenizer, i), "p": math.exp(p)} for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

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
    print(f"Where the last token looks, a line for each head, a sign for each of the last {min(64, len(tokens))} tokens, {SHADES!r}:")
    for block, heads in enumerate(attention):
        for head, weights in enumerate(heads[:, -1]):
            bar = "".join(SHADES[min(4, round(4 * w / weights.max().item()))] for w in weights[-64:].tolist())
            print(f"  block {block:>2} head {head:>2} |{bar}| most at {tokens[weights.argmax()]!r} ({weights.max():.2f})")
    print("\nThe residual stream: mean norms, and what the head would say of the last token after each block (logit lens):")
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
        print(f"  {row['position']:>4} {came} " + (f"{row['entropy']:>6.2f}  {listed(row['expected'])}" if row["position"] else ""))


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
            axes.set_yticks(range(T), [repr(token)[1:-1] for token in tokens], fontsize=max(2, min(6, 70 * side / T)), parse_math=False)
    figure.suptitle("attention: each row a token, each column a token it looks at", fontsize=9)
    with gpt.replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with generated text.


def longest_loop(ids, longest_period=64):
    """The longest stretch that repeats what stands one period before it -> (its tokens, its period); (0, 0) without one."""
    ids, best = np.asarray(ids), (0, 0)
    for period in range(1, min(longest_period, len(ids) // 2) + 1):
        run = longest = 0
        for same in ids[period:] == ids[:-period]:
            run = run + 1 if same else 0
            longest = max(longest, run)
        if longest >= period and longest + period > best[0]:
            best = (longest + period, period)
    return best


def ngrams(ids, n):
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def measure(ids, entropies, surprises, text, asked):
    """A generated text, as token numbers, the entropy before each, -ln of its probability, and as a string -> figures."""
    fours, quarter = ngrams(ids, 4), max(1, len(ids) // 4)
    loop, period = longest_loop(ids)
    return {"tokens": len(ids), "asked": asked, "repeated": 1 - len(set(fours)) / len(fours) if fours else 0.0, "loop": loop, "period": period,
            **{f"distinct_{n}": len(set(ngrams(ids, n))) / max(1, len(ids) - n + 1) for n in (1, 2, 3)},
            "entropy_start": float(np.mean(entropies[:quarter])) if entropies else 0.0,
            "entropy_end": float(np.mean(entropies[-quarter:])) if entropies else 0.0,
            "surprise": float(np.mean(surprises) - np.mean(entropies)) if entropies else 0.0,
            "broken": text.count("\ufffd") / max(1, len(text))}  # fmt: skip


def verdict(row, vocab_size):
    """Figures -> what is wrong, in words, with what usually helps."""
    found = []
    if row["tokens"] < row["asked"] / 4:
        found.append(f"early end (after {row['tokens']} of {row['asked']} tokens): right for a short answer; else the end of text is too "
                     "frequent in what was learned")  # fmt: skip
    if row["loop"] >= max(12, row["tokens"] / 4):
        found.append(f"a loop ({row['loop']} tokens, repeating every {row['period']}): sample with --temperature 0.8 --top_p 0.9; if that loops "
                     "too, train longer or on more text")  # fmt: skip
    elif row["repeated"] > 0.3:
        found.append(f"repetition ({row['repeated']:.0%} of its 4-grams occurred before): a higher temperature, or more training")
    if row["tokens"] >= 20 and row["entropy_end"] < 0.1 * row["entropy_start"] and row["entropy_end"] < 0.5:
        found.append(f"collapse (entropy falls from {row['entropy_start']:.2f} to {row['entropy_end']:.2f} nats): the model is sure of its own "
                     "repetition; sample, or choose a longer context")  # fmt: skip
    if row["surprise"] > 1:
        found.append(f"word salad (what was drawn surprises the model itself, {row['surprise']:.1f} nats beyond what it expects): a lower "
                     "temperature, or --top_p 0.9")  # fmt: skip
    if row["broken"] > 0.01:
        found.append(f"gibberish ({row['broken']:.0%} of the characters are broken): a lower temperature or --top_p 0.9; at every temperature, it "
                     "is too little training")  # fmt: skip
    if row["tokens"] and row["entropy_start"] > 0.8 * math.log(vocab_size):
        found.append(f"noise (entropy {row['entropy_start']:.2f} of at most {math.log(vocab_size):.2f} nats): the model has hardly learned "
                     "anything yet")  # fmt: skip
    return found or ["no problem found"]


def diagnose(model, tokenizer, prompt, max_new_tokens, temperatures, seed):
    """Continue a prompt at each temperature (0 is greedy) -> rows of figures, the text, and what is wrong with it."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    for temperature in temperatures:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        made, entropies, surprises = [], [], []
        with hooked({"head": model.lm_head}) as seen:
            for token in model.stream(torch.tensor([ids], device=device), max_new_tokens, temperature, eot=tokenizer.eot, generator=generator):
                logits = seen["head"].pop()[0].float()
                if token.item() != tokenizer.eot:
                    made.append(token.item())
                    entropies.append(entropy(logits).item())
                    surprises.append(-logits.log_softmax(-1)[token.item()].item())
        text = tokenizer.decode(i for i in made if i < tokenizer.vocab_size).removesuffix("\ufffd")  # the last may be cut
        row = measure(made, entropies, surprises, text, max_new_tokens)
        yield {"temperature": temperature, **row, "text": text, "verdict": verdict(row, model.config.vocab_size)}


def show_diagnosis(rows):
    print(f"{'':<16} {'tokens':>7} {'repeated':>8} {'loop':>5} {'distinct 1 2 3':>16} {'entropy':>13} {'broken':>7}")
    for row in rows:
        name = f"temperature {row['temperature']:g}" if row["temperature"] else "greedy"
        distinct = " ".join(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3))
        print(f"{name:<16} {row['tokens']:>7,} {row['repeated']:>8.0%} {row['loop']:>5,} {distinct:>16} {row['entropy_start']:>5.2f} -> "
              f"{row['entropy_end']:.2f} {row['broken']:>7.1%}")  # fmt: skip
        print("".join(f"    {words}\n" for words in row["verdict"]) + f"    {row['text'][:160]!r}")
    print("repeated: share of 4-grams that occurred before; loop: tokens in the longest one; distinct: share of different tokens, pairs, "
          "triples; entropy: of the next token in nats, first and last quarter")  # fmt: skip
