import functools
import shlex

import pytest
import regex
import torch
from conftest import ROOT, SCRIPTS, script

import gpt
from gpt import GPT, GPTConfig, TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands on a line of their own, in the first column of a table, and within a sentence.
COMMANDS = regex.findall(
    r"^(?:\| `)?((?:torchrun \S+ |python )(?:\w+\.py|-m (?!venv)\w+)[^`\n]*)", README, regex.MULTILINE
)
COMMANDS += regex.findall(r"`(python (?:\w+\.py|-m (?!venv)\w+)[^`\n]*)`", README)


def parse(command):
    """A command -> the script or module that it runs, and what comes after it."""
    words = shlex.split(command, comments=True)
    if "-m" in words:
        i = words.index("-m") + 1
        return words[i], words[i + 1 :]
    i = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[i], words[i + 1 :]


@functools.cache
def help_of(name):
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_shows_every_script():
    assert len(COMMANDS) > 30
    assert {parse(command)[0] for command in COMMANDS} == set(SCRIPTS)


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_use_flags_that_exist(line):
    name, words = parse(line)
    flags = {word for word in words if word.startswith("--")}
    assert flags <= set(regex.findall(r"(?<=^\s*|[\s,])--\w+", help_of(name)))


@pytest.mark.parametrize("line", sorted(set(regex.findall(r"`pytest ([^`]+)`", README))))
def test_the_tests_that_are_named_exist(line):
    words = shlex.split(line)
    files = [ROOT / word for word in words if word.startswith("tests/")] or list((ROOT / "tests").glob("test_*.py"))
    names = regex.findall(r"def (test_\w+)", "".join(path.read_text(encoding="utf-8") for path in files))
    for word in words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]:
        assert any(word in name for name in names), word


def test_commands_that_train_have_values_that_fit():
    commands = [parse(line) for line in COMMANDS]
    lines = [flags for name, flags in commands if name == "gpt.py" and "--help" not in flags]
    assert len(lines) > 12
    for flags in lines:
        parser = gpt.Parser()
        for name in ("--preset", "--resume", "--overwrite"):
            parser.add_argument(name, **({} if name == "--preset" else {"action": "store_true"}))
        gpt.add_flags(parser, GPTConfig, TrainConfig)
        parsed = vars(parser.parse_args(flags))
        values = gpt.PRESETS[parsed.pop("preset") or "tiny"] | parsed
        gpt.from_flags(GPTConfig, values), gpt.from_flags(TrainConfig, values)


def test_presets_are_as_they_are():
    for name in gpt.PRESETS:
        shape = GPTConfig.preset(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in GPT(shape).parameters())
        row = (shape.n_layer, shape.n_embd, shape.n_head, shape.block_size, shape.vocab_size, count)
        assert f"| `{name}` | " + " | ".join(f"{value:,}" for value in row) + " |" in README


def test_the_table_of_mistakes_names_them_all():
    from debug import mistakes

    rows = regex.findall(
        r"^\| ([^|`]+) \| \de[+-]\d\d \| [+-]\de[+-]\d\d \| \d+ of 50 \| [^|]+ \|$", README, regex.MULTILINE
    )
    assert rows == list(mistakes.MISTAKES)


def test_shares_and_learning_rates_of_each_method_are_those_of_the_tables():
    import finetune

    for preset, pattern in (
        ("gpt2", r"^\| `{}` \| .* \| ([\d,]+)(?: beside them)? \| ([\d.]+) \|$"),
        ("tiny", r"^\| `{}` \| ([\d.]+)% \|"),
    ):
        for method in finetune.METHODS:
            with torch.device("meta"):
                model = GPT(GPTConfig.preset(preset))
                total = sum(p.numel() for p in model.parameters())
                finetune.choose(model, finetune.FinetuneConfig(data=["-"], method=method))
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            shown = regex.search(pattern.format(regex.escape(method)), README, regex.MULTILINE)
            if preset == "gpt2":
                assert (shown[1], float(shown[2])) == (f"{count:,}", finetune.METHODS[method][1])
            else:
                assert float(shown[1]) == pytest.approx(100 * count / total, rel=0.05)


@pytest.mark.slow
@torch.no_grad()
def test_the_loss_in_the_proof_is_that_of_the_command():
    from debug import verify_gpt2

    model = verify_gpt2.randomize(GPT(GPTConfig.preset("gpt2")))
    idx = verify_gpt2.inputs(model.config, gpt.Tokenizer.bytes())["a paragraph"]
    loss = verify_gpt2.loss_of(model(idx)[0], idx)
    shown = regex.search(r"^\| a paragraph \| 313 \| \S+ \| \S+ \| 100% \| (\S+) \| \1 \|$", README, regex.MULTILINE)
    assert idx.shape == (1, 313) and loss == pytest.approx(float(shown[1]), abs=2e-5)
