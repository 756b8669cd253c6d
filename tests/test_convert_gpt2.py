import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROSE, ROOT, published
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import convert_gpt2
import gpt
import sample

pytest.importorskip("transformers")


def converted(folder, **options):
    convert_gpt2.convert(str(folder), "ours", overwrite=True, **options)
    return gpt.load_checkpoint("ours")[0]


def edit(folder, **changes):
    """Change config.json; a value of None removes the key."""
    path = folder / "config.json"
    described = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def change(folder, rename=lambda name: name, drop=(), add=()):
    """Change the tensors in model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name): tensor for name, tensor in tensors.items() if name not in drop} | dict(add)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


# ---------------------------------------------------------------------------------------------------------------------
# The same computation.


@pytest.mark.parametrize(
    "shape",
    [
        {"n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4},
        {"n_positions": 250, "n_embd": 48, "n_layer": 1, "n_head": 1},
        {"n_positions": 224, "n_embd": 30, "n_layer": 7, "n_head": 3, "vocab_size": 300},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, shape):
    reference = published(tmp_path / "hf", **shape)
    model, positions = converted(tmp_path / "hf"), shape["n_positions"]
    idx = torch.randint(257, (2, positions), generator=torch.Generator().manual_seed(1))
    reference.double()
    for T in (1, 2, 17, positions):
        exact = reference(idx[:, :T]).logits
        error = (model(idx[:, :T])[0].double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-5, f"relative error {error:.1e} for {T} tokens"
    options = {"attention_mask": torch.ones(2, 3), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    exact = reference.generate(idx[:, :3], max_new_tokens=200, **options)
    assert torch.equal(model.generate(idx[:, :3], 200, temperature=0), exact)


@pytest.mark.parametrize(
    "broken", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2", "wpe", "ln_f"]
)
@torch.no_grad()
def test_one_wrong_tensor_would_be_seen(tmp_path, broken):
    reference, model = published(tmp_path / "hf"), converted(tmp_path / "hf")
    idx = torch.arange(32)[None]
    for name, p in model.named_parameters():
        if broken in name and name.endswith("weight"):
            p.data = p.data.flip(0)
            break
    exact = reference.double()(idx).logits
    assert (model(idx)[0] - exact).abs().max() / exact.abs().max() > 1e-2


def test_a_shorter_context_keeps_the_first_positions(tmp_path):
    published(tmp_path / "hf")
    whole, short = converted(tmp_path / "hf"), converted(tmp_path / "hf", block_size=8)
    idx = torch.arange(8)[None]
    assert short.config.block_size == 8 and torch.equal(whole(idx)[0], short(idx)[0])


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_gpt2s_true_size_is_the_same(tmp_path):
    reference = published(tmp_path / "hf", n_positions=1024, n_embd=768, n_layer=12, n_head=12, vocab_size=50257)
    model = converted(tmp_path / "hf")
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    idx = torch.randint(50257, (1, 1024), generator=torch.Generator().manual_seed(1))
    reference.double()
    exact = reference(idx).logits
    assert (model(idx)[0].double() - exact).abs().max() / exact.abs().max() < 1e-5
    options = {"attention_mask": torch.ones(1, 3), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    exact = reference.generate(idx[:, :3], max_new_tokens=200, **options)
    assert torch.equal(model.generate(idx[:, :3], 200, temperature=0), exact)


# ---------------------------------------------------------------------------------------------------------------------
# The forms that weights come in.


def as_bin(folder, model, **options):
    (folder / "model.safetensors").unlink()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool() for i in range(2)}
    torch.save(model.state_dict() | masks, folder / "pytorch_model.bin", **options)  # lm_head.weight is among them


def without_prefix(folder, model):
    masks = {
        f"h.{i}.attn.{name}": torch.ones(1, 1, 32, 32).tril() for i in range(2) for name in ("bias", "masked_bias")
    }
    change(folder, rename=lambda name: name.removeprefix("transformer."), add=masks.items())


def in_shards(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists() and (folder / "model.safetensors.index.json").exists()


def in_pickled_shards(folder, model):
    (folder / "model.safetensors").unlink()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    shards = {f"pytorch_model-{i}.bin": dict(list(state.items())[i::3]) for i in range(3)}
    for name, tensors in shards.items():
        torch.save(tensors, folder / name)
    where = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


FORMS = {
    "as transformers saves it": lambda folder, model: None,
    "no prefix, mask buffers": without_prefix,
    "a pickle": as_bin,
    "a pickle of the old format": lambda folder, model: as_bin(folder, model, _use_new_zipfile_serialization=False),
    "shards": in_shards,
    "pickled shards": in_pickled_shards,
    "the head, stored again": lambda folder, model: change(
        folder, add=[("lm_head.weight", model.lm_head.weight.data.clone())]
    ),
    "another name of the same GELU": lambda folder, model: edit(folder, activation_function="gelu_pytorch_tanh"),
    "the MLP's width spelt out": lambda folder, model: edit(folder, n_inner=64),
    "no word of what is usual": lambda folder, model: edit(
        folder, activation_function=None, layer_norm_epsilon=None, n_inner=None
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(tmp_path, form):
    reference = published(tmp_path / "hf")
    FORMS[form](tmp_path / "hf", reference)
    ours = dict(converted(tmp_path / "hf").named_parameters())
    for name, theirs in reference.named_parameters():
        assert torch.equal(ours[name], theirs.T if name.endswith(convert_gpt2.TRANSPOSED) else theirs), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_the_same_numbers_in_float32(tmp_path, dtype):
    reference = published(tmp_path / "hf")
    reference.to(dtype).save_pretrained(tmp_path / "hf")
    ours = dict(converted(tmp_path / "hf").named_parameters())
    assert all(p.dtype == torch.float32 for p in ours.values())
    for name, theirs in reference.named_parameters():
        assert torch.equal(ours[name], (theirs.T if name.endswith(convert_gpt2.TRANSPOSED) else theirs).float()), name


BROKEN = {
    "missing": (lambda folder: change(folder, drop=["transformer.h.1.mlp.c_fc.bias"]), "h.1.mlp.c_fc.bias is missing"),
    "unexpected": (lambda folder: change(folder, add=[("score.weight", torch.ones(2, 16))]), "score.weight is not GPT-2's"),
    "not transposed": (
        lambda folder: change(folder, add=[("transformer.h.0.attn.c_attn.weight", torch.ones(48, 16))]),
        r"h.0.attn.c_attn.weight is \(48, 16\), not \(16, 48\)",
    ),
    "fewer positions": (
        lambda folder: change(folder, add=[("transformer.wpe.weight", torch.ones(31, 16))]),
        r"wpe.weight is \(31, 16\), not \(32, 16\)",
    ),
    "other vocabulary": (lambda folder: edit(folder, vocab_size=300), r"wte.weight is \(257, 16\), not \(300, 16\)"),
    "twice": (lambda folder: change(folder, add=[("wpe.weight", torch.ones(32, 16))]), "has wpe.weight a second time"),
    "integers": (
        lambda folder: change(folder, add=[("transformer.ln_f.bias", torch.ones(16, dtype=torch.int8))]),
        "ln_f.bias is torch.int8",
    ),
    "nan": (lambda folder: change(folder, add=[("transformer.ln_f.bias", torch.full((16,), torch.nan))]), "or not finite"),
    "untied": (lambda folder: change(folder, add=[("lm_head.weight", torch.ones(257, 16))]), "its head is not tied"),
    "untied by its word": (lambda folder: edit(folder, tie_word_embeddings=False), "its tie_word_embeddings is False"),
    "relu": (lambda folder: edit(folder, activation_function="relu"), "its activation_function is 'relu', and ours is 'gelu_new'"),
    "exact gelu": (lambda folder: edit(folder, activation_function="gelu"), "its activation_function is 'gelu'"),
    "epsilon": (lambda folder: edit(folder, layer_norm_epsilon=1e-12), "its layer_norm_epsilon is 1e-12"),
    "scaled by layer": (
        lambda folder: edit(folder, scale_attn_by_inverse_layer_idx=True),
        "its scale_attn_by_inverse_layer_idx is True",
    ),
    "unscaled": (lambda folder: edit(folder, scale_attn_weights=False), "its scale_attn_weights is False"),
    "cross attention": (lambda folder: edit(folder, add_cross_attention=True), "its add_cross_attention is True"),
    "narrow MLP": (lambda folder: edit(folder, n_inner=32), "its n_inner is 32"),
    "llama": (lambda folder: edit(folder, model_type="llama"), "its model_type is 'llama', and ours is 'gpt2'"),
    "quantized": (lambda folder: edit(folder, quantization_config={"bits": 4}), "its quantization_config is"),
    "nameless": (lambda folder: edit(folder, model_type=None), "config.json has no model_type"),
    "no width": (lambda folder: edit(folder, n_embd=None), "config.json lacks n_embd"),
    "wrong type": (lambda folder: edit(folder, n_embd="16"), "n_embd must be a whole number"),
    "no number for dropout": (lambda folder: edit(folder, resid_pdrop="0.1"), "resid_pdrop is '0.1', not a number"),
    "code of its own": (lambda folder: edit(folder, auto_map={"AutoModel": "model.Model"}), "its auto_map is"),
    "no number for the width": (lambda folder: edit(folder, n_embd=[16], n_inner=64), "its n_inner is 64"),
    "endless nesting": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not JSON"),
    "an index of nothing": (
        lambda folder: ((folder / "model.safetensors").unlink(),
                        (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')),
        "does not name files next to it",
    ),
    "numbers that are none": (
        lambda folder: (folder / "vocab.json").write_text((folder / "vocab.json").read_text().replace(" 7,", " 7.0,")),
        "the vocabulary is not GPT-2's: the ids of .* are not whole numbers",
    ),
    "terabytes": (lambda folder: edit(folder, n_embd=2**16, n_layer=99), "the weights do not fit config.json: .* more"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("<html>"), "config.json is a web page"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is damaged.*download it again"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights"),
    "no vocabulary": (
        lambda folder: [(folder / name).unlink() for name in ("vocab.json", "tokenizer.json")],
        "there is neither vocab.json with merges.txt nor tokenizer.json",
    ),
    "not a pickle": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")),
        "has other things than tensors in it",
    ),
    "a pickle of something else": (
        lambda folder: ((folder / "model.safetensors").unlink(), torch.save([1, 2], folder / "pytorch_model.bin")),
        "has other things than tensors in it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_gpt2_is_refused_by_name_and_nothing_is_written(tmp_path, case, capsys):
    published(tmp_path / "hf")
    spoil, message = BROKEN[case]
    spoil(tmp_path / "hf")
    with pytest.raises(gpt.InputError, match=f"(?s){message}"):
        convert_gpt2.convert(str(tmp_path / "hf"), "ours")
    assert not os.path.exists("ours")
    with pytest.raises(SystemExit) as end:
        convert_gpt2.main([str(tmp_path / "hf"), "--out", "ours"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(1).expand(257, 16), torch.ones(257, 16).to_sparse(), torch.ones(257, 16, device="meta"), torch.ones(257, 16).to(torch.float8_e5m2), 7],
    ids=["stride 0", "sparse", "meta", "float8", "a number"],
)  # fmt: skip
def test_a_pickle_with_other_than_plain_tensors_is_refused(tmp_path, tensor):
    reference = published(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(reference.state_dict() | {"transformer.wte.weight": tensor}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(gpt.InputError, match="has other things than tensors in it|is torch.float8_e5m2"):
        convert_gpt2.convert("hf", "ours")


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_payload_is_refused_and_not_executed(tmp_path, zipped):
    reference = published(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    state = reference.state_dict() | {"transformer.extra": Payload()}
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(gpt.InputError, match="has other things than tensors in it, and was not loaded"):
        convert_gpt2.convert(str(tmp_path / "hf"), "ours")
    assert not os.path.exists("executed") and not os.path.exists("ours")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "model.py", 7])
def test_an_index_cannot_name_files_elsewhere(tmp_path, shard):
    published(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"wte.weight": shard}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(gpt.InputError, match="does not name files next to it"):
        convert_gpt2.convert(str(tmp_path / "hf"), "ours")


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies.


def trained_by_tokenizers(folder, specials, vocab_size=400):
    """vocab.json and merges.txt, learned by the tokenizers library -> its encoder."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([PROSE], vocab_size=vocab_size, special_tokens=specials, min_frequency=1)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_model(str(folder))
    return tokenizer


