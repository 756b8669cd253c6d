"""Speed and memory next to the alternatives, in one run. Look at the ratios, as machines and their load differ.

    python -m bench                            train a small model, and generate with GPT-2 (124M, random weights)
    python -m bench train-large train-gpt2     training at larger shapes; train-dropout: with dropout
    python -m bench generate-8 first-token     eight streams at once; a prompt of 1,000 tokens
    python -m bench finetune                   adapting GPT-2
    python -m bench processes                  two processes, by torchrun
    python -m bench profile                    where the time of a step goes
    python -m bench train --nanogpt ~/nanoGPT  nanoGPT's own model in place of our copy of it

Each workload runs in a process of its own, several times, in turn with the others. The lowest median of its steps
counts, and the highest peak in memory, without what the process took once its libraries were loaded. Peers whose
libraries are not installed are left out.
"""

import importlib.util
import json
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

import gpt
from bench import scaling
from bench.workloads import PARTS, SHAPES, train
from extras.tables import show
from gpt import command, log, require

LIBRARIES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "CTranslate2": "ctranslate2"}


def installed(workload):
    program = workload.split(", ")[0]
    return program not in LIBRARIES or importlib.util.find_spec(LIBRARIES[program]) is not None


def memory_in_use(key):
    """VmRSS, now, or VmHWM, at the peak: bytes of memory of this process, 0 if the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def work(part, workload, steps, **options):
    """Run one workload, and print the median time of a step and the peak in memory as JSON."""
    program, setting = workload.split(", ")
    require(installed(workload), f"{program} is not installed: pip install it, or leave --only out")
    if program in LIBRARIES:
        importlib.import_module(LIBRARIES[program])
    before = memory_in_use("VmRSS")
    times = []
    with redirect_stdout(sys.stderr):
        step = part.setup(program, setting, **part.options, **options)
        step(0)
        for number in range(1, steps + 1):
            began = time.perf_counter()
            step(number)
            times.append(time.perf_counter() - began)
    if gpt.RANK == 0:
        median = sorted(times)[steps // 2]
        print(json.dumps({"seconds": median, "memory": memory_in_use("VmHWM") - before}))


def measure(name, part, args):
    """Run the workloads of a part in turn, each in a process of its own -> rows of figures."""
    runs = {workload: [] for workload in part.workloads if installed(workload)}
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
        first = rows[0]["seconds"] if rows else seconds
        row = {"part": name, "name": workload, "unit": part.unit, "seconds": seconds}
        row |= {"per_second": part.size / seconds, "ratio": first / seconds}
        rows.append(row | {"megabytes": round(max(run["memory"] for run in figures) / 1e6)})
    return rows


def profiled(steps):
    """-> a row for each kind of operation, with its share of a step's time at each of the SHAPES."""
    found = {}
    for shape in SHAPES:
        step = train("gpt.py", "auto", shape)
        found[shape] = scaling.shares(scaling.operations(step, steps))
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
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    chosen = args.parts or ["train", "generate"]
    unknown = [name for name in chosen if name not in (*PARTS, "profile")]
    require(not unknown, f"there is no part {' '.join(unknown)}: choose among {names}")
    require(1 <= args.rounds <= 1000, f"--rounds is {args.rounds}, expected 1 to 1000")
    require(args.steps is None or 1 <= args.steps <= 10**6, f"--steps is {args.steps}, expected 1 to 1,000,000")
    there = args.nanogpt is None or Path(args.nanogpt, "model.py").is_file()
    require(there, f"there is no model.py in {args.nanogpt}: give --nanogpt a copy of nanoGPT")
    if args.only:
        part = PARTS.get(chosen[0])
        fits = part and len(chosen) == 1 and args.only in part.workloads
        require(fits, f"--only {args.only!r} is not a workload of {' '.join(chosen)}")
        options = {"folder": args.nanogpt} if args.only.startswith("nanoGPT") else {}
        return work(part, args.only, args.steps or part.steps, **options)
    native = gpt.resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    log(f"torch {torch.__version__}, {torch.get_num_threads()} threads, native bfloat16: {native}")
    for name in chosen:
        if name == "profile":
            show(profiled(args.steps or 5), args.json)
        else:
            part = PARTS[name]
            columns = {"name": name, "per_second": part.unit, "ratio": "ratio", "megabytes": "peak memory, MB"}
            show(measure(name, part, args), args.json, columns)


if __name__ == "__main__":
    main()
