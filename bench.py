"""Speed and memory, beside what a user would take instead, in one run; ratios count, as machines and their moods differ.

    python bench.py finetune                      steps per second and peak memory of adapting GPT-2 (124M, random weights)

Each workload runs in a process of its own, several times in turn with the others. Of the medians over its steps the lowest
counts, of its peaks in memory, beyond what the process held with all libraries loaded, the highest.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import gpt
from gpt import GPT, GPTConfig, InputError, command, require, say


def resident(peak=False):
    """Bytes of memory that this process holds, or has held at most; None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning at GPT-2's size: batch 2, context 128, dropout 0.1.


def tune_ours(method, blocks=2):
    """-> a function that makes one step of finetune.py."""
    import finetune

    config = finetune.FinetuneConfig(data=["-"], method=method, blocks=blocks, batch_size=2, block_size=128)
    model = GPT(GPTConfig.preset("gpt2"))
    finetune.choose(model, config)
    optimizers, dtype = gpt.make_optimizers(model, config), gpt.resolve_dtype("auto", torch.device("cpu"))
    data = gpt.TokenDataset(np.random.default_rng(0).integers(50257, size=10_000), 128)
    model.train()
    gpt.keep_freed_memory()

    def step(number):
        gpt.gradients(model, data, number, config, dtype)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def tune_transformers(settings=lambda: None):
    """-> a function that makes one step of a plain float32 loop around transformers' GPT-2, all of it trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = gpt.TokenDataset(np.random.default_rng(0).integers(50257, size=10_000), 128)
    model.train()
    settings()

    def step(number):
        x, _ = data.batch([2 * number % len(data), (2 * number + 1) % len(data)])
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


PARTS = {
    "finetune": {
        "transformers, full, float32": tune_transformers,
        "the same, keep_freed_memory()": lambda: tune_transformers(gpt.keep_freed_memory),
        "finetune.py, full": lambda: tune_ours("full"),
        "finetune.py, last 2 blocks": lambda: tune_ours("last"),
        "finetune.py, layernorm": lambda: tune_ours("layernorm"),
        "finetune.py, bias": lambda: tune_ours("bias"),
        "finetune.py, head": lambda: tune_ours("head"),
        "finetune.py, lora rank 8": lambda: tune_ours("lora"),
    },
}


def work(part, name, steps):
    """Run one workload, and print its figures as JSON."""
    try:
        import transformers  # noqa: F401 (loaded for all, so that memory compares)
    except ImportError as error:
        raise InputError(f"the peers to compare with are not installed ({error}): pip install -r requirements-dev.txt") from error
    before = resident()
    step = PARTS[part][name]()
    step(0)
    times = []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    memory = resident(peak=True)
    print(json.dumps({"seconds": sorted(times)[len(times) // 2], "memory": memory - before if memory else None}))


@command
def main(argv=None):
    parser = gpt.Parser(prog="bench.py", description="Speed and memory, beside what a user would take instead, in one run.")
    parser.add_argument("part", choices=PARTS, help="what to measure")
    parser.add_argument("--rounds", type=int, default=2, help="how often each workload runs, in turn (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="steps in each, of which the median counts (default: 5)")
    parser.add_argument("--only", help="one workload, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(args.rounds >= 1 and args.steps >= 1, "--rounds and --steps are at least 1")
    if args.only:
        require(args.only in PARTS[args.part], f"--only is one of {', '.join(map(repr, PARTS[args.part]))}")
        return work(args.part, args.only, args.steps)
    results = {}
    for turn in range(args.rounds):
        for name in PARTS[args.part]:
            say(f"round {turn + 1} of {args.rounds}: {name}")
            script = [sys.executable, __file__, args.part, "--only", name, "--steps", str(args.steps)]
            done = subprocess.run(script, capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"{name}: {done.stderr.strip().removeprefix('error: ')[-500:]}")
            found = json.loads(done.stdout)
            found["memory"] = max(filter(None, (found["memory"], results.get(name, found)["memory"])), default=None)
            found["seconds"] = min(found["seconds"], results.get(name, found)["seconds"])
            results[name] = found
    peer = next(iter(results.values()))["seconds"]
    if not args.json:
        print(f"{args.part:<30} {'steps/s':>8} {'ratio':>7} {'peak memory':>12}")
    for name, found in results.items():
        row = {"part": args.part, "name": name, "per_second": 1 / found["seconds"], "ratio": peer / found["seconds"]} | found
        memory = "" if found["memory"] is None else f"{found['memory'] / 1e9:.2f} GB"
        print(json.dumps(row) if args.json else f"{name:<30} {row['per_second']:>8.2f} {row['ratio']:>7.2f} {memory:>12}", flush=True)


if __name__ == "__main__":
    main()
