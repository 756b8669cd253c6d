"""Files that are damaged or made to harm, and texts nobody meant: an error line, never code run, memory taken or an interpreter crashed."""

import json
import math
import os
import pickle
import random
import resource
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, TINY, published, script
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import convert_gpt2
import evaluate
import finetune
import gpt
import sample
from debug import curve
from extras import lora
from gpt import InputError, Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture(scope="module")
def home(module_folder):
    """A trained checkpoint, an adapter on it, and a published model: the files that the tests below spoil copies of."""
    Path("prose.txt").write_text(PROSE)
    gpt.main([*TINY, "--data", str(module_folder / "prose.txt"), "--out", "model", "--max_steps", "8"])
    flags = [
        "--data",
        str(module_folder / "prose.txt"),
        "--out",
        "tuned",
        "--max_steps",
        "2",
        "--save_adapter",
        "adapter",
    ]
    finetune.main(["--model", "model", *flags, "--batch_size", "2"])
    published("hf")
    return module_folder


def spoil(data, chance):
    """Bytes -> other bytes, in one of the ways in which files go wrong."""
    data = bytearray(data)
    at, way = (
        chance.randrange(len(data)),
        chance.choice(["cut", "flip", "flips", "noise", "insert", "digit", "zeros", "twice"]),
    )
    if way == "cut":
        del data[at:]
    elif way in ("flip", "flips"):
        for _ in range(1 if way == "flip" else 40):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == "noise":
        data[at : at + 50] = chance.randbytes(50)
    elif way == "insert":
        data[at:at] = chance.randbytes(chance.randrange(1, 20))
    elif way == "digit":  # another number where one stands: in JSON, in a header, in a table
        places = [i for i, byte in enumerate(data[:5000]) if 48 <= byte <= 57] or [at]
        data[chance.choice(places)] = chance.choice(b"0123456789-.e")
    elif way == "zeros":
        data[at : at + 200] = bytes(len(data[at : at + 200]))
    else:
        data += data[at:]
    return bytes(data)


def use_model(folder):
    model, tokenizer = gpt.load_checkpoint(folder)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[tokenizer.eot, *tokenizer.encode("The")]]))
    assert logits.shape == (1, 4, model.config.vocab_size)
    tokenizer.decode(model.generate(torch.tensor([[tokenizer.eot]]), 2)[0].clamp(max=tokenizer.vocab_size - 1).tolist())


def use_run(folder):
    gpt.load_run(folder)


def use_log(folder):
    curve.read_curve(curve.read_log(folder / "log.csv"))


def use_adapter(folder):
    lora.load_adapter(gpt.load_checkpoint(folder.parent / "model")[0], folder)


def use_published(folder):
    shutil.rmtree("converted", ignore_errors=True)
    convert_gpt2.main.__wrapped__([str(folder), "--out", "converted"])


@pytest.mark.parametrize(
    ("name", "use", "times", "least"),
    [("model/config.json", use_model, 500, 0.3), ("model/model.safetensors", use_model, 1000, 0.3),
     ("model/tokenizer.tiktoken", use_model, 500, 0.3), ("model/log.csv", use_log, 500, 0.1),
     ("adapter/adapter_config.json", use_adapter, 200, 0.1), ("adapter/adapter_model.safetensors", use_adapter, 200, 0.1),
     ("hf/config.json", use_published, 100, 0.1), ("hf/vocab.json", use_published, 100, 0.1), ("hf/merges.txt", use_published, 100, 0.1),
     ("hf/model.safetensors", use_published, 100, 0.1)],
)  # fmt: skip
def test_a_spoiled_file_is_refused_or_harmless(home, own_folder, name, use, times, least, capsys):
    """No exception but InputError, and no memory: the address space is closed while a file is read."""
    folder = own_folder / Path(name).parent
    for other in ("model", "adapter", "hf"):
        shutil.copytree(home / other, own_folder / other)
    whole, chance, refused = (home / name).read_bytes(), random.Random(name), 0
    use(folder)  # everything that is imported late is now there
    taken = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else None
    )
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if taken:
            resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, limits[1]))
        for _ in range(times):
            (own_folder / name).write_bytes(spoil(whole, chance))
            try:
                use(folder)
            except InputError as error:
                refused += 1
                assert len(str(error)) < 1000 and str(error).strip()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert refused > least * times, f"only {refused} of {times}"


