"""The pictures of the notes, drawn from our own code and models.

python gpt.py --preset shakespeare-10min
python gpt.py --preset shakespeare-10min --max_steps 2000 --dropout 0.15 --out checkpoints/dropout
python gpt.py --preset shakespeare-10min --max_steps 2000 --dropout 0 --out checkpoints/no-dropout
python -m notes.pictures --model shakespeare --curves checkpoints/dropout checkpoints/no-dropout
"""

from pathlib import Path

import numpy as np
import torch

import gpt
from debug.activations import inspect
from debug.curve import read_log
from extras.checkpoints import read_config
from gpt import InputError, TrainConfig, command, load_checkpoint, require

SENTENCE = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate."
PROMPTS = ("ROMEO:\nI will not", "DUKE VINCENT")


def canvas(*grid, width=8, height=3):
    """-> a figure and its axes; white behind, so that it can be read on a dark page, too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(*grid)


def save(figure, path):
    with gpt.replacing(path) as part:
        figure.savefig(part, dpi=90, format="png")


def draw_mask(path):
    """Who sees whom: a whole window, and three new tokens beside a cache of five."""
    figure, panels = canvas(1, 2, height=3.6)
    for axes, (T, S) in zip(panels, ((8, 8), (3, 8)), strict=True):
        seen = torch.ones(T, S).tril(S - T)
        axes.imshow(seen.numpy(), cmap="Blues", vmin=0, vmax=1.6)
        for (t, s), value in zip(((t, s) for t in range(T) for s in range(S)), seen.flatten().tolist(), strict=True):
            axes.text(s, t, "0" if value else "-∞", ha="center", va="center", fontsize=8)
        axes.set(xlabel="key", ylabel="query", xticks=range(S), yticks=range(T), yticklabels=range(S - T, S))
        axes.set_title(f"{T} queries, {S} keys" + ("" if T == S else ": 5 of them from the cache"))
    save(figure, path)


def draw_schedule(path):
    """The learning rate of two presets."""
    figure, panels = canvas(1, 2)
    for axes, name in zip(panels, ("tiny", "gpt2"), strict=True):
        config = gpt.from_flags(TrainConfig, gpt.PRESETS[name])
        steps = range(0, config.max_steps + 1, max(1, config.max_steps // 1000))
        axes.plot(steps, [gpt.learning_rate(step, config) for step in steps])
        axes.set(title=name, xlabel="step", ylabel="learning rate", ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    save(figure, path)


def draw_tokens(vocabularies, path):
    """One sentence in several vocabularies: {name: Tokenizer}."""
    figure, axes = canvas(1, 1, width=10, height=0.75 * len(vocabularies) + 0.2)
    width = len(SENTENCE)
    for row, (name, tokenizer) in enumerate(vocabularies.items()):
        at, ids = 0, tokenizer.encode(SENTENCE)
        for number, i in enumerate(ids):
            token = tokenizer.decode([i])
            axes.barh(
                row, len(token), left=at, height=0.55, color=("#cfe2f3", "#9fc5e8")[number % 2], edgecolor="white"
            )
            for place, character in enumerate(token):
                axes.text(at + place + 0.5, row, character, ha="center", va="center", fontsize=8, family="monospace")
            at += len(token)
        axes.text(0, row - 0.48, f"{name}: {len(ids)} tokens", fontsize=8)
    axes.set(xlim=(0, width), ylim=(len(vocabularies) - 0.5, -0.8))
    axes.set_axis_off()
    save(figure, path)


@torch.no_grad()
def draw_sampling(model, tokenizer, path):
    """What temperature does to the ten most probable next tokens; and how many tokens the nucleus keeps."""
    figure, panels = canvas(1, 2, width=10, height=3.6)
    context = model.config.block_size
    logits = {prompt: model(torch.tensor([tokenizer.encode(prompt)[-context:]]))[0][:, -1] for prompt in PROMPTS}
    tokens = logits[PROMPTS[0]].topk(10).indices[0]
    names = [repr(tokenizer.decode([i])) for i in tokens.tolist()]
    for number, temperature in enumerate((0.5, 1.0, 2.0)):
        probs = gpt.next_token_probs(logits[PROMPTS[0]], temperature)[0, tokens]
        panels[0].bar(
            [place + 0.27 * (number - 1) for place in range(10)],
            probs.tolist(),
            0.27,
            label=f"temperature {temperature}",
        )
    panels[0].set_xticks(range(10), names, rotation=60, fontsize=8, parse_math=False)
    panels[0].set(ylabel="probability", title=f"after {PROMPTS[0]!r}")
    for prompt, vector in logits.items():
        probs = gpt.next_token_probs(vector)[0].sort(descending=True).values
        kept = int((gpt.next_token_probs(vector, top_p=0.9) > 0).sum())
        panels[1].plot(range(1, len(probs) + 1), probs.cumsum(0).tolist(), label=f"after {prompt!r}: {kept} tokens")
        panels[1].plot(kept, probs[:kept].sum(), "ko", ms=4)
    panels[1].axhline(0.9, color="gray", lw=0.8, ls="--")
    panels[1].set(
        xscale="log",
        xlabel="tokens, most probable first",
        ylabel="probability together",
        title="the nucleus at top_p 0.9",
    )
    for axes in panels:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save(figure, path)


def read_run(folder):
    """-> its dropout, and the columns of its log.csv."""
    rows = read_log(folder / "log.csv")
    columns = [[row[key] for row in rows] for key in ("step", "train_loss", "val_loss")]
    return read_config(folder)["model"]["dropout"], *columns


def draw_attention(attention, tokens, path):
    """A map for each head (columns) of each block (rows): each token looks at the tokens before it."""
    from matplotlib.colors import PowerNorm

    n_layer, n_head, T, _ = attention.shape
    figure, grid = canvas(n_layer, n_head, height=1.9 * n_layer)
    for (layer, head), axes in np.ndenumerate(np.reshape(grid, (n_layer, n_head))):
        axes.imshow(attention[layer, head], cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # small weights show, too
        axes.set(title=f"block {layer}, head {head}", xticks=[], yticks=[])
        if head == 0:
            axes.set_yticks(range(T), tokens, fontsize=6, parse_math=False)
    save(figure, path)


def draw_curves(runs, path):
    """Training and validation loss of several runs."""
    figure, axes = canvas(1, 1, height=4)
    for number, (dropout, steps, train, val) in enumerate(runs):
        axes.plot(steps, val, color=f"C{number}", label=f"dropout {dropout:g}: validation")
        axes.plot(steps, train, ":", color=f"C{number}", label=f"dropout {dropout:g}: training")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


@command
def main(argv=None):
    parser = gpt.Parser(
        prog="python -m notes.pictures", description="Draw the pictures of the notes from our own models."
    )
    parser.add_argument(
        "--model", default="shakespeare", help="whose attention and distributions (default: shakespeare)"
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        default=[],
        help="folders of runs whose losses are compared, with and without dropout, say",
    )
    parser.add_argument("--out", default="notes", help="folder for the pictures (default: notes)")
    args = parser.parse_args(argv)
    model, tokenizer = load_checkpoint(args.model)
    folder, runs = Path(args.out), [read_run(Path(name)) for name in args.curves]
    require(folder.is_dir(), f"there is no folder {folder}: make it, or choose another --out")
    vocabularies = {"bytes": gpt.Tokenizer.bytes(), f"{args.model}, {tokenizer.vocab_size:,} tokens": tokenizer}
    try:
        vocabularies["GPT-2, 50,257 tokens"] = gpt.Tokenizer.gpt2()
    except InputError as error:
        gpt.log(f"without GPT-2's vocabulary: {error}")
    draw_mask(folder / "mask.png")
    draw_schedule(folder / "schedule.png")
    draw_tokens(vocabularies, folder / "tokens.png")
    draw_sampling(model, tokenizer, folder / "sampling.png")
    ids = tokenizer.encode("ROMEO:\nMy love, I will not speak of it.")[-model.config.block_size :]
    tokens = [repr(tokenizer.decode([i]))[1:-1] for i in ids]
    draw_attention(inspect(model, ids)["attention"].numpy(), tokens, folder / "attention.png")
    if runs:
        draw_curves(runs, folder / "dropout.png")
    print(f"the pictures are in {folder}")


if __name__ == "__main__":
    main()