@given(text=st.text() | st.text(alphabet="the quick fox's 12 \n\t=-é🎉", max_size=200))
def test_a_vocabulary_that_begins_with_the_end_of_text_gives_the_same_tokens(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "begins"
    if not folder.exists():
        folder.mkdir()
        trained_by_tokenizers(folder, ["<|endoftext|>"])
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ours = convert_gpt2.read_tokenizer(lambda name: path if (path := folder / name).exists() else None)
    assert ours.eot == 0 and ours.vocab_size == theirs.get_vocab_size()
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_such_a_vocabulary_survives_in_the_checkpoint(tmp_path):
    published(tmp_path / "hf", vocab_size=400)
    trained_by_tokenizers(tmp_path / "hf", ["<|endoftext|>"])
    convert_gpt2.convert(str(tmp_path / "hf"), "ours")
    tokenizer = gpt.load_checkpoint("ours")[1]
    assert tokenizer.eot == 0 and tokenizer.kind == "bpe" and tokenizer.token_bytes[0] == b""
    text = "the quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert sum(len(tokenizer.token_bytes[i]) for i in tokenizer.encode(text)) == len(text)


def test_tokenizer_json_alone_is_enough(tmp_path):
    published(tmp_path / "hf", gpt.Tokenizer.bpe([PROSE], 300))
    fetch = convert_gpt2.open_source(str(tmp_path / "hf"))[0]
    both = convert_gpt2.read_tokenizer(fetch)
    (tmp_path / "hf" / "vocab.json").unlink()
    assert convert_gpt2.read_tokenizer(fetch).dumps() == both.dumps() == gpt.Tokenizer.bpe([PROSE], 300).dumps()


def test_further_special_tokens_may_follow_the_end_of_text(tmp_path):
    published(tmp_path / "hf", vocab_size=260)
    path = tmp_path / "hf" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"<pad>": 257, "<sep>": 258}))
    tokenizer = convert_gpt2.read_tokenizer(convert_gpt2.open_source(str(tmp_path / "hf"))[0])
    assert tokenizer.vocab_size == 257 and tokenizer.kind == "bytes"


