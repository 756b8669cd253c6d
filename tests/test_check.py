import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of, run_main

import gpt
from debug import check

run = functools.partial(run_main, check.main, "--device", "cpu")


def test_sound_code_passes_every_check(mine, capsys):
    run("--model", "mine", "--data", "words.txt", expect=0)
    out, err = capsys.readouterr()
    assert (
        out.count("ok   ") == len(check.CHECKS)
        and "FAIL" not in out
        and f"all {len(check.CHECKS)} checks passed" in err
    )
    assert out.count("healthy: ") == len(check.CHECKS) and "Python" in err and "torch" in err


def test_it_needs_no_model(words, capsys, monkeypatch):
    monkeypatch.setattr(gpt.GPTConfig.__init__, "__defaults__", (32, 300, 2, 2, 64, 0.0))
    run("--data", "words.txt", "--json", expect=0)
    rows = rows_of(capsys)
    assert [row["check"] for row in rows] == list(check.CHECKS) and all(row["ok"] for row in rows)


def masked(diagonal):
    """Written-out attention whose mask begins elsewhere."""

    def attention(q, k, v, dropout=None, fused=None):
        T, S = q.shape[2], k.shape[2]
        scores = q @ k.mT / math.sqrt(q.shape[3])
        return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + diagonal), -math.inf).softmax(-1) @ v

    return attention


def broken_mask(monkeypatch):
    monkeypatch.setattr(gpt, "attention", masked(2))


def blind_mask(monkeypatch):
    monkeypatch.setattr(gpt, "attention", masked(0))


def only_fused_broken(monkeypatch):
    original = gpt.F.scaled_dot_product_attention
    monkeypatch.setattr(
        gpt.F, "scaled_dot_product_attention", lambda q, k, v, mask=None, p=0.0, is_causal=False: original(q, k, v)
    )


def only_written_out_broken(monkeypatch):
    """Scores are not masked: what comes after a token counts as much as what came before it."""
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda scores, mask, value: scores)


def no_past(monkeypatch):
    monkeypatch.setattr(gpt, "attention", lambda q, k, v, dropout=None, fused=None: v[:, :, -q.shape[2] :])


def unshifted(monkeypatch):
    original = gpt.TokenDataset.batch
    monkeypatch.setattr(gpt.TokenDataset, "batch", lambda self, windows: (original(self, windows)[0],) * 2)


def shifted_twice(monkeypatch):
    original = gpt.TokenDataset.batch

    def batch(self, windows):
        x, y = original(self, windows)
        return x[:, :-1], y[:, 1:]

    monkeypatch.setattr(gpt.TokenDataset, "batch", batch)


def strange_id(monkeypatch):
    original = gpt.load_data

    def load_data(*args):
        tokenizer, train, val = original(*args)
        return tokenizer, train, np.concatenate([val, [257]])

    monkeypatch.setattr(gpt, "load_data", load_data)


def shared_text(monkeypatch):
    original = gpt.split_texts

    def split(texts, val_bytes):
        train, val = original(texts, val_bytes)
        return train, [train[-1][-1000:] + val[0], *val[1:]]

    monkeypatch.setattr(gpt, "split_texts", split)


def copied_text(monkeypatch):
    Path("words.txt").write_text(Path("words.txt").read_text()[:6000] * 2)


def large_embedding(monkeypatch):
    original = gpt.GPT.init_weights

    def init_weights(self, module):
        original(self, module)
        if isinstance(module, gpt.GPT):  # comes last
            torch.nn.init.normal_(module.transformer.wte.weight)

    monkeypatch.setattr(gpt.GPT, "init_weights", init_weights)


def frozen(monkeypatch):
    original = gpt.load_checkpoint

    def load(folder, device="cpu"):
        model, tokenizer = original(folder, device)
        model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
        return model, tokenizer

    monkeypatch.setattr(check, "load_checkpoint", load)


def dropout_on(monkeypatch):
    monkeypatch.setattr(gpt.Dropout, "forward", lambda self, x: torch.nn.functional.dropout(x, self.p, True))


def dropout_off(monkeypatch):
    monkeypatch.setattr(gpt.Dropout, "forward", lambda self, x: x)


def forgetful_cache(monkeypatch):
    original = gpt.KVCache.append

    def append(self, k, v):
        k, v = original(self, k, v)
        return k[:, :, -9:], v[:, :, -9:]

    monkeypatch.setattr(gpt.KVCache, "append", append)


def lossy_file(monkeypatch):
    original = gpt.save_file
    monkeypatch.setattr(
        gpt,
        "save_file",
        lambda tensors, *rest: original({name: p.half().float() for name, p in tensors.items()}, *rest),
    )


