"""Speed and memory, beside what a user would take instead, in one run; ratios count, as machines and their moods differ.

    python bench.py                               training a small model, and generating with GPT-2 (124M, random weights)
    python bench.py train-large train-gpt2        training at larger shapes
    python bench.py generate-8                    eight streams at once
    python bench.py finetune                      adapting GPT-2
    python bench.py --scaling                     how time and memory grow with context, width, depth, batch and text
    python bench.py --plan                        GPT-2's four sizes on 8 and 64 GPUs, by closed forms

Each workload runs in a process of its own, several times in turn with the others. Of the medians over its steps the lowest
counts, of its peaks in memory, beyond what the process held with all libraries loaded, the highest.
"""

import dataclasses
import functools
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import gpt
import scaling
from gpt import GPT, GPTConfig, InputError, command, require, say


def processor():
    """The processor's name where the system says it, and whether it computes bfloat16 natively."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    native = gpt.resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    return f"{found[1] if found else platform.machine()}, {'native' if native else 'no native'} bfloat16"


def resident(peak=False):
    """Bytes of memory that this process holds, or has held at most; None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning at GPT-2's size: batch 2, context 128, dropout 0.1.


def stepping(model, data, config):
    """-> a function that makes one step of gpt.py's loop."""
    optimizers, dtype = gpt.make_optimizers(model, config), gpt.resolve_dtype(config.dtype, torch.device("cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    gpt.keep_freed_memory()

    def step(number):
        gpt.gradients(model, data, number, config, dtype)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def plain_loop(model, data, batch_size, settings=lambda: None):
    """-> a function that makes one step of the loop that a user of transformers would write."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train()
    settings()

    def step(number):
        x, _ = data.batch([i % len(data) for i in range(batch_size * number, batch_size * (number + 1))])
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def tune_ours(method, blocks=2):
    import finetune

    config = finetune.FinetuneConfig(data=["-"], method=method, blocks=blocks, batch_size=2, block_size=128)
    model = GPT(GPTConfig.preset("gpt2"))
    finetune.choose(model, config)
    return stepping(model, gpt.TokenDataset(np.random.default_rng(0).integers(50257, size=10_000), 128), config)


def tune_transformers(settings=lambda: None):
    """All of GPT-2, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return plain_loop(GPT2LMHeadModel(GPT2Config()), gpt.TokenDataset(np.random.default_rng(0).integers(50257, size=10_000), 128), 2, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Training from nothing, with AdamW, at the two shapes that nanoGPT's users know: its small one for a CPU, and its
# default for Shakespeare.

SHAPES = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 257, "batch_size": 12},
    "large": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257, "batch_size": 16},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 128, "vocab_size": 50257, "batch_size": 2},
}


