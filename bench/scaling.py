"""How the cost of training grows: closed forms for parameters, arithmetic and memory, and measurements.

python -m bench --scaling measures, and --plan applies the closed forms to larger machines. The tests compare each
form with what PyTorch counts and keeps, at small sizes, to the last byte.
"""

import functools
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

import gpt
from gpt import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# Closed forms. C channels, L layers, H heads, T tokens in each of B windows, V tokens in the vocabulary, N parameters.


def parameters(config):
    """Weights and biases; the head is the token embedding, and counts once."""
    C, L, T, V = config.n_embd, config.n_layer, config.block_size, config.vocab_size
    return V * C + T * C + L * (12 * C**2 + 13 * C) + 2 * C


def flops(config, B, T):
    """Floating-point operations of a training step: an addition and a multiplication for each weight and token.

    The backward pass needs two products for each one of the forward pass. Attention is counted without its mask, which
    makes half of it superfluous (as in Narayanan et al. 2021, appendix).
    """
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    matrices = 2 * B * T * (12 * L * C**2 + V * C)
    attention = 2 * B * T * (2 * L * T * C)  # q kᵀ, and the weights times v
    return 3 * (matrices + attention)


def activations(config, B, T, bfloat16=False, fused=False):
    """Bytes that forward keeps for backward, without dropout.

    In each block: both inputs of the norms, C wide; their outputs, q, k, v and attention's output, C wide each; the
    MLP's inner layer before and after the GELU, 4 C wide; mean and standard deviation of two norms; attention's T
    weights for each head and token, of which the fused kernel keeps one sum; and the mask, once for all windows. In
    bfloat16, all but the residual stream, the norms' figures and the loss is half as large, but each matrix is copied.
    """
    C, L, H, V = config.n_embd, config.n_layer, config.n_head, config.vocab_size
    size = 2 if bfloat16 else 4
    stream = 4 * (2 * L + 1) * C + size * (14 * L + 1) * C
    weights = 4 * L * H if fused else size * L * H * T
    masks = 0 if fused else L * T**2
    copies = 2 * (12 * L * C**2 + V * C) if bfloat16 else 0
    return B * T * (stream + weights + 4 * 2 * (2 * L + 1) + 4 * V + 16) + masks + copies + 12


def memory(config, B, T, **options):
    """Bytes of training with AdamW, float32 weights: {what: bytes}."""
    N = parameters(config)
    return {
        "weights": 4 * N,
        "gradients": 4 * N,
        "averages": 8 * N,
        "activations": activations(config, B, T, **options),
    }


GPUS, CARD, PEAK, TOKENS = (
    (8, 64),
    80e9,
    312e12,
    300e9,
)  # an A100: bytes of memory, bfloat16 FLOP/s; tokens of GPT-3's training
SHARE = 0.3  # of the peak: what nanoGPT's published four days for 300 billion tokens on 8 A100 come to, by this table


