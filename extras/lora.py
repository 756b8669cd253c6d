"""LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", 4.1): a frozen W learns as W + B A.

B (out, rank) and A (rank, in) are small, so there is little to train, to save and to share. B starts at zero, so the
adapted model starts as the base, bit for bit. Adapters are read and written in the format of Hugging Face PEFT.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import gpt
from gpt import InputError, log, refuse_pointer, require

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class LoRALinear(nn.Linear):
    """x -> W x + b + (alpha / rank) B A x; W and b belong to a given linear layer and stay as they are."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.dropout = gpt.Dropout(dropout)

    def forward(self, x):
        inner = F.linear(self.dropout(x), self.lora_A)  # (B, T, in) -> (B, T, rank)
        update = F.linear(inner, self.lora_B)  # (B, T, out)
        return F.linear(x, self.weight, self.bias) + self.scaling * update


def adapt(model, targets=("attn.c_attn",), rank=8, alpha=16, dropout=0.0, only=None):
    """Freeze the model and put LoRA on the named projections of every block, or on `only` the layers of these names.

    Raises InputError.
    """
    choices = ", ".join(TARGETS)
    for target in targets:
        tied = "; the head is tied, so merging into it would change the embedding too" if target == "lm_head" else ""
        require(target in TARGETS, f"LoRA has no target {target!r}: choose from {choices}{tied}")
    require(targets, f"LoRA needs a target: choose from {choices}")
    smallest = model.config.n_embd
    require(1 <= rank <= smallest, f"rank is {rank}, expected 1 to {smallest}, the smaller side of the matrices")
    model.requires_grad_(False)
    for i, block in enumerate(model.transformer.h):
        for target in targets:
            if only is None or f"transformer.h.{i}.{target}" in only:
                module, name = target.split(".")
                parent = block.get_submodule(module)
                setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha, dropout))
    return model


def merged(model):
    """The parameters of an ordinary checkpoint: W + (alpha / rank) B A in place of W."""
    found = {name: p.detach() for name, p in model.named_parameters() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            update = module.lora_B.detach() @ module.lora_A.detach()  # (out, in)
            found[f"{name}.weight"] = found[f"{name}.weight"] + module.scaling * update
    return found


PREFIX = "base_model.model."  # PEFT's name for the model that an adapter belongs to
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model, folder, base):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does; `base` is the folder of the base model."""
    folder = Path(folder)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    tensors = {}
    for name, module in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.detach().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.detach().cpu()
    rank = len(module.lora_A)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank}
    config |= {"lora_alpha": module.scaling * rank, "lora_dropout": module.dropout.p}
    config["target_modules"] = [target for target in TARGETS if any(name.endswith(target) for name in modules)]
    config |= {"bias": "none", "fan_in_fan_out": True, "inference_mode": True}
    with gpt.replacing(folder / WEIGHTS, parents=True) as part:
        save_file(tensors, part, {"format": "pt"})
    with gpt.replacing(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


def exporter(folder, base, overwrite):
    """export_weights for gpt.train: merges, and saves the adapter if there is a folder for it. Raises InputError."""
    if folder:
        free = overwrite or not Path(folder, CONFIG).exists()
        require(free, f"{folder} already holds an adapter: add --overwrite, or choose another --save_adapter")
        gpt.refuse_existing(folder, overwrite)

    def export_weights(model):
        if folder and gpt.RANK == 0:
            save_adapter(model, folder, base)
        return merged(model)

    return export_weights


PLAIN = {  # the values that LoRA as it is here may have; a setting that is not named here or below must be empty
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # the others change the base
}
NO_EFFECT = {  # the tensors show them, or they matter only in training or with other settings
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size"),
}


def check_plain(config):
    """Raise InputError if an adapter_config.json has a setting that changes what is computed, known here or not."""
    odd = []
    for key, value in config.items():
        plain = value in PLAIN[key] if key in PLAIN else not value or key in NO_EFFECT
        if not plain:
            odd.append(f"{key} is {value!r}")
    require(not odd, f"it is not plain LoRA: {', '.join(odd)}")


def read_weights(folder):
    """adapter_model.safetensors, or adapter_model.bin of older versions -> {name: tensor}."""
    pickled = folder / "adapter_model.bin"
    if (folder / WEIGHTS).exists() or not pickled.exists():
        refuse_pointer(folder / WEIGHTS)
        return load_file(folder / WEIGHTS)
    refuse_pointer(pickled)
    try:
        return torch.load(pickled, "cpu", weights_only=True)  # builds tensors, and runs no code
    except Exception as error:
        raise InputError(f"{pickled.name} holds other things than tensors, or is damaged") from error


UNREADABLE = (OSError, SafetensorError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)
UNREADABLE += (RecursionError,)  # of nested JSON


def load_adapter(model, folder, base=None):
    """Put the adapter in `folder`, ours or PEFT's, on the model. Raises InputError if it doesn't fit.

    Logs a remark if the adapter was made for another model than `base`, a folder.
    """
    folder = Path(folder)
    require((folder / CONFIG).exists(), f"there is no adapter in {folder}: it has no {CONFIG}")
    try:
        config = json.loads(gpt.read_text(folder / CONFIG))
        check_plain(config)
        found = read_weights(folder)
        tensors = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in found.items()}
        layers = {re.sub(r"\.lora_[AB]$", "", name) for name in tensors}
        targets = {re.sub(r"^transformer\.h\.\d+\.", "", name) for name in layers}
        adapt(model, sorted(targets), config["r"], config["lora_alpha"], only=layers)
        parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
        for name in sorted(parameters.keys() | tensors.keys()):
            fits = name in parameters and name in tensors and parameters[name].shape == tensors[name].shape
            require(fits, f"{name} does not fit the model and the rank of {config['r']}")
    except UNREADABLE as error:
        raise InputError(f"{folder} is not a readable adapter: {error}") from error
    made_for = config.get("base_model_name_or_path")
    if base and made_for and Path(made_for).name != Path(base).name:
        log(f"the adapter in {folder} was made for {made_for}, not for {base}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])
    return model.eval()
