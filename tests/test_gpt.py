"""What gpt.py claims, one claim a test."""

import base64
import dataclasses
import hashlib
import http.server
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import PROSE, ROOT, TINY, interrupt, parameters_of, script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt
from gpt import GPT, GPTConfig, InputError, TokenDataset, Tokenizer, TrainConfig

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("scratch-152m", 152_791_296),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == count


def test_tiny_is_the_default():
    assert GPTConfig.preset("tiny") == GPTConfig()


def test_every_preset_makes_both_configs():
    for flags in gpt.PRESETS.values():
        known = {f.name for c in (GPTConfig, TrainConfig) for f in dataclasses.fields(c)}
        assert flags.keys() <= known
        gpt.from_flags(TrainConfig, flags)


@pytest.mark.parametrize(
    "wrong",
    [{"n_embd": 10, "n_head": 3}, {"n_layer": 0}, {"dropout": 1.0}, {"dropout": math.nan}, {"n_layer": 10**9}],
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(InputError):
        GPTConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"lr": math.nan}, {"lr": -1.0}, {"optimizer": "sgd"}, {"data": []}, {"max_steps": 0}]
)
def test_impossible_training_is_refused(wrong):
    with pytest.raises(InputError):
        TrainConfig(**wrong)


def test_importing_gpt_changes_nothing():
    code = (
        "import torch, os, signal; torch.manual_seed(5); before = torch.get_rng_state(), torch.get_num_threads(), os.listdir(), "
        "signal.getsignal(signal.SIGINT), dict(os.environ); import gpt; after = torch.get_rng_state(), torch.get_num_threads(), "
        "os.listdir(), signal.getsignal(signal.SIGINT), dict(os.environ); "
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def learned():
    return Tokenizer.bpe([PROSE], 300)


def naive_bpe(text, vocab_size):
    """The textbook algorithm: count every pair anew for every merge."""
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(gpt.SPLIT, text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ranks[pair[0]], ranks[pair[1]]))
        ranks.setdefault(best[0] + best[1], len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


@pytest.mark.parametrize("text", [PROSE, "aaaaaaa aaa aaaa abababab bababa", "x", "über größer Größe übergröße " * 3])
def test_incremental_counts_learn_what_counting_anew_learns(text):
    assert gpt.train_bpe([text], 330) == naive_bpe(text, 330)


def test_bpe_by_hand():
    ranks = gpt.train_bpe(
        ["low low low lower"], 259
    )  # l-o and o-w occur four times each; l-o has the smaller first byte
    assert [token for token, rank in ranks.items() if rank >= 256] == [b"lo", b"low", b" low"]


def test_vocab_size_counts_bytes_merges_and_end_of_text(learned):
    assert learned.vocab_size == 300 and learned.eot == 299
    assert Tokenizer.bytes().vocab_size == 257


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(learned, text):
    for tokenizer in (Tokenizer.bytes(), learned):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.eot for i in ids)


def test_gpt2_round_trips_and_has_its_published_numbers(gpt2_vocabulary):
    assert gpt2_vocabulary.vocab_size == 50257 and gpt2_vocabulary.eot == 50256
    assert gpt2_vocabulary.encode("Hello, world!") == [15496, 11, 995, 0]
    text = "naïve 🤖 \r\n\t  two  spaces 'll 't 12345 عربي\n"
    assert gpt2_vocabulary.decode(gpt2_vocabulary.encode(text)) == text


def test_gpt2_splits_as_tiktoken_does(gpt2_vocabulary):
    import tiktoken

    published = tiktoken.get_encoding("gpt2")
    for text in (
        PROSE,
        "a\n\n\n  b   \n c\u00a0d\u3000e  ",
        "x" * 50 + " " * 40 + "\n",
        "日本語 ½ ① don't DON'T",
        " \n \n",
    ):
        assert gpt2_vocabulary.encode(text) == published.encode_ordinary(text)


@pytest.mark.parametrize("kind", ["bytes", "learned"])
def test_the_spelling_of_end_of_text_is_plain_text(kind, learned):
    tokenizer = learned if kind == "learned" else Tokenizer.bytes()
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


def test_save_and_load_keep_the_tokens(learned):
    again = Tokenizer.loads(learned.dumps(), "bpe")
    assert again.ranks == learned.ranks and again.encode(PROSE) == learned.encode(PROSE)


@pytest.mark.parametrize("text", ["", "junk", "!!! 3\n", "YQ== 0\nYQ== 1\n", "YQ== x\n"])
def test_a_damaged_vocabulary_is_refused(text):
    with pytest.raises(ValueError):
        Tokenizer.loads(text, "bpe")


def test_the_end_of_text_can_have_any_id_and_comes_back():
    ranks = {bytes([byte]): byte + 1 for byte in range(256)}
    tokenizer = Tokenizer.loads(Tokenizer(ranks, "bpe", 0).dumps(), "bpe", 0)
    assert tokenizer.eot == 0 and tokenizer.encode("ab") == [98, 99] and tokenizer.token_bytes[0] == b""
    with pytest.raises(InputError, match="ids"):
        Tokenizer.loads(tokenizer.dumps(), "bpe")  # 256 is an id already


def test_token_bytes_spell_the_text(learned):
    ids = learned.encode(PROSE)
    assert b"".join(learned.token_bytes[i] for i in ids).decode() == PROSE and learned.token_bytes[learned.eot] == b""


def test_merge_by_example():
    assert gpt.merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4] and gpt.merge([1, 1, 1], (1, 1), 2) == [2, 1]


def test_an_unreachable_gpt2_vocabulary_names_the_remedies(monkeypatch, tmp_path):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match=r"vocab\.bpe.*TIKTOKEN_CACHE_DIR.*--tokenizer bpe"):
        Tokenizer.gpt2()


# ---------------------------------------------------------------------------------------------------------------------
# Dataset


def test_targets_are_the_inputs_shifted_by_one():
    data = TokenDataset(np.arange(100, dtype=np.uint16), block_size=8, stride=3)
    for i in range(len(data)):
        (x,), (y,) = data.batch([i])
        assert x.dtype == y.dtype == torch.int64 and x.shape == (8,)
        assert x[0] == 3 * i
        known = y != -1
        assert torch.equal(y[known], x[known] + 1)


