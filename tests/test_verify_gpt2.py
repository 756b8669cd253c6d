import json

import pytest
import torch
from conftest import published
from safetensors.torch import load_file, save_file

import convert_gpt2
import gpt
from debug import mistakes, verify_gpt2

pytest.importorskip("transformers")
SHAPE = {"n_positions": 210, "n_embd": 32, "n_layer": 3, "n_head": 4}


def verify(*argv):
    """-> exit status, JSON lines on stdout; call with capsys."""
    try:
        verify_gpt2.main([*argv, "--json"])
    except SystemExit as end:
        return end.code
    return 0


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def both(tmp_path, capsys):
    published(tmp_path / "hf", **SHAPE)
    convert_gpt2.main(["hf", "--out", "checkpoints/ours"])
    capsys.readouterr()
    return tmp_path / "hf"


def damage(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, {"format": "pt"})


def test_a_converted_model_is_proven_equal(both, capsys):
    assert verify("ours") == 0
    *rows, greedy, verdict = lines(capsys)
    assert [row["input"] for row in rows] == ["one token", "a paragraph", "2 x random tokens", "full context"]
    assert [row["tokens"] for row in rows] == [1, 210, 210, 210]
    for row in rows:
        assert row["relative_error"] < 1e-5 and row["top1"] == 1
        assert row["loss"] == row["reference_loss"] or abs(row["loss"] - row["reference_loss"]) < 1e-5
    assert (greedy["same"], greedy["tokens"]) == (200, 200)
    assert verdict == {"equal": True, "worst": max(row["relative_error"] for row in rows), "same_tokens": True,
                       "parts_at": None, "parts_by": 0.0}  # fmt: skip


def test_figures_are_those_of_an_independent_computation(both, capsys):
    from transformers import GPT2LMHeadModel

    verify("ours")
    row = lines(capsys)[1]
    model, tokenizer = gpt.load_checkpoint("checkpoints/ours")
    idx = torch.tensor([[tokenizer.eot, *tokenizer.encode(convert_gpt2.PARAGRAPH)][:210]])
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(both).double()(idx, labels=idx)
        ours = model(idx)[0].double()
    assert row["reference_loss"] == pytest.approx(theirs.loss.item(), abs=1e-5)  # theirs is a float32
    assert row["relative_error"] == pytest.approx(
        ((ours - theirs.logits).abs().max() / theirs.logits.abs().max()).item(), rel=0.01
    )


def test_the_first_difference_is_the_first():
    a, b = torch.tensor([9, 9, 1, 2, 3, 4, 5]), torch.tensor([9, 8, 1, 2, 7, 4, 7])
    assert verify_gpt2.first_difference(a, b, 2) == 2 and verify_gpt2.first_difference(a, a, 2) == 5


def test_the_table_is_for_reading(both, capsys):
    verify_gpt2.main(["ours", "--new_tokens", "5"])
    out, err = capsys.readouterr()
    assert "greedy text: 5 of 5 tokens the same" in out and "\nequal: the largest relative error is" in out
    assert f"with {both}\n" in err


@pytest.mark.parametrize(
    ("name", "change", "place"),
    [
        ("transformer.wte.weight", lambda w: w.flip(0), "token embedding"),
        ("transformer.wpe.weight", lambda w: w.roll(1, 0), "token plus position embedding"),
        ("transformer.h.1.ln_1.bias", lambda w: w + 0.1, "block 1, LayerNorm 1"),
        ("transformer.h.2.attn.c_attn.weight", lambda w: w.T.reshape(w.shape), "block 2, queries, keys, values"),
        ("transformer.h.1.attn.c_proj.weight", lambda w: w.T, "block 1, attention's projection"),
        ("transformer.h.0.ln_2.weight", lambda w: w * 1.001, "block 0, LayerNorm 2"),
        ("transformer.h.2.mlp.c_fc.bias", lambda w: w.flip(0), "block 2, the MLP's first layer"),
        ("transformer.h.0.mlp.c_proj.weight", lambda w: w.T.reshape(w.shape), "block 0, the MLP's second layer"),
        ("transformer.ln_f.weight", lambda w: w * 1.001, "the final LayerNorm"),
    ],
)
def test_a_broken_conversion_is_found_out_and_the_place_named(both, tmp_path, capsys, name, change, place):
    damage(tmp_path / "checkpoints" / "ours", name, change)
    assert verify("ours", "--new_tokens", "5") == 1
    verdict = lines(capsys)[-1]
    assert (
        not verdict["equal"] and verdict["worst"] > 1e-5 and verdict["parts_at"] == place and verdict["parts_by"] > 1e-5
    )
    with pytest.raises(SystemExit) as end:
        verify_gpt2.main(["ours", "--new_tokens", "5", "--reference", str(both)])
    assert end.value.code == 1 and f"first differ at {place}, with a" in capsys.readouterr().out