def test_gpt2s_published_vocabulary_is_recognised(tmp_path, gpt2_vocabulary):
    """tiktoken's copy of the published files has the same content as vocab.json and merges.txt on the hub."""
    from extras.export import merges, vocabulary

    ranks = gpt2_vocabulary.ranks
    published(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(vocabulary(gpt2_vocabulary)))
    lines = [f"{left} {right}" for left, right in merges(gpt2_vocabulary)]
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    ours = convert_gpt2.read_tokenizer(convert_gpt2.open_source(str(tmp_path / "hf"))[0])
    assert ours.kind == "gpt2" and ours.ranks == ranks and ours.dumps() == gpt2_vocabulary.dumps()
    cached = sorted(os.listdir(os.environ.get("TIKTOKEN_CACHE_DIR", tmp_path)))
    for name in cached:  # encoder.json and vocab.bpe, as published by OpenAI
        content = Path(os.environ["TIKTOKEN_CACHE_DIR"], name).read_bytes()
        (tmp_path / "hf" / ("vocab.json" if content.startswith(b"{") else "merges.txt")).write_bytes(content)
    if cached:
        ours = convert_gpt2.read_tokenizer(convert_gpt2.open_source(str(tmp_path / "hf"))[0])
        assert ours.kind == "gpt2" and ours.ranks == ranks