@pytest.mark.parametrize("n", [2, 7, 8, 9, 10, 17, 18, 100])
def test_with_stride_of_the_context_every_token_but_the_first_is_a_target_once(n):
    data = TokenDataset(np.arange(n, dtype=np.uint16), block_size=8)
    _, y = data.batch(range(len(data)))
    assert sorted(y[y != -1].tolist()) == list(range(1, n))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_no_stride_leaves_a_token_out(stride):
    data = TokenDataset(np.arange(50, dtype=np.uint16), 8, stride)
    _, y = data.batch(range(len(data)))
    assert set(y[y != -1].tolist()) == set(range(1, 50))


def test_a_stride_beyond_the_context_is_refused():
    with pytest.raises(InputError, match="skip"):
        TokenDataset(np.arange(50), 8, 9)


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    config = TrainConfig(batch_size=3, grad_accum=2)
    windows = np.concatenate([gpt.windows_of_step(18, step, config).ravel() for step in range(6)])
    assert sorted(windows[:18]) == sorted(windows[18:]) == list(range(18))
    assert list(windows[:18]) != list(windows[18:])


def test_a_step_larger_than_the_text_goes_through_several_epochs():
    windows = gpt.windows_of_step(5, 0, TrainConfig(batch_size=12))
    assert Counter(windows.ravel().tolist()).most_common()[-1][1] >= 2


def test_the_splits_are_the_whole_text_and_do_not_overlap():
    texts = ["a" * 700, "é" * 150]
    train, val = gpt.split_texts(texts, 2**20)
    assert "".join(train + val) == "".join(texts) and len("".join(val).encode()) == 100


@pytest.mark.parametrize("shift", range(8))
def test_the_cut_is_never_inside_a_character(shift):
    text = "x" * shift + "🤖" * 100
    (train,), (val,) = gpt.split_texts([text], 2**20)
    assert train + val == text and len(val) in (10, 11)


def test_validation_is_a_tenth_but_no_more_than_val_bytes():
    for limit, expected in ((2**20, len(PROSE) // 10), (100, 100)):
        assert gpt.split_texts([PROSE], limit)[1] == [PROSE[-expected:]]


@pytest.mark.parametrize("size", [32, 64, 1000])
def test_text_that_is_cut_into_pieces_has_the_tokens_of_the_whole(size, monkeypatch, learned):
    text = (
        PROSE + "  \n\n  tabs\t\tand\r\n\r\nlines   \x1c \x85 ½ don't 'll ünïcode 🤖🤖 end  " + PROSE[:99] + "\t\n\n b"
    )
    monkeypatch.setattr(gpt, "PIECE", gpt.PIECE.replace("1000000", str(size)))
    assert len(regex.findall(gpt.PIECE, text)) > 5
    assert gpt.tokenize([text], learned).tolist() == [learned.eot, *learned.encode(text)]


def test_files_are_joined_by_the_end_of_text(own_folder):
    folder = own_folder / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (
        (folder / "b.TXT").write_text("second " * 30),
        (folder / "a.txt").write_text("first"),
        (folder / "c.md").write_text("no"),
    )
    (folder / "sub" / "c.txt").write_text("<|endoftext|> third " * 10)
    (folder / "._a.txt").write_text("hidden"), (folder / ".git" / "d.txt").write_text("hidden")
    assert gpt.load_texts([str(folder)]) == ["first", "second " * 30, "<|endoftext|> third " * 10]
    tokenizer, train, val = gpt.load_data([str(folder)], "bytes")
    assert [train.tolist().count(tokenizer.eot), val.tolist().count(tokenizer.eot)] == [3, 1]
    assert tokenizer.decode(train[:20].tolist()) == "firstsecond second"


def test_text_comes_in_without_byte_order_mark_and_carriage_returns(own_folder):
    path = own_folder / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert gpt.read_text(path) == "one\ntwo\n"


def test_a_vocabulary_is_learned_from_the_training_part_only(own_folder):
    path = own_folder / "t.txt"
    path.write_text("ab " * 900 + "zq " * 100)
    tokenizer, *_ = gpt.load_data([str(path)], "bpe", 270)
    assert not any(b"z" in token or b"q" in token for token, rank in tokenizer.ranks.items() if rank >= 256)


def test_the_vocabulary_size_decides_the_width_of_an_id():
    assert gpt.tokenize([PROSE], Tokenizer.bytes()).dtype == np.uint16
    wide = Tokenizer(Tokenizer.bytes().ranks | {b"%06d" % i: 256 + i for i in range(70_000)}, "bpe")
    ids = gpt.tokenize([PROSE], wide)
    assert ids.dtype == np.uint32 and wide.decode(ids.tolist()) == PROSE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea" * 50, "UTF-8"),
        (b"abc\0def" * 50, "NUL"),
        (b"caf\xe9 " * 50, "position 3"),
        (b" " * 100_000, "100,000 spaces"),
        (b"", "too little"),
        (b"abc", "too little"),
    ],
)
def test_what_is_not_text_is_refused(content, message, own_folder):
    path = own_folder / "t.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        gpt.load_data([str(path)], "bytes")


def test_missing_texts_are_named(own_folder):
    (own_folder / "empty").mkdir()
    for name in ("nowhere.txt", "empty"):
        with pytest.raises(InputError, match=name):
            gpt.load_texts([name])


def test_pydoc_repeats_no_paragraph():
    texts = gpt.load_texts(["pydoc"])
    paragraphs = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
    assert len(texts) > 50 and len(set(paragraphs)) == len(paragraphs)


def prepared(folder, tokenizer, **tokens):
    Path(folder).mkdir()
    (Path(folder) / "tokenizer.tiktoken").write_text(tokenizer.dumps())
    for name, ids in tokens.items():
        np.asarray(ids, np.uint16).tofile(Path(folder) / f"{name}.bin")


def test_a_prepared_folder_is_mapped_with_its_own_vocabulary(own_folder, learned):
    prepared("corpus", learned, train=learned.encode(PROSE), val=[1, 2, 3])
    tokenizer, train, val = gpt.load_data(["corpus"], "gpt2")
    assert isinstance(train, np.memmap) and tokenizer.decode(train.tolist()) == PROSE and val.tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="vocabulary of its own"):
        gpt.load_data(["corpus"], Tokenizer.bytes())


def test_a_long_run_over_a_memory_mapped_file_touches_it_without_keeping_it(own_folder):
    np.zeros(50_000_000, np.uint16).tofile("t.bin")
    data = TokenDataset(np.memmap("t.bin", np.uint16, "r"), 64)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    before = resident()
    for start in range(0, len(data) - 64, 64 * 20):
        data.batch(range(start, start + 64 * 20, 20))
    assert resident() - before < 20_000_000


