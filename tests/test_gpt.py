"""The claims of gpt.py, one claim per test."""

import hashlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import regex
import requests
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F
from conftest import PROSE, ROOT, TINY, after_backward, enlarge, parameters_of, run_main, script

import gpt
from extras import native
from gpt import GPT, GPTConfig, InputError, TokenDataset, Tokenizer, TrainConfig

COMPILER = shutil.which("g++") or shutil.which("clang++")


IMPORT = """
import os, signal, socket, torch
def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return torch.get_rng_state().tolist(), torch.get_num_threads(), handlers, dict(os.environ), os.listdir()
torch.manual_seed(5), torch.set_num_threads(3)
socket.socket.connect, before = None, state()
import gpt
assert state() == before
"""


def test_importing_gpt_has_no_side_effects():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---- Tokenizer ----
@pytest.fixture(scope="module")
def learned():
    return Tokenizer.bpe([PROSE], 300)


def naive_bpe(text, vocab_size):
    """The textbook algorithm: count every pair anew for every merge."""
    words = [list(word.encode()) for word in regex.findall(gpt.SPLIT, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size and max(map(len, words)) > 1:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        token = tokens[best[0]] + tokens[best[1]]
        if token not in tokens:
            tokens.append(token)
        words = [gpt.merge(word, best, tokens.index(token)) for word in words]
    return {token: i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("text", [PROSE, "aaaaaaa aaa aaaa abababab bababa", "x", "über größer Größe übergröße " * 3])
def test_incremental_counts_give_the_merges_of_counting_anew(text):
    assert gpt.merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4] and gpt.merge([1, 1, 1], (1, 1), 2) == [2, 1]
    assert gpt.train_bpe([text], 330) == naive_bpe(text, 330)


def test_gpt2_has_the_published_ids(gpt2_vocabulary):
    assert (gpt2_vocabulary.vocab_size, gpt2_vocabulary.eot) == (50257, 50256)
    assert gpt2_vocabulary.encode("Hello, world!") == [15496, 11, 995, 0]
    published = tiktoken.get_encoding("gpt2")
    spaces = "a\n\n\n  b   \n c\u00a0d\u3000e  " + "x" * 50 + " " * 40 + "\n"
    for text in (PROSE, spaces, "日本語 ½ ① don't DON'T naïve 🤖 \r\n\t 'll 't 12345 عربي\n", " \n \n"):
        ids = gpt2_vocabulary.encode(text)
        assert ids == published.encode_ordinary(text) and gpt2_vocabulary.decode(ids) == text


# ---- Dataset ----
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("n", [2, 7, 8, 9, 10, 17, 18, 50])
def test_targets_are_the_inputs_shifted_by_one_and_no_token_is_left_out(n, stride):
    data = TokenDataset(np.arange(n, dtype=np.uint16), block_size=8, stride=stride)
    x, y = data.batch(range(len(data)))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (len(data), 8)
    known = y != -1
    assert torch.equal(y[known], x[known] + 1) and set(y[known].tolist()) == set(range(1, n))
    assert stride < 8 or known.sum() == n - 1, "in validation, every token is a target once"


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    config = TrainConfig(batch_size=3, grad_accum=2)
    windows = np.concatenate([gpt.windows_of_step(18, step, config).ravel() for step in range(6)])
    assert sorted(windows[:18]) == sorted(windows[18:]) == list(range(18))
    assert list(windows[:18]) != list(windows[18:])
    large = gpt.windows_of_step(5, 0, TrainConfig(batch_size=12))  # more than two epochs in one step
    assert min(Counter(large.ravel().tolist()).values()) == 2


@pytest.mark.parametrize(("limit", "expected"), [(2**20, 100), (33, 33)])
def test_the_last_tenth_up_to_a_limit_is_for_validation_cut_between_characters(limit, expected):
    for shift in range(4):
        texts = ["a" * (948 - shift), "x" * shift + "🤖" * 8, "b" * 20]  # 1,000 bytes
        train, val = gpt.split_texts(texts, limit)
        assert "".join(train + val) == "".join(texts)
        assert expected <= len("".join(val).encode()) < expected + 4


@pytest.mark.parametrize(
    ("text", "remarks"), [('{"prompt": "a"}\n', 1), ('[\n {"text": 1}]', 1), ("{x} is a set\n", 0), ('a {"b": 1}', 0)]
)
def test_text_that_looks_like_json_gets_a_remark(text, remarks, capsys):
    Path("a.txt").write_text(text)
    assert gpt.load_texts(["a.txt"]) == [text]
    assert capsys.readouterr().err.count("finetune.py learns") == remarks


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_is_utf8_on_every_stream_that_is_no_console(encoding, name, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, name, stream)
    gpt.command(lambda argv: print("né 你", file=getattr(sys, name)))()
    stream.flush()
    assert stream.buffer.getvalue().decode() == "né 你\n"


def test_files_come_in_sorted_as_plain_text_and_joined_by_end_of_text(capsys):
    files = {"b.TXT": "second " * 30, "a.txt": "\ufefffirst\r\n", "sub/c.txt": "<|endoftext|> third " * 10}
    others = {"c.md": "no", "._a.txt": "hidden", ".git/d.txt": "hidden"}
    for name, text in (files | others).items():
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_bytes(text.encode())
    assert gpt.load_texts(["texts"]) == ["first\n", files["b.TXT"], files["sub/c.txt"]]
    tokenizer, train, val = gpt.load_data(["texts"], "bytes")
    assert train.tolist().count(tokenizer.eot) == 3 and val.tolist().count(tokenizer.eot) == 1
    assert tokenizer.decode(train[:21].tolist()) == "first\nsecond second"
    assert "<|endoftext|> is plain text, 10 times" in capsys.readouterr().err


def test_a_vocabulary_is_learned_from_the_training_part_only():
    Path("t.txt").write_text("ab " * 900 + "zq " * 100)
    tokenizer, *_ = gpt.load_data(["t.txt"], "bpe", 270)
    assert not any(b"z" in token or b"q" in token for token, rank in tokenizer.ranks.items() if rank >= 256)


def test_pydoc_repeats_no_paragraph():
    texts = gpt.load_texts(["pydoc"])
    paragraphs = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
    assert len(texts) > 50 and len(set(paragraphs)) == len(paragraphs)


def test_a_prepared_folder_has_its_own_vocabulary_and_stays_on_disk(learned):
    Path("corpus").mkdir()
    Path("corpus/tokenizer.tiktoken").write_text(learned.dumps())
    np.zeros(50_000_000, np.uint16).tofile("corpus/train.bin")
    np.array([1, 2, 3], np.uint16).tofile("corpus/val.bin")
    before = psutil.Process().memory_info().rss
    tokenizer, train, val = gpt.load_data(["corpus"], "gpt2")
    data = TokenDataset(train, 64)
    for start in range(0, len(data) - 64, 64 * 20):
        data.batch(range(start, start + 64 * 20, 20))
    assert psutil.Process().memory_info().rss - before < 20_000_000
    assert tokenizer.ranks == learned.ranks and val.tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="vocabulary of its own"):
        gpt.load_data(["corpus"], Tokenizer.bytes())


def test_shakespeare_is_downloaded_once_and_checked(monkeypatch):
    def respond(*_, **__):
        response = requests.Response()
        response.status_code, response.raw = 200, io.BytesIO(answers.pop(0))
        return response

    answers = [b"<html>log in</html>", b"To be, or not to be"]
    monkeypatch.setattr(requests.Session, "request", respond)
    monkeypatch.setattr(gpt, "SHAKESPEARE_SHA256", hashlib.sha256(answers[1]).hexdigest())
    with pytest.raises(InputError, match=r"checksum differs: save it yourself as .*shakespeare\.txt"):
        gpt.load_texts(["shakespeare"])
    assert gpt.load_texts(["shakespeare"]) == gpt.load_texts(["shakespeare"]) == ["To be, or not to be"]


# ---- Model ----
def test_logits_equal_those_of_transformers():
    """Weights large, embeddings small: a wrong GELU, epsilon, mask, transpose or position shows."""
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 97}
    reference = enlarge(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, n_positions=40)).double())
    ours = GPT(GPTConfig(**shape, block_size=40)).eval()
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            theirs = weights[name]
            p.copy_(theirs.T if p.dim() == 2 and ".h." in name else theirs)
    idx = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = reference(idx).logits
    assert (ours(idx)[0] - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (1, 9), (4, 9)])