def windows(shape):
    return gpt.TokenDataset(np.random.default_rng(0).integers(shape["vocab_size"], size=100_000), shape["block_size"], shape["block_size"] // 4)


def train_ours(name, dropout=0.0, **fields):
    shape = SHAPES[name]
    model = GPT(gpt.from_flags(GPTConfig, shape | {"dropout": dropout}))
    config = gpt.from_flags(gpt.TrainConfig, shape | {"optimizer": "adamw", "lr": 1e-3} | fields)
    return stepping(model, windows(shape), config)


def train_transformers(name, dropout=0.0):
    """transformers' GPT-2 of the same shape, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = SHAPES[name]
    sizes = {"n_positions": shape["block_size"], **{key: shape[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}}
    config = GPT2Config(**sizes, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout))
    return plain_loop(GPT2LMHeadModel(config), windows(shape), shape["batch_size"])


# ---------------------------------------------------------------------------------------------------------------------
# Generating with GPT-2 (124M, random weights): 200 tokens, greedily, after a prompt of 16; then with 8 streams at once.

PROMPT, NEW = 16, 200


def generate_ours(dtype, streams=1, prompt=PROMPT, new=None):
    import quantize

    model = GPT(GPTConfig.preset("gpt2")).eval()
    model = quantize.quantize(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    idx = torch.arange(prompt).repeat(streams, 1)
    return lambda number: model.generate(idx + number, new or NEW, temperature=0)


def generate_transformers(dtype, streams=1, prompt=PROMPT, new=None):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(eos_token_id=None)).eval().to(getattr(torch, dtype))
    idx = torch.arange(prompt).repeat(streams, 1)
    options = {"max_new_tokens": new or NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(idx)}
    return lambda number: model.generate(idx + number, **options)


def generate_llama(dtype):
    """llama.cpp, by way of export.py, where llama-cpp-python is installed."""
    from llama_cpp import Llama

    import export

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = gpt.Tokenizer({bytes([i]) if i < 256 else b"%d," % i: i for i in range(50256)}, "bpe")
        export.to_gguf(GPT(GPTConfig.preset("gpt2")), tokenizer, Path(folder) / "gpt2.gguf", dtype)
        model = Llama(str(Path(folder) / "gpt2.gguf"), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)

    def step(number):
        model.reset()
        for made, _ in enumerate(model.generate([token + number for token in range(PROMPT)], temp=0.0), 1):
            if made == NEW:
                return

    return step


# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    """Workloads that are measured beside each other; the first is the peer that ratios are to."""

    unit: str
    size: float  # units in a step
    steps: int  # how many a workload makes, after one to warm up
    workloads: dict


def training_part(name, steps):
    tokens = SHAPES[name]["batch_size"] * SHAPES[name]["block_size"]
    return Part("tokens/s", tokens, steps, {
        "transformers, float32": lambda: train_transformers(name),
        "gpt.py, float32": lambda: train_ours(name, dtype="float32"),
        "gpt.py": lambda: train_ours(name),
        "transformers, dropout 0.1": lambda: train_transformers(name, dropout=0.1),
        "gpt.py, dropout 0.1": lambda: train_ours(name, dropout=0.1),
    })  # fmt: skip


PARTS = {
    "finetune": Part("steps/s", 1, 5, {
        "transformers, full, float32": tune_transformers,
        "the same, keep_freed_memory()": lambda: tune_transformers(gpt.keep_freed_memory),
        "finetune.py, full": lambda: tune_ours("full"),
        "finetune.py, last 2 blocks": lambda: tune_ours("last"),
        "finetune.py, layernorm": lambda: tune_ours("layernorm"),
        "finetune.py, bias": lambda: tune_ours("bias"),
        "finetune.py, head": lambda: tune_ours("head"),
        "finetune.py, lora rank 8": lambda: tune_ours("lora"),
    }),
    "train": training_part("small", 100),
    "train-large": training_part("large", 5),
    "train-gpt2": training_part("gpt2", 5),
    "generate": Part("tokens/s", NEW, 1, {
        "transformers, float32": lambda: generate_transformers("float32"),
        "transformers, bfloat16": lambda: generate_transformers("bfloat16"),
        "gpt.py, float32": lambda: generate_ours("float32"),
        "gpt.py, bfloat16": lambda: generate_ours("bfloat16"),
        "gpt.py, int8": lambda: generate_ours("int8"),
        "llama.cpp, f32": lambda: generate_llama("float32"),
        "llama.cpp, f16": lambda: generate_llama("float16"),
        "llama.cpp, q8_0": lambda: generate_llama("q8_0"),
    }),
    "generate-8": Part("tokens/s", 8 * NEW, 1, {
        "transformers, float32": lambda: generate_transformers("float32", 8),
        "gpt.py, float32": lambda: generate_ours("float32", 8),
        "gpt.py, bfloat16": lambda: generate_ours("bfloat16", 8),
        "gpt.py, int8": lambda: generate_ours("int8", 8),
    }),
    "first-token": Part("prompts/s", 1, 5, {
        "transformers, float32": lambda: generate_transformers("float32", prompt=1000, new=1),
        "gpt.py, float32": lambda: generate_ours("float32", prompt=1000, new=1),
        "gpt.py, int8": lambda: generate_ours("int8", prompt=1000, new=1),
    }),
    "scaling": Part("steps/s", 1, 5, scaling.points(stepping)),
    "corpus": Part("texts/s", 1, 1, {f"corpus {n}": functools.partial(scaling.tokenizing, n) for n in scaling.CORPUS}),
}  # fmt: skip


def work(part, name, steps):
    """Run one workload, and print its figures as JSON."""
    try:
        import transformers  # noqa: F401 (loaded for all, so that memory compares)
    except ImportError as error:
        raise InputError(f"the peers to compare with are not installed ({error}): pip install -r requirements-dev.txt") from error
    before = resident()
    step = part.workloads[name]()
    step(0)
    times = []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    memory = resident(peak=True)
    print(json.dumps({"seconds": sorted(times)[len(times) // 2], "memory": memory - before if memory else None}))


def measure(name, part, rounds, steps):
    """Run the workloads of a part in turn, each in a process of its own -> {workload: figures}."""
    results = {}
    for turn in range(rounds):
        for workload in part.workloads:
            if "llama" in workload and not importlib.util.find_spec("llama_cpp"):
                continue
            say(f"{name}, round {turn + 1} of {rounds}: {workload}")
            script = [sys.executable, __file__, name, "--only", workload, "--steps", str(steps or part.steps)]
            done = subprocess.run(script, capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"{workload}: {done.stderr.strip().removeprefix('error: ')[-500:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            found["memory"] = max(filter(None, (found["memory"], results.get(workload, found)["memory"])), default=None)
            found["seconds"] = min(found["seconds"], results.get(workload, found)["seconds"])
            results[workload] = found
    return results


@command
def main(argv=None):
    parser = gpt.Parser(prog="bench.py", description="Speed and memory, beside what a user would take instead, in one run.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: train generate)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each workload runs, in turn (default: 2)")
    parser.add_argument("--steps", type=int, help="steps in each, of which the median counts (default: enough for the part)")
    parser.add_argument("--only", help="one workload of one part, in this process")
    parser.add_argument("--scaling", action="store_true", help="the parts scaling and corpus, with a picture of how costs grow")
    parser.add_argument("--plan", action="store_true", help="what training GPT-2's four sizes takes on 8 and 64 GPUs, by closed forms")
    parser.add_argument("--picture", help="where to draw it (default: bench.png or scaling.png)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(args.scaling + args.plan + bool(args.parts) <= 1, "PART, --scaling and --plan exclude each other")
    if args.plan:
        rows = scaling.plan()
        return print("\n".join(map(json.dumps, rows))) if args.json else scaling.show_plan(rows)
    names = args.parts or (["scaling", "corpus"] if args.scaling else ["train", "generate"])
    picture = Path(args.picture or ("scaling.png" if args.scaling else "bench.png"))
    require(picture.parent.is_dir(), f"there is no folder {picture.parent} for --picture")
    unknown = [name for name in names if name not in PARTS]
    require(not unknown, f"there is no part {' '.join(unknown)}: choose among {', '.join(PARTS)}")
    require(1 <= args.rounds <= 1000, f"--rounds is {args.rounds}, expected 1 to 1000")
    require(args.steps is None or 1 <= args.steps <= 10**6, f"--steps is {args.steps}, expected 1 to 1,000,000")
    if args.only:
        workloads = PARTS[names[0]].workloads
        require(len(names) == 1 and args.only in workloads, f"--only is one of {', '.join(map(repr, workloads))}")
        return work(PARTS[names[0]], args.only, args.steps or PARTS[names[0]].steps)
    say(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    if args.scaling:
        found = {point: figures for name in names for point, figures in measure(name, PARTS[name], args.rounds, args.steps).items()}
        rows = [scaling.figures(point, figures) for point, figures in found.items()]
        print("\n".join(map(json.dumps, rows))) if args.json else scaling.show(rows)
        scaling.plot(rows, picture)
        return say(f"the same as a picture: {picture}")
    drawn = {}
    for name in names:
        part = PARTS[name]
        results = measure(name, part, args.rounds, args.steps)
        peer = next(iter(results.values()))["seconds"]
        if not args.json:
            print(f"{name:<30} {part.unit:>10} {'ratio':>7} {'peak memory':>12}")
        for workload, found in results.items():
            row = {"part": name, "name": workload, "unit": part.unit, "per_second": part.size / found["seconds"], "ratio": peer / found["seconds"]}
            memory = "" if found["memory"] is None else f"{found['memory'] / 1e9:.2f} GB"
            line = f"{workload:<30} {row['per_second']:>10,.{0 if part.size > 1 else 2}f} {row['ratio']:>7.2f} {memory:>12}"
            print(json.dumps(row | found) if args.json else line, flush=True)
            drawn.setdefault(name, {})[workload] = row["ratio"]
    scaling.plot_ratios(drawn, picture)
    say(f"the same as a picture: {picture}")


if __name__ == "__main__":
    main()