VALUES = [None, True, -1, 0, 10**30, 0.5, math.nan, "", "x", [], {}, [[]], {"a": 1}]


def test_every_entry_of_a_config_with_every_kind_of_value_is_refused_or_harmless(home, own_folder):
    shutil.copytree(home / "model", "model")
    described, refused = json.loads(Path("model/config.json").read_text()), 0
    for place in (described, described["model"], described["training"], described["validation"]):
        for key, value in list(place.items()):
            for wrong in VALUES:
                place[key] = wrong
                Path("model/config.json").write_text(json.dumps(described))
                try:
                    use_model(Path("model"))
                except InputError:
                    refused += 1
            place[key] = value
    assert refused > 80


def test_headers_that_promise_more_than_the_file_are_refused(home, own_folder):
    shutil.copytree(home / "model", "model")
    weights = Path("model/model.safetensors")
    whole = weights.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])

    def with_header(changed):
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    name = "transformer.wte.weight"
    for content in (
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 2**40) + whole[8:],
        struct.pack("<Q", 90 * 2**20) + b"{" * 1000,
        with_header(header | {name: header[name] | {"shape": [2**40, 2**20]}}),
        with_header(header | {name: header[name] | {"data_offsets": [0, 2**60]}}),
        with_header(
            header | {f"extra{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
        ),
        b"",
        b"\0" * 100,
    ):
        weights.write_bytes(content)
        with pytest.raises(InputError):
            use_model(Path("model"))


def test_a_config_that_asks_for_terabytes_takes_no_memory_and_no_time(home, own_folder):
    shutil.copytree(home / "model", "model")
    described = json.loads(Path("model/config.json").read_text())
    began = time.monotonic()
    for huge in ({"block_size": 2**20}, {"vocab_size": 2**24}, {"n_embd": 2**16}, {"n_layer": 1000}, {"n_layer": 10**9},
                 {"block_size": 2**20, "n_embd": 2**16, "n_layer": 1000, "vocab_size": 2**24}):  # fmt: skip
        Path("model/config.json").write_text(json.dumps(described | {"model": described["model"] | huge}))
        with pytest.raises(InputError):
            use_model(Path("model"))
    for deep in ("[" * 10**6, '{"model":' * 10**5, "9" * 10**6):
        Path("model/config.json").write_text(deep)
        with pytest.raises(InputError):
            use_model(Path("model"))
    assert time.monotonic() - began < 60  # a bound on hanging, not a measurement


