"""Adapters made by PEFT with any setting: the same logits here, or an error that names the setting."""

import json
import os
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import published
from safetensors.torch import load_file, save_file

import convert_gpt2
import gpt
from extras import lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDX = torch.arange(20).view(2, 10)
CONFIG, WEIGHTS, PICKLE = lora.CONFIG, lora.WEIGHTS, "adapter_model.bin"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published model and its checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    published(folder / "hf", n_layer=3)
    convert_gpt2.convert(str(folder / "hf"), folder / "ours")
    return folder


def made_by_peft(base, **settings):
    """An adapter with large weights, as PEFT saves it in the folder `adapter` -> the logits with it."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base / "hf")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    model.save_pretrained("adapter")
    return model.double()(IDX).logits


@torch.no_grad()
def ours(base):
    return lora.load_adapter(gpt.load_checkpoint(base / "ours")[0], "adapter")(IDX)[0]


def assert_same(exact, logits):
    assert (logits - exact).abs().max() / exact.abs().max() < 1e-5


def refused(base, message):
    with pytest.raises(gpt.InputError, match=message):
        ours(base)


SAME = {
    "all": {"target_modules": "all-linear"},
    "c_proj, of attention and MLP": {"target_modules": ["c_proj"]},
    "two blocks of a pattern": {"layers_to_transform": [0, 2], "layers_pattern": "h"},
    "a part of a block left out": {"target_modules": ["c_fc", "c_proj"], "exclude_modules": ["h.0.attn.c_proj"]},
    "dropout": {"lora_dropout": 0.4},
    "for another task": {"task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main"},
}
REFUSED = {
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"h.0.attn.c_attn": 2}},
    "alpha_pattern": {"alpha_pattern": {"h.0.attn.c_attn": 2}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "the head is tied": {"target_modules": ["lm_head"]},
}
SETTINGS = SAME | REFUSED


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_not_computed_here_is_refused_by_name(base, setting):
    made_by_peft(base, **REFUSED[setting])
    refused(base, setting)


PAIRS = [*combinations(SETTINGS, 2)]
FAST = [(setting, setting) for setting in SAME] + PAIRS[::7]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair not in FAST]


@pytest.mark.parametrize(("first", "second"), FAST + SLOW)
def test_one_or_two_settings_are_refused_or_give_pefts_logits(base, first, second):
    try:
        exact = made_by_peft(base, **(SETTINGS[first] | SETTINGS[second]))
    except (ValueError, TypeError, KeyError, RuntimeError):
        assert first != second, "PEFT does not take every pair"
        return
    try:
        assert_same(exact, ours(base))
    except gpt.InputError as error:
        assert first in REFUSED or second in REFUSED, error


def test_an_adapter_takes_the_type_of_its_model(base):
    exact = made_by_peft(base)
    model = lora.load_adapter(gpt.load_checkpoint(base / "ours")[0].bfloat16(), "adapter")
    assert torch.cosine_similarity(model(IDX)[0].float(), exact, dim=-1).mean() > 0.99


# ---- Files ----
UNFIT = {
    "adapter is not a readable adapter": {"r": "x"},
    "does not fit the model and the rank of 3": {"r": 3},
    "it is not plain LoRA: use_new_thing is 0.5": {"use_new_thing": 0.5, "empty_thing": {}},
    "peft_type is 'IA3'": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("message", UNFIT)
def test_a_config_that_does_not_fit_is_refused(base, message):
    made_by_peft(base)
    path = Path("adapter", CONFIG)
    path.write_text(json.dumps(json.loads(path.read_text()) | UNFIT[message]))
    refused(base, message)


def test_a_missing_tensor_is_named(base):
    made_by_peft(base)
    tensors = load_file(Path("adapter", WEIGHTS))
    tensors.popitem()
    save_file(tensors, Path("adapter", WEIGHTS))
    refused(base, "lora_[AB] does not fit")


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_an_old_adapter_is_a_pickle_that_runs_no_code(base):
    exact = made_by_peft(base)
    path = Path("adapter", WEIGHTS)
    torch.save(load_file(path), Path("adapter", PICKLE))
    path.unlink()
    assert_same(exact, ours(base))
    torch.save({"weight": Payload()}, Path("adapter", PICKLE))
    refused(base, "holds other things than tensors")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PICKLE])
def test_a_pointer_of_git_lfs_is_recognized(base, name):
    made_by_peft(base)
    Path("adapter", WEIGHTS).unlink()
    Path("adapter", name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000\n")
    refused(base, f"{name} is a pointer of git-lfs, not the file: run `git lfs pull`")
