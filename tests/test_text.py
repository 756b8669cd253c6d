import functools
import random
from unittest import mock

import pytest
import torch
from conftest import rows_of, run_main

import gpt
from debug import text

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
    monkeypatch.setattr(gpt, "sample_next_token", lambda *_: torch.tensor([[next(tokens)]]))
    (row,) = text.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 100, (0,), 0)
    assert (row["text"], row["tokens"], row["verdict"][0]) == ("abcd", 4, "early end")
    with torch.no_grad():
        logits = mine(torch.tensor([list(b"to beabc")]))[0][0, -4:]
    entropies = torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert [row["entropy_start"], row["entropy_end"]] == pytest.approx([entropies[0], entropies[3]], rel=1e-4)


@pytest.mark.parametrize(("showing", "expected"), [(4, "no problem found"), (5, "repetition")])
def test_a_failure_is_one_that_most_samples_show(mine, monkeypatch, showing, expected):
    verdict = mock.Mock(side_effect=[["repetition"]] * showing + [["no problem found"]] * (8 - showing))
    monkeypatch.setattr(text, "verdict", verdict)
    (row,) = text.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 20, (0.8,), 0)
    assert row["verdict"] == [expected] and row["samples"] == 8 and len(row["repeated_range"]) == 2
    assert len({call.args[0]["entropy_end"] for call in verdict.call_args_list}) == 8, "samples differ"


SOURCE = "          to be or not to be, is the question: né? 🙂🙂"
COPIES = [  # sample, its longest run that is in SOURCE, the share in runs of 14 or more
    ("so to be or not to be, that", " to be or not to be, ", 21 / 27),
    ("          ", "", 0),
    ("", "", 0),
    ("not to be, or not to be, ", " or not to be, ", 15 / 25),
    ("on: né? 🙂🙂🙂", "on: né? 🙂🙂", 0),
    (SOURCE, SOURCE, 1),
]


@pytest.mark.parametrize(("sample", "run", "share"), COPIES)
def test_copied_runs_are_found(sample, run, share):
    longest, found = text.copied([sample], text.Runs(SOURCE), least=14)
    assert longest == run and found == [pytest.approx(share, abs=1e-6)]


def test_in_a_long_text_copies_are_found_as_by_looking_at_every_run():
    letters = random.Random(0)
    source = "".join(letters.choices("ab \n", k=20_000))
    samples = [source[i : i + 11] + source[7 * i : 7 * i + 40] + "".join(letters.choices("ab", k=9)) for i in (5, 900)]
    runs = [sample[i:j] for sample in samples for j in range(61) for i in range(j)]
    longest, shares = text.copied(samples, text.Runs(source), least=20)
    assert len(longest) == max(len(run) for run in runs if run in source) >= 40 and longest in source
    for sample, share in zip(samples, shares, strict=True):
        starts = [i for i in range(41) if sample[i : i + 20] in source]
        assert share == len({i for start in starts for i in range(start, start + 20)}) / 60


def test_without_its_training_text_a_table_says_so_and_shows_no_copies(mine, words, capsys):
    run("--model", "mine", "--max_new_tokens", 5)
    out, err = capsys.readouterr()
    assert "copied" not in out and "the longest run" not in out and err.count("copies can't be found") == 1
    gpt.save_checkpoint("copying", mine, gpt.Tokenizer.bytes(), training={"data": ["words.txt"]})
    run("--model", "copying", "--max_new_tokens", 5)
    out, err = capsys.readouterr()
    assert "copied run" in out and "the longest run" in out and "copies can't be found" not in err
