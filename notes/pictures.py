"""The pictures of the notes, drawn from our own code, models and runs, as SVG that reads on light and dark pages.

python gpt.py
python -m notes.pictures                                  # all but dropout.svg, which compares two runs:
python gpt.py --dropout 0 --out checkpoints/no-dropout
python -m notes.pictures --curves scratch no-dropout
"""

import math
from pathlib import Path

import numpy as np
import torch

import finetune
import gpt
from debug.activations import inspect
from debug.curve import read_log
from extras.checkpoints import read_config
from gpt import InputError, TrainConfig, command, load_checkpoint, require
from notes import diagrams, diagrams_use
from notes.svg import Picture, ticks

SENTENCE = "Tokenizers split words."
SEEN = "The import statement is used in a module."
PROMPTS = ("The import statement is", "The following example")
DIAGRAMS = [
    diagrams.draw_model,
    diagrams.draw_windows,
    diagrams.draw_lookup,
    diagrams.draw_qkv,
    diagrams.draw_mask,
    diagrams.draw_heads,
    diagrams.draw_block,
    diagrams.draw_gpt2,
    diagrams_use.draw_tying,
    diagrams_use.draw_cache,
    diagrams_use.draw_transpose,
    diagrams_use.draw_lora,
]


def draw_freezing():
    """Which parameters of GPT-2 each method of finetune.py trains."""
    story = (
        "A row for each method, a column for each part of GPT-2: full trains all, last the last two blocks and the "
        "final LayerNorm, layernorm and bias a few parameters of each block, head the token embedding, which is also "
        "the head, and lora added matrices. The last column says how far back the backward pass goes."
    )
    picture = Picture("freezing", "Which parameters of GPT-2 each method trains", story, height=344)
    n_layer = gpt.GPTConfig.preset("gpt2").n_layer
    columns = ["wte", "wpe", *(f"h.{i}" for i in range(n_layer)), "ln_f"]
    widths = [44, 34, *[17] * n_layer, 34]
    lefts = [130 + sum(widths[:i]) + 3 * i for i in range(len(widths))]
    for left, width, name in zip(lefts, widths, columns, strict=True):
        picture.text(left + width / 2, 46, name.removeprefix("h."), size=12)
    picture.text(lefts[0] + 22, 26, "head =", size=12)
    picture.text((lefts[2] + lefts[n_layer + 2]) / 2, 26, "blocks", size=12)
    picture.text(592, 46, "trained", size=12, bold=True, anchor="end")
    picture.text(662, 36, "backward\nreaches", size=12, bold=True)
    for row, method in enumerate(finetune.METHODS):
        model = diagrams.gpt2_model()
        finetune.choose(model, finetune.FinetuneConfig(method=method, data=("my.txt",)))
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        reached = []  # the parts with trained parameters, from the input on
        y = 62 + 34 * row
        picture.text(122, y + 13, method, anchor="end", code=True, size=12)
        for left, width, name in zip(lefts, widths, columns, strict=True):
            inside = [flag for key, flag in trained.items() if f".{name}." in key]
            hue, fill = "gray", 0.05
            if any(inside):
                reached.append(name)
                hue, fill = "orange" if method == "lora" else "blue", 0.8 if all(inside) else 0.3
            picture.box(left, y, width, 26, hue=hue, fill=fill, line=1, round=2)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        picture.text(592, y + 13, f"{count:,}", anchor="end")
        picture.text(662, y + 13, reached[0])
    legend = (("blue", 0.8, "trained"), ("blue", 0.3, "trained in part"), ("orange", 0.3, "added matrices"))
    for i, (hue, fill, words) in enumerate((*legend, ("gray", 0.05, "frozen"))):
        picture.box(130 + 140 * i, 314, 16, 14, hue=hue, fill=fill, line=1, round=2)
        picture.text(153 + 140 * i, 321, words, size=12, anchor="start")
    return picture


