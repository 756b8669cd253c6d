"""What a user would take instead of this project, ready to be timed by bench.py: transformers, and llama.cpp.

Each function returns one that makes a step: of training, in the plain loop that a user of transformers would write, or a
generation.
"""

import tempfile
from pathlib import Path

import torch

import gpt
from gpt import GPT, GPTConfig


def train(config, data, batch_size, settings=lambda: None):
    """transformers' GPT-2 of a GPTConfig's shape and dropout, in float32, with AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": config.block_size, **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)))
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


def generate(dtype, streams, prompt, new):
    """GPT-2 in transformers: `new` tokens, greedily, after prompts of `prompt` tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(eos_token_id=None)).eval().to(getattr(torch, dtype))
    idx = torch.arange(prompt).repeat(streams, 1)
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(idx)}
    return lambda number: model.generate(idx + number, **options)


def generate_llama(dtype, prompt, new):
    """llama.cpp, by way of export.py, where llama-cpp-python is installed."""
    from llama_cpp import Llama

    import export

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = gpt.Tokenizer({bytes([i]) if i < 256 else b"%d," % i: i for i in range(50256)}, "bpe")
        export.to_gguf(GPT(GPTConfig.preset("gpt2")), tokenizer, Path(folder) / "gpt2.gguf", dtype)
        model = Llama(str(Path(folder) / "gpt2.gguf"), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)

    def step(number):
        model.reset()
        for made, _ in enumerate(model.generate([token + number for token in range(prompt)], temp=0.0), 1):
            if made == new:
                return

    return step
