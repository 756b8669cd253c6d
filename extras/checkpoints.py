"""What config.json says about a checkpoint, beyond what load_checkpoint needs."""

import json

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
    names = [text for text in training.get("data", []) if not text.endswith((".jsonl", ".ndjson"))]
    return names, training.get("val_bytes", 2**20)
