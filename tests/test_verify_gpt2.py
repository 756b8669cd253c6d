import json
from pathlib import Path

import pytest
import torch
from conftest import published, rows_of, run_main
from safetensors.torch import load_file, save_file

import convert_gpt2
import gpt
from debug import verify_gpt2

pytest.importorskip("transformers")


@pytest.fixture
def both(own_folder):
    """Published files, and our checkpoint converted from them."""
    published("hf", n_positions=60, n_embd=32, n_layer=2, n_head=4)
    convert_gpt2.main(["hf", "--out", "checkpoints/ours"])


def damage(folder, name, change):
    tensors = load_file(f"{folder}/model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})


def verify(*argv, expect=0):
    run_main(verify_gpt2.main, *argv, "--new_tokens", 8, "--json", expect=expect)


def test_a_converted_model_is_proven_equal(both, capsys):
    from transformers import GPT2LMHeadModel

    run_main(verify_gpt2.main, "ours", "--json", expect=0)
    *rows, verdict = rows_of(capsys)
    assert [row["tokens"] for row in rows] == [1, 60, 60, 60]
    assert all(row["relative_error"] < 1e-5 and row["top1"] == 1 for row in rows)
    assert verdict["equal"] and verdict["greedy_tokens"] == verdict["same_greedy_tokens"] == 52
    assert verdict["same_vocabulary"] and verdict["first_difference"] is None
    model, tokenizer = gpt.load_checkpoint("ours")
    idx = verify_gpt2.inputs(model.config, tokenizer)["a paragraph"]
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained("hf").double()(idx, labels=idx)
        error = (model(idx)[0] - theirs.logits).abs().max() / theirs.logits.abs().max()
    assert rows[1]["reference_loss"] == pytest.approx(theirs.loss.item(), abs=1e-5)
    assert rows[1]["relative_error"] == pytest.approx(error.item(), rel=0.01)


DAMAGES = [
    ("wpe.weight", lambda w: w.roll(1, 0), "token plus position embedding"),
    ("h.1.ln_1.bias", lambda w: w * 1e37, "block 1, LayerNorm 1"),  # NaN
    ("h.1.attn.c_proj.weight", lambda w: w.T, "block 1, attention's projection"),
    ("ln_f.weight", lambda w: w * 1.001, "the final LayerNorm"),
]


@pytest.mark.parametrize(("name", "change", "where"), DAMAGES)
def test_the_first_difference_of_a_broken_conversion_is_named(both, capsys, name, change, where):
    damage("checkpoints/ours", f"transformer.{name}", change)
    verify("ours", expect=1)
    verdict = rows_of(capsys)[-1]
    assert not verdict["equal"] and verdict["first_difference"] == where and not verdict["error_there"] <= 1e-5


def edit(file, **changes):
    path = Path("hf", file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FRONT = {"type": "RobertaProcessing", "cls": [gpt.EOT, 256], "sep": [gpt.EOT, 256]}
FRONT |= {"trim_offsets": True, "add_prefix_space": False}
TOKENS = [  # a change of the published files since, and what the verdict says of it
    ("same_vocabulary", "<|user|>", "tokenizer_config.json", {"extra_special_tokens": ["<|user|>"]}),
    ("same_vocabulary", "!", "tokenizer_config.json", {"pad_token": "!!"}),
    ("same_vocabulary", "The lighthouse", "tokenizer.json", {"post_processor": FRONT}),
    ("same_end", "", "generation_config.json", {"eos_token_id": [256, 7]}),
]


@pytest.mark.parametrize(("figure", "text", "file", "change"), TOKENS)
def test_other_ids_or_another_end_of_text_are_a_difference(both, capsys, figure, text, file, change):
    edit(file, **change)
    verify("ours", expect=1)
    verdict = rows_of(capsys)[-1]
    assert not verdict["equal"] and {key for key in ("same_vocabulary", "same_end") if not verdict[key]} == {figure}
    assert verdict["first_difference"] is None and text in (verdict["different_text"] or "")


@pytest.mark.parametrize("form", ["reorder_and_upcast_attn", "output_attentions"])
def test_another_precision_or_form_of_the_same_computation_is_equal(both, capsys, form):
    edit("config.json", **{form: True})
    verify("ours")
    assert rows_of(capsys)[-1]["equal"]


UNFIT = {  # what the error says of the published files -> what has become of them
    "hf: name their folder with --reference": lambda: Path("hf").rename("moved"),
    "transformer.h.2.attn.c_proj.bias is missing": lambda: edit("config.json", n_layer=3),
    "hf has a different shape": lambda: published("hf"),
}


@pytest.mark.parametrize("message", UNFIT)
def test_without_published_files_that_fit_nothing_is_called_proven(both, message, capsys):
    UNFIT[message]()
    verify("ours", expect=2)
    assert message in capsys.readouterr().err


def test_a_model_of_our_own_is_compared_by_way_of_the_exporter(mine, capsys):
    run_main(verify_gpt2.main, "mine", "--new_tokens", 5, expect=0)
    captured = capsys.readouterr()
    assert "True" in captured.out and "as exported by extras.export" in captured.err


def test_random_weights_need_no_checkpoint(monkeypatch, capsys):
    shape = {"block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300}
    monkeypatch.setitem(gpt.PRESETS, "gpt2", shape)
    verify("gpt2", "--random")
    assert rows_of(capsys)[-1]["equal"]
    verify("gpt2", "--random", "--diagnose", expect=None)
    assert len(rows_of(capsys)) == len(FIRST_DIFFERENCES)


ATTENTION = "block 0, attention: scores, scaling, mask, softmax"
FIRST_DIFFERENCES = {
    "missing transpose: attn.c_attn": "block 0, queries, keys, values",
    "missing transpose: attn.c_proj": "block 0, attention's projection",
    "missing transpose: mlp.c_fc": "block 0, the MLP's first layer",
    "missing transpose: mlp.c_proj": "block 0, the MLP's second layer",
    "exact GELU, not tanh": "block 0, GELU",
    "LayerNorm eps 1e-12": "block 0, LayerNorm 1",
    "head not tied": "the head",
    "scores not divided by √D": ATTENTION,
    "mask off by one": ATTENTION,
    "post-LayerNorm": "block 0, the residual stream",
    "positions shifted by one": "token plus position embedding",
    "dropout left on": "token plus position embedding",
}


def test_every_known_mistake_is_visible_and_undone_again(both):
    model, tokenizer = gpt.load_checkpoint("ours")
    idx = torch.arange(20)[None]
    before, functions = model(idx)[0], (gpt.attention, torch.nn.functional.gelu, gpt.Block.forward)
    rows = list(verify_gpt2.diagnose(model, tokenizer, 50))
    assert {row["mistake"]: row["first_difference"] for row in rows} == FIRST_DIFFERENCES
    for row in rows:
        assert row["logits"] > 1e-4 and abs(row["loss"]) > 1e-7, row
        if row["mistake"] not in ("exact GELU, not tanh", "LayerNorm eps 1e-12"):  # these two move little
            assert row["logits"] > 0.05 and row["same_greedy_tokens"] < 50, row
    assert torch.equal(model(idx)[0], before)
    assert (gpt.attention, torch.nn.functional.gelu, gpt.Block.forward) == functions
    assert model.lm_head.weight is model.transformer.wte.weight and not model.training
