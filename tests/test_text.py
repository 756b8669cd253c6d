import functools
import math

import pytest
import torch
from conftest import parameters_of, rows_of, run_main
from safetensors.torch import save_file

import gpt
from debug import text
from debug.activations import entropy

run = functools.partial(run_main, text.main, "--device", "cpu")


@pytest.mark.parametrize(
    ("ids", "loop"),
    [([1, 2, 3, 4, 5], (0, 0)), ([7, 7, 7, 7], (4, 1)), ([9, 1, 2, 1, 2, 1, 2, 8], (6, 2)), ([1, 2, 3, 1, 2], (0, 0)), ([], (0, 0)),
     ([5, 1, 2, 3, 4] * 3 + [9], (15, 5)), (list(range(70)) * 2, (0, 0))],
)  # fmt: skip
def test_the_longest_loop_is_found(ids, loop):
    assert text.longest_loop(ids) == loop


def test_figures_of_a_text():
    row = text.measure([1, 2, 3, 1, 2, 3, 1, 2], [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.1], [2.0] * 8, "ab\ufffdd", 10)
    assert row["surprise"] == pytest.approx(2 - 12.6 / 8)
    assert (
        row["repeated"] == pytest.approx(2 / 5)
        and row["distinct_1"] == 3 / 8
        and row["distinct_2"] == 3 / 7
        and row["distinct_3"] == 3 / 6
    )
    assert (row["loop"], row["period"], row["broken"], row["tokens"], row["asked"]) == (8, 3, 0.25, 8, 10)
    assert (row["entropy_start"], row["entropy_end"]) == (4.0, pytest.approx(0.3))


SICK = {
    "early end": ([1, 2, 3], [2.0] * 3, "abc"),
    "a loop": ([*range(40), *[1, 2, 3] * 20], [2.0] * 100, "x"),
    "repetition": (
        [*[1, 2, 3, 4, 5, 90], *range(10, 40), *[1, 2, 3, 4, 5, 91], *range(10, 41), *range(12, 39)],
        [2.0] * 100,
        "x",
    ),
    "collapse": (range(100), [*[3.0] * 60, *[0.05] * 40], "x"),
    "gibberish": (range(100), [2.0] * 100, "a\ufffd" * 20),
    "noise": (range(100), [5.4] * 100, "x"),
    "word salad": (range(100), [2.0] * 100, "x"),
}


@pytest.mark.parametrize("sickness", SICK)
def test_each_sickness_is_named(sickness):
    ids, entropies, words = SICK[sickness]
    surprises = [entropy + 1.5 * (sickness == "word salad") for entropy in entropies]
    found = text.verdict(text.measure(list(ids), list(entropies), surprises, words, 100), 257)
    assert len(found) == 1 and found[0].startswith(sickness)


def test_a_healthy_text_is_left_in_peace():
    found = text.verdict(text.measure(list(range(100)), [2.5] * 100, [2.6] * 100, "a text", 100), 257)
    assert found == ["no problem found"]


def test_the_model_writes_and_is_diagnosed(words, capsys):
    config = gpt.GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64)
    model = gpt.GPT(config)
    gpt.save_checkpoint("checkpoints/newborn", model, gpt.Tokenizer.bytes())
    run("--model", "newborn", "--max_new_tokens", 60, "--json")
    rows = rows_of(capsys)
    assert [row["temperature"] for row in rows] == [0, 0.5, 0.8, 1.0, 1.5]
    assert all(any(words.startswith("noise") for words in row["verdict"]) for row in rows)
    assert any("a loop" in words for words in rows[0]["verdict"]), (
        "an untrained model, asked greedily, says one thing for ever"
    )
    assert rows[-1]["broken"] > 0.2 and any("gibberish" in words for words in rows[-1]["verdict"])
    run("--model", "newborn", "--max_new_tokens", 60)
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("greedy") and "noise (" in out and "a loop (" in out


def test_the_entropies_are_those_before_each_token(mine):
    (row,) = text.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 8, (0,), 0)
    ids = gpt.Tokenizer.bytes().encode("to be")
    made = mine.generate(torch.tensor([ids]), 8, temperature=0)
    with torch.no_grad():
        entropies = torch.distributions.Categorical(logits=mine(made)[0][0, len(ids) - 1 : -1]).entropy()
    assert row["tokens"] == 8 and row["entropy_start"] == pytest.approx(entropies[:2].mean().item(), rel=1e-4)
    assert row["entropy_end"] == pytest.approx(entropies[-2:].mean().item(), rel=1e-4)


def test_what_comes_after_the_end_does_not_count(mine, monkeypatch):
    tokens = iter([*b"abcd", 256, *b"xyz"])
    seen = []

    def sample_next_token(logits, *_):
        seen.append(entropy(logits[0]).item())
        return torch.tensor([[next(tokens)]])

    monkeypatch.setattr(gpt, "sample_next_token", sample_next_token)
    (row,) = text.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 100, (0,), 0)
    assert (
        row["text"] == "abcd"
        and row["tokens"] == 4
        and row["verdict"][0].startswith("early end (after 4 of 100 tokens)")
    )
    assert row["entropy_end"] == pytest.approx(seen[3])


BAD = {
    "no such model": (["--model", "nobody"], "there is no checkpoint nobody"),
    "nothing to write": (["--model", "mine", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
    "negative seed": (["--model", "mine", "--seed", "-1"], "--seed is -1"),
    "endless seed": (["--model", "mine", "--seed", str(2**64)], "--seed is 18446744073709551616"),
    "not a number": (["--model", "poisoned"], "transformer.wte.weight holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    gpt.save_checkpoint("checkpoints/poisoned", mine, gpt.Tokenizer.bytes())
    weights = parameters_of("checkpoints/poisoned")
    weights["transformer.wte.weight"][0] = math.nan
    save_file(weights, "checkpoints/poisoned/model.safetensors")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