def draw_losses(picture, runs, low, high, top=36):
    """The axes, and training and validation loss of some runs: [(label, rows of a log), ...]."""
    last = max(rows[-1]["step"] for _, rows in runs)
    frame = (76, top, 470, 240)
    across, down = picture.axes(frame, ticks(0, last), ticks(low, high), "step", "loss, nats per token")
    for i, (label, rows) in enumerate(runs):
        hue = ("blue", "orange")[i]
        picture.text(566, top + 12 + 78 * i, label, anchor="start", bold=True)
        for j, (key, words) in enumerate((("val_loss", "validation"), ("train_loss", "training"))):
            dashes = "5 4" if key == "train_loss" else None
            points = [(across(row["step"]), down(row[key])) for row in rows if row[key] <= high]  # no nan, either
            picture.line(*points, hue=hue, width=2, dashes=dashes)
            y = top + 34 + 78 * i + 22 * j
            picture.line((566, y), (594, y), hue=hue, width=2, dashes=dashes)
            picture.text(602, y, words, anchor="start")
    return across, down


def draw_curve(rows, vocab_size):
    """Training and validation loss of one run, with its best validation."""
    best = min(rows, key=lambda row: row["val_loss"])
    uniform = math.log(vocab_size)
    story = (
        f"The validation loss falls from {rows[0]['val_loss']:.2f}, near the {uniform:.2f} of a uniform guess, to "
        f"{best['val_loss']:.2f} nats per token at step {best['step']:,}."
    )
    picture = Picture("curve", "Training and validation loss of one run", story, height=340)
    losses = [row[key] for row in rows for key in ("train_loss", "val_loss") if math.isfinite(row[key])]
    low, high = min(losses), max(*losses, uniform)
    across, down = draw_losses(picture, [("loss", rows)], low, high)
    picture.line((76, down(uniform)), (546, down(uniform)), dashes="2 3")
    picture.text(540, down(uniform) - 12, f"uniform guess: ln {vocab_size:,} = {uniform:.2f}", size=12, anchor="end")
    x, y = across(best["step"]), down(best["val_loss"])
    picture.box(x - 4, y - 4, 8, 8, hue="blue", fill=1, line=0, round=4)
    words = f"best: {best['val_loss']:.2f} nats per token\n= {best['val_bits_per_byte']:.3f} bits per byte"
    picture.text(min(x, 540), y - 28, words, size=12, anchor="end" if x > 300 else "start")
    return picture


def draw_dropout(runs, p=0.25):
    """What dropout does to activations; and the losses of two runs from their first tenth on, where they differ."""
    story = "Dropout zeroes activations and scales up the others in training, and does nothing in evaluation."
    for label, rows in runs:
        story += f" Best validation loss with {label}: {min(row['val_loss'] for row in rows):.2f}."
    picture = Picture("dropout", "Dropout, and the loss with and without it", story, height=470)
    x = torch.tensor([3.0, 6.0, 9.0, 12.0, 3.0, 6.0, 9.0, 12.0])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(6)
        dropped = gpt.Dropout(p).train()(x)
    rows = {"activations": x, "in training": dropped, "in evaluation": gpt.Dropout(p).eval()(x)}
    for i, (name, row) in enumerate(rows.items()):
        numbers = row.round().int().tolist()
        hues = ["teal" if number else "gray" for number in numbers]
        picture.matrix(120, 14 + 36 * i, [numbers], lambda _, j, hues=hues: hues[j], names=[name])
    picture.text(490, 63, f"each is 0 with probability p = {p}", anchor="start", size=12)
    picture.text(490, 80, f"the others × 1 / (1 − p) = {1 / (1 - p):.2f}", anchor="start", size=12)
    picture.text(490, 99, "all pass, unchanged", anchor="start", size=12)
    late = [row for _, rows in runs for row in rows if row["step"] >= rows[-1]["step"] / 10]
    losses = [row[key] for row in late for key in ("train_loss", "val_loss") if math.isfinite(row[key])]
    draw_losses(picture, runs, min(losses), max(losses), top=166)
    return picture