def aligned_to_the_top_left(monkeypatch):
    """What is_causal does with fewer queries than keys."""
    original = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda mask, diagonal: original(mask, 1))


def left_in_training(monkeypatch):
    original = gpt.load_checkpoint

    def load(folder, device="cpu"):
        model, tokenizer = original(folder, device)
        for module in model.modules():
            if isinstance(module, gpt.Dropout):
                module.p = 0.2
        return model.train(), tokenizer

    monkeypatch.setattr(check, "load_checkpoint", load)


def silent_error(monkeypatch):
    def forward(self, x):
        raise AssertionError

    monkeypatch.setattr(gpt.MLP, "forward", forward)


def no_steps(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)


def lower_case(monkeypatch):
    original = gpt.Tokenizer.encode
    monkeypatch.setattr(gpt.Tokenizer, "encode", lambda self, text: original(self, text.lower()))


def time_first(monkeypatch):
    original = gpt.GPT.forward

    def forward(self, idx, targets=None):
        logits, loss = original(self, idx, targets)
        return logits if targets is None else logits.transpose(0, 1), loss

    monkeypatch.setattr(gpt.GPT, "forward", forward)


BREAKAGES = {
    broken_mask: {"causality", "cache"},
    blind_mask: {"causality"},
    only_fused_broken: {"causality", "cache"},
    only_written_out_broken: {"causality", "cache"},
    no_past: {"the past"},
    unshifted: {"targets", "first loss"},  # each token's embedding is its own best match in the head
    shifted_twice: {"targets"},
    strange_id: {"token ids"},
    shared_text: {"splits", "repeats"},
    copied_text: {"repeats"},
    large_embedding: {"first loss", "first logits"},
    frozen: {"gradients"},
    dropout_on: {"dropout"},
    dropout_off: {"dropout"},
    forgetful_cache: {"cache"},
    lossy_file: {"save and load"},
    no_steps: {"overfit"},
    aligned_to_the_top_left: {"cache"},
    left_in_training: {"dropout"},
    silent_error: {"shapes"},
    lower_case: {"round trip"},
    time_first: {"shapes"},
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_each_way_to_break_the_code_fails_its_check(mine, capsys, monkeypatch, breakage):
    breakage(monkeypatch)
    run("--model", "mine", "--data", "words.txt", "--json", expect=1)
    out, err = capsys.readouterr()
    failed = {row["check"] for row in map(json.loads, out.splitlines()) if not row["ok"]}
    assert failed >= BREAKAGES[breakage] and f"{len(failed)} of {len(check.CHECKS)} checks failed" in err
    if breakage not in (
        blind_mask,
        left_in_training,
        silent_error,
    ):  # nothing is sound where every number is NaN, noise or an error
        assert failed == BREAKAGES[breakage]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 2)], ids=str)
def test_the_smallest_models_pass_too(words, capsys, shape):
    config = gpt.GPTConfig(block_size=shape[0], vocab_size=300, n_layer=shape[1], n_head=1, n_embd=16)
    gpt.save_checkpoint("checkpoints/least", gpt.GPT(config), gpt.Tokenizer.bytes())
    run("--model", "least", "--data", "words.txt", "--json", expect=0)
    assert next(row for row in rows_of(capsys) if row["check"] == "targets")["measured"].endswith(": 1")


def test_every_check_can_fail():
    assert set().union(*BREAKAGES.values()) == set(check.CHECKS)
    readme = (ROOT / "README.md").read_text()
    assert (
        (len(check.CHECKS), len(BREAKAGES)) == (15, 22)
        and "fifteen things" in readme
        and "in twenty-two ways" in readme
    )


def test_new_models_of_any_width_begin_with_a_healthy_loss(words):
    for width, vocabulary, context in ((768, 257, 64), (1600, 257, 1), (192, 1024, 8), (16, 300, 3)):
        config = gpt.GPTConfig(block_size=context, vocab_size=vocabulary, n_layer=2, n_head=1, n_embd=width)
        tokens = np.array(gpt.Tokenizer.bytes().encode(words))
        subject = check.Subject(
            config, gpt.GPT(config).eval(), gpt.Tokenizer.bytes(), ["words.txt"], 1000, tokens, tokens
        )
        assert check.first_loss(subject)[2], check.first_loss(subject)


BAD = {
    "no such model": (["--model", "nobody"], "there is no checkpoint nobody"),
    "too little to check": (["--model", "mine", "--data", "one.txt"], "one.txt is too little text"),
    "negative split": (["--val_bytes", "-1"], "--val_bytes is -1"),
    "no device": (["--model", "mine", "--data", "words.txt", "--device", "abacus"], "device 'abacus' is not available"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    Path("one.txt").write_text("a")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