VOCABULARIES = {
    "several special tokens in front": ["<s>", "<pad>", "</s>"],
    "none at all": [],
    "padding in front": ["<pad>"],
}


def test_an_end_of_text_of_another_name_is_taken_on_the_configs_word(tmp_path):
    published(tmp_path / "hf", vocab_size=400)
    trained_by_tokenizers(tmp_path / "hf", ["</s>"])
    edit(tmp_path / "hf", eos_token_id=1)
    with pytest.raises(gpt.InputError, match="id 0, where the end of text should be, is '</s>'"):
        converted(tmp_path / "hf")
    edit(tmp_path / "hf", eos_token_id=0)
    converted(tmp_path / "hf")
    assert gpt.load_checkpoint("ours")[1].eot == 0


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
    ids=str,
)
def test_text_that_is_split_or_changed_in_another_way_is_refused(tmp_path, change):
    published(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        gpt.InputError, match="its text is changed or split in another way|the vocabulary is not GPT-2's"
    ):
        converted(tmp_path / "hf")


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_vocabulary_laid_out_otherwise_is_refused(tmp_path, case):
    published(tmp_path / "hf", vocab_size=400)
    trained_by_tokenizers(tmp_path / "hf", VOCABULARIES[case])
    with pytest.raises(gpt.InputError, match="the vocabulary is not GPT-2's"):
        convert_gpt2.read_tokenizer(convert_gpt2.open_source(str(tmp_path / "hf"))[0])


