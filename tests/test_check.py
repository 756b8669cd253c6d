import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows_of, run_main

import gpt
from debug import check
from debug.mistakes import peek

run = functools.partial(run_main, check.main, "--device", "cpu")


@pytest.fixture
def subject(mine, words):
    tokens = np.array(gpt.Tokenizer.bytes().encode(words))
    return check.Subject(mine, gpt.Tokenizer.bytes(), tokens[:-3000], tokens[-3000:])


def test_a_sound_checkpoint_passes_every_check(mine, capsys):
    run("--model", "mine", "--data", "words.txt", expect=0)
    out, err = capsys.readouterr()
    assert out.count("True  ") == len(check.CHECKS) and f"all {len(check.CHECKS)} checks passed" in err
    assert torch.__version__ in err


def test_it_needs_no_model(words, capsys, monkeypatch):
    monkeypatch.setattr(gpt.GPTConfig.__init__, "__defaults__", (32, 300, 2, 2, 64, 0.0))
    run("--data", "words.txt", "--json", expect=0)
    assert [row["check"] for row in rows_of(capsys) if row["ok"]] == list(check.CHECKS)


attention, kernel = gpt.attention, gpt.F.scaled_dot_product_attention
batch, encode, append = gpt.TokenDataset.batch, gpt.Tokenizer.encode, gpt.KVCache.append
forward, masked_fill, init_weights = gpt.GPT.forward, torch.Tensor.masked_fill, gpt.GPT.init_weights


def time_first(model, idx, targets=None):
    logits, loss = forward(model, idx, targets)
    return logits if targets is None else logits.transpose(0, 1), loss


def large_embedding(model, module):
    init_weights(model, module)
    if isinstance(module, gpt.GPT):  # comes last
        torch.nn.init.normal_(module.transformer.wte.weight)


def blind(q, k, v, *_, **__):
    """Attention that sees nothing but the token itself."""
    return v[:, :, -q.shape[2] :]


def left_in_training(patch, subject):
    subject.model.transformer.drop.p = 0.2
    subject.model.train()


BREAKAGES = {  # what is broken -> how, and the checks that fail
    "time first": (lambda patch, _: patch(gpt.GPT, "forward", time_first), {"shapes"}),
    "large embedding": (lambda patch, _: patch(gpt.GPT, "init_weights", large_embedding), {"first loss"}),
    "lower case": (lambda patch, _: patch(gpt.Tokenizer, "encode", lambda t, s: encode(t, s.lower())), {"round trip"}),
    "targets are the inputs": (
        lambda patch, _: patch(gpt.TokenDataset, "batch", lambda d, w: batch(d, w)[:1] * 2),
        {"targets"},
    ),
    "targets skip one": (
        lambda patch, _: patch(gpt.TokenDataset, "batch", lambda d, w: (batch(d, w)[0][:, :-1], batch(d, w)[1][:, 1:])),
        {"targets"},
    ),
    "copied text": (lambda _, subject: setattr(subject, "val", subject.train[:3000]), {"repeats"}),
    "mask off by one": (lambda patch, _: patch(gpt, "attention", peek), {"causality", "cache"}),
    "attention sees nothing": (lambda patch, _: patch(gpt, "attention", blind), {"causality"}),
    "kernel without mask": (
        lambda patch, _: patch(gpt.F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: kernel(q, k, v)),
        {"causality", "cache"},
    ),
    "written-out form without mask": (lambda patch, _: patch(torch.Tensor, "masked_fill", lambda x, *_: x), {"cache"}),
    "cache that forgets": (
        lambda patch, _: patch(gpt.KVCache, "append", lambda c, k, v: [x[:, :, -9:] for x in append(c, k, v)]),
        {"cache"},
    ),
    "a frozen bias": (lambda _, subject: subject.model.transformer.ln_f.bias.requires_grad_(False), {"gradients"}),
    "no steps": (lambda patch, _: patch(torch.optim.AdamW, "step", lambda optimizer: None), {"overfit"}),
    "dropout always": (
        lambda patch, _: patch(gpt.Dropout, "forward", lambda d, x: torch.nn.functional.dropout(x, d.p)),
        {"dropout"},
    ),
    "dropout never": (lambda patch, _: patch(gpt.Dropout, "forward", lambda d, x: x), {"dropout"}),
    "left in training": (left_in_training, {"causality", "cache", "dropout"}),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_fails_its_check_and_no_other(subject, monkeypatch, name):
    break_it, failing = BREAKAGES[name]
    break_it(monkeypatch.setattr, subject)
    assert {row["check"] for row in check.run_checks(subject) if not row["ok"]} == failing


def test_every_check_can_fail():
    assert set().union(*(failing for _, failing in BREAKAGES.values())) == set(check.CHECKS)


def test_an_error_is_a_failure_and_the_exit_status_says_so(mine, monkeypatch, capsys):
    monkeypatch.setattr(check, "CHECKS", {"ids": (lambda subject: subject.model(torch.tensor([[-1]])), "wrong ids")})
    run("--model", "mine", "--data", "words.txt", expect=1)
    out, err = capsys.readouterr()
    assert "IndexError" in out and "wrong ids" in err and "1 of 1 checks failed" in err


@pytest.mark.parametrize(("width", "vocabulary", "context"), [(768, 257, 64), (1600, 257, 4), (16, 300, 3)])
def test_new_models_of_any_width_begin_with_a_healthy_loss(width, vocabulary, context):
    config = gpt.GPTConfig(block_size=context, vocab_size=vocabulary, n_layer=1, n_head=1, n_embd=width)
    tokens = np.arange(100)
    assert check.first_loss(check.Subject(gpt.GPT(config), gpt.Tokenizer.bytes(), tokens, tokens))[1]


BAD = {
    "no such model": (["--model", "nobody"], "there is no checkpoint nobody"),
    "too little text": (["--model", "mine", "--data", "short.txt"], "use more"),
    "no device": (["--model", "mine", "--data", "words.txt", "--device", "abacus"], "device 'abacus' is not available"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    Path("short.txt").write_text("too short to check")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