def test_without_the_published_files_nothing_is_called_proven(both, tmp_path, capsys):
    damage(tmp_path / "checkpoints" / "ours", "transformer.h.1.attn.c_proj.weight", lambda w: w.T)
    both.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as end:
        verify_gpt2.main(["ours"])
    assert end.value.code == 2 and "are gone: give them by --reference" in capsys.readouterr().err
    assert verify("ours", "--reference", "moved", "--new_tokens", "5") == 1
    assert verify("ours", "--own", "--new_tokens", "5") == 0, "its own weights are computed with as they should be"


def test_the_files_are_found_from_every_folder(both, tmp_path, monkeypatch, capsys):
    damage(tmp_path / "checkpoints" / "ours", "transformer.h.1.attn.c_proj.weight", lambda w: w.T)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert verify("../checkpoints/ours", "--new_tokens", "5") == 1


def test_another_vocabulary_is_found_out(both, tmp_path, capsys):
    path = tmp_path / "checkpoints" / "ours" / "tokenizer.tiktoken"
    lines = path.read_text().splitlines()
    lines[97], lines[98] = (
        f"{a.split()[0]} {b.split()[1]}" for a, b in ((lines[97], lines[98]), (lines[98], lines[97]))
    )
    path.write_text("\n".join(lines) + "\n")
    assert verify("ours", "--new_tokens", "5") == 1
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verdict["same_tokens"] is False and verdict["worst"] < 1e-5


def test_a_folder_that_asks_for_less_repetition_is_compared_without_it(both, capsys):
    path = both / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}))
    assert verify("ours") == 0


def test_a_nan_is_not_equal_to_anything(both, tmp_path, capsys):
    damage(tmp_path / "checkpoints" / "ours", "transformer.h.1.ln_1.bias", lambda w: w * 1e37)
    assert verify("ours", "--new_tokens", "5") == 1
    assert lines(capsys)[-1]["parts_at"] == "block 1, LayerNorm 1"


def test_a_folder_of_published_files_will_do(both, capsys):
    assert verify(str(both)) == 0
    assert not list(both.glob("*.tiktoken")), "nothing is written into it"


def test_a_model_of_our_own_is_compared_by_way_of_the_exporter(tmp_path, capsys):
    model = verify_gpt2.randomize(gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16)))
    gpt.save_checkpoint("mine", model, gpt.Tokenizer.bytes())
    assert verify("mine") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["equal"] and "as exported by extras.export" in captured.err


def test_a_shorter_context_is_compared_within_it(both, capsys):
    convert_gpt2.main(["hf", "--out", "short", "--block_size", "20"])
    capsys.readouterr()
    assert verify("short") == 0
    assert lines(capsys)[-2] == {"input": "greedy text", "tokens": 12, "same": 12}


