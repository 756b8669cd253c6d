"""What sample.py claims, one claim a test."""

import io
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import PROSE, ROOT, run_main

import gpt
import sample


@pytest.fixture
def checkpoints():
    """Two small models with different vocabularies."""
    for name, tokenizer in (("first", gpt.Tokenizer.bytes()), ("second", gpt.Tokenizer.bpe([PROSE], 300))):
        torch.manual_seed(len(name))
        model = gpt.GPT(gpt.GPTConfig(block_size=24, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16))
        for p in model.parameters():
            p.data.normal_(std=0.3)
        gpt.save_checkpoint(f"checkpoints/{name}", model, tokenizer)


def speak(capsys, *flags):
    sample.main(["--dtype", "float32", "--device", "cpu", *flags])
    return capsys.readouterr()


def texts(capsys, *flags):
    return [json.loads(line)["text"] for line in speak(capsys, *flags, "--json").out.splitlines()]


def rewrite(name, weight):
    """Save the first model under a name, with another embedding of the end of text: a multiple of the last bias."""
    model, tokenizer = gpt.load_checkpoint("first")
    model.transformer.wte.weight.data[tokenizer.eot] = weight * model.transformer.ln_f.bias.data
    gpt.save_checkpoint(f"checkpoints/{name}", model, tokenizer)


@pytest.mark.parametrize("prompt", ["The fox", ""])
def test_stdout_is_the_prompt_and_the_text_of_generate_alone(checkpoints, capsys, prompt):
    model, tokenizer = gpt.load_checkpoint("second")
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    options = {"temperature": 0.8, "eot": tokenizer.eot, "generator": torch.Generator().manual_seed(1337)}
    tokens = model.generate(torch.tensor([ids]), 30, **options)[0, len(ids) :].tolist()
    tokens = tokens[: tokens.index(tokenizer.eot)] if tokenizer.eot in tokens else tokens
    found = speak(capsys, "--model", "second", "--prompt", prompt, "--max_new_tokens", "30")
    assert found == (prompt + tokenizer.decode(tokens) + "\n", "") and tokens


def test_a_seed_gives_its_samples_again_and_another_seed_gives_others(checkpoints, capsys):
    flags = ["--model", "first", "--prompt", "a", "--num_samples", "3", "--seed"]
    first, again, other = (texts(capsys, *flags, seed) for seed in "112")
    assert first == again and len({*first, *other}) == 6


def test_every_model_gets_the_same_prompt_and_seed(checkpoints, capsys):
    alone = [texts(capsys, "--model", name, "--prompt", "x")[0] for name in ("first", "second")]
    out = speak(capsys, "--model", "first", "second", "--prompt", "x", "--json").out
    first, second = [json.loads(line) for line in out.splitlines()]
    assert first == {"model": "first", "prompt": "x", "sample": 0, "seed": 1337, "text": alone[0]}
    assert second == first | {"model": "second", "text": alone[1]}


def test_several_models_are_side_by_side(checkpoints, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    flags = ["--model", "first", "second", "--prompt", "The fox"]
    head, _, *body = speak(capsys, *flags).out.splitlines()
    assert head.replace(" ", "") == "first|second" and body[0].count("The fox") == 2
    assert all(len(line) <= 100 for line in body)


def test_a_stop_string_ends_the_text_before_it(checkpoints, capsys):
    whole = texts(capsys, "--model", "first", "--prompt", "b")[0]
    stop = whole[5:8]
    out = speak(capsys, "--model", "first", "--prompt", "b", "--stop", "never this", stop).out
    assert out == "b" + whole[: whole.index(stop)] + "\n"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_known():
    assert list(sample.until(["<end>"], ["a<", "e", "nd", ">b"])) == ["a", "", "", ""]
    assert "".join(sample.until(["<end>"], ["a<", "en", "x>"])) == "a<enx>"
    assert "".join(sample.until(["xyz", "b"], ["axyb"])) == "axy"
    assert "".join(sample.until(["aab"], ["aa", "ab"])) == "a"
    assert "".join(sample.until([], ["a", "b"])) == "ab"


def test_generation_ends_at_the_end_of_text(checkpoints, capsys):
    rewrite("silent", 100)
    assert speak(capsys, "--model", "silent", "--prompt", "hello", "--temperature", "0").out == "hello\n"


def test_rows_of_a_padded_vocabulary_say_nothing(own_folder, capsys):
    model = gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=2000, n_layer=1, n_head=1, n_embd=8))
    gpt.save_checkpoint("padded", model, gpt.Tokenizer.bytes())
    assert len(texts(capsys, "--model", "padded", "--prompt", "a", "--max_new_tokens", "40")[0]) < 30


