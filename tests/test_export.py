import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, enlarge, parameters_of, published
from hypothesis import given
from hypothesis import strategies as st

import convert_gpt2
import gpt
from extras import export

transformers = pytest.importorskip("transformers")

TOKENIZERS = {
    "bytes": gpt.Tokenizer.bytes,
    "bpe": lambda: gpt.Tokenizer.bpe([PROSE], 500),
    "bpe of repetitions": lambda: gpt.Tokenizer.bpe(
        ["=" * 50 + " " + "ab" * 40 + " " + "aaabaab" * 9 + "\n" * 40 + " " * 40] * 3, 330
    ),
    "end of text in front": lambda: gpt.Tokenizer(
        {token: rank + 1 for token, rank in gpt.Tokenizer.bpe([PROSE], 400).ranks.items()}, "bpe", 0
    ),
}


def checkpoint(folder, tokenizer=None, vocab_size=None, **shape):
    tokenizer = tokenizer or gpt.Tokenizer.bytes()
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32} | shape
    model = enlarge(gpt.GPT(gpt.GPTConfig(vocab_size=vocab_size or tokenizer.vocab_size, **shape)))
    gpt.save_checkpoint(folder, model, tokenizer)
    return model, tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
@torch.no_grad()
def test_transformers_computes_the_same_logits(kind):
    model, tokenizer = checkpoint("ours", TOKENIZERS[kind]())
    export.main(["ours", "--format", "hf", "--out", "theirs"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs")
    assert type(theirs).__name__ == "GPT2LMHeadModel" and theirs.dtype == torch.float32
    idx = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    exact = theirs.double()(idx).logits
    assert (model(idx)[0] - exact).abs().max() / exact.abs().max() < 1e-5
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot


@pytest.fixture(scope="module")
def both_tokenizers(tmp_path_factory):
    made = {}
    for kind, make in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("theirs")
        tokenizer = make()
        model = gpt.GPT(gpt.GPTConfig(block_size=4, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=4))
        export.to_hf(model, tokenizer, folder)
        made[kind] = tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    return made


TEXTS = st.text(max_size=60) | st.text(alphabet="ab= \n\t'st1é🎉\u00a0\u3000", max_size=120)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXTS)
def test_transformers_gives_the_same_tokens(both_tokenizers, kind, text):
    ours, theirs = both_tokenizers[kind]
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids, "no token is added in front or at the end either"
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eot and len(theirs) == ours.vocab_size


def test_gpt2s_vocabulary_gives_the_same_tokens(gpt2_vocabulary, tmp_path):
    config = gpt.GPTConfig(block_size=4, vocab_size=50257, n_layer=1, n_head=1, n_embd=4)
    export.to_hf(gpt.GPT(config), gpt2_vocabulary, tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    texts = [PROSE[:2000], "  x\n\n y\t\tz 2024's naïve 日本語 🎉🎉 <|endoftex|> ===== ------", gpt.__doc__]
    for text in texts:
        assert theirs(text)["input_ids"] == gpt2_vocabulary.encode(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_there_and_back_is_bit_exact(kind):
    checkpoint("ours", TOKENIZERS[kind](), n_head=4)
    export.main(["ours", "--format", "hf", "--out", "theirs"])
    convert_gpt2.main(["theirs", "--out", "back"])
    ours, back = parameters_of("ours"), parameters_of("back")
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    assert Path("ours/tokenizer.tiktoken").read_bytes() == Path("back/tokenizer.tiktoken").read_bytes()
    ours, back = (json.loads(Path(folder, "config.json").read_text()) for folder in ("ours", "back"))
    assert all(ours[key] == back[key] for key in ("model", "tokenizer", "eot", "special_tokens"))


def test_back_and_there_gives_what_was_published(tmp_path):
    reference = published(tmp_path / "hf")
    convert_gpt2.main(["hf", "--out", "ours"])
    export.main(["ours", "--format", "hf", "--out", "theirs"])
    again = transformers.GPT2LMHeadModel.from_pretrained("theirs")
    for (name, p), (other, q) in zip(reference.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)


def test_rows_that_no_token_has_are_kept():
    model, _ = checkpoint("ours", vocab_size=300)
    export.main(["ours", "--format", "hf", "--out", "theirs"])
    assert transformers.AutoModelForCausalLM.from_pretrained("theirs").lm_head.weight.shape == (300, 32)
    convert_gpt2.main(["theirs", "--out", "back"])
    assert torch.equal(gpt.load_checkpoint("back")[0].lm_head.weight, model.lm_head.weight)


# ---------------------------------------------------------------------------------------------------------------------
# GGUF.

gguf = pytest.importorskip("gguf")


def read_gguf(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def names(config):
    """Where llama.cpp looks for each of our parameters, written down independently of extras.export."""
    yield from (("token_embd.weight", "transformer.wte.weight"), ("position_embd.weight", "transformer.wpe.weight"))
    yield from ((f"output_norm.{kind}", f"transformer.ln_f.{kind}") for kind in ("weight", "bias"))
    pairs = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
             "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
    for i in range(config.n_layer):
        for theirs, ours in pairs.items():
            yield from ((f"blk.{i}.{theirs}.{kind}", f"transformer.h.{i}.{ours}.{kind}") for kind in ("weight", "bias"))


@pytest.mark.parametrize(("dtype", "precision"), [("float32", 0), ("float16", 2**-11), ("q8_0", 1 / 127)])
def test_gguf_holds_the_weights(dtype, precision):
    model, _ = checkpoint("ours")
    export.main(["ours", "--format", "gguf", "--dtype", dtype, "--out", "theirs.gguf"])
    fields, tensors = read_gguf("theirs.gguf")
    ours = dict(model.named_parameters())
    assert {theirs for theirs, _ in names(model.config)} == tensors.keys()
    for theirs, name in names(model.config):
        tensor, p = tensors[theirs], ours[name].detach().numpy()
        assert list(tensor.shape[::-1]) == list(p.shape), "gguf counts the dimensions from the other end"
        exact = p.ndim == 1 or "wpe" in name
        assert tensor.tensor_type.name == (
            "F32" if exact else {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}[dtype]
        )
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(p.shape)
        assert np.abs(values - p).max() <= (0 if exact else precision) * np.abs(p).max(), name
    assert fields["general.file_type"] == {"float32": 0, "float16": 1, "q8_0": 7}[dtype]


def test_gguf_holds_the_shape_and_the_vocabulary():
    _, tokenizer = checkpoint("ours", TOKENIZERS["bpe"](), vocab_size=512)
    export.main(["ours", "--format", "gguf", "--out", "theirs.gguf"])
    fields, _ = read_gguf("theirs.gguf")
    shape = {
        "context_length": 32,
        "embedding_length": 32,
        "feed_forward_length": 128,
        "block_count": 2,
        "attention.head_count": 2,
    }
    assert fields["general.architecture"] == "gpt2"
    assert {key: fields[f"gpt2.{key}"] for key in shape} == shape
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    tokens, byte_of = fields["tokenizer.ggml.tokens"], {c: b for b, c in convert_gpt2.characters().items()}
    for token, number in tokenizer.ranks.items():
        assert bytes(byte_of[c] for c in tokens[number]) == token
    assert len(tokens) == len(fields["tokenizer.ggml.token_type"]) == 512 and tokens[tokenizer.eot] == "<|endoftext|>"
    assert [fields["tokenizer.ggml.token_type"][i] for i in (0, tokenizer.eot, 511)] == [1, 3, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot and fields["tokenizer.ggml.add_bos_token"] is False
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert [tuple(rule.split(" ")) for rule in fields["tokenizer.ggml.merges"]] == export.merges(tokenizer)


def test_q8_0_leaves_rows_that_it_cannot_pack_in_float16():
    checkpoint("ours", n_embd=40)  # the MLP's second layer has rows of 160 = 5 x 32, the other matrices rows of 40
    export.main(["ours", "--format", "gguf", "--dtype", "q8_0", "--out", "theirs.gguf"])
    _, tensors = read_gguf("theirs.gguf")
    assert (
        tensors["blk.0.ffn_up.weight"].tensor_type.name == "F16"
        and tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"
    )


def test_bytes_without_merges_get_a_rule_that_never_applies():
    checkpoint("ours")
    export.main(["ours", "--format", "gguf", "--out", "theirs.gguf"])
    assert read_gguf("theirs.gguf")[0]["tokenizer.ggml.merges"] == ["<|endoftext|> <|endoftext|>"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("float16", 5e-3), ("q8_0", 0.15)])
@torch.no_grad()
def test_llama_cpp_computes_the_same(kind, dtype, tolerance):
    """llama.cpp keeps its cache and a table of its GELU in float16, and quantizes activations for q8_0."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="compiles for minutes: pip install llama-cpp-python")
    model, tokenizer = checkpoint("ours", TOKENIZERS[kind](), block_size=256, n_embd=64)
    export.main(["ours", "--format", "gguf", "--dtype", dtype, "--out", "theirs.gguf"])
    theirs = llama_cpp.Llama("theirs.gguf", n_ctx=256, logits_all=True, verbose=False)
    rng = np.random.default_rng(0)
    for text in ["".join(rng.choice(list("ab =-\n\t'st1é🎉 the"), 40)) for _ in range(100)]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    idx = rng.integers(tokenizer.vocab_size, size=256)
    theirs.eval(idx.tolist())
    ours = model(torch.from_numpy(idx)[None])[0][0].numpy()
    assert np.abs(np.array(theirs.scores) - ours).max() / np.abs(ours).max() < tolerance
    assert theirs.token_eos() == tokenizer.eot


def test_values_beyond_float16_are_refused_and_nothing_is_written(tmp_path, capsys):
    model, tokenizer = checkpoint("ours")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = 1e6
    gpt.save_checkpoint("ours", model, tokenizer, overwrite=True)
    with pytest.raises(SystemExit) as end:
        export.main(["ours", "--format", "gguf", "--dtype", "float16", "--out", "theirs.gguf"])
    assert end.value.code == 2 and "h.1.mlp.c_fc.weight has values beyond" in capsys.readouterr().err
    assert not list(tmp_path.glob("*theirs*"))


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, capsys):
    checkpoint("ours")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit) as end:
        export.main(["ours", "--format", "gguf", "--out", "theirs.gguf"])
    assert end.value.code == 2 and "pip install gguf" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def test_what_is_there_is_not_overwritten_unasked(tmp_path, capsys):
    checkpoint("ours")
    for kind, out in (("hf", "theirs"), ("gguf", "theirs.gguf")):
        export.main(["ours", "--format", kind, "--out", out])
        with pytest.raises(SystemExit) as end:
            export.main(["ours", "--format", kind, "--out", out])
        assert end.value.code == 2 and "add --overwrite" in capsys.readouterr().err
        export.main(["ours", "--format", kind, "--out", out, "--overwrite"])


BAD = {
    "no format": ["ours", "--out", "x"],
    "no place": ["ours", "--format", "hf"],
    "no such format": ["ours", "--format", "onnx", "--out", "x"],
    "no such checkpoint": ["nobody", "--format", "hf", "--out", "x"],
    "no such dtype": ["ours", "--format", "gguf", "--out", "x", "--dtype", "q4"],
    "a dtype for hf": ["ours", "--format", "hf", "--out", "x", "--dtype", "q8_0"],
    "onto itself": ["ours", "--format", "hf", "--out", "ours", "--overwrite"],
    "into itself": ["ours", "--format", "gguf", "--out", "ours", "--overwrite"],
    "a folder for a file": ["ours", "--format", "gguf", "--out", "folder"],
    "a file for a folder": ["ours", "--format", "hf", "--out", "file"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(tmp_path, case, capsys):
    checkpoint("ours")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        export.main(BAD[case])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_what_is_exported_others_may_read(tmp_path):
    checkpoint("ours")
    export.main(["ours", "--format", "hf", "--out", "theirs"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in (*tmp_path.glob("theirs/*"), *tmp_path.glob("ours/*"))}
    assert len(set(modes.values())) == 1, modes
