"""Speed and memory next to the alternatives, in one run. Look at the ratios, as machines and their load differ.

    python -m bench                            train a small model, and generate with GPT-2 (124M, random weights)
    python -m bench --picture bench.svg        the same, and the ratios as bars
    python -m bench quality                    Shakespeare to nanoGPT's quality on a CPU, from start to end
    python -m bench train-large train-gpt2     training at larger shapes; train-dropout: with dropout
    python -m bench generate-8 first-token     eight streams at once; a prompt of 1,000 tokens
    python -m bench finetune                   adapting GPT-2
    python -m bench processes compile          two processes, by torchrun; --compile
    python -m bench muon prepare               our Muon and PyTorch's; tokenizing 100 MB
    python -m bench scaling                    how time and memory grow with context, width, depth and batch
    python -m bench gpu gpu-generate           GPT-2 on a GPU
    python -m bench profile                    where the time of a step goes
    python -m bench train quality --nanogpt ~/nanoGPT    nanoGPT's own code, its recipe included

Each workload runs in a process of its own, several times, in turn with the others. The lowest median of its steps
counts, and the highest peak in memory, without what the process took once its libraries were loaded. Peers whose
libraries are not installed are left out.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

import finetune
import gpt
from bench import peers, scaling
from bench.picture import draw
from extras import int8, native
from extras.prepare import prepare
from extras.tables import show
from gpt import GPT, GPTConfig, TrainConfig, command, log, require

# ---- What is timed: each function sets a program up, and returns a function that makes a step ----
SHAPES = {  # nanoGPT's small one for a CPU, its default for Shakespeare, and GPT-2 at a short context
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 257, "batch_size": 12},
    "large": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257, "batch_size": 16},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 128, "vocab_size": 50257, "batch_size": 2},
}
QUICK = """--data shakespeare --vocab_size 2048 --n_layer 1 --n_head 2 --n_embd 64 --batch_size 16 --lr 0.03
--weight_decay 0.1 --warmup_steps 10 --max_steps 130 --eval_interval 130"""
QUALITY = 2.721  # bits per byte, nanoGPT's 1.886 nats a character on the last tenth of tiny Shakespeare


def random_windows(vocab_size, block_size):
    """Random tokens, cut into windows that overlap as in training."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=100_000)
    return gpt.TokenDataset(tokens, block_size, block_size // 4)


def stepping(model, data, config):
    """-> a function that makes one step of gpt.py's loop, together with the other processes of torchrun."""
    optimizers = gpt.make_optimizers(model, config)
    dtype = gpt.resolve_dtype(config.dtype, next(model.parameters()).device)
    model.train()
    runner = torch.compile(model) if config.compile else model
    if gpt.WORLD_SIZE > 1:
        gpt.dist.init_process_group()
        runner = torch.nn.parallel.DistributedDataParallel(runner)
    gpt.keep_freed_memory()

    def step(number):
        loss, _ = gpt.forward_backward(runner, data, number, config, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        return loss

    return step


def train(program, setting, shape, dropout=0.0, device="cpu", folder=None):
    """Training from scratch with AdamW; the setting is a type, or "auto compiled"; a folder holds nanoGPT's."""
    dtype, _, compiled = setting.partition(" ")
    fields = shape | {"dropout": dropout, "dtype": dtype, "compile": bool(compiled), "optimizer": "adamw", "lr": 1e-3}
    model_config = gpt.from_flags(GPTConfig, fields)
    data = random_windows(model_config.vocab_size, model_config.block_size)
    if program == "nanoGPT":
        return peers.train_nanogpt(model_config, data, fields["batch_size"], folder)
    return stepping(GPT(model_config).to(device), data, gpt.from_flags(TrainConfig, fields))


def train_tiny(program, workers):
    """Training at the preset tiny with one or two threads, or with one in each of two processes."""
    torch.set_num_threads(2 if workers == "2 threads" else 1)
    return stepping(GPT(GPTConfig()), random_windows(1024, 64), TrainConfig())


def grow(field, n):
    """Training at one of the points of scaling.SWEEPS."""
    return train("gpt.py", "auto", scaling.point(field, int(n)))


def muon(program, dtype):
    """One step of Muon alone, for the matrices of the preset tiny."""
    matrices = [p for p in GPT(GPTConfig()).transformer.h.parameters() if p.dim() == 2]
    for p in matrices:
        p.grad = torch.randn_like(p)
    if program == "torch.optim":
        optimizer = torch.optim.Muon(matrices, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    else:
        optimizer = gpt.Muon(matrices, 0.01, 0.1, getattr(torch, dtype))
    return lambda number: optimizer.step()


def quality(program, setting, folder=None):
    """A whole command, from start to end, that learns tiny Shakespeare as well as nanoGPT's does on a CPU."""
    prepared = folder is None or Path(folder, "data", "shakespeare_char", "train.bin").exists()
    require(prepared, f"run python data/shakespeare_char/prepare.py in {folder} first")

    def step(number):
        if number == 0:
            return
        with tempfile.TemporaryDirectory() as out:
            ours = [gpt.__file__, *QUICK.split(), "--out", out]
            theirs = ["train.py", *peers.RECIPE.split(), f"--out_dir={out}"]
            command, where = (theirs, folder) if program == "nanoGPT" else (ours, None)
            subprocess.run([sys.executable, *command], cwd=where, check=True, stdout=sys.stderr)
            if program != "nanoGPT":
                found = json.loads(Path(out, gpt.CONFIG).read_text())["validation"]["bits_per_byte"]
                require(found <= QUALITY, f"our recipe comes to {found:.3f} bits per byte, not {QUALITY}")

    return step


def prepare_text(program, setting, megabytes):
    """Text -> tokens, from a file to a file, next to tiktoken's batch encoding from memory to memory."""
    text = "\n\n".join(gpt.pydoc())
    tokenizer = gpt.Tokenizer.bpe([text], 1024)
    text = text * round(megabytes * 1e6 / len(text))
    if program == "tiktoken":
        pieces = re.findall(gpt.PIECE, text)
        return lambda number: number and tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=os.cpu_count())
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "text.txt").write_text(text)

    def step(number):
        if number > 0:
            prepare([f"{folder.name}/text.txt"], f"{folder.name}/out", tokenizer, overwrite=True)

    return step


def tune(program, method):
    """Fine-tuning at GPT-2's size: batch 2, context 128, dropout 0.1."""
    model_config = GPTConfig.preset("gpt2")
    data = random_windows(model_config.vocab_size, 128)
    if program == "transformers":
        return peers.finetune_transformers(model_config, data, 2)
    config = finetune.FinetuneConfig(data=["-"], method=method, batch_size=2, block_size=128)
    model = GPT(model_config)
    finetune.choose(model, config)
    return stepping(model, data, config)


def generate(program, dtype, streams=1, prompt=16, new=200, device="cpu"):
    """GPT-2 (124M, random weights) continues a prompt greedily; step 0, to warm up, makes only a few tokens."""
    idx = torch.arange(prompt, device=device).repeat(streams, 1)  # (B, T)

    def lengths(number):
        return new if number > 0 else min(8, new)

    config = GPTConfig.preset("gpt2")
    if program in peers.GENERATORS:
        return peers.GENERATORS[program](config, dtype, idx, lengths)
    model = GPT(config).eval()
    model = int8.quantize(model) if dtype == "int8" else model.to(device, getattr(torch, dtype))
    if program == "sample.py":
        model = native.speed_up(model)
    return lambda number: model.generate(idx + number, lengths(number), temperature=0)


@dataclasses.dataclass
class Part:
    """Workloads to compare, each "program, setting"; ratios are relative to the first."""

    setup: Callable  # (program, setting, **options) -> a function that makes a step
    unit: str
    size: int  # units in a step
    steps: int  # of a run, after one to warm up
    workloads: tuple
    options: dict = dataclasses.field(default_factory=dict)
    counted: bool = False  # with figures by the closed forms


SMALL = {"shape": SHAPES["small"]}
TRAIN = ("nanoGPT, float32", "gpt.py, float32", "gpt.py, auto")
MUON = ("torch.optim, bfloat16", "gpt.py, bfloat16", "gpt.py, float32")
SWEEPS = tuple(f"{field}, {n}" for field, values in scaling.SWEEPS.items() for n in values)
PREPARE = ("tiktoken, memory to memory", "prepare.py, file to file")
QUALITIES = ("nanoGPT, its own recipe", "gpt.py, as good as that")
GPU = ("gpt.py, bfloat16", "gpt.py, bfloat16 compiled")
GPU_SHAPE = SHAPES["gpt2"] | {"block_size": 1024, "batch_size": 16}
WORKERS = ("gpt.py, 1 thread", "gpt.py, 2 threads", "gpt.py, 2 processes")
TUNE = ("transformers, full", *(f"finetune.py, {method}" for method in finetune.METHODS))
GENERATE = ("transformers, float32", "sample.py, float32", "sample.py, bfloat16", "sample.py, int8")
LLAMA = ("llama.cpp, float32", "llama.cpp, float16", "llama.cpp, q8_0")
MORE = ("transformers, bfloat16", "gpt.py, float32", *LLAMA)
PARTS = {
    "train": Part(train, "tokens/s", 12 * 64, 100, TRAIN, SMALL),
    "train-large": Part(train, "tokens/s", 16 * 256, 5, TRAIN, {"shape": SHAPES["large"]}),
    "train-gpt2": Part(train, "tokens/s", 2 * 128, 5, TRAIN, {"shape": SHAPES["gpt2"]}),
    "train-dropout": Part(train, "tokens/s", 12 * 64, 100, TRAIN, SMALL | {"dropout": 0.1}),
    "compile": Part(train, "tokens/s", 12 * 64, 100, ("gpt.py, auto", "gpt.py, auto compiled"), SMALL),
    "muon": Part(muon, "steps/s", 1, 20, MUON),
    "quality": Part(quality, "runs/hour", 3600, 1, QUALITIES),
    "scaling": Part(grow, "tokens/s", 1, 5, SWEEPS, counted=True),
    "prepare": Part(prepare_text, "MB/s", 100, 1, PREPARE, {"megabytes": 100}),
    "processes": Part(train_tiny, "tokens/s", 32 * 64, 20, WORKERS),
    "finetune": Part(tune, "steps/s", 1, 5, TUNE),
    "generate": Part(generate, "tokens/s", 200, 1, GENERATE + MORE),
    "generate-8": Part(generate, "tokens/s", 8 * 200, 1, GENERATE, {"streams": 8}),
    "first-token": Part(generate, "prompts/s", 1, 5, GENERATE, {"prompt": 1000, "new": 1}),
    "gpu": Part(train, "tokens/s", 16 * 1024, 10, GPU, {"shape": GPU_SHAPE, "device": "cuda"}, counted=True),
    "gpu-generate": Part(generate, "tokens/s", 200, 3, ("transformers, bfloat16", GPU[0]), {"device": "cuda"}),
}


# ---- Timing ----
LIBRARIES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


def installed(workload, nanogpt=None):
    program = workload.split(", ")[0]
    if workload == QUALITIES[0]:
        return bool(nanogpt)
    return program not in LIBRARIES or importlib.util.find_spec(LIBRARIES[program]) is not None


def work(part, workload, steps, **options):
    """Run one workload, and print the median time of a step and the peak in memory as JSON."""
    program, setting = workload.split(", ")
    there = installed(workload, options.get("folder"))
    require(there, f"{program} is not here: pip install it, or give --nanogpt its folder, or leave --only out")
    if program in LIBRARIES:
        importlib.import_module(LIBRARIES[program])
    before = scaling.memory_in_use("VmRSS")
    times = []
    with redirect_stdout(sys.stderr):
        step = part.setup(program, setting, **part.options, **options)
        step(0)
        for number in range(1, steps + 1):
            began = time.perf_counter()
            step(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    if gpt.RANK == 0:
        median = sorted(times)[steps // 2]
        memory = torch.cuda.max_memory_allocated() or scaling.memory_in_use("VmHWM") - before
        print(json.dumps({"seconds": median, "memory": memory}))


def measure(name, part, args):
    """Run the workloads of a part in turn, each in a process of its own -> rows of figures."""
    runs = {workload: [] for workload in part.workloads if installed(workload, args.nanogpt)}
    for turn in range(args.rounds):
        for workload, figures in runs.items():
            log(f"{name}, round {turn + 1} of {args.rounds}: {workload}")
            start = [sys.executable]
            if workload.endswith("2 processes"):
                start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            options = ["--only", workload, "--steps", str(args.steps or part.steps)]
            if args.nanogpt:
                options += ["--nanogpt", args.nanogpt]
            done = subprocess.run([*start, "-m", "bench", name, *options], capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"{workload}: {done.stderr.strip().removeprefix('error: ')[-500:]}")
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for workload, figures in runs.items():
        seconds = min(run["seconds"] for run in figures)
        row = {"part": name, "name": workload, "unit": part.unit, "seconds": seconds, "per_second": part.size / seconds}
        if part.counted:
            row |= scaling.closed_forms(workload, seconds, **part.options)
        row["ratio"] = row["per_second"] / (rows or [row])[0]["per_second"]
        rows.append(row | {"megabytes": round(max(run["memory"] for run in figures) / 1e6)})
    return rows


def profiled(steps):
    """-> a row for each kind of operation, with its share of a step's time at each of the SHAPES."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = scaling.shares(scaling.operations(train("gpt.py", "auto", shape), steps))
    return [{"kind": kind} | {shape: shares[kind] for shape, shares in found.items()} for kind in found["small"]]


@command
def main(argv=None):
    names = ", ".join([*PARTS, "profile"])
    parser = gpt.Parser(prog="python -m bench", description="Speed and memory next to the alternatives, in one run.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{names} (default: train generate)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each workload runs, in turn (default: 2)")
    parser.add_argument("--steps", type=int, help="steps in a run, of which the median counts (default: the part's)")
    parser.add_argument("--only", help="run one workload of one part, in this process")
    parser.add_argument("--nanogpt", help="a folder with nanoGPT's model.py (default: our copy of that model)")
    parser.add_argument("--picture", help="draw the ratios as bars, into a file .svg or .png")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    chosen = args.parts or ["train", "generate"]
    unknown = [name for name in chosen if name not in (*PARTS, "profile")]
    require(not unknown, f"there is no part {' '.join(unknown)}: choose among {names}")
    require(1 <= args.rounds <= 1000, f"--rounds is {args.rounds}, expected 1 to 1000")
    require(args.steps is None or 1 <= args.steps <= 10**6, f"--steps is {args.steps}, expected 1 to 1,000,000")
    own = args.nanogpt is None or Path(args.nanogpt, "model.py").is_file()
    require(own, f"there is no model.py in {args.nanogpt}: give --nanogpt a copy of nanoGPT")
    picture = Path(args.picture or "bench.svg")
    drawable = picture.suffix in (".svg", ".png") and picture.parent.is_dir()
    require(drawable, f"--picture is {picture}, expected a file .svg or .png in a folder that exists")
    runs_here = torch.cuda.is_available() or not {"gpu", "gpu-generate"} & {*chosen}
    require(runs_here, "PyTorch finds no GPU here: leave gpu and gpu-generate out")
    if args.only:
        part = PARTS.get(chosen[0])
        fits = part and len(chosen) == 1 and args.only in part.workloads
        require(fits, f"--only {args.only!r} is not a workload of {' '.join(chosen)}")
        options = {"folder": args.nanogpt} if args.only.startswith("nanoGPT") else {}
        return work(part, args.only, args.steps or part.steps, **options)
    dtype = gpt.resolve_dtype("auto", torch.device("cpu"))
    log(f"torch {torch.__version__}, {torch.get_num_threads()} threads, --dtype auto trains in {dtype}")
    measured = []
    for name in chosen:
        if name == "profile":
            show(profiled(args.steps or 5), args.json)
            continue
        rows = measure(name, PARTS[name], args)
        columns = {"ratio": "ratio", "name": name, "per_second": PARTS[name].unit, "megabytes": "peak memory, MB"}
        columns |= {key: title for key, title in scaling.TITLES.items() if rows[0].get(key) is not None}
        show(rows, args.json, columns)
        measured.extend(rows)
    if args.picture and measured:
        draw(measured, picture)


if __name__ == "__main__":
    main()
