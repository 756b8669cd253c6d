"""LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", 4.1): a frozen W learns as W + B A.

B (out, rank) and A (rank, in) are thin, so there is little to train, to keep and to pass on. B begins at zero, so that
the adapted model begins as the base, bit for bit. Adapters are read and written in the format of Hugging Face PEFT.
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
from gpt import InputError, require
from hub import read_json

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class LoRALinear(nn.Linear):
    """x -> W x + b + (alpha / rank) B A x; W and b are those of a given linear layer, and stay as they are."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling, self.dropout = alpha / rank, gpt.Dropout(dropout)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B) * self.scaling


def adapt(model, targets=("attn.c_attn",), rank=8, alpha=16, dropout=0.0):
    """Freeze the model and put LoRA on the named projections of every block. Raises InputError."""
    for target in targets:
        require(target in TARGETS, f"LoRA has no target {target!r}: choose among {', '.join(TARGETS)}" + (
                "; the head is tied, so that merging into it would change the embedding too" if target in ("lm_head", "wte") else ""))  # fmt: skip
    require(targets, f"LoRA needs a target: choose among {', '.join(TARGETS)}")
    smallest = model.config.n_embd
    require(1 <= rank <= smallest, f"rank is {rank}, expected 1 to {smallest}, the smaller side of the matrices")
    model.requires_grad_(False)
    for block in model.transformer.h:
        for target in targets:
            parent, name = block.get_submodule(target.split(".")[0]), target.split(".")[1]
            setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha, dropout))
    return model


def merged(model, weights=None):
    """Parameters as an ordinary checkpoint has them, W + (alpha / rank) B A in place of W; `weights` stand in for the model's."""
    own = dict(model.named_parameters()) | (weights or {})
    found = {name: p.detach() for name, p in own.items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            A, B = (own[f"{name}.lora_{letter}"].detach().to(module.weight.device) for letter in "AB")
            found[f"{name}.weight"] = found[f"{name}.weight"] + module.scaling * (B @ A)
    return found


BEGINNINGS = (True, False, "gaussian", "orthogonal")  # init_lora_weights that leave the base as it is
PREFIX = "base_model.model."  # PEFT's name for the model that an adapter sits on


def save_adapter(model, folder, base, weights=None):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does; `base` is what the adapter belongs to."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    own = dict(model.named_parameters()) | (weights or {})
    tensors = {f"{PREFIX}{name}.lora_{letter}.weight": own[f"{name}.lora_{letter}"].detach().cpu().contiguous()
               for name in modules for letter in "AB"}  # fmt: skip
    one = next(iter(modules.values()))
    targets = [target for target in TARGETS if any(name.endswith(target) for name in modules)]
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": len(one.lora_A),
                 "lora_alpha": one.scaling * len(one.lora_A), "lora_dropout": one.dropout.p, "target_modules": targets,
                 "bias": "none", "fan_in_fan_out": True, "inference_mode": True}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with gpt.replacing(folder / "adapter_model.safetensors") as part:
        save_file(tensors, part, {"format": "pt"})
    gpt.write(folder / "adapter_config.json", json.dumps(described, indent=2) + "\n")


def load_adapter(model, folder, base=None):
    """Put the adapter in `folder`, ours or PEFT's, on the model. Raises InputError for one that does not fit.

    Where it was made for another model than `base`, a path, a remark says so.
    """
    folder = Path(folder)
    require((folder / "adapter_config.json").is_file(), f"there is no adapter in {folder}: it has no adapter_config.json")
    described = read_json(folder / "adapter_config.json")
    plain = {"peft_type": "LORA", "bias": "none", "lora_bias": False, "use_rslora": False, "use_dora": False, "modules_to_save": None,
             "alpha_pattern": {}, "rank_pattern": {}}  # fmt: skip
    odd = [key for key, value in plain.items() if described.get(key, value) != value and (described[key] or value)]
    odd += ["init_lora_weights"] if described.get("init_lora_weights") not in (*BEGINNINGS, None) else []  # others change the base
    require(not odd, f"the adapter in {folder} is not plain LoRA: {', '.join(f'{key} is {described[key]!r}' for key in odd)}")
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        names = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
        places = {name: re.fullmatch(r"transformer\.h\.\d+\.(.+)\.lora_[AB]", name) for name in names}
        strange = sorted(name for name, place in places.items() if not place or place[1] not in TARGETS)
        require(not strange, f"the adapter in {folder} has {strange[:1]}, which is none of {', '.join(TARGETS)} in a block")
        rank, alpha = described["r"], described["lora_alpha"]
        require(all(tensor.isfinite().all() for tensor in tensors.values()), f"the adapter in {folder} holds numbers that are not finite")
        require(isinstance(alpha, (int, float)) and 0 < alpha <= 2**40, f"lora_alpha in {folder} is {alpha!r}, expected a positive number")
        require(all(type(rank) is int and rank in tensor.shape for tensor in names.values()), f"r in {folder} is {rank!r}, not that of its tensors")
        adapt(model, sorted({place[1] for place in places.values()}), rank, alpha)
        wanted = {name: p for name, p in model.named_parameters() if "lora_" in name}
        wrong = sorted(name for name in wanted.keys() | names.keys()
                       if name not in names or name not in wanted or names[name].shape != wanted[name].shape)  # fmt: skip
        require(not wrong, f"the adapter in {folder} does not fit the model at {', '.join(wrong[:3])}")
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not a readable adapter: {error}") from error
    made_for = described.get("base_model_name_or_path")
    if base and made_for and Path(str(made_for)).name != Path(base).name:
        gpt.say(f"the adapter in {folder} was made for {made_for}, not for {base}")
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(names[name])
    return model.eval()
