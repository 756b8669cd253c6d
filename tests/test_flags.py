"""Every flag of every script with values that cannot be: one error line, exit status 2, no traceback, nothing written."""

import re
from pathlib import Path

import pytest
from conftest import PROSE, TINY, script

import convert_gpt2
import evaluate
import explore
import finetune
import gpt
import sample
from bench import __main__ as bench
from debug import check, curve, text, verify_gpt2
from extras import export
from notes import pictures

MAIN = {"gpt": gpt.main, "sample": sample.main, "finetune": finetune.main, "evaluate": evaluate.main, "export": export.main,
        "convert_gpt2": convert_gpt2.main, "verify_gpt2": verify_gpt2.main, "bench": bench.main, "pictures": pictures.main,
        "explore": explore.main, "check": check.main, "curve": curve.main, "text": text.main}  # fmt: skip
MODULES = {
    "export": "extras.export",
    "verify_gpt2": "debug.verify_gpt2",
    "bench": "bench",
    "pictures": "notes.pictures",
}
MODULES |= {name: f"debug.{name}" for name in ("check", "curve", "text")}  # what python -m runs
SOUND = {  # what would work: only one flag is spoiled at a time
    "gpt": [*TINY, "--data", "prose.txt", "--out", "new"],
    "sample": ["--model", "mine", "--prompt", "The", "--max_new_tokens", "2"],
    "finetune": ["--model", "mine", "--data", "prose.txt", "--out", "new"],
    "evaluate": ["--model", "mine"],
    "export": ["mine", "--format", "hf", "--out", "new"],
    "convert_gpt2": ["exported", "--out", "new"],
    "verify_gpt2": ["mine"],
    "bench": [],
    "pictures": ["--model", "mine", "--out", "."],
    "explore": ["--model", "mine", "--prompt", "The"],
    "check": ["--model", "mine"],
    "curve": ["mine"],
    "text": ["--model", "mine"],
}
HUGE = str(10**30)
COUNT_BELOW = ["x", "", "1.5", "nan", "inf", "1e3", "0x10", "-1", "0", HUGE]  # for at least 1
COUNT_OR_0 = [value for value in COUNT_BELOW if value != "0"]
RATE = ["x", "", "nan", "inf", "-inf", "-0.1", HUGE, "1e400"]
SHARE = [*RATE, "1"]
CHOICE = ["x", "", "0", "FLOAT32"]
PLACE = ["nowhere", "-1", "nan"]
OUT = ["prose.txt", "prose.txt/x"]
TRAINING = {**dict.fromkeys(["--max_steps", "--batch_size", "--grad_accum", "--val_bytes", "--eval_interval", "--block_size"], COUNT_BELOW),
            **dict.fromkeys(["--stride", "--warmup_steps", "--patience", "--seed"], COUNT_OR_0),
            **dict.fromkeys(["--lr", "--min_lr", "--weight_decay", "--beta2", "--grad_clip"], RATE), "--dropout": SHARE,
            "--optimizer": CHOICE, "--tokenizer": CHOICE, "--device": [*CHOICE, "cuda:99"], "--dtype": [*CHOICE, "int8"],
            "--data": PLACE, "--out": ["", *OUT]}  # fmt: skip
