"""What a user would take instead: nanoGPT, transformers, llama.cpp.

Each function returns one that makes a step of training or generation.
"""

import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gpt


class NanoBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.p = config.dropout
        self.ln_1 = nn.LayerNorm(C, bias=False)
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.dropout = nn.Dropout(self.p)
        self.ln_2 = nn.LayerNorm(C, bias=False)
        up, down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.mlp = nn.Sequential(up, nn.GELU(), down, nn.Dropout(self.p))

    def forward(self, x):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = [part.view(heads).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(C, dim=2)]
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The model of nanoGPT (Karpathy 2022) with the defaults of its train.py, written anew for comparison."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*[NanoBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        x = self.dropout(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def plain_loop(model, optimizer, loss_of, data, batch_size):
    """The loop of nanoGPT's train.py on a CPU: random windows, float32, gradients clipped to a norm of 1."""
    T = data.block_size
    model.train()

    def step(number):
        starts = torch.randint(len(data.tokens) - T, (batch_size,))
        x = torch.stack([torch.from_numpy(data.tokens[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data.tokens[i + 1 : i + T + 1].astype(np.int64)) for i in starts])
        loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def train_nanogpt(config, data, batch_size, folder=None):
    """The model above, or that of the model.py in a folder with nanoGPT."""
    if folder is None:
        model = NanoGPT(config)
    else:
        spec = importlib.util.spec_from_file_location("nanogpt", Path(folder, "model.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(**dataclasses.asdict(config), bias=False))
    decayed = {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1}
    others = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], 1e-3, (0.9, 0.99))
    return plain_loop(model, optimizer, lambda x, y: model(x, y)[1], data, batch_size)


# nanoGPT's own for Shakespeare on a CPU, from its README
RECIPE = """config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0
--max_iters=2000 --lr_decay_iters=2000"""


def transformers_model(config):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    return GPT2LMHeadModel(GPT2Config(**shape, **dropouts, n_positions=config.block_size, eos_token_id=None))


def finetune_transformers(config, data, batch_size):
    model = transformers_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    return plain_loop(model, optimizer, lambda x, y: model(x, labels=x).loss, data, batch_size)


def generate_transformers(config, dtype, idx, lengths):
    model = transformers_model(config).eval().to(idx.device, getattr(torch, dtype))
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(idx)}
    return lambda number: model.generate(idx + number, max_new_tokens=lengths(number), **options)


def generate_llama(config, dtype, idx, lengths):
    """llama.cpp, with a file of extras.export's."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.gguf")
        words = {b"%d," % i: i for i in range(256, config.vocab_size - 1)}
        tokenizer = gpt.Tokenizer({bytes([i]): i for i in range(256)} | words, "bpe")
        gpt.save_checkpoint(Path(folder, "gpt2"), gpt.GPT(config), tokenizer)
        export = [sys.executable, "-m", "extras.export", str(Path(folder, "gpt2")), "--format", "gguf"]
        command = [*export, "--dtype", dtype, "--out", str(file)]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(gpt.__file__).parent)
        model = Llama(str(file), n_ctx=config.block_size, n_threads=torch.get_num_threads(), verbose=False)

    def step(number):
        model.reset()
        tokens = model.generate((idx[0] + number).tolist(), temp=0.0)
        return [next(tokens) for _ in range(lengths(number))]

    return step


GENERATORS = {
    "transformers": generate_transformers,
    "llama.cpp": generate_llama,
}