@pytest.fixture
def web(monkeypatch):
    """A web server on this machine that answers what `answers` says, one (status, body) a request."""
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(gpt, "SHAKESPEARE", f"http://127.0.0.1:{server.server_port}/input.txt")
    yield answers
    server.shutdown()


def test_shakespeare_is_fetched_once_and_checked(web, monkeypatch):
    text = b"To be, or not to be" * 100
    monkeypatch.setattr(gpt, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    web += [(200, text), (404, b"gone")]
    assert gpt.load_texts(["shakespeare"]) == gpt.load_texts(["shakespeare"]) == [text.decode()]


@pytest.mark.parametrize("answer", [(404, b"not here"), (200, b"<html>log in</html>")])
def test_another_text_in_its_place_is_refused(web, answer):
    web.append(answer)
    with pytest.raises(InputError, match=r"checksum differs: save it yourself as .*shakespeare\.txt"):
        gpt.load_texts(["shakespeare"])
    assert not Path(".cache").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Model


@pytest.mark.parametrize("written_out", [True, False])
def test_a_token_never_sees_its_future(small, written_out):
    idx = torch.randint(0, 50, (2, 16))
    with torch.set_grad_enabled(written_out):  # without gradients, attention is the fused kernel's
        logits, _ = small(idx)
        for t in range(16):
            changed = idx.clone()
            changed[:, t] = (changed[:, t] + 1) % 50
            moved = (small(changed)[0] - logits).abs().amax(dim=(0, 2))  # (T,)
            assert (moved[:t] == 0).all() and moved[t] > 0


def test_a_token_sees_all_of_its_past(small):
    small.train()
    idx = torch.randint(0, 50, (1, 16))
    embedded = small.transformer.wte(idx).detach().requires_grad_()
    small.transformer.wte.forward = lambda _: embedded
    small(idx)[0][0, -1].sum().backward()
    assert (embedded.grad.abs().sum(-1) > 0).all()


def test_head_and_embedding_are_one_tensor(small):
    assert small.lm_head.weight.data_ptr() == small.transformer.wte.weight.data_ptr()
    assert "lm_head.weight" not in dict(small.named_parameters())


@pytest.mark.parametrize(("vocab_size", "n_embd"), [(257, 64), (1024, 256), (5000, 768)])
def test_the_first_loss_is_ln_v_and_a_little(vocab_size, n_embd):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, n_embd=n_embd, n_head=4, n_layer=4, block_size=64, dropout=0.0))
    idx = torch.randint(0, vocab_size, (16, 65))
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(vocab_size) + 0.0002 * n_embd, rel=0.01)