def draw_schedule():
    """The learning rate of two presets."""
    story = "The learning rate rises in a straight line during warmup, then falls in a straight line to its last value."
    picture = Picture("schedule", "Learning rate: linear warmup, then linear decay", story, height=270)
    for left, name in ((76, "tiny"), (444, "gpt2")):
        config = gpt.from_flags(TrainConfig, gpt.PRESETS[name])
        steps = sorted({*range(0, config.max_steps + 1, config.max_steps // 100), config.warmup_steps})
        title = f"{name}: peak {config.lr:g} after {config.warmup_steps} steps"
        x_ticks = [(step, f"{step:,}") for step in (0, config.max_steps // 2, config.max_steps)]
        frame = (left, 36, 236, 176)
        across, down = picture.axes(frame, x_ticks, ticks(0, config.lr, 4), "step", "learning rate", title)
        points = [(across(step), down(gpt.learning_rate(step, config))) for step in steps]
        picture.line(*points, hue="blue", width=2)
    return picture


def shown(tokenizer, i):
    """A token with its spaces as · and line feeds as \\n."""
    return repr(tokenizer.decode([i]))[1:-1].replace(" ", "·")


def draw_tokens(vocabularies):
    """One sentence in several vocabularies, {name: Tokenizer}; a token of n bytes is n cells wide."""
    encoded = {name: tokenizer.encode(SENTENCE) for name, tokenizer in vocabularies.items()}
    story = f"“{SENTENCE}” is " + "; ".join(f"with {name} {len(ids)} tokens" for name, ids in encoded.items()) + "."
    picture = Picture("tokens", "One sentence in several vocabularies", story, height=94 * len(encoded) + 26)
    cell = 700 / len(SENTENCE)
    for row, (name, ids) in enumerate(encoded.items()):
        x, y = 10, 38 + 94 * row
        picture.text(x, y - 20, f"{name}: {len(ids)} tokens", anchor="start", bold=True)
        for number, i in enumerate(ids):
            token = shown(vocabularies[name], i)
            width = cell * len(token)
            picture.box(x, y, width, 30, hue=("blue", "orange")[number % 2], line=1, round=3)
            for at, character in enumerate(token):
                picture.text(x + (at + 0.5) * cell, y + 15, character, size=15, code=True)
            picture.text(x + width / 2, y + 44, i, size=12)
            x += width
    picture.text(10, picture.height - 14, "below each token: its id;  · is a space", anchor="start", size=12)
    return picture


def next_logits(model, tokenizer, prompt):
    """The logits (1, V) after a prompt."""
    ids = tokenizer.encode(prompt)[-model.config.block_size :]
    return model(torch.tensor([ids]))[0][:, -1]


def draw_sampling(model, tokenizer):
    """The probabilities of the ten most probable next tokens at three temperatures."""
    story = "At temperature 0.5 the most probable tokens gain; at 2 the bars are nearly equal, and the others gain."
    picture = Picture("sampling", "Temperature sharpens or flattens a distribution", story, height=378)
    logits = next_logits(model, tokenizer, PROMPTS[0])
    tokens = logits.topk(10).indices[0]
    picture.text(360, 18, f"the ten most probable tokens after “{PROMPTS[0]}”", bold=True)
    for row, i in enumerate(tokens.tolist()):
        picture.text(94, 75 + 25 * row, shown(tokenizer, i), anchor="end", code=True)
    found = {temperature: gpt.next_token_probs(logits, temperature)[0, tokens] for temperature in (0.5, 1.0, 2.0)}
    scale = ticks(0, max(probs.max().item() for probs in found.values()), 4)
    for panel, (temperature, probs) in enumerate(found.items()):
        left, hue = 102 + 204 * panel, ("blue", "teal", "orange")[panel]
        picture.text(left + 79, 44, f"temperature {temperature:g}")
        across, _ = picture.axes((left, 60, 158, 255), scale, [(0, ""), (1, "")], "probability", "")
        for row, p in enumerate(probs.tolist()):
            picture.box(left, 66 + 25 * row, across(p) - left, 18, hue=hue, fill=0.6, line=0, round=0)
            picture.text(across(p) + 5, 75 + 25 * row, f"{p:.2f}", size=12, anchor="start")
    return picture


def draw_nucleus(model, tokenizer, top_p=0.9):
    """The probabilities after one prompt, and how fast they add up after two: what top_p keeps."""
    story = f"Tokens are taken in the order of their probability until they add up to {top_p}; the rest is left out."
    picture = Picture("nucleus", f"Nucleus sampling: the fewest tokens that add up to {top_p}", story, height=384)
    found = []  # for each prompt: ids, probabilities and running sums in falling order, the size of the nucleus
    for prompt in PROMPTS:
        logits = next_logits(model, tokenizer, prompt)
        probs, order = gpt.next_token_probs(logits)[0].sort(descending=True)
        n_kept = int((gpt.next_token_probs(logits, top_p=top_p) > 0).sum())
        found.append((order.tolist(), probs.tolist(), probs.cumsum(0).tolist(), n_kept))
    order, probs, sums, n_kept = found[1]
    picture.text(170, 18, f"after “{PROMPTS[1]}”", bold=True)
    picture.text(130, 46, "probability", size=12)
    picture.text(286, 46, "running sum", size=12)
    for row in range(10):
        y = 72 + 25 * row
        picture.text(84, y, shown(tokenizer, order[row]), anchor="end", code=True)
        width = 104 * probs[row] / probs[0]
        picture.box(92, y - 9, width, 18, hue="violet" if row < n_kept else "gray", fill=0.6, line=0, round=0)
        picture.text(98 + width, y, f"{probs[row]:.3f}", size=12, anchor="start")
        picture.text(286, y, f"{sums[row]:.3f}", size=12)
    picture.text(170, 334, f"colored: the nucleus, {n_kept} of {len(order):,} tokens", size=12)
    marks = [n for n in (1, 10, 100, 1000, 10_000) if 2 * n < len(order)]
    x_ticks = [(math.log10(n), f"{n:,}") for n in (*marks, len(order))]
    frame = (402, 36, 290, 240)
    across, down = picture.axes(frame, x_ticks, ticks(0, 1, 5), "tokens, most probable first", "running sum")
    picture.line((402, down(top_p)), (692, down(top_p)), dashes="5 4")
    picture.text(688, down(top_p) + 11, f"top_p = {top_p}", size=12, anchor="end")
    for i, (prompt, (_, _, sums, n_kept)) in enumerate(zip(PROMPTS, found, strict=True)):
        hue = ("teal", "violet")[i]
        edge = across(math.log10(n_kept))
        picture.line(*((across(math.log10(n)), down(total)) for n, total in enumerate(sums, 1)), hue=hue, width=2)
        picture.line((edge, down(sums[n_kept - 1])), (edge, 276), hue=hue, dashes="2 3")
        picture.line((402, 344 + 22 * i), (426, 344 + 22 * i), hue=hue, width=2)
        picture.text(434, 344 + 22 * i, f"after “{prompt}”: {n_kept}", size=12, anchor="start")
    return picture


def draw_attention(model, tokenizer, most=4):
    """A map for each head (columns) of each block (rows): each token looks at the tokens before it."""
    ids = tokenizer.encode(SEEN)[: min(12, model.config.block_size)]
    attention = inspect(model, ids)["attention"][:most, :most]  # (L, H, T, T)
    n_layer, n_head, T, _ = attention.shape
    names = [shown(tokenizer, i) for i in ids]
    cell, top = 13, 40
    side = T * cell
    height = top + n_layer * (side + 34) + 8 * max(map(len, names)) + 26
    story = "A triangle for each head of each block: rows are queries, columns keys; a fuller cell is a larger weight."
    picture = Picture("attention", f"The attention of a trained model to “{SEEN}”", story, height)
    for layer in range(n_layer):
        y = top + layer * (side + 34)
        for t, name in enumerate(names):
            picture.text(92, y + (t + 0.5) * cell, name, size=12, anchor="end", code=True)
        for head in range(n_head):
            x = 100 + head * (side + 24)
            picture.text(x + side / 2, y - 14, f"block {layer}, head {head}", size=12)
            for (t, s), weight in np.ndenumerate(attention[layer, head].numpy()):
                if s <= t:
                    picture.box(x + s * cell, y + t * cell, cell, cell, hue="blue", fill=weight**0.5, line=0, round=0)
    for head in range(n_head):
        for s, name in enumerate(names):
            x = 100 + head * (side + 24) + (s + 0.5) * cell
            picture.text(x, y + side + 8, name, size=12, anchor="end", code=True, turned=True)
    picture.text(100, height - 16, "rows: queries;  columns: keys;  weight", size=12, anchor="start")
    for i, weight in enumerate((0, 0.1, 0.3, 1)):
        picture.box(336 + 62 * i, height - 23, cell, cell, hue="blue", fill=weight**0.5, line=0.5, round=0)
        picture.text(354 + 62 * i, height - 16, f"{weight:g}", size=12, anchor="start")
    return picture


def draw_all(model, tokenizer, rows, runs):
    """Yield every picture; dropout's only if there are runs to compare."""
    vocabularies = {"bytes": gpt.Tokenizer.bytes(), f"our vocabulary of {tokenizer.vocab_size:,}": tokenizer}
    try:
        vocabularies["GPT-2's vocabulary of 50,257"] = gpt.Tokenizer.gpt2()
    except InputError as error:
        gpt.log(f"without GPT-2's vocabulary: {error}")
    for draw in DIAGRAMS:
        yield draw()
    yield draw_freezing()
    yield draw_schedule()
    yield draw_tokens(vocabularies)
    yield draw_curve(rows, tokenizer.vocab_size)
    for draw in (draw_sampling, draw_nucleus, draw_attention):
        yield draw(model, tokenizer)
    if runs:
        yield draw_dropout(runs)


def read_losses(name):
    """The rows of a run's log, which reaches beyond the validation before the first step."""
    rows = read_log(gpt.find_checkpoint(name) / "log.csv")
    require(rows[-1]["step"] > 0, f"{name} stopped before its second validation: train it for longer")
    return rows


@command
def main(argv=None):
    parser = gpt.Parser(prog="python -m notes.pictures", description="Draw the pictures of the notes.")
    add = parser.add_argument
    add("--model", default="scratch", help="whose curve, attention and distributions (default: scratch)")
    add("--curves", nargs=2, default=[], help="two runs for dropout.svg, with dropout and without (default: none)")
    add("--out", default="notes", help="folder for the pictures (default: notes)")
    args = parser.parse_args(argv)
    folder = Path(args.out)
    require(folder.is_dir(), f"there is no folder {folder}: make it, or choose another --out")
    model, tokenizer = load_checkpoint(args.model)
    runs = [(f"dropout {read_config(name)['model']['dropout']:g}", read_losses(name)) for name in args.curves]
    rows = read_losses(args.model)
    with torch.no_grad():
        pictures = list(draw_all(model, tokenizer, rows, runs))
    for picture in pictures:
        with gpt.replacing(folder / f"{picture.name}.svg") as part:
            part.write_text(picture.render(), encoding="utf-8")
    print(f"{len(pictures)} pictures are in {folder}")


if __name__ == "__main__":
    main()
