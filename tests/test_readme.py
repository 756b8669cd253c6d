"""README and notes/reference.md are true: their commands run, and their counts are those of the code."""

import contextlib
import json
import shlex
from pathlib import Path

import pytest
import regex
import torch
from conftest import PROSE, ROOT, SCRIPTS, TINY, main_of, published, run_main

import finetune
import gpt
from gpt import GPT, GPTConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "notes/reference.md").read_text(encoding="utf-8")
COMMAND = r"^(?:\| `)?((?:torchrun \S+ |python )(?:\w+\.py|-m \w+)[^`\n]*)"  # on its own line, or in a table
COMMANDS = list(dict.fromkeys(regex.findall(COMMAND, README, regex.MULTILINE)))
MORE = set(regex.findall(COMMAND, REFERENCE, regex.MULTILINE)) | set(regex.findall(r"`(python [^`\n]+)`", README))
MORE |= {f"python gpt.py {flags}" for flags in regex.findall(r"^\| `(--[^`]+)` \| \d", REFERENCE, regex.MULTILINE)}
SMALLER = {  # what makes a command fast here; a later flag wins
    "gpt.py": [*TINY, "--max_steps", "2", "--block_size", "64"],
    "finetune.py": ["--max_steps", "2", "--batch_size", "2", "--block_size", "8"],
    "sample.py": ["--max_new_tokens", "4"],
    "debug.text": ["--max_new_tokens", "8"],
}
SLOW = ("torchrun", "--random", "-m bench", "-m debug.check")  # with tests of their own


def parse(command):
    """A command -> the script or module that it runs, and what comes after it."""
    words = shlex.split(command, comments=True)
    i = words.index("-m") + 1 if "-m" in words else next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[i], words[i + 1 :]


def write_sums():
    """Run the line of the README that makes sums.jsonl -> its examples."""
    code = regex.search(r"^python -c '(.*)' > sums\.jsonl$", README, regex.MULTILINE)[1]
    with open("sums.jsonl", "w") as file, contextlib.redirect_stdout(file):
        exec(code, {})
    return [json.loads(line) for line in Path("sums.jsonl").read_text().splitlines()]


@pytest.fixture
def a_newcomers_folder(own_folder, monkeypatch):
    """The files that README speaks of, small ones."""
    for name in ("my.txt", "held_out.txt", "my_folder/a.txt", "corpus/a.txt", ".cache/shakespeare.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(PROSE)
    write_sums()
    published("hf")
    monkeypatch.setattr(gpt, "pydoc", lambda: iter([PROSE]))
    return own_folder


def test_the_commands_of_the_readme_run_in_its_order_and_then_its_python(a_newcomers_folder, capsys):
    for command in COMMANDS:
        if any(word in command for word in SLOW):
            continue
        name, flags = parse(command.replace("convert_gpt2.py gpt2 ", "convert_gpt2.py hf --out checkpoints/gpt2 "))
        flags += ["--max_steps", "4"] if "--resume" in flags else SMALLER.get(name, [])
        status = run_main(main_of(name), *flags)
        assert not status, command
    capsys.readouterr()
    for code in regex.findall(r"```python\n(.*?)```", README, regex.DOTALL):
        exec(code, {})
    assert capsys.readouterr().out.count("The import statement") == 2


@pytest.mark.parametrize("command", sorted({*COMMANDS, *MORE}))
def test_a_command_uses_flags_that_exist(command, capsys):
    name, words = parse(command)
    assert name in SCRIPTS
    with pytest.raises(SystemExit):
        main_of(name)(["--help"])
    flags = {word for word in words if word.startswith("--")}
    assert flags <= set(regex.findall(r"(?<=^\s*|[\s,])--[\w-]+", capsys.readouterr().out))


def test_the_readme_names_every_script_and_fits_on_a_page():
    for name in set(SCRIPTS) - {"notes.pictures"}:
        assert (name if name.endswith(".py") else name.rpartition(".")[2]) in README, name
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("line", sorted(set(regex.findall(r"`(?:[^`]*&& )?pytest (tests[^`]+)`", REFERENCE))))
def test_the_tests_that_are_named_exist(line):
    path, *rest = shlex.split(line)
    names = regex.findall(r"def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"))
    for word in rest[1].split(" or ") if rest else []:
        assert any(word in name for name in names), word


def count_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", gpt.PRESETS)
def test_the_table_of_presets_is_true(name):
    shape = GPTConfig.preset(name)
    with torch.device("meta"):
        count = count_parameters(GPT(shape))
    row = (shape.n_layer, shape.n_embd, shape.n_head, shape.block_size, shape.vocab_size, count)
    assert f"| `{name}` | " + " | ".join(f"{value:,}" for value in row) + " |" in REFERENCE


@pytest.mark.parametrize("method", finetune.METHODS)
def test_the_table_of_methods_is_true(method):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2"))
        finetune.choose(model, finetune.FinetuneConfig(data=["-"], method=method))
    row = rf"^\| `{regex.escape(method)}`(?: \(default\))? \| .* \| ([\d,]+)(?: added)? \| ([\d.]+) \|$"
    shown = regex.search(row, README, regex.MULTILINE)
    assert shown[1] == f"{count_parameters(model):,}" and float(shown[2]) == finetune.METHODS[method][1]


@pytest.mark.slow
def test_the_command_of_the_readme_teaches_a_small_model_to_add(own_folder, capsys):
    """Here with a base that was trained for a quarter of the time."""
    examples = write_sums()
    sums = {example["prompt"] + example["completion"] for example in examples}
    assert sums == {f"{a}+{b}={a + b}" for a in range(10) for b in range(10)}
    gpt.main(["--max_steps", "200", "--eval_interval", "200", "--device", "cpu"])
    command = next(command for command in COMMANDS if "sums.jsonl" in command)
    finetune.main([*parse(command)[1], "--device", "cpu"])
    model, tokenizer = gpt.load_checkpoint("sums")
    right = []
    for example in examples:
        ids = tokenizer.encode(example["prompt"])
        answer = model.generate(torch.tensor([ids]), 4, temperature=0, eot=tokenizer.eot)[0, len(ids) :].tolist()
        right.append(tokenizer.decode(answer) == example["completion"])
    assert sum(right[:90]) >= 85, "the sums that it has seen"
    assert sum(right[90:]) >= 5, "and those that it has not, where chance is one in ten"