def test_a_tokenizer_larger_than_the_embedding_or_with_holes_is_refused(home, own_folder):
    shutil.copytree(home / "model", "model")
    lines = Path("model/tokenizer.tiktoken").read_text()
    for wrong in (lines + "AAA= 257\n", lines.replace(" 7\n", " 700\n"), lines.replace(" 7\n", " 8\n"), lines.replace(" 7\n", " -1\n"),
                  lines.replace(" 7\n", f" {10**30}\n"), lines.replace(" 7\n", " 7 7\n"), lines[: len(lines) // 2], lines + lines):  # fmt: skip
        Path("model/tokenizer.tiktoken").write_text(wrong)
        with pytest.raises(InputError):
            use_model(Path("model"))


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "name", ["training_state.safetensors", "model.safetensors", "config.json", "tokenizer.tiktoken"]
)
@pytest.mark.parametrize(
    "save", [torch.save, lambda made, path: path.write_bytes(pickle.dumps(made))], ids=["torch", "pickle"]
)
def test_a_pickle_with_a_payload_is_never_executed(home, own_folder, name, save, capsys):
    shutil.copytree(home / "model", "model")
    save({"config": {"data": Payload()}, "more": Payload()}, Path("model") / name)
    with pytest.raises(SystemExit) as end:
        gpt.main(["--resume", "--out", "model"]) if name == "training_state.safetensors" else evaluate.main(
            ["--model", "model"]
        )
    assert end.value.code == 2 and not Path("executed").exists()


def test_what_has_no_end_is_no_text(home, own_folder):
    for main, argv in ((gpt.main, ["--data", "/dev/zero"]), (evaluate.main, ["--model", str(home / "model"), "--data", "/dev/zero"]),
                       (sample.main, ["--model", str(home / "model"), "--prompt_file", "/dev/zero"])):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2


def test_every_entry_of_an_adapter_with_every_kind_of_value_is_refused_or_harmless(home, own_folder):
    for name in ("model", "adapter"):
        shutil.copytree(home / name, name)
    path, refused = Path("adapter/adapter_config.json"), 0
    described = json.loads(path.read_text())
    for key in described:
        for wrong in (*VALUES, 10**400):
            path.write_text(json.dumps(described | {key: wrong}))
            try:
                use_adapter(Path("adapter"))
            except InputError:
                refused += 1
    assert refused > 40
    path.write_text(json.dumps(described))
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file({name: tensor * math.nan for name, tensor in tensors.items()}, "adapter/adapter_model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        use_adapter(Path("adapter"))


def test_a_checkpoint_of_links_and_folders_is_refused(home, own_folder):
    for name in (gpt.CONFIG, gpt.VOCABULARY, gpt.MODEL):
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree(home / "model", "model")
        Path("model", name).unlink()
        Path("model", name).symlink_to("/dev/zero")
        with pytest.raises(InputError):
            use_model(Path("model"))
        Path("model", name).unlink()
        os.mkfifo(Path("model", name))
        with pytest.raises(InputError):
            use_model(Path("model"))
        Path("model", name).unlink()
        Path("model", name).mkdir()
        with pytest.raises(InputError):
            use_model(Path("model"))


# ---------------------------------------------------------------------------------------------------------------------
# Texts

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
AWKWARD = st.lists(
    st.sampled_from(["\r\n", "\r", "\n", "\t", " ", "  ", "\u00a0", "\u2028", "\ufeff", "\u202e", "e\u0301", "👩‍👩‍👧", "🏴‍☠️", "שלום", "مرحبا",
                     "'ll", "<|endoftext|>", "\x00", "\x7f", "\ud7ff", "\U0010ffff", "½", "日本", "a" * 50, " " * 50, "\n" * 20]),
    max_size=40,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def vocabularies():
    tokenizers = [Tokenizer.bytes(), Tokenizer.bpe([PROSE], 400)]
    try:
        return [*tokenizers, Tokenizer.gpt2()]
    except InputError:  # where its vocabulary is not at hand, the two others stand for it
        return tokenizers


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT | AWKWARD)
def test_any_text_round_trips_in_every_vocabulary(vocabularies, text):
    for tokenizer in vocabularies:
        ids = tokenizer.encode(text)
        assert (
            tokenizer.decode(ids) == "".join(sample.decode_stream(tokenizer, ids)) == text and tokenizer.eot not in ids
        )
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()


def test_every_byte_and_every_character_round_trips(vocabularies):
    for tokenizer in vocabularies[:2]:
        for start in range(0, 0x110000, 0x4000):
            text = "".join(chr(i) for i in range(start, start + 0x4000) if not 0xD800 <= i < 0xE000)
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert {token[0] for token in tokenizer.ranks if len(token) == 1} == set(range(256))


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=60))
def test_any_tokens_decode_to_text_however_they_cut_characters(vocabularies, ids):
    for tokenizer in vocabularies:
        valid = [i % tokenizer.vocab_size for i in ids]
        text = tokenizer.decode(valid)
        text.encode()  # proper Unicode
        spelling = {i: token for token, i in tokenizer.ranks.items()} | {tokenizer.eot: b""}
        assert text == b"".join(spelling[i] for i in valid).decode(errors="replace")


