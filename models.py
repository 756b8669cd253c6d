"""The name of a model -> the model, ready to run."""

from pathlib import Path

import torch

import lora
import quantize
from gpt import load_checkpoint, require, resolve_dtype


def open_model(name, device="cpu", dtype="float32", adapter=None):
    """A folder, or a name under checkpoints/ -> GPT on the device, Tokenizer; dtype is that of --dtype, or int8."""
    for folder in (Path(name), Path("checkpoints", name)):
        foreign = (folder / "config.json").exists() and not (folder / "tokenizer.tiktoken").exists()
        advice = f"if it is a GPT-2 of Hugging Face's, run python convert_gpt2.py {folder} --out DIR"
        require(not foreign, f"{folder} has no tokenizer.tiktoken, it is not a checkpoint of ours: {advice}")
        is_adapter = (folder / lora.CONFIG).exists()
        require(not is_adapter, f"{folder} is an adapter: use python sample.py --model ITS_BASE --adapter {folder}")
    device = torch.device(device)
    model, tokenizer = load_checkpoint(name)
    if adapter:
        lora.load_adapter(model, adapter, name)
    if dtype == "int8":
        return quantize.quantize(model).to(device), tokenizer
    return model.to(device, resolve_dtype(dtype, device)), tokenizer