def test_written_out_and_fused_attention_agree_with_the_definition(T, S):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, T, 4), torch.randn(2, 3, S, 4), torch.randn(2, 3, S, 4)
    expected = torch.zeros_like(q)
    for t in range(T):  # query t is at position S - T + t
        seen = slice(0, S - T + t + 1)
        scores = (k[:, :, seen] @ q[:, :, t, :, None] / 2).softmax(2)  # √4 = 2
        expected[:, :, t] = (scores * v[:, :, seen]).sum(2)
    for fused in (False, True):
        assert torch.allclose(gpt.attention(q, k, v, fused=fused), expected, atol=1e-6)


def test_the_first_loss_is_ln_v_and_a_little():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=2000, n_embd=512, n_layer=2))
    idx = torch.randint(0, 2000, (64, 65))
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(2000) + 0.0002 * 512, abs=0.03)


def test_initialization_has_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=128, n_head=4, vocab_size=2000))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name


def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_count(small):
    idx, targets = torch.randint(0, 50, (3, 16)), torch.randint(0, 50, (3, 16))
    targets[0, :5] = -1
    logits, loss = small(idx, targets)
    probs = logits.softmax(-1)
    nll = [-math.log(probs[b, t, targets[b, t]].item()) for b in range(3) for t in range(16) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(sum(nll) / 43, rel=1e-5)
    assert small(idx, torch.full((3, 16), -1))[1].item() == 0
    assert small(idx)[1] is None


def test_dropout_is_on_embeddings_attention_and_both_branches_and_off_in_eval(small):
    idx = torch.randint(0, 50, (2, 16))
    layers = [module for module in small.modules() if isinstance(module, gpt.Dropout)]
    assert len(layers) == 1 + 3 * 3
    without = small(idx)[0]
    for layer in layers:
        layer.p = 0.5
        assert torch.equal(small.eval()(idx)[0], without)
        assert not torch.allclose(small.train()(idx)[0], without)
        layer.p = 0.0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_independently(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = gpt.Dropout(p).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # the same mask
    dropped = (y == 0).double().flatten()
    assert dropped.mean().item() == pytest.approx(p, abs=0.002)  # four standard deviations
    assert y.mean().item() == pytest.approx(1, abs=0.002 / (1 - p))
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    for distance in (1, 2, 3, 4, 8, 1001):
        together = (dropped[:-distance] * dropped[distance:]).mean().item()
        assert together == pytest.approx(p * p, abs=0.003)


# ---- Generation ----
def recomputed(model, idx, new, generator, **options):
    """The naive loop: every step computes the whole window, which keeps its last half when the context is full."""
    window = idx[:, -model.config.block_size :]
    for _ in range(new):
        if window.shape[1] > model.config.block_size:
            window = window[:, -(model.config.block_size // 2) :]
        token = gpt.sample_next_token(model(window)[0][:, -1], generator=generator, **options)
        window, idx = torch.cat([window, token], 1), torch.cat([idx, token], 1)
    return idx


@pytest.mark.parametrize(("prompt", "new"), [(1, 15), (5, 40), (16, 1), (30, 12)])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}])
def test_the_cache_changes_nothing(small, prompt, new, options):
    idx = torch.randint(0, 50, (3, prompt), generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    cached = small.generate(idx, new, generator=torch.Generator().manual_seed(2), **options)
    assert torch.equal(cached, recomputed(small, idx, new, torch.Generator().manual_seed(2), **options))
    assert torch.equal(before, torch.get_rng_state()), "a generator of one's own leaves the global one alone"


@pytest.mark.parametrize(("new", "expected"), [(5, 9), (500, 16)])
def test_the_cache_is_no_larger_than_needed(small, new, expected, monkeypatch):
    class Noting(gpt.KVCache):
        def __init__(self, max_length):
            lengths.append(max_length)
            super().__init__(max_length)

    lengths = []
    monkeypatch.setattr(gpt, "KVCache", Noting)
    small.generate(torch.zeros(1, 4, dtype=torch.long), new)
    assert max(lengths) == expected


def test_ended_rows_repeat_end_of_text_until_all_have_ended(small):
    def sampled(**options):
        return small.generate(idx, 300, generator=torch.Generator().manual_seed(0), **options)[:, 3:].tolist()

    idx, eot = torch.randint(0, 50, (4, 3), generator=torch.Generator().manual_seed(0)), 7
    ends = [row.index(eot) for row in sampled()]
    expected = [row[:end] + [eot] * (max(ends) + 1 - end) for row, end in zip(sampled(), ends, strict=True)]
    assert min(ends) < max(ends) and sampled(eot=eot) == expected


@pytest.mark.parametrize(
    ("probs", "options", "expected"),
    [
        ([0.5, 0.3, 0.15, 0.05], {"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ([0.15, 0.05, 0.5, 0.3], {"top_p": 0.45}, [0, 0, 1, 0]),
        ([0.1, 0.6, 0.3], {"top_k": 2}, [0, 2 / 3, 1 / 3]),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),  # of the two, the first has 0.571
        ([0.8, 0.2], {"temperature": 0.5}, [16 / 17, 1 / 17]),
        ([0.8, 0.2], {"temperature": 2.0}, [2 / 3, 1 / 3]),
        ([0.6, 0.4, 0.0], {"temperature": 1e-6}, [1, 0, 0]),
    ],
)
def test_temperature_top_k_and_top_p_by_hand(probs, options, expected):
    found = gpt.next_token_probs(torch.tensor([probs]).log(), **options)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert gpt.next_token_probs(torch.tensor([[-3e38, 3e38]]), temperature=1e-6).tolist() == [[0, 1]], "no overflow"


def test_tokens_are_sampled_as_often_as_their_probabilities_say():
    """Half of the probability is in 50,000 tokens of 1e-5 each."""
    logits = torch.full((1, 50_001), 1e-5).log()
    logits[0, 7] = math.log(0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([gpt.sample_next_token(logits.expand(50, -1), generator=generator) for _ in range(12)])
    rare = drawn[drawn != 7]
    assert len(rare) / 600 == pytest.approx(0.5, abs=0.08)  # four standard deviations
    assert len(rare.unique()) > 250 and rare.float().mean().item() == pytest.approx(25_000, rel=0.15)
    assert gpt.sample_next_token(logits, temperature=0).item() == 7


def test_a_call_that_makes_no_sense_is_refused_by_name(small):
    idx = torch.zeros(1, 17, dtype=torch.long)
    calls = {
        "encode takes a string, not int": lambda: Tokenizer.bytes().encode(5),
        "decode takes a list of ids": lambda: Tokenizer.bytes().decode("text"),
        "such as idx[0].tolist()": lambda: Tokenizer.bytes().decode(idx),
        "idx is a tensor of ids, (B, T)": lambda: small.generate("text", 3),
        "end-of-text": lambda: small.generate(idx[:, :0], 1),
        "17 tokens do not fit into the context of 16": lambda: small(idx),
        "top_p is 0": lambda: small.generate(idx, 1, top_p=0),
        "top_p is 1.1": lambda: small.generate(idx, 1, top_p=1.1),
        "top_k is 0": lambda: small.generate(idx, 1, top_k=0),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=regex.escape(message)):
            call()
    assert Tokenizer.bytes().decode(torch.tensor([97, 98])) == Tokenizer.bytes().decode(iter([97, 98])) == "ab"


# ---- Checkpoints ----
def bytes_model(**shape):
    return GPT(GPTConfig(**{"block_size": 16, "vocab_size": 257, "n_layer": 3, "n_head": 2, "n_embd": 8} | shape))


def test_a_checkpoint_comes_back_as_it_was(learned):
    model = bytes_model(vocab_size=300)
    gpt.save_checkpoint("here", model, learned, step=3)
    again, tokenizer = gpt.load_checkpoint("here")
    assert not again.training and again.config == model.config
    assert tokenizer.ranks == learned.ranks and tokenizer.kind == "bpe"
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    assert again.lm_head.weight is again.transformer.wte.weight and "lm_head.weight" not in parameters_of("here")
    assert json.loads(Path("here/config.json").read_text())["step"] == 3
    assert sorted(os.listdir("here")) == ["config.json", "model.safetensors", "tokenizer.tiktoken"]


@pytest.mark.parametrize(("old", "new"), [('"n_layer": 3', '"n_layer": 4'), ('"n_embd": 8', '"n_embd": 65536')])
def test_a_config_that_does_not_fit_the_weights_is_refused(old, new):
    gpt.save_checkpoint("here", bytes_model(), Tokenizer.bytes())
    config = Path("here/config.json")
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InputError, match="here is not a readable checkpoint"):
        gpt.load_checkpoint("here")


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded():
    model = bytes_model()
    gpt.save_checkpoint("here", model, Tokenizer.bytes())
    model.transformer.ln_f.bias.data[0] = math.nan
    with pytest.raises(InputError, match=r"ln_f\.bias .* not finite"):
        gpt.save_checkpoint("here", model, Tokenizer.bytes(), overwrite=True)
    gpt.load_checkpoint("here")
    safetensors.torch.save_file(dict(model.named_parameters()), "here/model.safetensors")
    with pytest.raises(InputError, match=r"ln_f\.bias .* not finite"):
        gpt.load_checkpoint("here")


def test_a_name_under_checkpoints_is_found_and_a_missing_one_lists_what_is_there():
    with pytest.raises(InputError, match=r"no checkpoint mine.*python gpt\.py"):
        gpt.load_checkpoint("mine")
    for name in ("one", "two"):
        gpt.save_checkpoint(f"checkpoints/{name}", bytes_model(), Tokenizer.bytes())
    assert gpt.find_checkpoint("one") == gpt.find_checkpoint("checkpoints/one") == Path("checkpoints/one")
    with pytest.raises(InputError, match="one, two"):
        gpt.load_checkpoint("mine")


# ---- Optimizers, schedule, gradients, metric ----
def test_only_matrices_decay_and_every_parameter_has_one_optimizer(small):
    for name, expected in (("adamw", 1), ("muon", 2)):
        optimizers = gpt.make_optimizers(small, TrainConfig(optimizer=name, weight_decay=0.3))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen = [p for group in groups for p in group["params"]]
        assert len(optimizers) == expected and len(seen) == len(set(seen)) == len(list(small.parameters()))
        for group in groups:
            assert all((p.dim() == 2) == (group["weight_decay"] == 0.3) for p in group["params"])
    muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
    assert muon == {id(p) for name, p in small.named_parameters() if ".h." in name and p.dim() == 2}


def test_stacked_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (48, 16), (16, 16), (16, 48), (16, 16), (33, 16)]
    begin = [torch.randn(shape) for shape in shapes]
    ours = [torch.nn.Parameter(p.clone()) for p in begin]
    theirs = [torch.nn.Parameter(p.clone()) for p in begin]
    reference = torch.optim.Muon(theirs, 0.1, 0.2, adjust_lr_fn="match_rms_adamw")
    optimizer = gpt.Muon(ours, 0.1, 0.2, torch.bfloat16)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q, start in zip(ours, theirs, begin, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()  # both orthogonalize in bfloat16


def test_the_learning_rate_warms_up_and_decays_linearly():
    config = TrainConfig(lr=1.0, warmup_steps=10, max_steps=110, min_lr=0.1)
    rates = [gpt.learning_rate(step, config) for step in (0, 4, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1])
    assert gpt.learning_rate(5, TrainConfig(warmup_steps=5, max_steps=5)) == TrainConfig().lr


def gradient(model, data, dtype=torch.float32, **config):
    model.zero_grad()
    loss, tokens = gpt.forward_backward(model, data, 0, TrainConfig(**config), dtype)
    return loss, tokens, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulated_gradients_equal_those_of_the_whole_batch(small):
    data = TokenDataset(np.random.default_rng(0).integers(0, 50, 11 * 16 + 4), 16)  # of 12 windows, one has 3 targets
    loss, tokens, whole = gradient(small, data, batch_size=12)
    parts_loss, parts_tokens, parts = gradient(small, data, batch_size=3, grad_accum=4)
    assert tokens == parts_tokens == 11 * 16 + 3
    assert loss == pytest.approx(parts_loss, rel=1e-6) and torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)


def test_bfloat16_gives_nearly_the_loss_and_gradient_of_float32(small):
    data = TokenDataset(np.random.default_rng(0).integers(0, 50, 400), 16)
    loss, _, exact = gradient(small, data)
    rounded_loss, _, rounded = gradient(small, data, torch.bfloat16)
    assert loss == pytest.approx(rounded_loss, rel=0.01) and loss != rounded_loss
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


# ---- Training ----
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nothing disturbed: its folder, its flags, and what it printed."""
    home = tmp_path_factory.mktemp("trained")
    (home / "prose.txt").write_text(PROSE)
    flags = [*TINY, "--data", str(home / "prose.txt"), "--dropout", "0.2", "--grad_accum", "2"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        gpt.main([*flags, "--out", str(home / "run")])
    return SimpleNamespace(home=home, folder=home / "run", flags=flags, out=out.getvalue(), err=err.getvalue())


def log_of(folder):
    return [line.split(",") for line in Path(folder, "log.csv").read_text().splitlines()]


def test_training_writes_its_checkpoint_and_prints_its_result(trained):
    files = [gpt.CONFIG, gpt.VOCABULARY, gpt.MODEL, gpt.STATE, "log.csv", "loss.png"]
    assert sorted(os.listdir(trained.folder)) == sorted(files)
    header, *rows = log_of(trained.folder)
    assert header == ["step", "tokens", "seconds", "lr", "train_loss", "val_loss", "val_bits_per_byte", "grad_norm"]
    assert [row[0] for row in rows] == ["0", "4", "8", "12"] and rows[1][1] == str(4 * 2 * 4 * 16)
    losses = [float(row[5]) for row in rows]
    assert losses == sorted(losses, reverse=True), "it learns"
    described = json.loads((trained.folder / "config.json").read_text())
    assert described["model"]["n_layer"] == 2 and described["training"]["max_steps"] == 12
    assert described["tokenizer"] == "bytes" and described["validation"]["loss"] == pytest.approx(min(losses))
    assert trained.out.count("\n") == 1 and "bits per byte" in trained.out
    assert "step 4 of 12" in trained.err and "\x1b" not in trained.err


@pytest.mark.parametrize("flags", ["--n_layer 3", "--optimizer adamw", "--preset tiny", "--data other.txt"])
def test_a_resumed_run_keeps_its_shape_and_its_text(trained, flags, capsys):
    shutil.copytree(trained.folder, "here")
    Path("other.txt").write_text(PROSE + "more")
    run_main(gpt.main, "--resume", "--out", "here", *flags.split(), expect=2)
    assert regex.search("n_layer|optimizer|--preset|the data .* changed", capsys.readouterr().err.splitlines()[-1])


def test_the_saved_weights_are_those_of_the_best_validation_and_patience_ends_the_run(trained, monkeypatch):
    def uphill(model, step):
        for p in model.parameters():
            p.grad *= -1 if step >= 4 else 1

    after_backward(monkeypatch, uphill)
    gpt.main([*trained.flags, "--out", "here", "--max_steps", "100", "--patience", "2"])
    model, tokenizer = gpt.load_checkpoint("here")
    losses = [float(row[5]) for row in log_of("here")[1:]]
    best = min(losses)
    assert best < losses[-1] and losses.index(best) == len(losses) - 3
    data = TokenDataset(gpt.load_data([str(trained.home / "prose.txt")], "bytes")[2], 16)
    found = gpt.evaluate(model, data, tokenizer, 4, gpt.resolve_dtype("auto", torch.device("cpu")))
    assert found["loss"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("grad_clip", "least", "most"), [(0.5, 0.499, 0.501), (0, 100, math.inf)])
def test_steps_follow_the_schedule_clip_the_gradient_and_drop_anew(prose, grad_clip, least, most, monkeypatch):
    def steep(model, step):
        masks.add(tuple(gpt.Dropout(0.5).train()(torch.ones(64)).tolist()))
        for p in model.parameters():
            p.grad *= 1000

    class Noting(torch.optim.AdamW):
        def step(self):
            rates.append({group["lr"] for group in self.param_groups})
            grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat(grads).norm().item())
            super().step()

    rates, norms, masks = [], [], set()
    after_backward(monkeypatch, steep)
    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    flags = ["--data", prose, "--out", "here", "--optimizer", "adamw", "--max_steps", 6, "--grad_clip", grad_clip]
    run_main(gpt.main, *TINY, *flags)
    config = TrainConfig(warmup_steps=2, max_steps=6)
    assert rates == [{gpt.learning_rate(step, config)} for step in range(6)] and len(masks) == 6
    assert all(least < norm < most for norm in norms)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(prose, where, monkeypatch, capsys):
    def poison(model, step):
        if step == 6 and where == "gradient":
            next(model.parameters()).grad[0, 0] = math.inf
        return math.nan if step == 6 and where == "loss" else None

    after_backward(monkeypatch, poison)
    run_main(gpt.main, *TINY, "--data", prose, "--out", "here", expect=2)
    assert regex.search(f"error: the .*{where} .*at step 6.*--lr", capsys.readouterr().err.splitlines()[-1])
    run, tensors, _ = gpt.load_run("here")
    assert run["step"] == 4 and all(tensor.isfinite().all() for tensor in tensors.values())
    gpt.load_checkpoint("here")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--preset gpt2 --vocab_size 257", {"n_embd": 16, "max_steps": 12, "dropout": 0.1, "grad_accum": 16}),
        ("--preset shakespeare-10min", {"out": "checkpoints/shakespeare"}),
        ("--max_steps 12", {"out": "checkpoints/scratch", "dropout": 0.0}),
        ("--max_steps 600", {"dropout": 0.15}),
        ("--max_steps 600 --dropout 0", {"dropout": 0.0}),
    ],
)
def test_flags_beat_presets_and_some_defaults_depend_on_the_text(flags, expected, monkeypatch):
    def stop(model, tokenizer, train_data, val_data, config, *_, **__):
        settled.update(vars(model.config) | vars(config))
        sys.exit()

    settled = {}
    monkeypatch.setattr(gpt, "train", stop)
    monkeypatch.setattr(gpt, "load_texts", lambda names: [PROSE])
    with pytest.raises(SystemExit):
        gpt.main([*TINY, *flags.split()])
    assert settled | expected == settled


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "gpt.py"],
        pytest.param(["gpt.py", "--compile"], marks=pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")),
    ],
)
def test_two_processes_and_a_compiled_model_compute_what_one_process_computes(prose, command):
    """With AdamW: Muon orthogonalizes in bfloat16, where the least difference in rounding grows to 2e-4."""
    flags = [*TINY, "--n_layer", 1, "--data", prose, "--dropout", 0, "--dtype", "float32", "--grad_accum", 2]
    flags += ["--optimizer", "adamw"]
    for done in (script("gpt.py", *flags, "--out", "one"), script(*command, *flags, "--out", "two")):
        assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    weights = parameters_of("two")
    for name, weight in parameters_of("one").items():
        assert torch.allclose(weight, weights[name], atol=1e-5), name


# ---- Bad input ----
FILES = {
    "empty.txt": b"",
    "short.txt": b"too short.",
    "utf16.txt": "ab".encode("utf-16"),
    "examples.JSONL": b"{}\n",
    "taken/" + gpt.STATE: b"not a checkpoint",
}
BAD = [
    ("--data taken", r"no \*.txt in taken"),
    ("--data empty.txt", "too little text"),
    ("--data examples.JSONL", "is JSON, not text"),
    ("--data short.txt", "shorter than a window"),
    ("--data utf16.txt", "see line 1, byte 0: if it is utf-16, convert it with iconv -f utf-16 -t utf-8"),
    ("--n_embd 17", "not a multiple"),
    ("--stride 17", "stride 17"),
    ("--vocab_size 300", "bytes has a vocabulary of 257"),
    ("--device cuda:99", "device 'cuda:99' is not available"),
    ("--n_layers 2", "did you mean --n_layer"),
    ("--out=", "out is empty"),
    ("--out taken", "already holds a checkpoint: add --overwrite"),
    ("--out empty.txt/sub", "is not a folder to write to"),
    ("--resume --out nothing", "nothing to resume in nothing"),
    ("--resume --out taken", "can't be resumed"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2_and_nothing_is_overwritten(flags, message, prose, capsys):
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    run_main(gpt.main, *TINY, "--data", prose, *flags.split(), expect=2)
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and err.count("error: ") == 1 and last.startswith("error: ") and regex.search(message, last), err
    assert all(Path(name).read_bytes() == content for name, content in FILES.items())


def test_running_out_of_memory_is_an_error_line_and_a_bug_keeps_its_traceback(capsys):
    @gpt.command
    def fail(error):
        raise error

    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(SystemExit, match="2"):
            fail(error)
        assert capsys.readouterr().err.startswith("error: out of memory")
    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    ("cpu", "training", "generating"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.float32, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_it_is_fast(cpu, training, generating, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    device = torch.device("cpu")
    assert gpt.resolve_dtype("auto", device) == training and native.resolve_dtype("auto", device) == generating
    assert gpt.resolve_dtype("bfloat16", device) == torch.bfloat16
