"""Speed and memory, compared with the alternatives in one run; look at the ratios, as machines and their load differ.

    python -m bench                               train a small model, and generate with GPT-2 (124M, random weights)
    python -m bench train-large train-gpt2        training at larger shapes
    python -m bench train-dropout                 training with dropout
    python -m bench generate-8                    eight streams at once
    python -m bench quality                       training on Shakespeare until it matches nanoGPT's recipe for a CPU
    python -m bench finetune                      adapting GPT-2
    python -m bench --profile                     where the time of a step goes
    python -m bench --scaling                     how time and memory grow with context, width, depth, batch and text
    python -m bench --plan                        GPT-2's four sizes on 8 and 64 GPUs, by closed forms

Each workload runs in a process of its own, several times, in turn with the others. The lowest median of its steps
counts, and the highest peak in memory, less what the process took with its libraries loaded.
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

import torch

import gpt
from bench import peers, scaling
from bench.workloads import (
    NEW,
    PROMPT,
    SHAPES,
    generate,
    profiled,
    stepping,
    to_quality,
    train,
    train_tiny,
    train_with_muon,
    tune_transformers,
    validating,
    windows,
)
from gpt import GPT, GPTConfig, InputError, command, log, require


def processor():
    """The processor's name where the system says it, and whether it computes bfloat16 natively."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    native = gpt.resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    return f"{found[1] if found else platform.machine()}, {'native' if native else 'no native'} bfloat16"


def resident(peak=False):
    """Bytes of memory that this process uses, or used at its peak; None if the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    """Workloads that are compared; ratios are relative to the first."""

    unit: str
    size: float  # units in a step
    steps: int  # how many a workload makes, after one to warm up
    workloads: dict


def tune(method, blocks=2):
    """Fine-tuning at GPT-2's size: batch 2, context 128, dropout 0.1."""
    import finetune

    config = finetune.FinetuneConfig(data=["-"], method=method, blocks=blocks, batch_size=2, block_size=128)
    model = GPT(GPTConfig.preset("gpt2"))
    finetune.choose(model, config)
    return stepping(model, windows(50257, 128), config)


def generate_llama(dtype):
    """llama.cpp, with a file of extras.export's."""
    from extras.export import to_gguf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.gguf")
        tokenizer = gpt.Tokenizer({bytes([i]) if i < 256 else b"%d," % i: i for i in range(50256)}, "bpe")
        to_gguf(GPT(GPTConfig.preset("gpt2")), tokenizer, file, dtype)
        return peers.generate_llama(file, PROMPT, NEW)


def training_part(name, steps):
    tokens = SHAPES[name]["batch_size"] * SHAPES[name]["block_size"]
    return Part("tokens/s", tokens, steps, {
        "transformers, float32": lambda: train(name, peer=True),
        "gpt.py, float32": lambda: train(name, dtype="float32"),
        "gpt.py": lambda: train(name),
    })  # fmt: skip