@pytest.mark.parametrize("unit", ["é", "👩‍👩‍👧", "x "])
def test_a_million_characters_without_end_are_tokens_and_text_again(vocabularies, unit):
    """tiktoken alone gives up at a million blanks."""
    text = "begin" + (unit * 10**6)[: 10**6] + "end"
    for tokenizer in vocabularies[1:]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_is_learned_from_one_endless_word(vocabularies):
    word = "".join(random.Random(0).choices("abcdefghij", k=300_000))
    learned = Tokenizer.bpe([word], 300)
    assert learned.vocab_size == 300 and learned.decode(learned.encode(word)) == word


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=ANY_TEXT | AWKWARD,
    block_size=st.integers(1, 20),
    stride=st.integers(1, 20),
    kind=st.sampled_from(["bytes", "bpe"]),
)
def test_any_text_is_split_in_two_and_every_window_is_inside_its_split(own_folder, text, block_size, stride, kind):
    """What is not text, or too little of it, is a clear error; the rest comes back exactly, each part from its own side of the cut."""
    path = own_folder / "any.txt"
    path.write_bytes(text.encode())
    try:
        tokenizer, train, val = gpt.load_data([str(path)], kind, 300)
    except InputError as error:
        assert "\0" in text or "too little text" in str(error) or "too short" in str(error), error
        return
    assert train[0] == val[0] == tokenizer.eot
    assert tokenizer.decode([*train, *val]) == text.encode().decode("utf-8-sig").replace("\r\n", "\n")
    assume(stride <= block_size < len(train))
    data = gpt.TokenDataset(train, block_size, stride)
    x, y = data.batch(range(len(data)))
    flat = train.astype(np.int64)
    for i, (inputs, targets) in enumerate(zip(x.numpy(), y.numpy())):
        inside = targets != -1
        assert (targets[inside] == flat[i * stride + 1 : i * stride + 1 + inside.sum()]).all()
        assert (inputs[inside] == flat[i * stride : i * stride + inside.sum()]).all()
    assert (data.stride < block_size) or (y != -1).sum() == len(train) - 1


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30) | st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False),
                                                                                     min_size=1, max_size=30),
    temperature=st.floats(0.1, 2) | st.floats(1e-6, 1e6) | st.just(0.0),
    top_k=st.none() | st.integers(1, 10**9),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    rows=st.integers(1, 3),
)  # fmt: skip
def test_any_valid_parameters_give_a_valid_distribution_and_token(logits, temperature, top_k, top_p, rows):
    gpt.check_sampling(temperature, top_k, top_p)
    logits = torch.tensor([logits] * rows)
    tokens = gpt.sample_next_token(logits, temperature, top_k, top_p)
    assert tokens.shape == (rows, 1)
    if temperature == 0 or top_k == 1:
        assert (logits.gather(1, tokens) == logits.max()).all()
    if temperature == 0:
        return
    probs = gpt.next_token_probs(logits, temperature, top_k, top_p)
    assert (probs >= 0).all() and torch.allclose(probs.sum(1), torch.ones(rows)) and (probs.gather(1, tokens) > 0).all()
    k = min(top_k or logits.shape[1], logits.shape[1])
    whole = ((logits[0].double() - logits[0].max()) / temperature).softmax(-1).sort(descending=True).values[:k]
    whole, ordered = whole / whole.sum(), probs[0].sort(descending=True).values
    kept = int((ordered > 0).sum())
    assert kept <= k
    if top_p not in (None, 1):  # the kept are the fewest that reach p
        assert whole[:kept].sum() >= top_p - 1e-5 and (kept == 1 or whole[: kept - 1].sum() < top_p + 1e-5)
    if temperature >= 0.1:
        assert torch.allclose(ordered[:kept].double(), whole[:kept] / whole[:kept].sum(), atol=1e-5)
    of_all = gpt.next_token_probs(logits, temperature)[0]  # logits that differ may be equally probable
    left_out = of_all[probs[0] == 0]
    assert (of_all[probs[0] > 0].min() >= left_out).all(), (
        "a token is left out that is more probable than one that is in"
    )


def test_a_prompt_of_a_million_characters_is_cropped_in_bounded_time(home):
    Path("prompt.txt").write_text("The words come back again. " * 40_000)
    began = time.monotonic()
    done = script("sample.py", "--model", str(home / "model"), "--prompt_file", "prompt.txt", "--max_new_tokens", "3")
    assert done.returncode == 0 and "only the last 16 fit" in done.stderr and len(done.stdout) > 10**6
    assert time.monotonic() - began < 100  # a bound on hanging, not a measurement


def test_a_jsonl_of_hostile_lines_is_refused_line_by_line(own_folder):
    good = '{"text": "fine"}\n'
    for line in ('{"text": "\\ud800"}', "[" * 10**5, '{"text": 1e999}', "9" * 5000, '{"text": ' + '"a"'):
        Path("bad.jsonl").write_bytes((good + line + "\n").encode("latin1"))
        with pytest.raises(InputError, match="line 2"):
            list(finetune.read_jsonl("bad.jsonl"))
