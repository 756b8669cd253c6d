"""Look inside your own model: what it sees and expects, token by token and block by block, on one page.

    python explore.py --prompt "The import statement"               # -> explore.html, to open in a browser
    python explore.py --model gpt2 --prompt "Learning is" --text    # the same as tables in the terminal

The page needs no server and no network. Its logit lens (nostalgebraist 2020) reads with the head after every block.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
import torch

import gpt
from debug.activations import inspect
from extras import tables
from gpt import command, log, require
from sample import open_model, read_prompt

TEMPLATE = Path(__file__).with_name("explore_template.html")
MARK = '<meta name="generator" content="explore.py">'
CARRIED = 8192  # up to this vocabulary the page carries all logits, above it those of the 1,000 best tokens
BUDGET = 1_200_000  # bytes for attention, and as many for predictions, before base64: the page stays below 5 MB
TEMPERATURES = [n / 10 for n in range(21)]  # of the page's slider


def content(tokenizer, i):
    return tokenizer.token_bytes[i] if i < tokenizer.vocab_size else b""  # a padded embedding has rows without a token


def spell(tokenizer, i):
    """The text of an id; its bytes where they form no visible text, its number where it has none."""
    text = gpt.EOT if i == tokenizer.eot else content(tokenizer, i).decode(errors="replace")
    visible = "\ufffd" not in text and all(c.isprintable() or c in "\n\r\t" for c in text)
    return text or f"<{i}>" if visible else f"<{content(tokenizer, i).hex()}>"


def pack(x, dtype):
    """A tensor -> its type, shape and bytes in base64, as the page unpacks them."""
    array = np.ascontiguousarray(x.cpu().numpy().astype(dtype))
    return {"type": dtype, "shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}


def sums_of_the_rest(logits, n):
    """(T, V) -> (temperatures, 2, T): over all but the n best tokens, the sums of exp(z) and of z exp(z)."""
    ranked = logits.sort(descending=True).values
    z = ranked[:, n:] - ranked[:, :1]
    sums = [torch.stack([(z / t).exp().sum(-1), (z * (z / t).exp()).sum(-1) / t]) for t in TEMPERATURES[1:]]
    return torch.stack(sums)


def page_data(name, model, tokenizer, ids, n_prompt, seen):
    """All that the page shows, as a dict for JSON; large tensors are packed, and cut to the budget."""
    config, (T, V) = model.config, seen["logits"].shape
    n_attention = min(T, math.isqrt(BUDGET // (config.n_layer * config.n_head)))  # n² / 2 weights a head
    per_token = (2 * V if V <= CARRIED else 6000) + 30 * (config.n_layer + 1)  # bytes: logits, then lens and lengths
    n_predictions = min(T, max(1, BUDGET // per_token))
    log_probs = seen["logits"].log_softmax(-1)
    came = log_probs[range(T - 1), ids[1:]]
    rank = (log_probs[:-1] > came[:, None]).sum(-1) + 1
    logits = seen["logits"][:n_predictions]
    best = logits.topk(min(1000, V))
    carried = logits if V <= CARRIED else best.values
    ranges = torch.stack(carried.aminmax(dim=-1), dim=-1)  # (T, 2): logits are sixteen bits between these
    levels = (carried - ranges[:, :1]) / (ranges[:, 1:] - ranges[:, :1]).clamp(min=1e-12) * 65535
    rows, columns = np.tril_indices(n_attention)
    data = {"n_prompt": n_prompt, "n_attention": n_attention, "n_predictions": n_predictions}
    data["model"] = {"name": name, "parameters": sum(p.numel() for p in model.parameters()), **vars(config)}
    data["tokens"] = [{"id": i, "text": spell(tokenizer, i), "bytes": content(tokenizer, i).hex(" ")} for i in ids]
    data |= {"log_prob": [None, *came.tolist()], "rank": [None, *rank.tolist()]}
    data |= {"logits": pack(levels.round(), "uint16"), "ranges": pack(ranges, "float32")}
    data["attention"] = pack((seen["attention"][:, :, rows, columns] * 65535).round(), "uint16")
    data["lens_ids"] = pack(seen["lens_ids"][:, :n_predictions, :3], "uint32")
    data["lens_probs"] = pack((seen["lens_probs"][:, :n_predictions, :3] * 65535).round(), "uint16")
    data |= {key: pack(x[:, :n_predictions], "float32") for key, x in seen.items() if key.endswith("norm")}
    used = range(V)
    if V > CARRIED:
        used = sorted({*ids, *best.indices.flatten().tolist(), *seen["lens_ids"].flatten().tolist()})
        data["ids"] = pack(best.indices, "uint32")
        data["rest"] = pack(sums_of_the_rest(logits, 1000), "float32")
    return data | {"vocabulary": {i: spell(tokenizer, i) for i in used}}


def show_text(tokenizer, ids, seen):
    """The same in the terminal: three tables."""
    names, probs, rows = [repr(spell(tokenizer, i)) for i in ids], seen["logits"].softmax(-1), []
    for t, name in enumerate(names):
        expected = "  ".join(f"{spell(tokenizer, i)!r} {probs[t, i]:.2f}" for i in probs[t].topk(3).indices.tolist())
        p = probs[t - 1, ids[t]].item() if t else None
        rank = 1 + int((probs[t - 1] > p).sum()) if t else None
        rows.append({"position": t, "token": name, "probability": p, "rank": rank, "expected next": expected})
    tables.show(rows)
    print("\nWhere the last token looks most:")
    weights, tokens = seen["attention"][:, :, -1].max(dim=-1)  # (L, H) each
    rows = []
    for (block, head), weight in np.ndenumerate(weights.numpy()):
        rows.append({"block": block, "head": head, "token": names[tokens[block, head]], "weight": float(weight)})
    tables.show(rows)
    print("\nThe residual stream of the last token, and what the head would say after each block (logit lens):")
    rows = []
    for i, norms in enumerate(seen["stream_norm"]):
        row = {"after": f"block {i - 1}" if i else "embedding", "norm": norms[-1].item()}
        row |= {part: seen[f"{part}_norm"][i - 1, -1].item() if i else None for part in ("attention", "mlp")}
        row["says"] = repr(spell(tokenizer, seen["lens_ids"][i, -1, 0].item()))
        rows.append(row | {"probability": seen["lens_probs"][i, -1, 0].item()})
    tables.show(rows)


@command
def main(argv=None):
    parser = gpt.Parser(prog="explore.py", description="Look inside a model: one HTML page, or tables.")
    add = parser.add_argument
    add("--model", default="scratch", help="a folder, or a name under checkpoints/ (default: scratch)")
    add("--adapter", help="a folder with a LoRA adapter for the model")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to read and continue")
    prompt.add_argument("--prompt_file", help="a UTF-8 file with that text")
    add("--max_new_tokens", type=int, default=30, help="tokens that the model writes after it (default: 30)")
    add("--seed", type=int, default=1337, help="the same seed gives the same text (default: 1337)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "int8"), help="default: float32, exact")
    add("--out", type=Path, default="explore.html", help="the page (default: explore.html)")
    add("--overwrite", action="store_true", help="replace --out even if it is not such a page")
    add("--text", action="store_true", help="print tables, and write no page")
    add("--json", action="store_true", help="print all numbers as one JSON object, and write no page")
    args = parser.parse_args(argv)
    require(0 <= args.max_new_tokens <= 2**31, f"--max_new_tokens is {args.max_new_tokens}, expected 0 to 2**31")
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, expected 0 or more")
    require(args.adapter is None or args.dtype != "int8", "--adapter goes with float32 or bfloat16, not with int8")
    out = args.out
    free = not out.exists() or (out.is_file() and MARK in out.read_text(errors="replace")[:2000])
    require(free or args.overwrite or args.text or args.json, f"{out} is not a page of explore.py: add --overwrite")
    device = gpt.resolve_device(args.device)
    model, tokenizer = open_model(args.model, device, args.dtype, args.adapter)
    context, prompt = model.config.block_size, tokenizer.encode(read_prompt(args)) or [tokenizer.eot]
    if len(prompt) > context:
        log(f"the prompt has {len(prompt):,} tokens, only the last {context:,} fit into the context")
    idx = torch.tensor([prompt[-context:]], device=device)
    n_prompt, generator = idx.shape[1], torch.Generator(device).manual_seed(args.seed)
    n_new = min(args.max_new_tokens, context - n_prompt)
    ids = model.generate(idx, n_new, temperature=0.8, eot=tokenizer.eot, generator=generator)[0].tolist()
    seen = inspect(model, ids)
    if args.text:
        return show_text(tokenizer, ids, seen)
    if args.json:
        return print(json.dumps({"ids": ids, "n_prompt": n_prompt, **seen}, default=torch.Tensor.tolist))
    name = f"{args.model} with {args.adapter}" if args.adapter else args.model
    data = page_data(name, model, tokenizer, ids, n_prompt, seen)
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # data, never markup
    with gpt.replacing(out) as part:
        part.write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", packed), encoding="utf-8")
    carried = f"attention for {data['n_attention']} and predictions for {data['n_predictions']} of {len(ids)} tokens"
    log(f"{out}: {out.stat().st_size / 1e6:.1f} MB, with {carried}")


if __name__ == "__main__":
    main()
