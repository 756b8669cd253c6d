"""What sample.py claims, one claim a test."""

import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PROSE, ROOT, script

import gpt
import sample


@pytest.fixture
def checkpoints(own_folder):
    """Two small models with different vocabularies, as a user would have them."""
    for name, tokenizer in (("first", gpt.Tokenizer.bytes()), ("second", gpt.Tokenizer.bpe([PROSE], 300))):
        torch.manual_seed(len(name))
        shape = gpt.GPTConfig(block_size=24, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16)
        model = gpt.GPT(shape)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.3)
        gpt.save_checkpoint(f"checkpoints/{name}", model, tokenizer)
    return own_folder


def speak(capsys, *flags):
    sample.main(["--dtype", "float32", "--device", "cpu", *flags])
    return capsys.readouterr()


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        sample.main(list(flags))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_stdout_is_the_prompt_and_its_continuation_alone(checkpoints, capsys):
    out, err = speak(capsys, "--model", "first", "--prompt", "The fox", "--max_new_tokens", "9")
    assert out.startswith("The fox") and len(out) > 8 and err == ""


def test_the_text_is_what_generate_gives(checkpoints, capsys):
    out, _ = speak(capsys, "--model", "second", "--prompt", "The fox", "--greedy", "--max_new_tokens", "30", "--json")
    model, tokenizer = gpt.load_checkpoint("checkpoints/second")
    ids = model.generate(torch.tensor([tokenizer.encode("The fox")]), 30, temperature=0, eot=tokenizer.eot)[0].tolist()
    ids = ids[len(tokenizer.encode("The fox")) :]
    ids = ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
    assert lines(out)[0]["text"] == tokenizer.decode(ids)