OPTIONAL = {"llama.cpp": "llama_cpp", "CTranslate2": "ctranslate2"}  # peers that are measured where they are installed
TWO = "two processes, by torchrun"
PARTS = {
    "finetune": Part("steps/s", 1, 5, {
        "transformers, full, float32": tune_transformers,
        "the same, keep_freed_memory()": lambda: tune_transformers(gpt.keep_freed_memory),
        "finetune.py, full": lambda: tune("full"),
        "finetune.py, last 2 blocks": lambda: tune("last"),
        "finetune.py, layernorm": lambda: tune("layernorm"),
        "finetune.py, bias": lambda: tune("bias"),
        "finetune.py, head": lambda: tune("head"),
        "finetune.py, lora rank 8": lambda: tune("lora"),
    }),
    "train": training_part("small", 100),
    "train-large": training_part("large", 5),
    "train-gpt2": training_part("gpt2", 5),
    "train-dropout": Part("tokens/s", 12 * 64, 100, {
        "transformers, dropout 0.1": lambda: train("small", dropout=0.1, peer=True),
        "gpt.py, dropout 0.1": lambda: train("small", dropout=0.1),
    }),
    "muon": Part("tokens/s", 32 * 64, 20, {
        "torch.optim.Muon": lambda: train_with_muon(peer=True),
        "gpt.py's Muon": train_with_muon,
    }),
    "quality": Part("runs/h", 3600, 1, {
        "transformers, nanoGPT's recipe": lambda: to_quality(peer=True),
        "gpt.py, until it is as good": to_quality,
    }),
    "compile": Part("tokens/s", 32 * 64, 20, {
        "gpt.py": train_tiny,
        "gpt.py --compile": lambda: train_tiny(compile=True),
    }),
    "processes": Part("tokens/s", 32 * 64, 20, {
        "one thread": lambda: train_tiny(1),
        "two threads": lambda: train_tiny(2),
        TWO: lambda: train_tiny(1),
    }),
    "generate": Part("tokens/s", NEW, 1, {
        "transformers, float32": lambda: generate("float32", peer="transformers"),
        "transformers, bfloat16": lambda: generate("bfloat16", peer="transformers"),
        "gpt.py, float32": lambda: generate("float32"),
        "sample.py, float32": lambda: generate("float32", in_c=True),
        "sample.py, bfloat16": lambda: generate("bfloat16", in_c=True),
        "sample.py, int8": lambda: generate("int8", in_c=True),
        "CTranslate2, float32": lambda: generate("float32", peer="CTranslate2"),
        "CTranslate2, int8": lambda: generate("int8", peer="CTranslate2"),
        "llama.cpp, f32": lambda: generate_llama("float32"),
        "llama.cpp, f16": lambda: generate_llama("float16"),
        "llama.cpp, q8_0": lambda: generate_llama("q8_0"),
    }),
    "generate-8": Part("tokens/s", 8 * NEW, 1, {
        "transformers, float32": lambda: generate("float32", 8, peer="transformers"),
        "sample.py, float32": lambda: generate("float32", 8, in_c=True),
        "sample.py, bfloat16": lambda: generate("bfloat16", 8, in_c=True),
        "sample.py, int8": lambda: generate("int8", 8, in_c=True),
    }),
    "first-token": Part("prompts/s", 1, 5, {
        "transformers, float32": lambda: generate("float32", prompt=1000, new=1, peer="transformers"),
        "sample.py, float32": lambda: generate("float32", prompt=1000, new=1, in_c=True),
        "sample.py, int8": lambda: generate("int8", prompt=1000, new=1, in_c=True),
    }),
    "scaling": Part("steps/s", 1, 5, scaling.points(stepping)),
    "corpus": Part("texts/s", 1, 1, {f"corpus {n}": functools.partial(scaling.tokenizing, n) for n in scaling.CORPUS}),
}  # fmt: skip