@pytest.mark.parametrize(("ending", "kept"), [("", ""), ("\n", ""), ("\r\n", ""), ("\n\n", "\n")])
def test_a_prompt_is_the_same_from_a_flag_a_file_and_stdin(checkpoints, capsys, monkeypatch, ending, kept):
    """Without byte-order mark and one final line feed, and with \\r\\n as \\n."""
    expected = speak(capsys, "--model", "first", "--prompt", "one\ntwo" + kept)
    text = "\ufeffone\r\ntwo" + kept.replace("\n", "\r\n")
    assert speak(capsys, "--model", "first", "--prompt", text) == expected
    content = f"\ufeffone\r\ntwo{ending}".encode()
    Path("p.txt").write_bytes(content)
    assert speak(capsys, "--model", "first", "--prompt_file", "p.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert speak(capsys, "--model", "first") == expected


def dialogue(capsys, monkeypatch, *typed):
    """What sample.py prints for these prompts, typed in a terminal; an exception is pressed."""
    type_line = mock.Mock(side_effect=[*typed, EOFError])
    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    found = speak(capsys, "--model", "first", "--max_new_tokens", "5")
    assert type_line.call_count == len(typed) + 1
    return found


def test_a_dialogue_names_the_model_and_shows_the_continuation_alone(checkpoints, capsys, monkeypatch):
    one = texts(capsys, "--model", "first", "--max_new_tokens", "5", "--prompt", "one")[0]
    out, err = dialogue(capsys, monkeypatch, "one", "two")
    assert out.startswith(one + "\n") and "one" not in out and "two" not in out
    assert "checkpoints/first" in err and "continue" in err and "Ctrl-D" in err


def test_ctrl_c_ends_a_text_and_not_the_dialogue(checkpoints, capsys, monkeypatch):
    show = mock.Mock(side_effect=[KeyboardInterrupt, None])
    monkeypatch.setattr(sample, "show", show)
    dialogue(capsys, monkeypatch, "one", KeyboardInterrupt, "two")
    assert [call.args[1] for call in show.call_args_list] == ["one", "two"]


def test_a_prompt_may_begin_with_a_dash(checkpoints, capsys):
    out = speak(capsys, "--prompt", "-hello", "--model", "first", "--max_new_tokens", "3").out
    assert out == speak(capsys, "--model", "first", "--prompt=-hello", "--max_new_tokens", "3").out
    assert out.startswith("-hello")


@pytest.mark.parametrize(
    ("flags", "remark"),
    [
        (["--prompt", "a\\nb"], r"\n is a backslash and an n"),
        (["--stop", "\\n"], r"\n is a backslash and an n"),
        (["--num_samples", "2", "--temperature", "0"], "all samples are the same"),
        (["--prompt", "a\nb", "--num_samples", "2"], ""),
    ],
)
def test_what_is_probably_not_meant_gets_a_remark(checkpoints, capsys, flags, remark):
    out, err = speak(capsys, "--model", "first", "--max_new_tokens", "3", "--prompt", "a", *flags)
    assert remark in err and err.count("\n") == bool(remark) and out


def test_a_long_prompt_keeps_its_last_tokens_and_says_so(checkpoints, capsys):
    long, err = speak(capsys, "--model", "first", "--prompt", PROSE, "--temperature", "0")
    assert "7,920 tokens, only the last 24" in err
    short = texts(capsys, "--model", "first", "--prompt", PROSE[-24:], "--temperature", "0")[0]
    assert long == PROSE + short + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "other"], "python convert_gpt2.py other"),
        (["--model", "gpt2"], "run python convert_gpt2.py gpt2 first"),
        (["--model", "adapter"], "--model ITS_BASE --adapter adapter"),
        (["--prompt", "a\ud800"], "is not UTF-8 text"),
        ([], "stdin is not UTF-8 text, see line 2, byte 6: if it is cp1252"),
        (["--prompt_file", "latin.txt"], "latin.txt is not UTF-8 text, see line 2, byte 9"),
    ],
)
def test_bad_input_is_one_line_and_status_2(checkpoints, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\r\ncaf\xe9" if not flags else b"a")))
    Path("latin.txt").write_bytes(b"\xef\xbb\xbfa\r\ncaf\xe9")
    for name, file in (("other", "config.json"), ("adapter", "adapter_config.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    run_main(sample.main, "--model", "first", *flags, expect=2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_needs_no_torch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--help"])
    for name in ("torch", "gpt"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert end.value.code == 0 and "--top_p" in capsys.readouterr().out


def test_a_real_process_streams_as_it_generates(checkpoints):
    rewrite("endless", -100)
    command = [sys.executable, ROOT / "sample.py", "--model", "endless", "--prompt", "a", "--max_new_tokens", "20000"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, as do their children
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert process.stdout.read(20)[:1] == b"a"
    assert process.poll() is None, "it goes on"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.splitlines()[-1:] == [b"interrupted"]