WRONG = {
    "gpt": {**TRAINING, **dict.fromkeys(["--n_layer", "--n_head", "--n_embd", "--vocab_size"], COUNT_BELOW), "--preset": [*CHOICE, "gpt3"]},
    "sample": {**dict.fromkeys(["--max_new_tokens", "--top_k", "--num_samples"], COUNT_BELOW), "--seed": COUNT_OR_0,
               "--temperature": ["x", "", "nan", "inf", "-0.1", "1e400"], "--top_p": [*RATE, "0"], "--model": PLACE, "--adapter": PLACE, "--prompt": [],
               "--prompt_file": PLACE, "--stop": [""], "--device": [*CHOICE, "cuda:99"],
               "--dtype": CHOICE},
    "finetune": {**TRAINING, "--model": PLACE, "--method": CHOICE, "--blocks": COUNT_BELOW, "--rank": COUNT_BELOW, "--alpha": [*RATE, "0"],
                 "--lora_dropout": SHARE, "--targets": ["", "lm_head", "wte"], "--also_eval": PLACE,
                 "--save_adapter": ["", *OUT]},
    "evaluate": {**dict.fromkeys(["--val_bytes", "--batch_size", "--context", "--stride"], COUNT_BELOW), "--model": PLACE, "--data": PLACE,
                 "--split": CHOICE, "--device": [*CHOICE, "cuda:99"], "--dtype": CHOICE},
    "explore": {"--model": PLACE, "--prompt": [""], "--out": ["", "nowhere/x.png"], "--device": [*CHOICE, "cuda:99"]},
    "check": {"--model": PLACE, "--data": PLACE, "--val_bytes": COUNT_BELOW, "--device": [*CHOICE, "cuda:99"]},
    "curve": {},
    "text": {"--model": PLACE, "--prompt": [], "--max_new_tokens": COUNT_BELOW, "--seed": COUNT_OR_0, "--device": [*CHOICE, "cuda:99"]},
    "export": {"--format": CHOICE, "--dtype": CHOICE, "--out": ["", "prose.txt", "/proc/no"]},
    "convert_gpt2": {"--out": ["prose.txt"], "--block_size": COUNT_BELOW, "--revision": [""]},
    "verify_gpt2": {"--reference": PLACE, "--new_tokens": COUNT_BELOW},
    "bench": {"--rounds": COUNT_BELOW, "--steps": COUNT_BELOW, "--only": ["x"], "--picture": ["nowhere/x.png"]},
    "pictures": {"--model": PLACE, "--curves": PLACE, "--out": ["nowhere", "prose.txt", *PLACE]},
}  # fmt: skip
OF_PLACES = {
    "--data",
    "--out",
    "--model",
    "--adapter",
    "--prompt_file",
    "--also_eval",
    "--save_adapter",
    "--reference",
    "--picture",
    "--curves",
}
WITH = {("finetune", "--blocks"): ["--method", "last"]}
UNSPOILED = [(name, flag, value) for name, flags in WRONG.items() for flag, values in flags.items() for value in values]

CONTRADICTIONS = [
    ("gpt", ["--resume", "--preset", "gpt2"], "--resume goes with neither"),
    ("gpt", ["--resume", "--overwrite"], "--resume goes with neither"),
    ("gpt", ["--resume", "--out", "nowhere"], "nothing to resume in nowhere"),
    ("gpt", ["--resume", "--out", "mine", "--n_layer", "7"], "can't change n_layer"),
    ("gpt", ["--out", "mine"], "already holds a checkpoint"),
    ("gpt", ["--n_embd", "17", "--n_head", "2"], "17 is not a multiple of n_head 2"),
    ("gpt", ["--stride", "17"], "stride 17 would skip tokens"),
    ("gpt", ["--vocab_size", "300"], "has a vocabulary of 257"),
    ("gpt", ["--block_size", "1000000"], "shorter than a window"),
    ("gpt", ["--n_embd", "65536", "--n_layer", "1000"], "out of memory"),
    ("gpt", ["--data", "exported/config.json"], "is JSON, not text"),
    ("sample", ["--model", "mine", "mine"], "names a checkpoint twice"),
    ("sample", ["--model", "mine", "exported"], "is not a checkpoint of ours"),
    ("sample", ["--prompt_file", "prose.txt"], "exclude each other"),
    ("sample", ["--adapter", "a", "--model", "mine", "other"], "--adapter belongs to one model"),
    ("sample", ["--adapter", "a", "--dtype", "int8"], "--adapter goes with float32"),
    ("finetune", ["--resume", "--overwrite"], "--resume needs --out"),
    ("finetune", ["--resume", "--out", "mine"], "is a run of gpt.py"),
    ("finetune", ["--out", "mine"], "is the base itself"),
    ("finetune", ["--method", "full", "--rank", "4"], "goes with --method lora"),
    ("finetune", ["--method", "lora", "--blocks", "1"], "goes with --method last"),
    ("finetune", ["--method", "last", "--blocks", "3"], "the model has only 2"),
    ("finetune", ["--data", "prose.txt", "x.jsonl"], "mixes .jsonl with other texts"),
    ("explore", ["--text", "--json"], "not allowed with argument"),
    ("evaluate", ["--stride", "9", "--context", "8"], "stride 9 would skip tokens"),
    ("evaluate", ["--context", "17"], "--context 17 does not fit mine"),
    ("export", ["--format", "hf", "--dtype", "q8_0"], "--dtype goes with --format gguf"),
    ("verify_gpt2", ["--random", "--reference", "exported"], "--random"),
    ("bench", ["x"], "there is no part x"),
    ("bench", ["train", "--scaling"], "exclude each other"),
    ("bench", ["--plan", "--scaling"], "exclude each other"),
    ("sample", ["--prompt_file", "exported", "--prompt", "x"], "exclude each other"),
    ("bench", ["train", "generate", "--only", "x"], "--only"),
]
UNKNOWN = [("gpt", "--n_layers", "--n_layer"), ("gpt", "--learning_rat", None), ("gpt", "", None),
           ("gpt", "--batch-size", "--batch_size"), ("sample", "--topp", "--top_p"), ("sample", "--max_tokens", "--max_new_tokens"),
           ("finetune", "--ranks", "--rank"), ("finetune", "--methods", "--method"),
           ("export", "--fmt", "--format")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(module_folder):
    """A text, a checkpoint of ours and an exported one."""
    Path("prose.txt").write_text(PROSE)
    gpt.main([*TINY, "--data", "prose.txt", "--out", "mine"])
    export.main(["mine", "--format", "hf", "--out", "exported"])
    return module_folder


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Run a script's main in the folder -> its error line, having made sure that it is the only one and that nothing was written."""
    monkeypatch.chdir(folder)

    def tried(*_, **__):
        pytest.fail("the work began")

    monkeypatch.setattr(gpt, "train", tried)
    monkeypatch.setattr(bench, "measure", tried)

    def run(name, argv):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".cache" not in path.parts}
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            MAIN[name](argv)
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and out == "" and len(errors) == 1 and "Traceback" not in err, (
            end.value.code,
            out,
            err,
        )
        assert len(errors[0]) > 15, errors[0]
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if ".cache" not in path.parts}
        assert before == after, "something was written"
        return errors[0]

    return run