def test_random_weights_need_no_checkpoint(monkeypatch, capsys):
    monkeypatch.setitem(
        gpt.PRESETS, "gpt2", {"block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300}
    )
    assert verify("gpt2", "--random") == 0
    assert lines(capsys)[-1]["equal"]


PLACES = {
    "missing transpose: attn.c_attn": "block 0, queries, keys, values",
    "missing transpose: attn.c_proj": "block 0, attention's projection",
    "missing transpose: mlp.c_fc": "block 0, the MLP's first layer",
    "missing transpose: mlp.c_proj": "block 0, the MLP's second layer",
    "exact GELU, not tanh": "block 0, GELU",
    "LayerNorm eps 1e-12": "block 0, LayerNorm 1",
    "head not tied": "the head",
    "scores not divided by √D": "block 0, attention: scores, scaling, mask, softmax",
    "mask off by one": "block 0, attention: scores, scaling, mask, softmax",
    "post-LayerNorm": "block 0, the residual stream",
    "positions shifted by one": "token plus position embedding",
    "dropout left on": "token plus position embedding",
}


def test_every_known_mistake_is_visible_and_its_place_is_named(both, capsys):
    assert verify("ours", "--diagnose", "--new_tokens", "50") == 0
    rows = {row["mistake"]: row for row in lines(capsys)}
    assert rows.keys() == PLACES.keys() == mistakes.MISTAKES.keys()
    for name, row in rows.items():
        assert row["relative_error"] > 1e-4, f"{name} moves the logits by {row['relative_error']:.1e} only"
        assert abs(row["loss"] - row["sound_loss"]) > 1e-7, name
        assert row["parts_at"] == PLACES[name] and row["parts_by"] > 1e-5, name
        if name not in ("exact GELU, not tanh", "LayerNorm eps 1e-12"):  # these two move little
            assert row["relative_error"] > 0.05 and row["same_tokens"] < 50, name


def test_a_sound_model_shows_no_mistake(both, monkeypatch, capsys):
    monkeypatch.setattr(verify_gpt2, "MISTAKES", ["none"])
    monkeypatch.setitem(mistakes.MISTAKES, "none", lambda model: [])
    verify("ours", "--diagnose")
    (row,) = lines(capsys)
    assert (row["relative_error"], row["parts_at"], row["same_tokens"]) == (0, None, 200), (
        "as long as the context allows"
    )


def test_each_mistake_is_taken_back(both):
    model, tokenizer = gpt.load_checkpoint("checkpoints/ours")
    idx = torch.arange(20)[None]
    before, functions = model(idx)[0], (gpt.attention, torch.nn.functional.gelu, gpt.Block.forward)
    verify_gpt2.diagnose(model, tokenizer, 5)
    assert torch.equal(model(idx)[0], before)
    assert (gpt.attention, torch.nn.functional.gelu, gpt.Block.forward) == functions
    assert model.lm_head.weight is model.transformer.wte.weight and not model.training


def test_the_table_of_mistakes_is_for_reading(both, capsys):
    verify_gpt2.main(["ours", "--diagnose", "--new_tokens", "8"])
    out = capsys.readouterr().out
    assert out.count("\n") == 2 + len(PLACES) and all(name in out for name in PLACES)


BAD = {
    "no such checkpoint": ["nobody"],
    "no tokens": ["ours", "--new_tokens", "0"],
    "not a preset": ["ours", "--random"],
    "both": ["ours", "--diagnose", "--reference", "hf"],
    "random beside files": ["tiny", "--random", "--reference", "hf"],
    "no such reference": ["ours", "--reference", "nowhere"],
    "a checkpoint as reference": ["ours", "--reference", "checkpoints/ours"],
    "own and other weights": ["ours", "--reference", "hf", "--own"],
    "another shape": ["ours", "--reference", "other"],
    "not GPT-2": ["ours", "--reference", "llama"],
    "no weights": ["ours", "--reference", "empty"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(both, tmp_path, case, capsys):
    published(tmp_path / "other", n_embd=16)
    for name, described in {
        "llama": {"model_type": "llama"},
        "empty": json.loads((both / "config.json").read_text()),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    with pytest.raises(SystemExit) as end:
        verify_gpt2.main(BAD[case])
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reference: ")]
    assert end.value.code == 2 and len(error) == 1 and error[0].startswith("error: ")


def test_a_reference_that_lacks_a_tensor_is_refused(both, tmp_path, capsys):
    tensors = load_file(both / "model.safetensors")
    del tensors["transformer.h.1.ln_1.bias"]
    save_file(tensors, both / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as end:
        verify_gpt2.main(["ours"])
    assert end.value.code == 2 and "transformers finds no transformer.h.1.ln_1.bias" in capsys.readouterr().err


def test_without_transformers_the_error_says_how_to_get_it(both, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as end:
        verify_gpt2.main(["ours"])
    assert end.value.code == 2 and "pip install transformers" in capsys.readouterr().err
    verify_gpt2.main(["ours", "--diagnose", "--new_tokens", "3"])  # which needs no reference