def test_damaged_vocabularies_are_refused(tmp_path):
    published(tmp_path / "hf", gpt.Tokenizer.bpe([PROSE], 300))
    fetch, vocab, merges = (
        convert_gpt2.open_source(str(tmp_path / "hf"))[0],
        tmp_path / "hf" / "vocab.json",
        tmp_path / "hf" / "merges.txt",
    )
    sound, lines = json.loads(vocab.read_text()), merges.read_text(encoding="utf-8").split("\n")
    for wrong in (
        {token: number for token, number in sound.items() if token != "A"},
        {token: [number] for token, number in sound.items()},
        {token: number + 1 for token, number in sound.items()},
        {token: 0 for token in sound},
    ):
        vocab.write_text(json.dumps(wrong))
        with pytest.raises(gpt.InputError, match="the vocabulary is not GPT-2's"):
            convert_gpt2.read_tokenizer(fetch)
    vocab.write_text(json.dumps(sound))
    for wrong in (lines[:1] + lines[:0:-1], [*lines, "日 本"], [*lines, "x"]):
        merges.write_text("\n".join(wrong), encoding="utf-8")
        with pytest.raises(gpt.InputError, match="the vocabulary is not GPT-2's"):
            convert_gpt2.read_tokenizer(fetch)
    vocab.unlink()
    for wrong in ({}, {"model": {"type": "ByteLevel"}}, {"model": [], "x": "ByteLevel"}, []):
        (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(wrong))
        with pytest.raises(gpt.InputError, match="tokenizer.json|the vocabulary is not GPT-2's"):
            convert_gpt2.read_tokenizer(fetch)


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def test_the_command_converts_and_says_what_it_did(tmp_path, capsys):
    published(tmp_path / "tiny-gpt2")
    convert_gpt2.main(["tiny-gpt2"])
    out, err = capsys.readouterr()
    assert (
        "checkpoints/tiny-gpt2: 11,216 parameters in 28 tensors, 8 of them transposed; context 32, vocabulary 257\n"
        in out
    )
    assert (
        "guessing: ln 257 = 5.55" in out
        and "--model checkpoints/tiny-gpt2" in err
        and "debug.verify_gpt2 checkpoints/tiny-gpt2" in err
    )
    described = json.loads((tmp_path / "checkpoints/tiny-gpt2/config.json").read_text())
    assert described["source"]["folder"] == str(tmp_path / "tiny-gpt2")


