"""The alternatives to this project that python -m bench times: transformers, llama.cpp, CTranslate2.

Each function returns one that makes a step: of training, in the plain loop that a user of transformers would write, or
of generation.
"""

import math
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

import gpt


def train(config, data, batch_size, settings=lambda: None, rate=lambda number: 1e-4):
    """transformers' GPT-2 of a GPTConfig's shape and dropout, in float32, with AdamW; rate(step) is the learning rate."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_positions": config.block_size,
        **{key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    }
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout))
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    model.train()
    settings()

    def step(number):
        x, _ = data.batch(np.random.default_rng(number).integers(len(data), size=batch_size))
        optimizer.param_groups[0]["lr"] = rate(number)
        optimizer.zero_grad()
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return model

    return step


def nanogpt_recipe(config, data, val_data, tokenizer, steps=2000):
    """All of nanoGPT's recipe for Shakespeare on a CPU, in transformers -> bits per byte.

    2,000 steps of 12 windows, AdamW with a warm-up of 100 steps to 0.001 and a cosine to a tenth of that (its README
    and config/train_shakespeare_char.py).
    """
    step = train(
        config,
        data,
        12,
        rate=lambda i: 1e-3 * min((i + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * (i - 100) / (steps - 100))),
    )
    for number in range(steps):
        model = step(number)

    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx, targets):
            logits = self.model(idx).logits
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    return gpt.evaluate(Scored(), val_data, tokenizer)["bits_per_byte"]


def tokens_of(step, new):
    """How many tokens a step of generating makes: step 0, to warm up, a few."""
    return new if step else min(8, new)


def generate(dtype, streams, prompt, new):
    """GPT-2 in transformers: `new` tokens, greedily, after prompts of `prompt` tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(eos_token_id=None)).eval().to(getattr(torch, dtype))
    idx = torch.arange(prompt).repeat(streams, 1)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(idx)}
    return lambda number: model.generate(idx + number, max_new_tokens=tokens_of(number, new), **options)


def generate_llama(file, prompt, new):
    """llama.cpp with a GGUF file, where llama-cpp-python is installed."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)

    def step(number):
        model.reset()
        for made, _ in enumerate(model.generate([token + number for token in range(prompt)], temp=0.0), 1):
            if made == tokens_of(number, new):
                return

    return step


def generate_ctranslate2(dtype, prompt, new):
    """CTranslate2, with transformers' weights, where ctranslate2 is installed."""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        spec = GPT2Loader().get_model_spec(GPT2LMHeadModel(GPT2Config()))
        spec.register_vocabulary([f"{i}" for i in range(50257)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "50256"
        spec.validate()
        spec.optimize(quantization=dtype)
        spec.save(folder)
        model = ctranslate2.Generator(folder, compute_type=dtype, intra_threads=torch.get_num_threads())

    def step(number):
        idx = [f"{token + number}" for token in range(prompt)]
        wanted = tokens_of(number, new)
        options = {"min_length": wanted, "sampling_topk": 1, "include_prompt_in_result": False}
        (made,) = model.generate_batch([idx], max_length=wanted, **options)
        gpt.require(len(made.sequences_ids[0]) == wanted, "CTranslate2 made another number of tokens")

    return step