def plan():
    """GPT-2's four sizes on several GPUs, each with a whole copy of the model -> rows of figures."""
    rows = []
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = GPTConfig.preset(name)
        T = config.block_size
        fixed, each = sum(list(memory(config, 1, T).values())[:3]), activations(config, 1, T, bfloat16=True, fused=True)
        windows = int((0.9 * CARD - fixed) // each)
        per_token = flops(config, 1, T) / T
        hours = {n: per_token * TOKENS / (n * PEAK * SHARE) / 3600 for n in GPUS}
        row = {"model": name, "parameters": parameters(config), "flops_per_token": per_token}
        rows.append(row | {"fixed": fixed, "per_window": each, "windows": windows, "hours": hours})
    return rows


def show_plan(rows):
    print(f"{'model':<12} {'parameters':>13} {'GFLOP/token':>11} {'states':>8} {'per window':>10} {'windows':>7} "
          + " ".join(f"{f'hours, {n} GPUs':>14}" for n in GPUS))  # fmt: skip
    for row in rows:
        work = f"{row['model']:<12} {row['parameters']:>13,} {row['flops_per_token'] / 1e9:>11.2f}"
        held = f"{row['fixed'] / 1e9:>5.1f} GB {row['per_window'] / 1e9:>7.2f} GB {row['windows']:>7,}"
        print(work, held, *(f"{row['hours'][n]:>14,.0f}" for n in GPUS))
    speed = f"{SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s"
    print(f"{TOKENS:.0e} tokens, context 1,024, bfloat16 and fused attention, {speed};")
    print("states are weights, gradients and AdamW's averages;")
    print(f"windows is how many fit into nine tenths of {CARD / 1e9:.0f} GB at a time")


# ---------------------------------------------------------------------------------------------------------------------
# Where the time of a step goes: PyTorch's operations by kind.

KINDS = {
    "matrix products": "(b?mm|addmm|baddbmm|mv|addmv|.*linear.*)",
    "attention, fused": ".*scaled_dot_product.*|.*flash_attention.*",
    "softmax": "_softmax.*",
    "GELU": "gelu.*",
    "LayerNorm": "native_layer_norm.*",
    "loss": ".*log_softmax.*|nll_loss.*",
    "embeddings": "embedding.*|index_.*",
    "dropout": "random_|ge|native_dropout.*|bernoulli_.*",
    "optimizer and clipping": "_fused_adamw_|lerp.*|_foreach.*|linalg_vector_norm|norm",
    "copies and conversions": "copy_|_to_copy|clone|cat|stack|contiguous",
    "sums: residuals, biases": "add_?|sum",
    "zeros": "fill_|zero_",
}


def shares(step, data, steps):
    """Run steps of training on a dataset -> {kind of operation: its share of their time}, the largest first."""
    from torch.profiler import ProfilerActivity, profile, record_function

    batch = data.batch

    def watched(windows):
        with record_function("data"):
            return batch(windows)

    step(0)
    data.batch = watched
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(1, steps + 1):
            with record_function("Python"):
                step(number)
    times = dict.fromkeys((*KINDS, "data", "Python", "other"), 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        kind = (
            name
            if name in times
            else next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), "other")
        )
        times[kind] += event.self_cpu_time_total
    return {kind: time / sum(times.values()) for kind, time in sorted(times.items(), key=lambda item: -item[1]) if time}