def work(part, name, steps):
    """Run one workload, and print its figures as JSON."""
    if any(peer in name for peer in ("transformers", *OPTIONAL)):
        try:
            import transformers  # noqa: F401 (before memory is looked at)
        except ImportError as error:
            raise InputError(
                f"the peers to compare with are not installed ({error}): pip install -r requirements-dev.txt"
            ) from error
    before = resident()
    step = part.workloads[name]()
    step(0)
    times = []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    memory = resident(peak=True)
    if gpt.RANK == 0:
        print(json.dumps({"seconds": sorted(times)[len(times) // 2], "memory": memory - before if memory else None}))


def measure(name, part, rounds, steps):
    """Run the workloads of a part in turn, each in a process of its own -> {workload: figures}."""
    results = {}
    for turn in range(rounds):
        for workload in part.workloads:
            if any(peer in workload and not importlib.util.find_spec(module) for peer, module in OPTIONAL.items()):
                continue
            log(f"{name}, round {turn + 1} of {rounds}: {workload}")
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if workload == TWO else []
            script = [
                sys.executable,
                *launch,
                "-m",
                "bench",
                name,
                "--only",
                workload,
                "--steps",
                str(steps or part.steps),
            ]
            done = subprocess.run(script, capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"{workload}: {done.stderr.strip().removeprefix('error: ')[-500:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            found["memory"] = max(filter(None, (found["memory"], results.get(workload, found)["memory"])), default=None)
            found["seconds"] = min(found["seconds"], results.get(workload, found)["seconds"])
            results[workload] = found
    return results


@command
def main(argv=None):
    parser = gpt.Parser(
        prog="python -m bench", description="Speed and memory, compared with the alternatives in one run."
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: train generate)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="how often each workload runs, in turn (default: 2)")
    parser.add_argument(
        "--steps", type=int, help="steps in each, of which the median counts (default: enough for the part)"
    )
    parser.add_argument("--only", help="one workload of one part, in this process")
    parser.add_argument(
        "--scaling", action="store_true", help="the parts scaling and corpus, with a picture of how costs grow"
    )
    parser.add_argument(
        "--plan", action="store_true", help="what training GPT-2's four sizes takes on 8 and 64 GPUs, by closed forms"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="where the time of a step of training goes, at each shape, and validation's share",
    )
    parser.add_argument("--picture", help="where to draw it (default: bench.png or scaling.png)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(
        args.scaling + args.plan + args.profile + bool(args.parts) <= 1,
        "PART, --scaling, --plan and --profile exclude each other",
    )
    if args.plan:
        rows = scaling.plan()
        return print("\n".join(map(json.dumps, rows))) if args.json else scaling.show_plan(rows)
    names = args.parts or (["scaling", "corpus"] if args.scaling else ["train", "generate"])
    picture = Path(args.picture or ("scaling.png" if args.scaling else "bench.png"))
    require(picture.parent.is_dir(), f"there is no folder {picture.parent} for --picture")
    require(1 <= args.rounds <= 1000, f"--rounds is {args.rounds}, expected 1 to 1000")
    require(args.steps is None or 1 <= args.steps <= 10**6, f"--steps is {args.steps}, expected 1 to 1,000,000")
    if args.profile:
        found, share = {name: profiled(name, args.steps) for name in SHAPES}, validating(args.steps)
        if args.json:
            return print(json.dumps(found | {"validation": share}))
        scaling.show_shares(found)
        return print(f"validation, with its samples and checkpoints: {share:.1%} of a run of the preset tiny")
    unknown = [name for name in names if name not in PARTS]
    require(not unknown, f"there is no part {' '.join(unknown)}: choose among {', '.join(PARTS)}")
    if args.only:
        workloads = PARTS[names[0]].workloads
        require(len(names) == 1 and args.only in workloads, f"--only is one of {', '.join(map(repr, workloads))}")
        return work(PARTS[names[0]], args.only, args.steps or PARTS[names[0]].steps)
    log(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {processor()}"
    )
    if args.scaling:
        found = {
            point: figures
            for name in names
            for point, figures in measure(name, PARTS[name], args.rounds, args.steps).items()
        }
        rows = [scaling.figures(point, figures) for point, figures in found.items()]
        print("\n".join(map(json.dumps, rows))) if args.json else scaling.show(rows)
        scaling.plot(rows, picture)
        return log(f"the same as a picture: {picture}")
    drawn = {}
    for name in names:
        part = PARTS[name]
        results = measure(name, part, args.rounds, args.steps)
        peer = next(iter(results.values()))["seconds"]
        if not args.json:
            print(f"{name:<30} {part.unit:>10} {'ratio':>7} {'peak memory':>12}")
        for workload, found in results.items():
            row = {
                "part": name,
                "name": workload,
                "unit": part.unit,
                "per_second": part.size / found["seconds"],
                "ratio": peer / found["seconds"],
            }
            memory = "" if found["memory"] is None else f"{found['memory'] / 1e9:.2f} GB"
            speed = f"{row['per_second']:,.{0 if part.size > 1 else 2}f}"
            line = f"{workload:<30} {speed:>10} {row['ratio']:>7.2f} {memory:>12}"
            print(json.dumps(row | found) if args.json else line, flush=True)
            drawn.setdefault(name, {})[workload] = row["ratio"]
    scaling.plot_ratios(drawn, picture)
    log(f"the same as a picture: {picture}")


if __name__ == "__main__":
    main()
