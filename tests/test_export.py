import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, enlarge, parameters_of, run_main
from hypothesis import given
from hypothesis import strategies as st

import convert_gpt2
import gpt
from extras import export, published

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

BYTES = gpt.Tokenizer.bytes()
BPE = gpt.Tokenizer.bpe([PROSE], 500)
TOKENIZERS = {
    "bytes": BYTES,
    "bpe": BPE,
    "two merges make a token": gpt.Tokenizer(BYTES.ranks | {b"bc": 256, b"ab": 257, b"abc": 258}, "bpe"),
    "end of text in front": gpt.Tokenizer({token: i + 1 for token, i in BPE.ranks.items()}, "bpe", 0),
    "an end of its own": gpt.Tokenizer(BPE.ranks | {gpt.EOT.encode(): BPE.eot}, "bpe", BPE.eot + 1),
}
OWN_END = {"<|end|>": BPE.eot + 1, gpt.EOT: BPE.eot}


def checkpoint(tokenizer=BYTES, unused=0, **shape):
    """The checkpoint `ours`, with rows of the embedding that no token has."""
    shape = {"block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32} | shape
    model = enlarge(gpt.GPT(gpt.GPTConfig(vocab_size=tokenizer.vocab_size + unused, **shape)))
    special = {"special_tokens": OWN_END} if gpt.EOT.encode() in tokenizer.ranks else {}
    gpt.save_checkpoint("ours", model, tokenizer, overwrite=True, **special)
    return model


def to_hf():
    export.main(["ours", "--format", "hf", "--out", "theirs"])


def to_gguf(dtype="float32"):
    """-> the fields and tensors of the file."""
    export.main(["ours", "--format", "gguf", "--dtype", dtype, "--out", "theirs.gguf"])
    reader = gguf.GGUFReader("theirs.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@torch.no_grad()
def test_transformers_computes_the_same_logits():
    tokenizer = TOKENIZERS["end of text in front"]
    model = checkpoint(tokenizer, unused=3)
    to_hf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs")
    idx = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    exact = theirs.double()(idx).logits
    assert (model(idx)[0] - exact).abs().max() / exact.abs().max() < 1e-5
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot


def test_the_natural_calls_of_transformers_stay_within_the_context():
    """A pipeline's default asks for 256 more tokens than the prompt has."""
    checkpoint()
    to_hf()
    pipe = transformers.pipeline("text-generation", model="theirs", device="cpu")
    assert pipe("The import")[0]["generated_text"].startswith("The import")
    assert pipe.tokenizer.model_max_length == 32
    ids = pipe.tokenizer("The import", return_tensors="pt")
    assert pipe.model.generate(**ids).shape[1] <= 32


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_gives_the_same_tokens(kind):
    ours = TOKENIZERS[kind]
    checkpoint(ours)
    to_hf()
    theirs = transformers.AutoTokenizer.from_pretrained("theirs")
    assert theirs.eos_token_id == ours.eot and len(theirs) == ours.vocab_size

    pieces = ["the", " words", "repeat", "xabc", "ab", " ", "\n", "é🎉", "'s", "12", "\u3000"]

    @given(text=st.text(max_size=60) | st.lists(st.sampled_from(pieces)).map("".join))
    def check(text):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, "nothing is added before or after"
        assert theirs.decode(ids) == text

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_there_and_back_is_bit_exact(kind):
    checkpoint(TOKENIZERS[kind], unused=3)
    to_hf()
    convert_gpt2.main(["theirs", "--out", "back"])
    ours, back = parameters_of("ours"), parameters_of("back")
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    assert Path("ours/tokenizer.tiktoken").read_bytes() == Path("back/tokenizer.tiktoken").read_bytes()
    ours, back = (json.loads(Path(folder, "config.json").read_text()) for folder in ("ours", "back"))
    assert all(ours[key] == back[key] for key in ("model", "tokenizer", "eot", "special_tokens"))


def llama_name(name):
    """What llama.cpp calls one of our parameters, written down independently of extras.export."""
    table = "transformer.h=blk transformer.wte=token_embd transformer.wpe=position_embd transformer.ln_f=output_norm "
    table += "attn.c_attn=attn_qkv attn.c_proj=attn_output mlp.c_fc=ffn_up mlp.c_proj=ffn_down ln_1=attn_norm "
    table += "ln_2=ffn_norm"
    for pair in table.split():
        name = name.replace(*pair.split("="))
    return name


@pytest.mark.parametrize(("dtype", "precision"), [("float32", 0), ("float16", 2**-11), ("q8_0", 1 / 127)])
def test_gguf_holds_the_weights(dtype, precision):
    model = checkpoint()
    fields, tensors = to_gguf(dtype)
    assert fields["general.file_type"] == {"float32": 0, "float16": 1, "q8_0": 7}[dtype]
    assert tensors.keys() == {llama_name(name) for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        tensor = tensors[llama_name(name)]
        assert list(tensor.shape[::-1]) == list(p.shape), "gguf counts the dimensions from the other end"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(p.shape)
        allowed = 0 if p.dim() == 1 or "wpe" in name else precision
        assert np.abs(values - p.detach().numpy()).max() <= allowed * p.abs().max().item(), name


def test_gguf_holds_the_shape_and_the_vocabulary():
    tokenizer, model = BPE, checkpoint(BPE, unused=12)
    fields, _ = to_gguf()
    shape = {"context_length": 32, "embedding_length": 32, "feed_forward_length": 128, "block_count": 2}
    shape |= {"attention.head_count": 4, "attention.layer_norm_epsilon": pytest.approx(1e-5)}
    assert {key: fields[f"gpt2.{key}"] for key in shape} == shape and fields["general.architecture"] == "gpt2"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_of = {character: byte for byte, character in published.characters().items()}
    for token, i in tokenizer.ranks.items():
        assert bytes(byte_of[c] for c in tokens[i]) == token
    assert len(tokens) == len(kinds) == model.config.vocab_size and tokens[tokenizer.eot] == "<|endoftext|>"
    assert [kinds[i] for i in (0, tokenizer.eot, -1)] == [1, 3, 5], "a token, a control token, an unused row"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot and fields["tokenizer.ggml.add_bos_token"] is False
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert [tuple(rule.split(" ")) for rule in fields["tokenizer.ggml.merges"]] == export.merges(tokenizer)


def test_bytes_get_a_merge_that_never_applies_and_narrow_rows_stay_in_float16():
    checkpoint(n_embd=40)  # rows of 40, which q8_0 can't pack, except in the MLP's second layer: 160 = 5 x 32
    fields, tensors = to_gguf("q8_0")
    assert fields["tokenizer.ggml.merges"] == ["<|endoftext|> <|endoftext|>"], "llama.cpp wants at least one"
    kinds = [tensors[f"blk.0.{name}.weight"].tensor_type.name for name in ("ffn_up", "ffn_down")]
    assert kinds == ["F16", "Q8_0"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("q8_0", 0.15)])
@torch.no_grad()
def test_llama_cpp_computes_the_same(dtype, tolerance):
    """llama.cpp keeps its cache and a table of its GELU in float16, and quantizes activations for q8_0."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="compiles for minutes: pip install llama-cpp-python")
    tokenizer = TOKENIZERS["two merges make a token"]
    model = checkpoint(tokenizer, block_size=256, n_embd=64)
    to_gguf(dtype)
    theirs = llama_cpp.Llama("theirs.gguf", n_ctx=256, logits_all=True, verbose=False)
    rng = np.random.default_rng(0)
    for text in ["".join(rng.choice(list("ab =-\n\t'st1é🎉 the"), 40)) for _ in range(100)]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    idx = rng.integers(tokenizer.vocab_size, size=256)
    theirs.eval(idx.tolist())
    ours = model(torch.from_numpy(idx)[None])[0][0].numpy()
    assert np.abs(np.array(theirs.scores) - ours).max() / np.abs(ours).max() < tolerance
    assert theirs.token_eos() == tokenizer.eot


@pytest.mark.parametrize(("kind", "out"), [("hf", "folder"), ("gguf", "file")])
def test_what_exists_is_only_overwritten_when_asked_and_a_checkpoint_never(kind, out):
    checkpoint()
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("folder/file").write_text("mine")
    run_main(export.main, "ours", "--format", kind, "--out", out, expect=2)
    assert Path("file").read_text() == Path("folder/file").read_text() == "mine"
    export.main(["ours", "--format", kind, "--out", out, "--overwrite"])
    run_main(export.main, "ours", "--format", kind, "--out", "ours", "--overwrite", expect=2)
