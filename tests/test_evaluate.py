import functools
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROSE, TINY, rows_of, run_main

import evaluate
import gpt
from extras import export

run = functools.partial(run_main, evaluate.main, "--device", "cpu")


def scored_by_transformers(folder, ids, context, stride):
    """The definition again, with another library's model: each target once, in the first window that has it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    nats, hits, done = 0.0, 0, 1  # the first token is no target
    for start in range(0, len(ids), stride):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[start : start + context]])).logits[0].log_softmax(-1)
        for target in range(done, min(start + context + 1, len(ids))):
            row = log_probs[target - start - 1]
            nats -= row[ids[target]].item()
            hits += (row.argmax() == ids[target]).item()
            done += 1
    return nats, hits


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (20, 7)])
def test_figures_are_those_of_an_independent_computation(mine, capsys, context, stride):
    text = PROSE[:600]
    Path("held_out.txt").write_text(text)
    export.main(["mine", "--format", "hf", "--out", "theirs"])
    capsys.readouterr()
    window = ["--context", context, "--stride", stride]
    run("--model", "mine", "--data", "held_out.txt", *window, "--dtype", "float32", "--json")
    (row,) = rows_of(capsys)
    nats, hits = scored_by_transformers("theirs", [256, *text.encode()], context, stride)
    assert row["tokens"] == len(text) and row["parameters"] == sum(p.numel() for p in mine.parameters())
    assert row["loss"] == pytest.approx(nats / len(text), abs=5e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nats / len(text)), rel=5e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), abs=5e-5)
    assert row["accuracy"] == hits / len(text) > 0


def test_without_data_the_figures_are_those_of_the_training_log(words, capsys):
    gpt.main([*TINY, "--data", "words.txt", "--out", "checkpoints/mine", "--val_bytes", "700", "--dtype", "float32"])
    capsys.readouterr()
    run("--model", "mine", "--json", "--dtype", "float32")
    (row,) = rows_of(capsys)
    logged = min(gpt.load_run("checkpoints/mine")[0]["rows"], key=lambda row: row["val_loss"])
    assert row["split"] == "val" and row["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-5)
    run("--model", "mine", "--data", "./words.txt", "--split", "val", "--json", "--dtype", "float32")
    assert rows_of(capsys)[0]["tokens"] == row["tokens"], "the part that training held out"
    shutil.copytree("checkpoints/mine", "checkpoints/copy")
    run("--model", "mine", "copy", "--split", "all")
    err = capsys.readouterr().err
    assert "mine, copy: trained on this text" in err and err.count("\n") == 2, "a warning and a footer, once"


def test_bits_per_byte_compare_models_of_different_vocabularies(mine, words, capsys):
    tokenizer = gpt.Tokenizer.bpe([words], 300)
    config = gpt.GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=8)
    gpt.save_checkpoint("checkpoints/other", gpt.GPT(config), tokenizer)
    run("--model", "mine", "other", "--data", "words.txt", "--json", "--dtype", "float32")
    rows = rows_of(capsys)
    assert rows[0]["tokens"] != rows[1]["tokens"] == len(tokenizer.encode(words))
    for row in rows:
        bits = row["loss"] * row["tokens"] / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits / len(words.encode()), rel=1e-6)


TEXT = ["--model", "mine", "--data", "words.txt"]
BAD = {
    "no text": (["--model", "mine"], "mine has no training text"),
    "too little text": (["--model", "mine", "--data", "one.txt"], "one.txt is shorter than two tokens"),
    "large stride": ([*TEXT, "--context", "8", "--stride", "9"], "--stride 9 would skip tokens"),
    "one of them missing": (["--model", "mine", "nobody", *TEXT[2:], "--json"], "there is no checkpoint nobody"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    Path("one.txt").write_text("a")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