def without(argv, flags):
    """The words of a command line but for some flags and their values."""
    left, dropping = [], False
    for word in argv:
        dropping = word in flags if word.startswith("--") else dropping
        left += [] if dropping else [word]
    return left


def spoiled(name, flag, value):
    return [*without(SOUND[name], [flag]), *WITH.get((name, flag), []), f"{flag}={value}"]


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, flags in WRONG.items() for flag in flags])
def test_a_value_that_cannot_be_is_one_error_line(refused, name, flag):
    for value in WRONG[name][flag]:
        error = refused(name, spoiled(name, flag, value))
        place = (
            value.encode("utf-8", "replace").decode() if flag in OF_PLACES else value
        )  # stderr shows a stray byte as ?
        assert re.search(rf"\b{flag[2:]}\b", error) or len(value) > 1 and place in error or repr(value) in error, (
            value,
            error,
        )


def test_the_table_has_every_flag_that_takes_a_value(monkeypatch, folder):
    monkeypatch.chdir(folder)

    class Seen(Exception):
        pass

    def seen(parser, argv=None, namespace=None):
        raise Seen(
            {
                a.option_strings[0]
                for a in parser._actions
                if a.option_strings and a.nargs != 0 and type(a).__name__ != "BooleanOptionalAction"
            }
        )

    monkeypatch.setattr(gpt.Parser, "parse_known_args", seen)
    for name, main in MAIN.items():
        with pytest.raises(Seen) as found:
            main(SOUND[name])
        assert found.value.args[0] == WRONG[name].keys(), name


@pytest.mark.parametrize(
    ("name", "more", "message"), CONTRADICTIONS, ids=[f"{name} {' '.join(more)}" for name, more, _ in CONTRADICTIONS]
)
def test_flags_that_contradict_each_other_are_refused(refused, name, more, message):
    argv = {"gpt": [], "finetune": ["--data", "prose.txt"]}[name] if "--resume" in more else without(SOUND[name], more)
    assert message in refused(name, [*argv, *more])


@pytest.mark.parametrize(("name", "flag", "nearest"), UNKNOWN)
def test_an_unknown_flag_is_told_the_nearest(refused, name, flag, nearest):
    error = refused(name, [*SOUND[name], flag])
    assert f"unrecognized arguments: {flag}" in error and (
        f"did you mean {nearest}?" in error if nearest else "see --help" in error
    )


@pytest.mark.parametrize(
    ("name", "argv"),
    [("gpt", ["--lr", "nan"]), ("sample", ["--top_p", "2"]), ("finetune", ["--rank", "0"]), ("evaluate", ["--stride", "-1", "--model", "mine"]),
     ("export", ["nowhere", "--format", "hf", "--out", "new"]), ("convert_gpt2", ["nowhere/at/all"]), ("verify_gpt2", ["nowhere"]), ("bench", ["x"]), ("curve", ["nowhere"]),
     ("explore", ["--prompt", ""]), ("check", ["--val_bytes", "0"]), ("text", ["--seed", "-1"])],
)  # fmt: skip
def test_a_real_process_says_the_same(folder, name, argv):
    done = script(MODULES.get(name, f"{name}.py"), *argv, cwd=folder)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    ), done.stderr
