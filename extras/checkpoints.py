"""What a folder is, and what its config.json says, beyond what load_checkpoint needs."""

import json
from pathlib import Path

import gpt


def read_config(name):
    """A folder, or a name under checkpoints/ -> its config.json as a dict. Raises InputError."""
    path = gpt.find_checkpoint(name) / gpt.CONFIG
    try:
        config = json.loads(gpt.read_text(path))
    except (ValueError, RecursionError) as error:
        raise gpt.InputError(f"{path} is not JSON: {error}") from error
    gpt.require(isinstance(config, dict), f"{path} is not a JSON object")
    return config


def training_text(name):
    """The texts that a model was trained on, and the size of their validation split -> names, val_bytes."""
    training = read_config(name).get("training", {})
    names = [text for text in training.get("data", []) if not text.lower().endswith((".jsonl", ".ndjson"))]
    return names, training.get("val_bytes", 2**20)


PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")


def require_checkpoint(name):
    """The name itself; raises InputError if it is a published model or an adapter, and says what to do."""
    folders = (Path(name), Path("checkpoints", name))
    for folder in folders:
        foreign = (folder / gpt.CONFIG).exists() and not (folder / gpt.VOCABULARY).exists()
        gpt.require(not foreign, f"{folder} is not a checkpoint of ours: is it for python convert_gpt2.py {folder}?")
        advice = f"use python sample.py --model ITS_BASE --adapter {folder}"
        gpt.require(not (folder / "adapter_config.json").exists(), f"{folder} is an adapter: {advice}")
    missing = name in PUBLISHED and not any(folder.exists() for folder in folders)
    gpt.require(not missing, f"there is no checkpoint {name}: run python convert_gpt2.py {name} first")
    gpt.find_checkpoint(name)
    return name