def test_the_same_seed_gives_the_same_text_and_another_does_not(checkpoints, capsys):
    texts = [speak(capsys, "--model", "first", "--prompt", "a", "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_streamed_and_collected_text_are_the_same(checkpoints, capsys):
    streamed, _ = speak(capsys, "--model", "first", "--prompt", "a")
    collected = lines(speak(capsys, "--model", "first", "--prompt", "a", "--json")[0])[0]["text"]
    assert streamed == "a" + collected + "\n"


def test_samples_of_one_batch_differ(checkpoints, capsys):
    found = lines(speak(capsys, "--model", "first", "--prompt", "a", "--num_samples", "3", "--json")[0])
    assert [line["sample"] for line in found] == [0, 1, 2] and len({line["text"] for line in found}) == 3


def test_several_models_stand_side_by_side(checkpoints, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out, _ = speak(capsys, "--model", "first", "second", "--prompt", "The fox")
    head, rule, *body = out.splitlines()
    assert head.split("|")[0].strip() == "first" and head.split("|")[1].strip() == "second" and set(rule) <= set("- |")
    assert all(len(line) <= 100 for line in out.splitlines()) and body[0].count("The fox") == 2
    monkeypatch.setenv("COLUMNS", "40")
    out, _ = speak(capsys, "--model", "first", "second", "--prompt", "The fox")
    assert "=== first ===\nThe fox" in out and "=== second ===\nThe fox" in out


def test_every_model_gets_the_same_prompt_and_seed(checkpoints, capsys):
    alone = [lines(speak(capsys, "--model", name, "--prompt", "x", "--json")[0])[0] for name in ("first", "second")]
    assert lines(speak(capsys, "--model", "first", "second", "--prompt", "x", "--json")[0]) == alone
    assert alone[0].keys() == {"model", "prompt", "sample", "seed", "text"}


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_stop_string_ends_the_text_before_it(checkpoints, capsys, at):
    whole = lines(speak(capsys, "--model", "first", "--prompt", "b", "--json")[0])[0]["text"]
    stop = whole[at : at + 3]
    out, _ = speak(capsys, "--model", "first", "--prompt", "b", "--stop", "never this", stop)
    assert out == "b" + whole[: whole.index(stop)] + "\n"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_known():
    assert list(sample.until(["<end>"], ["a<", "e", "nd", ">b"])) == ["a", "", "", ""]
    assert "".join(sample.until(["<end>"], ["a<", "en", "x>"])) == "a<enx>"
    assert "".join(sample.until(["xyz", "b"], ["axyb"])) == "axy"
    assert "".join(sample.until(["aab"], ["aa", "ab"])) == "a"
    assert "".join(sample.until([], ["a", "b"])) == "ab"


def test_generation_ends_at_the_end_of_text(checkpoints, capsys):
    model, tokenizer = gpt.load_checkpoint("checkpoints/first")
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer.eot] = 100 * model.transformer.ln_f.bias  # the end of text wins at once
    gpt.save_checkpoint("checkpoints/silent", model, tokenizer)
    out, _ = speak(capsys, "--model", "silent", "--prompt", "hello", "--greedy")
    assert out == "hello\n"


def test_prompts_come_from_a_file_and_from_stdin(checkpoints, capsys, monkeypatch):
    expected, _ = speak(capsys, "--model", "first", "--prompt", "from élsewhere")
    (checkpoints / "p.txt").write_text("from élsewhere", encoding="utf-8")
    assert speak(capsys, "--model", "first", "--prompt_file", "p.txt")[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from élsewhere\n".encode()), encoding="latin-1"))
    assert speak(capsys, "--model", "first")[0] == expected


def test_byte_order_marks_and_line_ends_of_windows_are_dropped_everywhere(checkpoints, capsys, monkeypatch):
    text = "\ufeffone\r\ntwo"
    expected, _ = speak(capsys, "--model", "first", "--prompt", "one\ntwo")
    assert speak(capsys, "--model", "first", "--prompt", text)[0] == expected
    (checkpoints / "p.txt").write_bytes(text.encode())
    assert speak(capsys, "--model", "first", "--prompt_file", "p.txt")[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert speak(capsys, "--model", "first")[0] == expected


def test_characters_are_decoded_when_their_bytes_are_complete():
    tokenizer = gpt.Tokenizer.bytes()
    pieces = list(sample.decode_stream(tokenizer, tokenizer.encode("aé🙂b")))
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b", ""]
    assert list(sample.decode_stream(tokenizer, [97, 0xC3])) == ["a", "", "\ufffd"], (
        "an incomplete character at the end"
    )
    assert "".join(sample.decode_stream(tokenizer, [0xFF, 97, tokenizer.eot])) == "\ufffda"
    with pytest.raises(gpt.InputError, match="there is no token 257"):
        list(sample.decode_stream(tokenizer, [257]))


def test_a_prompt_that_is_not_utf8_is_refused(checkpoints):
    command = [sys.executable, str(ROOT / "sample.py"), "--model", "first"]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"error: standard input is not UTF-8")


def test_a_dialogue_in_a_terminal_continues_each_prompt(checkpoints, capsys, monkeypatch):
    typed = iter(["one", "two"])

    def ask(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    out, err = speak(capsys, "--model", "first", "--max_new_tokens", "5")
    assert out.startswith("one") and "\ntwo" in out and "Ctrl-D" in err


def test_an_empty_prompt_begins_from_end_of_text(checkpoints, capsys):
    out, _ = speak(capsys, "--model", "first", "--prompt", "", "--json")
    model, tokenizer = gpt.load_checkpoint("checkpoints/first")
    generator = torch.Generator().manual_seed(1337)
    ids = model.generate(torch.tensor([[tokenizer.eot]]), 200, temperature=0.8, eot=tokenizer.eot, generator=generator)[
        0, 1:
    ].tolist()
    ids = ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
    assert lines(out)[0]["text"] == tokenizer.decode(ids)


def test_a_long_prompt_keeps_its_last_tokens_and_says_so(checkpoints, capsys):
    long, err = speak(capsys, "--model", "first", "--prompt", PROSE, "--greedy", "--json")
    assert "7,920 tokens, only the last 24" in err
    short, _ = speak(capsys, "--model", "first", "--prompt", PROSE[-24:], "--greedy", "--json")
    assert lines(long)[0]["text"] == lines(short)[0]["text"]


def test_bfloat16_speaks_too(checkpoints, capsys):
    sample.main(["--model", "first", "--prompt", "a", "--dtype", "bfloat16", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nobody"], "there is no checkpoint nobody, in checkpoints/ there is first, second"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top_p", "0"], "top_p is 0.0"),
        (["--top_p", "1.5"], "top_p is 1.5"),
        (["--top_k", "0"], "top_k is 0"),
        (["--top_k", "x"], "invalid int"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--num_samples", "0"], "num_samples is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--stop", ""], "--stop is empty"),
        (["--model", "first", "first"], "twice"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--prompt_file", "b"], "exclude each other"),
        (["--dtype", "int3"], "invalid choice"),
        (["--device", "abacus"], "not available"),
        (["--temprature", "1"], "did you mean --temperature?"),
        (["--prompt", "a\ud800"], "--prompt is not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line_and_status_2(checkpoints, capsys, flags, message):
    flags = flags if "--model" in flags else ["--model", "first", *flags]
    flags = flags if {"--prompt", "--prompt_file"} & set(flags) else [*flags, "--prompt", "a"]
    assert message in refused(capsys, *flags)


def test_a_truncated_or_foreign_checkpoint_is_refused(checkpoints, capsys):
    path = checkpoints / "checkpoints/first/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a readable checkpoint" in refused(capsys, "--model", "first", "--prompt", "a")
    (checkpoints / "other").mkdir()
    (checkpoints / "other/config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}')
    assert "python convert_gpt2.py other" in refused(capsys, "--model", "other", "--prompt", "a")
    (checkpoints / "adapter").mkdir()
    (checkpoints / "adapter/adapter_config.json").write_text("{}")
    assert "--model ITS_BASE --adapter adapter" in refused(capsys, "--model", "adapter", "--prompt", "a")


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['sample.py', '--help']; import sample; sample.main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--top_p" in done.stdout, done.stderr


@pytest.fixture
def endless(checkpoints):
    """The first model, but the end of text never comes."""
    model, tokenizer = gpt.load_checkpoint("checkpoints/first")
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer.eot] = -100 * model.transformer.ln_f.bias
    gpt.save_checkpoint("checkpoints/first", model, tokenizer, overwrite=True)


def test_a_real_process_streams_as_it_generates(endless):
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        "--model",
        "first",
        "--prompt",
        "a",
        "--max_new_tokens",
        "20000",
    ]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in the background of a shell it is ignored, here and in children
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert process.stdout.read(20)[:1] == b"a"
    assert process.poll() is None  # still at it
    process.send_signal(2)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.splitlines()[-1:] == [b"interrupted"]


def test_a_reader_who_leaves_early_is_no_error(endless):
    command = f"{sys.executable} {ROOT / 'sample.py'} --model first --prompt a --max_new_tokens 3000 | head -c 20"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=False)
    assert len(done.stdout) == 20 and done.stderr == b""


def test_rows_that_no_token_has_say_nothing(small, capsys):
    model = gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=2000, n_layer=1, n_head=1, n_embd=8))
    gpt.save_checkpoint("padded", model, gpt.Tokenizer.bytes())
    sample.main(["--model", "padded", "--prompt", "a", "--max_new_tokens", "40", "--json"])
    assert len(json.loads(capsys.readouterr().out)["text"]) < 30


def test_a_prompt_from_the_shell_works_end_to_end(checkpoints):
    done = script("sample.py", "--model", "second", "--prompt", "The fox", "--max_new_tokens", "10")
    assert done.returncode == 0 and done.stdout.startswith("The fox") and done.stderr == ""


def test_readme_commands_use_flags_that_exist():
    import shlex

    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.startswith("python sample.py")]
    assert len(lines) > 4
    for line in lines:
        sample.add_arguments(gpt.Parser()).parse_args(shlex.split(line)[2:])
