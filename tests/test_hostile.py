"""Files that are damaged or made to harm, and any text at all: an error line, and never code that runs."""

import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROSE, TINY, published, run_main
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_gpt2
import evaluate
import finetune
import gpt
import sample
from extras import lora
from gpt import InputError, Tokenizer


# ---- Files ----
@pytest.fixture(scope="module")
def home(module_folder):
    """A trained checkpoint, an adapter on it, and a published model: the files that the tests below spoil copies of."""
    Path("prose.txt").write_text(PROSE)
    gpt.main([*TINY, "--data", "prose.txt", "--out", "model", "--max_steps", "4"])
    flags = ["--data", "prose.txt", "--out", "tuned", "--max_steps", "2", "--batch_size", "2"]
    finetune.main(["--model", "model", "--method", "lora", *flags, "--save_adapter", "adapter"])
    published("hf")
    return module_folder


@pytest.fixture
def copies(home, own_folder):
    for name in ("model", "adapter", "hf"):
        shutil.copytree(home / name, name)


def use_model(folder):
    model, tokenizer = gpt.load_checkpoint(folder)
    idx = torch.tensor([[tokenizer.eot, *tokenizer.encode("The")]])
    tokenizer.decode(model.generate(idx, 2)[0].clamp(max=tokenizer.vocab_size - 1).tolist())


def use_adapter(folder):
    lora.load_adapter(gpt.load_checkpoint("model")[0], folder)


def use_published(folder):
    shutil.rmtree("converted", ignore_errors=True)
    convert_gpt2.main.__wrapped__([str(folder), "--out", "converted"])


PUBLISHED = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json"]
PUBLISHED += ["tokenizer_config.json", "model.safetensors"]
USES = {
    use_model: ["model/config.json", "model/model.safetensors", "model/tokenizer.tiktoken"],
    use_adapter: ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    use_published: [f"hf/{name}" for name in PUBLISHED],
}


def spoil(data, chance):
    """Bytes -> other bytes, in one of the ways in which files go wrong."""
    at = chance.randrange(len(data))
    digits = [i for i, byte in enumerate(data[:5000]) if 48 <= byte <= 57] or [at]
    digit = chance.choice(digits)
    return chance.choice(
        [
            data[:at],
            data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :],  # one bit
            data[:at] + chance.randbytes(10) + data[at:],
            data[:digit] + chance.choice([b"7", b"-", b"."]) + data[digit + 1 :],  # another number
            data[:at] + bytes(200) + data[at + 200 :],
        ]
    )


@pytest.mark.parametrize("times", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("use", "name"), [(use, name) for use, names in USES.items() for name in names])
def test_a_spoiled_file_is_refused_or_harmless(copies, capsys, use, name, times):
    """No exception except InputError."""
    path = Path(name)
    whole, chance, refused = path.read_bytes(), random.Random(name), 0
    for _ in range(times):
        path.write_bytes(spoil(whole, chance))
        try:
            use(path.parent)
        except InputError as error:
            refused += 1
            assert 0 < len(str(error)) < 1000
    assert refused > times / 10


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("name", [gpt.STATE, gpt.MODEL, gpt.CONFIG, gpt.VOCABULARY])
def test_a_pickle_with_a_payload_is_never_executed(copies, name):
    for save in (torch.save, lambda made, path: path.write_bytes(pickle.dumps(made))):
        save({"config": {"data": Payload()}}, Path("model") / name)
        if name == gpt.STATE:
            run_main(gpt.main, "--resume", "--out", "model", expect=2)
        else:
            run_main(evaluate.main, "--model", "model", expect=2)
    assert not Path("executed").exists()


# ---- Texts ----
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
PIECES = ["\r\n", "\r", "\n", "\t", " ", "  ", "\u00a0", "\u2028", "\ufeff", "e\u0301", "👩‍👩‍👧", "שלום", "'ll",
          "<|endoftext|>", "\x00", "\ud7ff", "\U0010ffff", "日本", "a" * 50, " " * 50, "\n" * 20]  # fmt: skip
AWKWARD = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.fixture(scope="module")
def vocabularies(gpt2_vocabulary):
    return [Tokenizer.bytes(), Tokenizer.bpe([PROSE], 400), gpt2_vocabulary]


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT | AWKWARD)
def test_any_text_round_trips_in_every_vocabulary(vocabularies, text):
    for tokenizer in vocabularies:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
        assert "".join(sample.decode_stream(tokenizer, ids)) == text
