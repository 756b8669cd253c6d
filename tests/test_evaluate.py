import functools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import PROSE, TINY, rows_of, run_main

import evaluate
import gpt
from extras import export

run = functools.partial(run_main, evaluate.main, "--device", "cpu")


def scored_by_transformers(folder, ids, context, stride):
    """The definition once more, with another library's model: each target once, in the first window that has it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    nats, hits, done = 0.0, 0, 1  # the first token is nobody's target
    for start in range(0, len(ids), stride):
        window = torch.tensor([ids[start : start + context]])
        with torch.no_grad():
            logs = model(window).logits[0].log_softmax(-1)
        for at, row in enumerate(logs):
            if done <= start + at + 1 < len(ids):
                nats, hits, done = (
                    nats - row[ids[start + at + 1]].item(),
                    hits + (row.argmax() == ids[start + at + 1]).item(),
                    done + 1,
                )
    assert done == len(ids)
    return nats, hits


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (20, 7), (32, 1)])
def test_figures_are_those_of_an_independent_computation(mine, capsys, context, stride):
    text = PROSE[:1000]
    Path("held_out.txt").write_text(text)
    export.main(["mine", "--format", "hf", "--out", "theirs"])
    capsys.readouterr()
    run(
        "--model",
        "mine",
        "--data",
        "held_out.txt",
        "--context",
        context,
        "--stride",
        stride,
        "--dtype",
        "float32",
        "--json",
    )
    (row,) = rows_of(capsys)
    nats, hits = scored_by_transformers("theirs", [256, *text.encode()], context, stride)
    assert row["tokens"] == len(text) and row["parameters"] == sum(p.numel() for p in mine.parameters())
    assert row["loss"] == pytest.approx(nats / len(text), abs=5e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nats / len(text)), rel=5e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), abs=5e-5)
    assert row["accuracy"] == hits / len(text) > 0


def test_unasked_it_gives_the_figure_of_the_training_log(words, capsys):
    gpt.main([*TINY, "--data", "words.txt", "--out", "checkpoints/mine", "--val_bytes", "700", "--dtype", "float32"])
    capsys.readouterr()
    run("--model", "mine", "--json", "--dtype", "float32")
    (row,) = rows_of(capsys)
    logged = min(gpt.load_run("checkpoints/mine")[0]["rows"], key=lambda row: row["val_loss"])
    assert row["split"] == "val" and row["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-5)
    run("--model", "mine", "--data", "./words.txt")
    assert "was trained on most of ./words.txt: --split val" in capsys.readouterr().err
    run("--model", "mine", "--data", "./words.txt", "--split", "val", "--json", "--dtype", "float32")
    assert rows_of(capsys)[0]["tokens"] == row["tokens"], "the part that training held out"
    run("--model", "mine", "--split", "all", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == len(words.encode()) and "was trained on most of words.txt: --split val" in err
    Path("more.txt").write_text(words[::-1])
    run("--model", "mine", "--data", "words.txt", "more.txt")
    assert "was trained on most of words.txt: the figure says little about new text" in capsys.readouterr().err


def test_bits_per_byte_compare_models_of_different_vocabularies(mine, words, capsys):
    tokenizer = gpt.Tokenizer.bpe([words], 300)
    config = gpt.GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=8)
    gpt.save_checkpoint("checkpoints/other", gpt.GPT(config), tokenizer)
    run("--model", "mine", "other", "--data", "words.txt", "--json", "--dtype", "float32")
    rows = rows_of(capsys)
    assert rows[0]["tokens"] != rows[1]["tokens"] == len(tokenizer.encode(words))
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(
            row["loss"] * row["tokens"] / math.log(2) / len(words.encode()), rel=1e-6
        )
    run("--model", "mine", "other", "--data", "words.txt")
    table = capsys.readouterr().out.splitlines()
    assert (
        table[1].split()[0] == "mine"
        and f"{rows[1]['bits_per_byte']:.4f}" in table[2]
        and "all tokens but the first" in table[-1]
    )
    assert table[4] == "other: words.txt; windows of 16 tokens, 16 apart"


BAD = {
    "no model": ([], "there is no checkpoint scratch"),
    "no such model": (["--model", "nobody"], "there is no checkpoint nobody"),
    "no text": (["--model", "mine"], "mine has no text of its own"),
    "empty text": (["--model", "mine", "--data", "empty.txt"], "empty.txt is shorter than two tokens"),
    "one token": (["--model", "mine", "--data", "one.txt"], "one.txt is shorter than two tokens"),
    "not there": (["--model", "mine", "--data", "nowhere.txt"], "there is no text file nowhere.txt"),
    "context too large": (
        ["--model", "mine", "--data", "words.txt", "--context", "33"],
        "--context 33 does not fit mine: 1 to 32",
    ),
    "no context": (
        ["--model", "mine", "--data", "words.txt", "--context", "0"],
        "--context 0 does not fit mine: 1 to 32",
    ),
    "stride too large": (
        ["--model", "mine", "--data", "words.txt", "--context", "8", "--stride", "9"],
        "--stride 9 would skip tokens",
    ),
    "no stride": (["--model", "mine", "--data", "words.txt", "--stride", "0"], "--stride 0 would skip tokens"),
    "negative batch": (["--model", "mine", "--data", "words.txt", "--batch_size", "-1"], "--batch_size is -1"),
    "one of them missing": (
        ["--model", "mine", "nobody", "--data", "words.txt", "--json"],
        "there is no checkpoint nobody",
    ),
    "no device": (["--model", "mine", "--data", "words.txt", "--device", "abacus"], "device 'abacus' is not available"),
    "NUL": (["--model", "mine", "--data", "nul.txt"], "nul.txt has NUL bytes"),
    "unknown": (["--modle", "mine"], "did you mean --model?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("a")
    Path("nul.txt").write_bytes(b"a\0b")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