def show_shares(found):
    kinds = sorted(
        {kind for row in found.values() for kind in row},
        key=lambda kind: -sum(row.get(kind, 0) for row in found.values()),
    )
    print(f"{'':<24}" + "".join(f"{name:>8}" for name in found))
    for kind in kinds:
        print(f"{kind:<24}" + "".join(f"{row.get(kind, 0):>8.1%}" for row in found.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Measured: one thing grows, the others stay. Context, width and depth at 4,096 tokens a step.

BASE = {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024}
SWEEPS = {  # what grows -> the values, and the shape and the number of windows for each
    "context": ((64, 128, 256, 512, 1024), lambda n: ({"block_size": n}, 4096 // n)),
    "width": ((64, 128, 256, 512), lambda n: ({"n_embd": n}, 32)),
    "depth": ((1, 2, 4, 8, 16), lambda n: ({"n_layer": n}, 32)),
    "batch": ((1, 4, 16, 64), lambda n: ({}, n)),
}
CORPUS = (1, 10, 100)  # MB of text; extras.prepare is for more


def training(name, n, stepping):
    """-> a function that makes a step at one point of a sweep."""
    fields, B = SWEEPS[name][1](n)
    config = GPTConfig(**(BASE | fields))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size * (B + 1) * 4)
    train_config = gpt.TrainConfig(batch_size=B, optimizer="adamw")
    return stepping(GPT(config), gpt.TokenDataset(tokens, config.block_size), train_config)


def tokenizing(megabytes):
    """-> a function that learns a vocabulary from that much text and tokenizes it; from 1 MB when first called."""
    from pydoc_data.topics import topics

    folder, text = tempfile.TemporaryDirectory(), "\n".join(topics.values())
    for name, size in (("0", 1), ("1", megabytes)):
        with open(Path(folder.name, name), "w", encoding="utf-8") as file:
            file.writelines(f"{i}\n{text}" for i in range(round(10**6 * size / len(text.encode()))))

    def step(number):
        gpt.load_data([str(Path(folder.name, str(min(number, 1))))])

    return step


def points(stepping):
    """{name of a workload: what makes it}, for all sweeps of the model."""
    return {
        f"{name} {n}": functools.partial(training, name, n, stepping)
        for name, (values, _) in SWEEPS.items()
        for n in values
    }


def figures(point, found):
    """What one point of a sweep has cost -> a row."""
    name, n = point.split()
    row = {"sweep": name, "value": int(n), "seconds": found["seconds"], "memory": found["memory"]}
    if name == "corpus":
        return row | {"megabytes_per_second": int(n) / found["seconds"]}
    fields, B = SWEEPS[name][1](int(n))
    config = GPTConfig(**(BASE | fields))
    T = config.block_size
    bfloat16 = gpt.resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    options = {"bfloat16": bfloat16, "fused": not bfloat16 or T >= 1024}  # as gpt.attention chooses
    return row | {"tokens_per_second": B * T / found["seconds"], "gflops": flops(config, B, T) / found["seconds"] / 1e9,
                  "closed_form": sum(memory(config, B, T, **options).values())}  # fmt: skip


def show(rows):
    for sweep in dict.fromkeys(row["sweep"] for row in rows):
        corpus = sweep == "corpus"
        unit, flop = ("MB/s", "") if corpus else ("tokens/s", "GFLOP/s")
        print(f"{sweep + (', MB' if corpus else ''):>12} {'ms':>10} {unit:>10} {flop:>8} "
              f"{'peak memory':>12} {'' if corpus else 'closed form':>12}".rstrip())  # fmt: skip
        for row in (row for row in rows if row["sweep"] == sweep):
            speed = row["megabytes_per_second"] if corpus else row["tokens_per_second"]
            held = "" if row["memory"] is None else f"{row['memory'] / 1e6:,.0f} MB"
            more = ("", "") if corpus else (f"{row['gflops']:,.0f}", f"{row['closed_form'] / 1e6:,.0f} MB")
            print(
                f"{row['value']:>12,} {1e3 * row['seconds']:>10,.1f} {speed:>10,.1f} "
                f"{more[0]:>8} {held:>12} {more[1]:>12}".rstrip()
            )


def plot(rows, path):
    """Time and memory of each sweep, both axes logarithmic: a straight line of slope 1 is a cost in proportion."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(3.2 * len(sweeps), 5.5), layout="constrained")
    grid = figure.subplots(2, len(sweeps), squeeze=False)
    for column, sweep in enumerate(sweeps):
        points = [row for row in rows if row["sweep"] == sweep]
        values = [row["value"] for row in points]
        for axes, key, scale in zip(grid[:, column], ("seconds", "memory"), (1e3, 1e-6)):
            axes.loglog(values, [scale * (row[key] or np.nan) for row in points], "o-", label="measured")
            if key == "memory" and sweep != "corpus":
                axes.loglog(values, [scale * row["closed_form"] for row in points], "s:", ms=4, label="closed form")
                axes.legend()
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.set_ylim(axes.get_ylim()[0] / 2, axes.get_ylim()[1] * 2)
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter("")
            axes.grid(alpha=0.3)
        grid[0, column].set(
            title=sweep + (", MB of text" if sweep == "corpus" else ""), ylabel="" if column else "ms per step"
        )
        grid[1, column].set(ylabel="" if column else "peak memory, MB")
    with gpt.replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")


def plot_ratios(parts, path):
    """{part: {workload: how many times as fast as the first}} -> a bar for each."""
    from matplotlib.figure import Figure

    sizes = [len(ratios) for ratios in parts.values()]
    figure = Figure(figsize=(8, 0.8 * len(parts) + 0.32 * sum(sizes)), layout="constrained")
    grid = figure.subplots(len(parts), squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (part, ratios) in zip(grid, parts.items()):
        bars = axes.barh(
            list(ratios), ratios.values(), color=["tab:blue" if ".py" in name else "tab:gray" for name in ratios]
        )
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1, color="black", lw=0.8)
        axes.set(title=f"{part}: times as fast as {next(iter(ratios))}", xlim=(0, 1.15 * max(ratios.values())))
        axes.invert_yaxis()
    with gpt.replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")
