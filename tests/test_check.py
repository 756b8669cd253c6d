import functools

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
    assert torch.__version__ in err and "checking mine on words.txt" in err
    assert len(out.splitlines()) == 1 + len(check.CHECKS), "a line each"
    assert not any(failure in err for _, failure in check.CHECKS.values())
    run("--model", "mine", "--data", "words.txt", "--verbose", expect=0)
    err = capsys.readouterr().err
    assert all(failure in err for _, failure in check.CHECKS.values())


def test_it_needs_no_model(words, capsys, monkeypatch):
    monkeypatch.setattr(gpt.GPTConfig.__init__, "__defaults__", (32, 300, 2, 2, 64, 0.0))
    run("--data", "words.txt", "--json", expect=0)
    assert [row["check"] for row in rows_of(capsys) if row["ok"]] == list(check.CHECKS)


kernel, batch, encode = gpt.F.scaled_dot_product_attention, gpt.TokenDataset.batch, gpt.Tokenizer.encode
forward, init_weights = gpt.GPT.forward, gpt.GPT.init_weights


def time_first(model, idx, targets=None):
    logits, loss = forward(model, idx, targets)
    return logits if targets is None else logits.transpose(0, 1), loss


def large_embedding(model, module):
    init_weights(model, module)
    if isinstance(module, gpt.GPT):  # comes last
        torch.nn.init.normal_(module.transformer.wte.weight)


def sees_only_itself(q, k, v, *_, **__):
    return v[:, :, -q.shape[2] :]


BREAKAGES = [  # what is replaced, by what, and the checks that fail
    (gpt.GPT, "forward", time_first, {"shapes"}),
    (gpt.GPT, "init_weights", large_embedding, {"first loss"}),
    (gpt.Tokenizer, "encode", lambda tokenizer, text: encode(tokenizer, text.lower()), {"round trip"}),
    (gpt.TokenDataset, "batch", lambda data, windows: batch(data, windows)[:1] * 2, {"targets"}),
    (gpt, "attention", peek, {"causality", "cache"}),
    (gpt, "attention", sees_only_itself, {"causality"}),
    (gpt.F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: kernel(q, k, v), {"causality", "cache"}),
    (torch.Tensor, "masked_fill", lambda scores, *_: scores, {"cache"}),  # the written-out form
    (torch.optim.AdamW, "step", lambda optimizer: None, {"overfit"}),
    (gpt.Dropout, "forward", lambda module, x: gpt.F.dropout(x, module.p, True), {"dropout"}),
    (gpt.Dropout, "forward", lambda module, x: x, {"dropout"}),
]


def failed(subject):
    return {row["check"] for row in check.run_checks(subject) if not row["ok"]}


@pytest.mark.parametrize(("thing", "name", "value", "failing"), BREAKAGES)
def test_broken_code_fails_its_check_and_no_other(subject, monkeypatch, thing, name, value, failing):
    monkeypatch.setattr(thing, name, value)
    assert failed(subject) == failing


def test_a_frozen_parameter_and_validation_text_that_is_trained_on_are_found(subject):
    subject.model.transformer.ln_f.bias.requires_grad_(False)
    subject.val = subject.train[:3000]
    assert failed(subject) == {"gradients", "repeats"}


def test_an_error_is_a_failure_and_the_exit_status_says_so(mine, monkeypatch, capsys):
    monkeypatch.setattr(check, "CHECKS", {"ids": (lambda subject: subject.model(torch.tensor([[-1]])), "wrong ids")})
    run("--model", "mine", "--data", "words.txt", expect=1)
    out, err = capsys.readouterr()
    assert "IndexError" in out and "wrong ids" in err and "1 of 1 checks failed" in err
