import functools

import pytest
import torch
from conftest import rows_of, run_main

import gpt
from debug import text
from debug.activations import entropy

run = functools.partial(run_main, text.main, "--device", "cpu")


@pytest.mark.parametrize(
    ("ids", "loop"),
    [([1, 2, 3, 4, 5], (0, 0)), ([7, 7, 7, 7], (4, 1)), ([9, 1, 2, 1, 2, 1, 2, 8], (6, 2)), ([], (0, 0))],
)
def test_the_longest_loop_is_found(ids, loop):
    assert text.longest_loop(ids) == loop


def test_figures_of_a_text():
    row = text.measure([1, 2, 3, 1, 2, 3, 1, 2], [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.1], [2.0] * 8, "ab\ufffdd", 10)
    assert row["excess_loss"] == pytest.approx(2 - 12.6 / 8) and row["repeated"] == pytest.approx(2 / 5)
    assert [row[f"distinct_{n}"] for n in (1, 2, 3)] == [3 / 8, 3 / 7, 3 / 6]
    assert (row["loop"], row["period"], row["broken"], row["tokens"], row["asked"]) == (8, 3, 0.25, 8, 10)
    assert (row["entropy_start"], row["entropy_end"]) == (4.0, pytest.approx(0.3))


REPEATED = [*range(5), 90, *range(10, 40), *range(5), 91, *range(10, 41), *range(12, 39)]
TEXTS = {  # finding -> ids, entropies, excess loss, text
    "early end": ([1, 2, 3], [2.0] * 3, 0, "abc"),
    "a loop": ([*range(40), *[1, 2, 3] * 20], [2.0] * 100, 0, "x"),
    "repetition": (REPEATED, [2.0] * 100, 0, "x"),
    "collapse": (range(100), [*[3.0] * 60, *[0.05] * 40], 0, "x"),
    "gibberish": (range(100), [2.0] * 100, 0, "a\ufffd" * 20),
    "noise": (range(100), [5.4] * 100, 0, "x"),
    "word salad": (range(100), [2.0] * 100, 1.5, "x"),
    "no problem found": (range(100), [2.5] * 100, 0.1, "a text"),
}


@pytest.mark.parametrize("finding", TEXTS)
def test_each_failure_is_named(finding):
    ids, entropies, excess, string = TEXTS[finding]
    losses = [entropy + excess for entropy in entropies]
    assert text.verdict(text.measure(list(ids), list(entropies), losses, string, 100), 257) == [finding]


def test_an_untrained_model_is_found_out(own_folder, capsys):
    config = gpt.GPTConfig(block_size=32, vocab_size=300, n_layer=1, n_head=2, n_embd=64)
    gpt.save_checkpoint("checkpoints/scratch", gpt.GPT(config), gpt.Tokenizer.bytes())
    run("--max_new_tokens", 20, "--json")
    rows = rows_of(capsys)
    assert [row["temperature"] for row in rows] == [0, 0.5, 0.8, 1.0, 1.5]
    assert all("noise" in row["verdict"] for row in rows)
    run("--max_new_tokens", 20)
    assert text.ADVICE["noise"] in capsys.readouterr().err


def test_the_entropies_are_those_before_each_token_up_to_the_end_of_text(mine, monkeypatch):
    tokens = iter([*b"abcd", 256, *b"xyz"])
    seen = []

    def sample_next_token(logits, *_):
        seen.append(entropy(logits[0]).item())
        return torch.tensor([[next(tokens)]])

    monkeypatch.setattr(gpt, "sample_next_token", sample_next_token)
    (row,) = text.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 100, (0,), 0)
    assert (row["text"], row["tokens"], row["verdict"][0]) == ("abcd", 4, "early end")
    with torch.no_grad():
        logits = mine(torch.tensor([list(b"to beabc")]))[0][0, -4:]
    entropies = torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert [row["entropy_start"], row["entropy_end"]] == pytest.approx([entropies[0], entropies[3]], rel=1e-4)


def test_a_failure_is_one_that_most_samples_show(mine, monkeypatch):
    figures = iter([[4, 5, 5, 5, 1, 1, 1, 1], [5, 5, 5, 5, 5, 1, 1, 1]])
    calls = []

    def verdict(row, vocab_size):
        calls.append(row)
        return ["repetition"] if values.pop(0) > 1 else ["no problem found"]

    monkeypatch.setattr(text, "verdict", verdict)
    for expected in ("no problem found", "repetition"):
        values = next(figures)
        (row,) = text.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 20, (0.8,), 0)
        assert row["verdict"] == [expected] and row["samples"] == 8 and len(row["repeated_range"]) == 2
    assert len({call["repeated"] for call in calls} | {call["entropy_end"] for call in calls}) > 2, "samples differ"


@pytest.mark.parametrize(
    ("sample", "run", "share"),
    [
        ("nothing here", "not", 0),
        ("so to be or not to be, that", " to be or not to be, ", 21 / 27),
        ("          ", "", 0),
        ("", "", 0),
        ("not to be, or not to be, ", " or not to be, ", 15 / 25),
    ],
)
def test_copied_runs_are_found(sample, run, share):
    source = "          to be or not to be, is the question"
    longest, found = text.copied(sample, source, least=14)
    assert longest == run and found == pytest.approx(share, abs=1e-6)