def test_initialization_has_gpt2s_deviations():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=256, n_head=4, vocab_size=2000))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, dropout=0.0))
    config = TrainConfig(optimizer="adamw", lr=1e-2)
    (optimizer,) = gpt.make_optimizers(model, config)
    idx = torch.randint(0, 64, (4, 17))
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_the_loss_is_the_mean_surprise_over_targets_that_count(small):
    idx, targets = torch.randint(0, 50, (3, 16)), torch.randint(0, 50, (3, 16))
    targets[0, :5] = -1
    logits, loss = small(idx, targets)
    probs = logits.softmax(-1)
    surprise = [-math.log(probs[b, t, targets[b, t]].item()) for b in range(3) for t in range(16) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(sum(surprise) / 43, rel=1e-5)
    assert small(idx, torch.full((3, 16), -1))[1].item() == 0


def test_logits_are_those_of_transformers():
    """Weights large, embeddings small: a wrong GELU, epsilon, mask, transpose or position shows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 97}
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, n_positions=40)).double().eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.normal_(std=0.05 if "wte" in name or "wpe" in name else 0.5)
    ours = GPT(GPTConfig(**shape, block_size=40))
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            theirs = weights[name]
            p.copy_(theirs.T if p.dim() == 2 and ".h." in name else theirs)
    ours.eval()
    idx = torch.randint(0, 97, (2, 40))
    expected = reference(idx).logits
    for train in (False, True):  # fused and written-out attention
        with torch.set_grad_enabled(train):
            found = ours(idx)[0]
        assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (1, 9), (4, 9)])
def test_written_out_and_fused_attention_agree_with_the_definition(T, S):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, T, 4), torch.randn(2, 3, S, 4), torch.randn(2, 3, S, 4)
    expected = torch.zeros_like(q)
    for t in range(T):  # query t stands at position S - T + t
        seen = slice(0, S - T + t + 1)
        scores = (k[:, :, seen] @ q[:, :, t, :, None] / 2).softmax(2)  # √4 = 2
        expected[:, :, t] = (scores * v[:, :, seen]).sum(2)
    for fused in (False, True):
        assert torch.allclose(gpt.attention(q, k, v, fused=fused), expected, atol=1e-6)


def test_dropout_is_in_four_places_and_off_in_eval(small):
    idx = torch.randint(0, 50, (2, 16))
    layers = [m for m in small.modules() if isinstance(m, gpt.Dropout)]
    assert len(layers) == 1 + 3 * 3  # embeddings, and in each block attention weights and both branches
    still = small(idx)[0]
    for layer in layers:
        layer.p = 0.5
        assert torch.equal(small.eval()(idx)[0], still)
        assert not torch.allclose(small.train()(idx)[0], still)
        layer.p = 0.0


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_independently(p):
    torch.manual_seed(0)
    x = gpt.Dropout(p).train()(torch.ones(1000, 1001))
    dropped = (x == 0).double()
    assert dropped.mean().item() == pytest.approx(p, abs=0.002)  # four standard deviations
    assert x.mean().item() == pytest.approx(1, abs=0.002 / (1 - p))
    assert x.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    flat = dropped.flatten()
    for distance in (1, 2, 3, 4, 8, 1001):  # neighbours know nothing of each other
        together = (flat[:-distance] * flat[distance:]).mean().item()
        assert together == pytest.approx(p * p, abs=0.003)


def test_dropout_passes_the_gradient_through_the_same_mask():
    x = torch.ones(50, 50, requires_grad=True)
    y = gpt.Dropout(0.3).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_a_sequence_beyond_the_context_is_refused(small):
    with pytest.raises(InputError, match="17 tokens do not fit into the context of 16"):
        small(torch.zeros(1, 17, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def recomputed(model, idx, new, generator, **options):
    """The naive loop: every step computes the whole window, which keeps its last half when the context is full."""
    window = idx[:, -model.config.block_size :]
    for _ in range(new):
        if window.shape[1] > model.config.block_size:
            window = window[:, -(model.config.block_size // 2) :]
        token = gpt.sample_next_token(model(window)[0][:, -1], generator=generator, **options)
        window, idx = torch.cat([window, token], 1), torch.cat([idx, token], 1)
    return idx


@pytest.mark.parametrize(("prompt", "new"), [(1, 15), (5, 60), (16, 40), (30, 3), (16, 1)])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}])
def test_the_cache_changes_nothing(small, prompt, new, options):
    idx = torch.randint(0, 50, (3, prompt), generator=torch.Generator().manual_seed(1))
    cached = small.generate(idx, new, generator=torch.Generator().manual_seed(2), **options)
    assert cached.shape == (3, prompt + new)
    assert torch.equal(cached, recomputed(small, idx, new, torch.Generator().manual_seed(2), **options))


def test_cached_logits_are_those_of_the_whole_sequence(small):
    idx = torch.randint(0, 50, (2, 16))
    whole = small(idx)[0]
    caches = [gpt.KVCache(16) for _ in small.transformer.h]
    with torch.no_grad():
        parts = [small.lm_head(small.hidden(part, caches)) for part in idx.split([5, 1, 4, 6], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_the_cache_is_no_larger_than_needed(small):
    made = []
    original = gpt.KVCache.__init__

    def noted(self, max_length):
        made.append(max_length)
        original(self, max_length)

    gpt.KVCache.__init__ = noted
    try:
        small.generate(torch.zeros(1, 4, dtype=torch.long), 5)
        small.generate(torch.zeros(1, 4, dtype=torch.long), 500)
    finally:
        gpt.KVCache.__init__ = original
    assert made[:3] == [9, 9, 9] and max(made[3:]) == 16


def test_beyond_the_context_the_last_half_is_read_again(small):
    idx = torch.randint(0, 50, (1, 16))
    out = small.generate(idx, 2, temperature=0)
    expected = small(out[:, 9:17])[0][:, -1].argmax()  # 17 tokens: the last 8 count
    assert out[0, 17] == expected


def test_a_context_of_one_still_generates():
    model = GPT(GPTConfig(block_size=1, vocab_size=10, n_layer=1, n_head=1, n_embd=4))
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 5).shape == (1, 6)


def test_generation_leaves_the_random_state_alone(small):
    before = torch.get_rng_state()
    small.generate(torch.zeros(1, 1, dtype=torch.long), 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_ended_rows_are_filled_with_end_of_text_and_all_ended_is_the_end(small):
    idx = torch.randint(0, 50, (4, 3))
    free = small.generate(idx, 30, temperature=0)
    eot = free[0, 6].item()
    out = small.generate(idx, 30, temperature=0, eot=eot)
    assert out.shape[1] <= 33
    for row, unbounded in zip(out[:, 3:].tolist(), free[:, 3:].tolist()):
        end = unbounded.index(eot) if eot in unbounded else len(row)
        assert row[:end] == unbounded[:end] and set(row[end:]) <= {eot}
    assert small.generate(idx[:1], 30, temperature=0, eot=eot).shape[1] == 3 + free[0, 3:].tolist().index(eot) + 1


def frequencies(probs, **options):
    logits = torch.tensor(probs).log().expand(20_000, -1)
    tokens = gpt.sample_next_token(logits, generator=torch.Generator().manual_seed(0), **options)
    return [round(share, 2) for share in (torch.bincount(tokens.flatten(), minlength=len(probs)) / 20_000).tolist()]


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    assert frequencies([0.5, 0.3, 0.15, 0.05], top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert frequencies([0.15, 0.05, 0.5, 0.3], top_p=0.5) == [0, 0, 1, 0]
    assert frequencies([0.5, 0.3, 0.15, 0.05], top_p=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert frequencies([0.5, 0.3, 0.15, 0.05], top_p=1e-50) == [1, 0, 0, 0]


def test_top_p_of_1_keeps_every_token():
    """A running sum of 50,257 numbers in float32 comes to 1 before its end."""
    logits = 3 * torch.randn(1, 50257, generator=torch.Generator().manual_seed(0))
    assert (gpt.next_token_probs(logits, top_p=1.0) > 0).all()


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.5, 3, 30])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(spread, top_p):
    logits = spread * torch.randn(2, 50257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = gpt.next_token_probs(logits, top_p=top_p)
    for exact, found in zip(logits.softmax(-1), probs):  # in float64, where nothing is lost
        ordered, kept = exact.sort(descending=True).values, int((found > 0).sum())
        assert ordered[: kept - 1].sum() - 1e-4 < top_p < ordered[:kept].sum() + 1e-4
        assert torch.allclose(
            found.sort(descending=True).values[:kept].double(), ordered[:kept] / ordered[:kept].sum(), rtol=1e-3
        )


def test_rare_tokens_come_as_often_as_they_should():
    """Half of the probability lies in 50,000 tokens of 1e-5 each."""
    logits = torch.full((1, 50_001), 1e-5).log()
    logits[0, 7] = math.log(0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([gpt.sample_next_token(logits.expand(100, -1), generator=generator) for _ in range(40)])
    assert (drawn != 7).float().mean().item() == pytest.approx(0.5, abs=0.03) and len(drawn.unique()) > 1500
    assert drawn[drawn != 7].float().mean().item() == pytest.approx(25_000, rel=0.05), "from all of them"


def test_top_k_keeps_k_even_among_equals():
    assert sum(share > 0 for share in frequencies([0.25, 0.25, 0.25, 0.25], top_k=2)) == 2
    assert frequencies([0.1, 0.6, 0.3], top_k=2) == pytest.approx([0, 0.667, 0.333], abs=0.015)
    assert frequencies([0.1, 0.6, 0.3], top_k=100) == pytest.approx([0.1, 0.6, 0.3], abs=0.015)


def test_top_p_counts_within_top_k():
    # of 0.4, 0.3, 0.2, 0.1 the two largest become 0.571 and 0.429: the first alone reaches 0.55
    assert frequencies([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.55) == [1, 0, 0, 0]


@pytest.mark.parametrize("logits", [[-3.4e38, 3.4e38], [-math.inf, 1.0], [0.0, 1.0]])
@pytest.mark.parametrize("temperature", [1e-6, 1, 1e6])
def test_no_temperature_makes_nan(temperature, logits):
    probs = gpt.next_token_probs(torch.tensor([logits]), temperature)
    assert probs.isfinite().all() and probs.sum().item() == pytest.approx(1)


def test_temperature_sharpens_flattens_and_at_zero_is_greedy():
    assert frequencies([0.8, 0.2], temperature=0.5) == pytest.approx([16 / 17, 1 / 17], abs=0.015)
    assert frequencies([0.8, 0.2], temperature=2.0) == pytest.approx([2 / 3, 1 / 3], abs=0.015)
    assert frequencies([0.2, 0.8], temperature=0) == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": 1e-9}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan},
     {"top_k": 0}],
)  # fmt: skip
def test_sampling_out_of_range_is_refused(small, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        small.generate(torch.zeros(1, 1, dtype=torch.long), 1, **wrong)


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(InputError, match="end-of-text"):
        small.generate(torch.zeros(1, 0, dtype=torch.long), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_comes_back_as_it_was(small, learned, own_folder):
    model = GPT(dataclasses.replace(small.config, vocab_size=learned.vocab_size))
    gpt.save_checkpoint("here", model, learned, step=3)
    again, tokenizer = gpt.load_checkpoint("here")
    assert (
        not again.training
        and again.config == model.config
        and tokenizer.ranks == learned.ranks
        and tokenizer.kind == "bpe"
    )
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert json.loads(Path("here/config.json").read_text())["step"] == 3
    assert sorted(os.listdir("here")) == ["config.json", "model.safetensors", "tokenizer.tiktoken"]


def test_loading_brings_in_no_more_modules(small, learned):
    """PyTorch's shapes without memory can cost a second and 800 modules, if a normal distribution is drawn among them."""
    gpt.save_checkpoint("here", GPT(GPTConfig(vocab_size=300, n_embd=8, n_layer=1)), learned)
    code = "import sys, gpt; before = len(sys.modules); gpt.load_checkpoint('here'); print(len(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 50


def test_an_existing_checkpoint_is_not_overwritten(small):
    tokenizer = Tokenizer.bytes()
    gpt.save_checkpoint("here", small, tokenizer)
    before = Path("here/model.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match="--overwrite"):
        gpt.save_checkpoint("here", small, tokenizer)
    assert Path("here/model.safetensors").stat().st_mtime_ns == before
    gpt.save_checkpoint("here", small, tokenizer, overwrite=True)
    assert Path("here/model.safetensors").stat().st_mtime_ns != before


def damage(name, change):
    path = Path("here") / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda b: b[: len(b) // 2]),
        ("model.safetensors", lambda b: b""),
        ("model.safetensors", lambda b: b"\xff" * 8 + b[8:]),
        ("config.json", lambda b: b[: len(b) // 2]),
        ("config.json", lambda b: b"[]"),
        ("config.json", lambda b: b.replace(b'"n_layer": 3', b'"n_layer": 999')),
        ("config.json", lambda b: b.replace(b'"n_embd": 8', b'"n_embd": 80000000000')),
        ("config.json", lambda b: b.replace(b'"n_layer": 3', b'"n_layer": "3"')),
        ("config.json", lambda b: b.replace(b'"n_layer"', b'"layers"')),
        ("config.json", lambda b: b.replace(b'"tokenizer"', b'"tokeniser"')),
        ("config.json", lambda b: b.replace(b'"eot": 256', b'"eot": 7')),
        ("tokenizer.tiktoken", lambda b: b[: len(b) // 2]),
        (
            "tokenizer.tiktoken",
            lambda b: b + base64.b64encode(b"zz") + b" 256\n" + base64.b64encode(b"zzz") + b" 257\n",
        ),
        ("tokenizer.tiktoken", lambda b: b"\xff\xfe"),
    ],
)
def test_a_damaged_checkpoint_is_refused(own_folder, name, change):
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=3, n_head=2, n_embd=8))
    gpt.save_checkpoint("here", model, Tokenizer.bytes())
    damage(name, change)
    with pytest.raises(InputError, match="here is not a readable checkpoint"):
        gpt.load_checkpoint("here")


def test_weights_that_are_not_finite_are_refused(small, own_folder):
    with torch.no_grad():
        small.transformer.ln_f.bias[0] = math.nan
    gpt.save_checkpoint("here", GPT(dataclasses.replace(small.config, vocab_size=257)), Tokenizer.bytes())
    weights = parameters_of("here") | {"transformer.ln_f.bias": small.transformer.ln_f.bias.detach()}
    safetensors.torch.save_file(weights, "here/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"ln_f\.bias holds numbers that are not finite"):
        gpt.load_checkpoint("here")


def test_a_name_under_checkpoints_is_found_and_a_missing_one_lists_what_is_there(own_folder):
    with pytest.raises(InputError, match=r"no checkpoint mine.*python gpt\.py"):
        gpt.load_checkpoint("mine")
    for name in ("one", "two"):
        gpt.save_checkpoint(
            f"checkpoints/{name}", GPT(GPTConfig(vocab_size=257, n_embd=8, n_layer=1)), Tokenizer.bytes()
        )
    assert gpt.find_checkpoint("one") == gpt.find_checkpoint("checkpoints/one") == Path("checkpoints/one")
    with pytest.raises(InputError, match="one, two"):
        gpt.load_checkpoint("mine")


def test_a_write_that_fails_leaves_the_old_file(own_folder):
    path = Path("f")
    path.write_text("old")
    with pytest.raises(InputError, match="disk is full"), gpt.replacing(path) as part:
        part.write_text("half of the ne")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and os.listdir() == ["f"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_decay_is_for_matrices_only_and_every_parameter_has_one_optimizer(small):
    for name, expected in (("adamw", 1), ("muon", 2)):
        optimizers = gpt.make_optimizers(small, TrainConfig(optimizer=name, weight_decay=0.3))
        assert len(optimizers) == expected
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen = [p for group in groups for p in group["params"]]
        assert len(seen) == len(set(seen)) == len(list(small.parameters()))
        for group in groups:
            assert all((p.dim() == 2) == (group["weight_decay"] == 0.3) for p in group["params"])
    muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
    assert muon == {id(p) for name, p in small.named_parameters() if ".h." in name and p.dim() == 2}


def test_stacked_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (48, 16), (16, 16), (16, 48), (16, 16), (33, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        gpt.Muon(ours, 0.1, 0.2, torch.bfloat16),
        torch.optim.Muon(theirs, 0.1, 0.2, adjust_lr_fn="match_rms_adamw"),
    ]
    begin = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(ours, theirs, begin):
        assert (p - q).norm() < 0.02 * (q - start).norm()  # both orthogonalize in bfloat16


def test_frozen_parameters_reach_no_optimizer(small):
    small.requires_grad_(False)
    small.transformer.ln_f.requires_grad_(True)
    (optimizer,) = gpt.make_optimizers(small, TrainConfig(optimizer="muon"))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 16


def test_the_schedule_warms_up_and_comes_down():
    config = TrainConfig(lr=1.0, warmup_steps=10, max_steps=110, min_lr=0.1)
    rates = [gpt.learning_rate(step, config) for step in range(111)]
    assert (
        rates[0] == 0.1
        and rates[9] == rates[10] == 1.0
        and rates[60] == pytest.approx(0.55)
        and rates[110] == pytest.approx(0.1)
    )
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert gpt.learning_rate(5, TrainConfig(warmup_steps=5, max_steps=5)) == TrainConfig().lr


def test_validation_weighs_every_token_alike(small):
    tokens = np.random.default_rng(0).integers(0, 50, 16 * 5 + 7).astype(np.uint16)  # a short last window
    tokenizer = Tokenizer.bytes()
    nats, counted = 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        ids = torch.tensor(tokens[start : start + 17].astype(np.int64))
        losses = F.cross_entropy(small(ids[None, :-1])[0][0], ids[1:], reduction="sum")
        nats, counted = nats + losses.item(), counted + len(ids) - 1
    for batch_size in (1, 3, 4, 100):
        figures = gpt.evaluate(small, TokenDataset(tokens, 16), tokenizer, batch_size)
        assert figures["tokens"] == counted == len(tokens) - 1
        assert figures["loss"] == pytest.approx(nats / counted, rel=1e-6)
        assert figures["perplexity"] == pytest.approx(math.exp(nats / counted), rel=1e-5)
        assert figures["bits_per_byte"] == pytest.approx(nats / counted / math.log(2), rel=1e-6)  # a byte a token


def test_bits_per_byte_divide_by_the_bytes_of_the_targets(small, learned):
    model = GPT(dataclasses.replace(small.config, vocab_size=learned.vocab_size)).eval()
    ids = learned.encode(PROSE[:500])
    figures = gpt.evaluate(model, TokenDataset(np.array(ids), 16), learned)
    n_bytes = len(learned.decode(ids[1:]).encode())
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] * (len(ids) - 1) / n_bytes / math.log(2))


class Masked(TokenDataset):
    """Every third window counts half of its targets only."""

    def batch(self, windows):
        x, y = super().batch(windows)
        y[np.asarray(windows) % 3 == 0, ::2] = -1
        return x, y


def test_accumulated_gradients_are_those_of_the_whole_batch(small):
    data = Masked(np.random.default_rng(0).integers(0, 50, 400), 16)
    results = []
    for batch_size, grad_accum in ((12, 1), (3, 4)):
        small.zero_grad()
        loss, tokens = gpt.forward_backward(
            small, data, 0, TrainConfig(batch_size=batch_size, grad_accum=grad_accum), torch.float32
        )
        results.append((loss, torch.cat([p.grad.flatten() for p in small.parameters()])))
        assert (
            0 < tokens < 12 * 16
            and tokens == (data.batch(gpt.windows_of_step(len(data), 0, TrainConfig(batch_size=12))[0])[1] != -1).sum()
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def run_training(*flags, expect=None):
    if expect is None:
        return gpt.main([*TINY, *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        gpt.main([*TINY, *map(str, flags)])
    assert stopped.value.code == expect


def test_training_writes_what_the_design_says(prose, capsys):
    run_training("--data", prose, "--out", "here")
    assert sorted(os.listdir("here")) == sorted(
        [gpt.CONFIG, gpt.VOCABULARY, gpt.MODEL, gpt.STATE, "log.csv", "loss.png"]
    )
    assert Path("here/loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split(",") for line in Path("here/log.csv").read_text().splitlines()]
    assert lines[0] == ["step", "tokens", "seconds", "lr", "train_loss", "val_loss", "val_bits_per_byte", "grad_norm"]
    assert [line[0] for line in lines[1:]] == ["0", "4", "8", "12"] and lines[2][1] == str(4 * 4 * 16)
    described = json.loads(Path("here/config.json").read_text())
    assert (
        described["model"]["n_layer"] == 2
        and described["training"]["max_steps"] == 12
        and described["tokenizer"] == "bytes"
    )
    assert described["validation"]["loss"] == pytest.approx(min(float(line[5]) for line in lines[1:]))
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "bits per byte" in out
    assert "ln 257" in err and "step 0 of 12" in err and "step 4 of 12" in err and "\x1b" not in err


def test_the_saved_weights_are_those_of_the_best_validation(prose, monkeypatch):
    original = gpt.forward_backward

    def uphill(model, data, step, config, dtype):
        loss = original(model, data, step, config, dtype)
        for p in model.parameters():
            p.grad *= -1 if step >= 8 else 1
        return loss

    monkeypatch.setattr(gpt, "forward_backward", uphill)
    run_training("--data", prose, "--out", "here", "--max_steps", 32)
    described = json.loads(Path("here/config.json").read_text())
    model, tokenizer = gpt.load_checkpoint("here")
    *_, val = gpt.load_data([str(prose)], "bytes")
    losses = [float(line.split(",")[5]) for line in Path("here/log.csv").read_text().splitlines()[1:]]
    assert min(losses) < losses[-1]
    dtype = gpt.resolve_dtype("auto", torch.device("cpu"))
    found = gpt.evaluate(model, TokenDataset(val, 16), tokenizer, 4, dtype)
    assert found["loss"] == pytest.approx(min(losses), rel=1e-6) == described["validation"]["loss"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_is_the_same_as_never_stopping(prose, optimizer, monkeypatch):
    flags = ["--data", prose, "--optimizer", optimizer, "--dropout", "0.2", "--grad_accum", 2]
    run_training(*flags, "--out", "whole")
    with interrupt(monkeypatch, step=5):  # which is not a step that validates
        run_training(*flags, "--out", "parts", expect=130)
    torch.manual_seed(99)
    assert len(Path("parts/log.csv").read_text().splitlines()) == 3
    gpt.main(["--resume", "--out", "parts"])
    (_, whole, best), (_, parts, same) = gpt.load_run("whole"), gpt.load_run("parts")
    assert (
        whole.keys() == parts.keys() and len(whole) > 2 * len(parameters_of("whole")) and best["step"] == same["step"]
    )
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    columns = [
        [line.split(",")[:2] + line.split(",")[3:] for line in Path(f"{n}/log.csv").read_text().splitlines()]
        for n in ("whole", "parts")
    ]
    assert columns[0] == columns[1]
    for name, weight in parameters_of("whole").items():
        assert torch.equal(weight, parameters_of("parts")[name])


def test_dropout_differs_from_step_to_step_and_training_follows_the_schedule(prose, monkeypatch):
    original, masks, rates = gpt.forward_backward, [], []

    def noting(model, data, step, config, dtype):
        state = torch.get_rng_state()
        masks.append(gpt.Dropout(0.5).train()(torch.ones(64)))
        torch.set_rng_state(state)
        return original(model, data, step, config, dtype)

    class Noting(torch.optim.AdamW):
        def step(self):
            rates.append({group["lr"] for group in self.param_groups})
            norm = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm()
            assert norm <= 0.0101
            super().step()

    monkeypatch.setattr(gpt, "forward_backward", noting)
    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    run_training("--data", prose, "--out", "here", "--grad_clip", 0.01, "--lr", 0.01)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 12
    config = TrainConfig(lr=0.01, warmup_steps=2, max_steps=12)
    assert rates == [{gpt.learning_rate(step, config)} for step in range(12)]


@pytest.mark.parametrize(("flags", "most"), [(["--grad_clip", 0], math.inf), (["--grad_clip", 0.5], 0.5)])
def test_the_gradient_is_clipped_and_0_means_no_limit(prose, flags, most, monkeypatch):
    original, norms = gpt.forward_backward, []

    def large(model, *rest):
        loss, tokens = original(model, *rest)
        for p in model.parameters():
            p.grad *= 1000
        return loss, tokens

    class Noting(torch.optim.AdamW):
        def step(self):
            grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat(grads).norm().item())
            super().step()

    monkeypatch.setattr(gpt, "forward_backward", large)
    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    run_training("--data", prose, "--out", "here", "--optimizer", "adamw", "--max_steps", 3, *flags)
    assert (
        all(norm > 100 if most == math.inf else norm == pytest.approx(most, rel=1e-3) for norm in norms)
        and len(norms) == 3
    )


def test_flags_that_are_given_beat_the_preset(prose, capsys):
    run_training("--data", prose, "--out", "here", "--preset", "gpt2", "--vocab_size", "257")
    described = json.loads(Path("here/config.json").read_text())
    assert described["model"]["n_embd"] == 16 and described["model"]["dropout"] == 0.1
    assert described["training"]["optimizer"] == "adamw" and described["training"]["max_steps"] == 12


@pytest.mark.parametrize(
    ("flags", "out"),
    [(["--data", "my.txt"], "my"), (["--preset", "shakespeare-10min"], "shakespeare"), ([], "scratch")],
)
def test_the_folder_is_named_after_the_text(prose, monkeypatch, flags, out):
    class Enough(Exception):
        pass

    def stop(model, tokenizer, train_data, val_data, config, *_, **__):
        raise Enough(config.out)

    prose.rename("my.txt")
    monkeypatch.setattr(gpt, "train", stop)
    monkeypatch.setattr(gpt, "load_texts", lambda names: [PROSE])
    with pytest.raises(Enough, match=f"^checkpoints/{out}$"):
        gpt.main([*TINY, *flags])


@pytest.mark.parametrize(
    ("steps", "given", "expected"),
    [(600, [], 0.15), (12, [], 0.0), (600, ["--dropout", "0"], 0.0), (12, ["--preset", "gpt2"], 0.1)],
)
def test_dropout_is_for_text_that_is_seen_often_unless_it_is_given(prose, monkeypatch, steps, given, expected):
    class Enough(Exception):
        pass

    def stop(model, *_, **__):
        raise Enough(model.config.dropout)

    monkeypatch.setattr(gpt, "train", stop)
    with pytest.raises(Enough, match=str(expected)):
        gpt.main([*TINY, "--data", str(prose), "--max_steps", str(steps), *given, "--vocab_size", "257"])


def test_a_crash_between_the_files_of_a_save_is_made_good(prose, monkeypatch):
    """After the new best weights and before the training state: resuming goes over the same steps to the same end."""
    run_training("--data", prose, "--out", "whole")
    original = gpt.save_run

    def crash(run, *rest):
        if run["step"] == 8:
            raise RuntimeError("killed")
        original(run, *rest)

    monkeypatch.setattr(gpt, "save_run", crash)
    with pytest.raises(RuntimeError, match="killed"):
        run_training("--data", prose, "--out", "here")
    monkeypatch.undo()
    os.chdir(prose.parent)
    run, _, best = gpt.load_run("here")
    assert (run["step"], best["step"]) == (4, 8), "the weights are ahead of the state, and say so"
    gpt.main(["--resume", "--out", "here"])
    for name, weight in parameters_of("whole").items():
        assert torch.equal(weight, parameters_of("here")[name]), name


def test_overwriting_leaves_nothing_of_the_old_checkpoint(prose):
    run_training("--data", prose, "--out", "here")
    gpt.save_checkpoint("here", GPT(GPTConfig(vocab_size=257)), Tokenizer.bytes(), overwrite=True)
    assert not Path("here", gpt.STATE).exists()


def test_a_finished_run_can_be_moved_and_prolonged(prose):
    run_training("--data", prose, "--out", "there")
    Path("checkpoints").mkdir()
    Path("there").rename("checkpoints/scratch")
    gpt.main(["--resume", "--max_steps", "16"])
    assert (
        Path("checkpoints/scratch/log.csv").read_text().splitlines()[-1].startswith("16,")
        and not Path("there").exists()
    )


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_go_wrong_stop_the_run_and_are_never_saved(prose, where, monkeypatch, capsys):
    original = gpt.forward_backward

    def poisoned(model, data, step, config, dtype):
        loss, tokens = original(model, data, step, config, dtype)
        if step == 6 and where == "gradient":
            next(model.parameters()).grad[0, 0] = math.inf
        return math.nan if step == 6 and where == "loss" else loss, tokens

    monkeypatch.setattr(gpt, "forward_backward", poisoned)
    run_training("--data", prose, "--out", "here", expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the ") and "at step 6" in error and "here" in error and "--lr" in error
    assert all(w.isfinite().all() for w in parameters_of("here").values())
    assert Path("here/log.csv").read_text().splitlines()[-1].startswith("4,")


def test_two_processes_compute_what_one_computes(prose):
    """With AdamW, as Muon orthogonalizes in bfloat16, where the least difference in rounding grows to 2e-4."""
    flags = [
        *TINY,
        "--data",
        str(prose),
        "--dropout",
        "0",
        "--dtype",
        "float32",
        "--grad_accum",
        "2",
        "--optimizer",
        "adamw",
    ]
    one = script("gpt.py", *flags, "--out", "one")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "gpt.py"),
    ]
    two = subprocess.run([*torchrun, *flags, "--out", "two"], capture_output=True, text=True, timeout=240, check=False)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert one.stdout.replace("one", "two") == two.stdout
    weights = parameters_of("two")
    for name, weight in parameters_of("one").items():
        assert torch.allclose(weight, weights[name], atol=1e-5), name
    losses = [
        [float(line.split(",")[5]) for line in Path(f"{n}/log.csv").read_text().splitlines()[1:]]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_bfloat16_trains_like_float32(prose):
    losses = []
    for dtype in ("float32", "bfloat16"):
        run_training("--data", prose, "--out", dtype, "--dtype", dtype, "--dropout", 0)
        losses.append(json.loads(Path(f"{dtype}/config.json").read_text())["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]


def test_compiled_training_computes_the_same(prose):
    import shutil

    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("torch.compile needs a C++ compiler")
    flags = [*TINY, "--data", prose, "--dtype", "float32", "--dropout", "0", "--max_steps", "4", "--n_layer", "1"]
    flags += ["--optimizer", "adamw"]
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        done = script("gpt.py", *flags, "--out", out, *more)
        assert done.returncode == 0, done.stderr
    for name, weight in parameters_of("plain").items():
        assert torch.allclose(weight, parameters_of("compiled")[name], atol=1e-5), name


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(prose, number, status):
    command = [
        sys.executable,
        str(ROOT / "gpt.py"),
        *TINY,
        "--data",
        str(prose),
        "--out",
        "here",
        "--max_steps",
        "100000",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until it has trained a little
        time.sleep(0.05)
        if Path("here/log.csv").exists() and len(Path("here/log.csv").read_text().splitlines()) > 2:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and out == "" and "go on with --resume --out here" in err
    assert gpt.load_run("here")[0]["step"] > 0 and Path("here/loss.png").exists()
    gpt.load_checkpoint("here")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


BAD = [
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--data", "empty.txt"], "too little text"),
    (["--data", "binary.txt"], "binary.txt is not UTF-8"),
    (["--data", "latin1.txt"], "latin1.txt is not UTF-8"),
    (["--data", "examples.JSONL"], "is JSON, not text"),
    (["--data", "short.txt"], "shorter than a window"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--tokenizer", "words"], "invalid choice: 'words'"),
    (["--n_embd", "17"], "not a multiple"),
    (["--n_layer", "0"], "n_layer is 0"),
    (["--n_layer", "two"], "invalid int"),
    (["--lr", "nan"], "lr is nan"),
    (["--lr", "-1"], "lr is -1"),
    (["--stride", "17"], "stride 17"),
    (["--vocab_size", "300"], "bytes has a vocabulary of 257"),
    (["--device", "abacus"], "device 'abacus' is not available"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    (["--dtype", "float8"], "invalid choice: 'float8'"),
    (["--n_layers", "2"], "did you mean --n_layer"),
    (["--xyzzy"], "see --help"),
    (["stray"], "unrecognized arguments: stray"),
    (["--max_steps"], "expected one argument"),
    (["--out", ""], "out is empty"),
    (["--data", ""], "data is empty"),
    (["--out", "taken"], "already holds a checkpoint: add --overwrite"),
    (["--out", "file/sub"], "is not a folder to write to"),
    (["--resume", "--out", "nothing"], "nothing to resume in nothing"),
    (["--resume", "--out", "old"], "older versions"),
    (["--resume", "--out", "broken"], "can't be resumed"),
    (["--out", "/proc/here"], "/proc|No such file"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags, message, prose, capsys):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    Path("latin1.txt").write_bytes("café ".encode("latin1") * 100)
    Path("short.txt").write_text("too short.")
    Path("file").write_text("")
    Path("examples.JSONL").write_text("{}\n")
    for name in ("taken", "broken", "checkpoints", "old"):
        Path(name).mkdir()
        Path(name, "training_state.pt" if name == "old" else gpt.STATE).write_bytes(b"not a checkpoint")
    flags = flags if "--data" in flags else [*flags, "--data", str(prose)]
    run_training(*flags, expect=2)
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and lines[-1].startswith("error: ") and regex.search(message, lines[-1]), err
    assert "Traceback" not in err
    assert Path("taken", gpt.STATE).read_bytes() == b"not a checkpoint"


def test_a_resumed_run_keeps_its_shape_and_its_text(prose, capsys):
    run_training("--data", prose, "--out", "here")
    capsys.readouterr()
    for flags, message in (
        (["--n_layer", "3"], "n_layer"),
        (["--optimizer", "adamw"], "optimizer"),
        (["--preset", "tiny"], "--preset"),
    ):
        with pytest.raises(SystemExit):
            gpt.main(["--resume", "--out", "here", *flags])
        assert message in capsys.readouterr().err
    prose.write_text(PROSE + "more")
    with pytest.raises(SystemExit) as stopped:
        gpt.main(["--resume", "--out", "here"])
    assert stopped.value.code == 2 and "the data or the base model changed" in capsys.readouterr().err


def test_an_error_in_a_real_process_has_no_traceback(own_folder):
    done = script("gpt.py", "--data", "nowhere.txt")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.splitlines()[-1].startswith("error: there is no text file nowhere.txt")
        and "Traceback" not in done.stderr
    )


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpt.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(GPTConfig) + dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text and field.metadata["help"][:20] in " ".join(text.split())
