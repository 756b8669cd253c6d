import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the processor to other programs

import pytest
import torch
from safetensors.torch import load_file

import gpt

ROOT = Path(__file__).resolve().parent.parent
CODE = [path for folder in (".", "debug", "extras", "bench") for path in sorted(ROOT.joinpath(folder).glob("*.py"))]


def run_as(path):
    """What a user runs: gpt.py, debug.check, bench."""
    path = path.relative_to(ROOT)
    return path.name if path.parent == Path() else ".".join(path.with_suffix("").parts).removesuffix(".__main__")


MAINS = [path for path in [*CODE, ROOT / "notes/pictures.py"] if "\nif __name__" in path.read_text(encoding="utf-8")]
SCRIPTS = list(dict.fromkeys(map(run_as, MAINS)))


def main_of(name):
    return importlib.import_module("bench.__main__" if name == "bench" else name.removesuffix(".py")).main


SHARED_VOCABULARY = ROOT.parent / "shared" / "tiktoken_cache"
if SHARED_VOCABULARY.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED_VOCABULARY))

PROSE = (
    "The quick brown fox jumps over the lazy dog. It's a test, isn't it? We'll see what 123 tokens can do;\n"
    "the words repeat, and the words come back again, until the model has learned them all by heart.\n"
) * 40


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own: .cache and checkpoints do not mix."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prose(own_folder):
    path = own_folder / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """The same for what a whole file of tests begins with."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("module")
        patched.chdir(folder)
        yield folder


@pytest.fixture
def words(own_folder):
    """A text in which no long run of tokens comes twice."""
    letters = random.Random(0)
    text = " ".join("".join(letters.choices("abcdefghij", k=letters.randint(1, 8))) for _ in range(6000))
    (own_folder / "words.txt").write_text(text)
    return text


@pytest.fixture
def mine(words):
    """A checkpoint with large weights, so that every figure has something to tell."""
    config = gpt.GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=64)
    gpt.save_checkpoint("checkpoints/mine", enlarge(gpt.GPT(config)), gpt.Tokenizer.bytes())
    return gpt.load_checkpoint("checkpoints/mine")[0]


@pytest.fixture
def small():
    """A model small enough to run anywhere, its weights large enough that every part of it matters."""
    return enlarge(gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=8)))


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    try:
        return gpt.Tokenizer.gpt2()
    except gpt.InputError as error:
        pytest.skip(str(error))


TINY = ["--tokenizer", "bytes", "--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--block_size", "16",
        "--batch_size", "4", "--max_steps", "12", "--eval_interval", "4", "--warmup_steps", "2",
        "--device", "cpu"]  # fmt: skip


def script(name, *args, **options):
    """Run a script (sample.py) or module (debug.check) as a user would, in a process of its own."""
    start = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)}  # where python -m looks, from any folder
    command = [sys.executable, *start, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **options)


def started(argv, main=gpt.main):
    """A main in a process that starts at once, as it is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "tiktoken", "matplotlib.figure", "pytest"])
    process = context.Process(target=main, args=(argv,))
    process.start()
    return process


def after_backward(monkeypatch, act):
    """Call act(model, step) after each forward and backward pass; it may return another loss."""
    original = gpt.forward_backward

    def hooked(model, data, step, config, dtype):
        loss, tokens = original(model, data, step, config, dtype)
        changed = act(model, step)
        return loss if changed is None else changed, tokens

    monkeypatch.setattr(gpt, "forward_backward", hooked)


@contextmanager
def interrupt(monkeypatch, step):
    """Ctrl-C during the given step of training."""
    with monkeypatch.context() as patched:
        after_backward(patched, lambda model, at: os.kill(os.getpid(), signal.SIGINT) if at == step else None)
        yield


def run_main(main, *argv, expect=None):
    """Call a script's main, with the exit status that is expected of it."""
    if expect is None:
        return main([*map(str, argv)])
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv)])
    assert end.value.code == expect


def rows_of(capsys):
    """What was printed, a JSON object a line."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def parameters_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def enlarge(model, seed=0):
    """Block weights, biases and norms large, embeddings small: every known mistake shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.05 if "wte" in name or "wpe" in name else 2 * min(p.shape) ** -0.5 if p.dim() == 2 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * std + (p.dim() == 1 and name.endswith("weight")))
    return model.eval()


def published(folder, tokenizer=None, seed=0, **shape):
    """A folder as on the hub, which transformers writes, with our tokenizer's vocabulary -> transformers' model."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.disable_progress_bar()
    from extras.export import to_hf

    tokenizer = tokenizer or gpt.Tokenizer.bytes()
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": tokenizer.vocab_size} | shape
    config = gpt.GPTConfig(block_size=4, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=4)
    to_hf(gpt.GPT(config), tokenizer, Path(folder))  # for its vocabulary; the rest is replaced
    model = enlarge(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)), seed)
    model.save_pretrained(folder)
    return model
