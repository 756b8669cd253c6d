"""What python -m bench times of this project: a step of training, a generation.

Each function returns one that makes a step; peers.py has the same for what a user would take instead.
"""

import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

import gpt
from bench import peers, scaling
from extras import int8, native
from gpt import GPT, GPTConfig, log


def windows(vocab_size, block_size):
    """Random tokens, cut into windows that overlap as in training."""
    return gpt.TokenDataset(np.random.default_rng(0).integers(vocab_size, size=100_000), block_size, block_size // 4)


def stepping(model, data, config, optimizers=None):
    """-> a function that makes one step of gpt.py's loop, together with the other processes that torchrun started."""
    optimizers = optimizers or gpt.make_optimizers(model, config)
    dtype = gpt.resolve_dtype(config.dtype, torch.device("cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    if config.compile:
        model = torch.compile(model)
    if gpt.WORLD_SIZE > 1:
        gpt.dist.init_process_group()
        model = torch.nn.parallel.DistributedDataParallel(model)
    gpt.keep_freed_memory()

    def step(number):
        gpt.forward_backward(model, data, number, config, dtype)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning at GPT-2's size: batch 2, context 128, dropout 0.1.


def tune_transformers(settings=lambda: None):
    """All of GPT-2, in float32."""
    return peers.train(GPTConfig.preset("gpt2"), windows(50257, 128), 2, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Training from nothing, with AdamW, at the two shapes that nanoGPT's users know: its small one for a CPU, and its
# default for Shakespeare.

SHAPES = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 257, "batch_size": 12},
    "large": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257, "batch_size": 16},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 128, "vocab_size": 50257, "batch_size": 2},
}


def train(name, dropout=0.0, peer=False, **fields):
    shape = SHAPES[name]
    model_config = gpt.from_flags(GPTConfig, shape | {"dropout": dropout})
    data = windows(shape["vocab_size"], shape["block_size"])
    if peer:
        return peers.train(model_config, data, shape["batch_size"])
    return stepping(
        GPT(model_config), data, gpt.from_flags(gpt.TrainConfig, shape | {"optimizer": "adamw", "lr": 1e-3} | fields)
    )


def profiled(name, steps=None):
    """-> {kind of operation: its share of a step's time}, at one of the shapes."""
    shape = SHAPES[name]
    data = windows(shape["vocab_size"], shape["block_size"])
    config = gpt.from_flags(gpt.TrainConfig, shape | {"optimizer": "adamw"})
    return scaling.shares(stepping(GPT(gpt.from_flags(GPTConfig, shape)), data, config), data, steps or 5)


def validating(steps, more=()):
    """-> the share of a run of the preset tiny that goes into validations, with the sample and checkpoint of each.

    Measured over that many steps, 200 if None, and projected to the preset's 800.
    """
    steps = steps or 200
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        gpt.main(["--max_steps", str(steps), "--eval_interval", str(steps), "--out", folder, *more])
        run, *_ = gpt.load_run(folder)
        model, tokenizer = gpt.load_checkpoint(folder)
        config = gpt.from_flags(gpt.TrainConfig, run["config"])
        _, _, val_ids = gpt.load_data(config.data, tokenizer, val_bytes=config.val_bytes)
        data = gpt.TokenDataset(val_ids, model.config.block_size)
        dtype = gpt.resolve_dtype(config.dtype, torch.device("cpu"))
        optimizers = gpt.make_optimizers(model, config)
        began = time.perf_counter()
        gpt.evaluate(model, data, tokenizer, config.batch_size, dtype)
        model.generate(torch.full((1, 1), tokenizer.eot), 48, temperature=0.8, top_p=0.9)
        gpt.save_checkpoint(folder, model, tokenizer, overwrite=True)
        gpt.save_run(run, model, optimizers, Path(folder))
        one = time.perf_counter() - began
    first, last = (row["seconds"] for row in run["rows"])  # between them lie all steps, and as much as one validation
    step = (last - first - one) / steps
    whole = gpt.TrainConfig()
    validations = 1 + whole.max_steps // whole.eval_interval
    return validations * one / (validations * one + whole.max_steps * step)


def train_tiny(threads=None, **fields):
    """The preset tiny, with so many threads."""
    torch.set_num_threads(threads or torch.get_num_threads())
    return stepping(GPT(GPTConfig()), windows(1024, 64), gpt.TrainConfig(**fields))


def train_with_muon(peer=False):
    """The preset tiny, and its default optimizer: ours, or PyTorch's own."""
    model, config = GPT(GPTConfig()), gpt.TrainConfig()
    adamw, muon = gpt.make_optimizers(model, config)
    if peer:
        matrices = muon.param_groups[0]["params"]
        muon = torch.optim.Muon(matrices, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return stepping(model, windows(1024, 64), config, [adamw, muon])


# ---------------------------------------------------------------------------------------------------------------------
# Time to quality: Shakespeare, to what nanoGPT's recipe for a CPU comes to.

QUALITY = 2.72  # bits per byte on the last tenth of the text
QUICK = ["--data", "shakespeare", "--max_steps", "120", "--warmup_steps", "20", "--eval_interval", "120"]


def to_quality(peer=False, **options):
    """-> a function that trains from nothing until that is reached; its step 0, to warm up, does nothing."""
    shape = SHAPES["small"]
    tokenizer, train_ids, val_ids = gpt.load_data(["shakespeare"], "bytes")
    train_data = gpt.TokenDataset(train_ids, shape["block_size"], stride=1)
    val_data = gpt.TokenDataset(val_ids, shape["block_size"])

    def step(number):
        if number and peer:
            reached = peers.nanogpt_recipe(gpt.from_flags(GPTConfig, shape), train_data, val_data, tokenizer, **options)
            log(f"the recipe comes to {reached:.3f} bits per byte")
        elif number:
            with tempfile.TemporaryDirectory() as folder:
                gpt.main([*QUICK, "--out", folder])
                _, _, best = gpt.load_run(folder)
            reached = best["validation"]["bits_per_byte"]
            gpt.require(reached <= QUALITY, f"{' '.join(QUICK)} comes to {reached:.3f} bits per byte only")

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Generating with GPT-2 (124M, random weights): 200 tokens, greedily, after a prompt of 16; then with 8 streams at once.

PROMPT, NEW = 16, 200


def generate(dtype, streams=1, prompt=PROMPT, new=None, peer=None, in_c=False):
    new = new or NEW
    if peer == "CTranslate2":
        return peers.generate_ctranslate2(dtype, prompt, new)
    if peer == "transformers":
        return peers.generate(dtype, streams, prompt, new)
    model = GPT(GPTConfig.preset("gpt2")).eval()
    model = int8.quantize(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    model = native.speed_up(model) if in_c else model
    idx = torch.arange(prompt).repeat(streams, 1)
    return lambda number: model.generate(idx + number, peers.tokens_of(number, new), temperature=0)