def test_sampling_from_it_needs_no_network(tmp_path, capsys, monkeypatch):
    published(tmp_path / "gpt2")
    convert_gpt2.main(["gpt2"])
    advice = capsys.readouterr().err
    monkeypatch.setattr(socket, "socket", None)
    name = re.search(r"sample.py --model (\S+)", advice)[1]  # not gpt2: that is also the folder of the published files
    sample.main(["--model", name, "--prompt", "a", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("a")


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path):
    published(tmp_path / "hf")
    convert_gpt2.main(["hf"])
    before = (tmp_path / "checkpoints/hf/model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit) as end:
        convert_gpt2.main(["hf", "--block_size", "4"])
    assert end.value.code == 2 and (tmp_path / "checkpoints/hf/model.safetensors").stat().st_mtime_ns == before
    convert_gpt2.main(["hf", "--block_size", "4", "--overwrite"])
    assert gpt.load_checkpoint("checkpoints/hf")[0].config.block_size == 4


@pytest.mark.parametrize("out", ["hf", "file"])
def test_the_published_files_and_other_files_are_not_overwritten(tmp_path, out, capsys):
    published(tmp_path / "hf")
    (tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        convert_gpt2.main(["hf", "--out", out, "--overwrite"])
    assert end.value.code == 2 and "choose another --out" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_is_left_of_the_run_that_is_overwritten(tmp_path):
    published(tmp_path / "hf")
    (tmp_path / "ours").mkdir()
    for name in ("training_state.safetensors", "log.csv", "loss.png", "config.json"):
        (tmp_path / "ours" / name).write_text("old")
    convert_gpt2.main(["hf", "--out", "ours", "--overwrite"])
    assert sorted(os.listdir("ours")) == ["config.json", "model.safetensors", "tokenizer.tiktoken"]


def test_a_missing_shard_is_named(tmp_path):
    in_shards(tmp_path / "hf", published(tmp_path / "hf"))
    gone = sorted((tmp_path / "hf").glob("model-0*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(gpt.InputError, match=f"names files that are missing: {gone.name}$"):
        convert_gpt2.convert("hf", "ours")


def test_what_cannot_be_written_is_not_downloaded_either(monkeypatch, capsys):
    Path("checkpoints/gpt2").mkdir(parents=True, exist_ok=True)
    Path("checkpoints/gpt2/model.safetensors").write_bytes(b"mine")
    monkeypatch.setattr(convert_gpt2.requests, "Session", None)
    with pytest.raises(SystemExit) as end:
        convert_gpt2.main(["gpt2"])
    assert end.value.code == 2 and "already holds a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["hf", "--block_size", "0"], ["hf", "--block_size", "33"], ["hf", "--blocksize", "4"],
                                  ["no such name"], ["checkpoints"]], ids=str)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(tmp_path, argv, capsys):
    published(tmp_path / "hf")
    os.mkdir("checkpoints")
    with pytest.raises(SystemExit) as end:
        convert_gpt2.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not os.listdir("checkpoints")


def test_our_own_checkpoint_is_not_taken_for_a_published_model(tmp_path, small):
    gpt.save_checkpoint("ours", small, gpt.Tokenizer.bytes())
    with pytest.raises(gpt.InputError, match="model_type"):
        convert_gpt2.convert("ours", "again")


MEASURE = """
import re, sys, torch
import convert_gpt2
def peak(): return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
torch.ones(300, 300) @ torch.ones(300, 300)
before = peak()
convert_gpt2.main(sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_memory_stays_under_one_and_a_half_times_the_weights(tmp_path, form):
    reference = published(tmp_path / "hf", n_embd=1024, n_layer=6, n_head=16)
    if form == "pickle":
        as_bin(tmp_path / "hf", reference)
    size = sum(4 * p.numel() for p in reference.parameters())
    command = [sys.executable, "-c", MEASURE, "hf"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    used = int(done.stdout.split()[-1])
    assert 0.3 * size < used < 1.5 * size, f"{used / size:.2f} times the {size / 1e6:.0f} MB of the weights"
