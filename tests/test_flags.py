"""Every flag of every script: a reason in --help, and for an impossible value one error line, with nothing written."""

from pathlib import Path

import pytest
from conftest import PROSE, SCRIPTS, TINY, main_of, script

import gpt
from extras import export

MAIN = {name: main_of(name) for name in SCRIPTS}
SOUND = {  # command lines that would work: only one flag is spoiled at a time
    "gpt.py": [*TINY, "--data", "prose.txt", "--out", "new"],
    "sample.py": ["--model", "mine", "--prompt", "The", "--max_new_tokens", "2"],
    "finetune.py": ["--model", "mine", "--data", "prose.txt", "--out", "new"],
    "evaluate.py": ["--model", "mine"],
    "explore.py": ["--model", "mine", "--prompt", "The"],
    "convert_gpt2.py": ["exported", "--out", "new"],
    "debug.check": ["--model", "mine"],
    "debug.curve": ["mine"],
    "debug.text": ["--model", "mine"],
    "debug.verify_gpt2": ["mine"],
    "extras.export": ["mine", "--format", "hf", "--out", "new"],
    "extras.prepare": ["prose.txt", "--out", "new"],
    "bench": [],
    "notes.pictures": ["--model", "mine", "--out", "."],
}
NOT_A_NUMBER = ["x", "", "nan", "-1", "1" + 30 * "0"]


@pytest.fixture(scope="module")
def folder(module_folder):
    """A text, a checkpoint of ours and an exported one."""
    Path("prose.txt").write_text(PROSE)
    gpt.main([*TINY, "--data", "prose.txt", "--out", "mine", "--max_steps", "4"])
    export.main(["mine", "--format", "hf", "--out", "exported"])
    return module_folder


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Run a script's main -> its one error line, nothing having been written."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(gpt, "train", lambda *_, **__: pytest.fail("training began"))

    def files():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".cache" not in path.parts}

    def run(name, argv):
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            MAIN[name](argv)
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and out == "" and len(errors) == 1 and files() == before, (argv, out, err)
        return errors[0]

    return run


def actions_of(name, monkeypatch):
    """The flags that a script's parser has."""

    def note(parser, *_):
        found.extend(parser._actions)
        raise SystemExit

    found = []
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(gpt.Parser, "parse_known_args", note)
        MAIN[name](SOUND[name])
    return [action for action in found if action.option_strings]


@pytest.mark.parametrize("name", MAIN)
def test_every_flag_is_explained(name, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        MAIN[name](["--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
    assert all(action.help for action in actions_of(name, monkeypatch))


@pytest.mark.parametrize("name", MAIN)
def test_a_value_that_cannot_be_is_one_error_line(refused, name, monkeypatch):
    for action in actions_of(name, monkeypatch):
        flag = action.option_strings[0]
        values = ["x", ""] if action.choices else NOT_A_NUMBER if action.type in (int, float) else []
        values += ["nowhere"] * (flag in ("--model", "--data"))
        for value in values:
            error = refused(name, [*SOUND[name], f"{flag}={value}"])
            assert flag[2:] in error or value in error, (flag, value, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_a_real_process_says_the_same(folder, name):
    done = script(name, "--no_such_flag", cwd=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
