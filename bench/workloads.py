"""What python -m bench times. Each function below sets a program up, and returns a function that makes a step."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

import finetune
import gpt
from bench import peers
from extras import int8, native
from gpt import GPT, GPTConfig, TrainConfig

SHAPES = {  # nanoGPT's small one for a CPU, its default for Shakespeare, and GPT-2 at a short context
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 257, "batch_size": 12},
    "large": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257, "batch_size": 16},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 128, "vocab_size": 50257, "batch_size": 2},
}


def random_windows(vocab_size, block_size):
    """Random tokens, cut into windows that overlap as in training."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=100_000)
    return gpt.TokenDataset(tokens, block_size, block_size // 4)


def stepping(model, data, config):
    """-> a function that makes one step of gpt.py's loop, together with the other processes of torchrun."""
    optimizers = gpt.make_optimizers(model, config)
    dtype = gpt.resolve_dtype(config.dtype, torch.device("cpu"))
    model.train()
    runner = model
    if gpt.WORLD_SIZE > 1:
        gpt.dist.init_process_group()
        runner = torch.nn.parallel.DistributedDataParallel(model)
    gpt.keep_freed_memory()

    def step(number):
        loss, _ = gpt.forward_backward(runner, data, number, config, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def train(program, dtype, shape, dropout=0.0, folder=None):
    """Training from scratch with AdamW at one of the SHAPES; a folder holds nanoGPT's own model.py."""
    fields = SHAPES[shape] | {"dropout": dropout, "dtype": dtype, "optimizer": "adamw", "lr": 1e-3}
    model_config = gpt.from_flags(GPTConfig, fields)
    data = random_windows(model_config.vocab_size, model_config.block_size)
    if program == "nanoGPT":
        return peers.train_nanogpt(model_config, data, fields["batch_size"], folder)
    return stepping(GPT(model_config), data, gpt.from_flags(TrainConfig, fields))


def train_tiny(program, workers):
    """Training at the preset tiny with one or two threads, or with one in each of two processes."""
    torch.set_num_threads(2 if workers == "2 threads" else 1)
    return stepping(GPT(GPTConfig()), random_windows(1024, 64), TrainConfig())


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


def generate(program, dtype, streams=1, prompt=16, new=200):
    """GPT-2 (124M, random weights) continues a prompt greedily; step 0, to warm up, makes only a few tokens."""
    idx = torch.arange(prompt).repeat(streams, 1)  # (B, T)

    def lengths(number):
        return new if number > 0 else min(8, new)

    config = GPTConfig.preset("gpt2")
    if program in peers.GENERATORS:
        return peers.GENERATORS[program](config, dtype, idx, lengths)
    model = GPT(config).eval()
    model = int8.quantize(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    if program == "sample.py":
        model = native.speed_up(model) or model
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


TRAIN = ("nanoGPT, float32", "gpt.py, float32", "gpt.py, auto")
WORKERS = ("gpt.py, 1 thread", "gpt.py, 2 threads", "gpt.py, 2 processes")
TUNE = ("transformers, full", *(f"finetune.py, {method}" for method in finetune.METHODS))
GENERATE = ("transformers, float32", "sample.py, float32", "sample.py, bfloat16", "sample.py, int8")
LLAMA = ("llama.cpp, float32", "llama.cpp, float16", "llama.cpp, q8_0")
MORE = ("transformers, bfloat16", "gpt.py, float32", *LLAMA, "CTranslate2, float32", "CTranslate2, int8")
PARTS = {
    "train": Part(train, "tokens/s", 12 * 64, 100, TRAIN, {"shape": "small"}),
    "train-large": Part(train, "tokens/s", 16 * 256, 5, TRAIN, {"shape": "large"}),
    "train-gpt2": Part(train, "tokens/s", 2 * 128, 5, TRAIN, {"shape": "gpt2"}),
    "train-dropout": Part(train, "tokens/s", 12 * 64, 100, TRAIN, {"shape": "small", "dropout": 0.1}),
    "processes": Part(train_tiny, "tokens/s", 32 * 64, 20, WORKERS),
    "finetune": Part(tune, "steps/s", 1, 5, TUNE),
    "generate": Part(generate, "tokens/s", 200, 1, GENERATE + MORE),
    "generate-8": Part(generate, "tokens/s", 8 * 200, 1, GENERATE, {"streams": 8}),
    "first-token": Part(generate, "prompts/s", 1, 5, GENERATE, {"prompt": 1000, "new": 1}),
}
