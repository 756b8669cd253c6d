"""extras/prepare.py makes of a corpus larger than memory what gpt.py makes of a text, or nothing at all."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PROSE, ROOT, run_main

import gpt
from extras.prepare import main, prepare

WORDS = ["word ", "It's\r\n", "\n\n", "  x", "é ", "日本。", "👩‍👩‍👧 ", "\r\r\n", "\x1c a", "\u00a0 b", gpt.EOT]


def make_corpus(seed):
    """A folder of texts with everything that a border could fall on, and of files that do not belong to it."""
    chance = random.Random(seed)
    folder = Path(f"corpus{seed}")
    for name in ("a.txt", "b/c.TXT", "b/d.txt", "e.txt"):
        text = "".join(chance.choices(WORDS, k=chance.choice([0, 1, 5, 200]))) + "end"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xef\xbb\xbf" * chance.randrange(2) + text.encode())
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "notes.md").write_text("notes")
    return [str(folder)]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_the_tokens_are_those_of_gpt_py_however_the_files_are_cut_into_pieces(own_folder, kind):
    for seed in range(40):
        names = make_corpus(seed)
        val_bytes = random.Random(seed).choice([1, 2, 30, 2**20])
        tokenizer, train, val = gpt.load_data(names, kind, 280, val_bytes)
        counts = prepare(names, "out", kind, 280, val_bytes, overwrite=True, size=15 + seed)
        prepared, *ids = gpt.load_data(["out"])
        assert prepared.ranks == tokenizer.ranks and counts == {"train": len(train), "val": len(val)}
        assert np.array_equal(ids[0], train) and np.array_equal(ids[1], val) and ids[0].dtype == train.dtype
    assert {path.name for path in Path().iterdir() if "out" in path.name} == {"out"}


def test_a_line_without_a_space_is_cut_and_loses_nothing(own_folder):
    line = "".join(random.Random(0).choices("abcé日\r", k=20_000))
    Path("line.txt").write_bytes(line.encode())
    prepare(["line.txt"], "out", "bytes", size=100)
    tokenizer, train, val = gpt.load_data(["out"])
    assert tokenizer.decode([*train, *val]) == line


@pytest.mark.parametrize("content", [b"a\0" * 50, b"a\xff" * 50, b"a" * 100 + b"\xe6\x97", b" " * 200_000, b"short"])
def test_what_is_not_text_is_one_error_line_and_nothing_is_written(own_folder, capsys, content):
    Path("bad.txt").write_bytes(content)
    run_main(main, "bad.txt", "--out", "out", expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: bad.txt ") and error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["bad.txt"]


def test_a_folder_is_replaced_only_if_asked_and_only_if_prepare_wrote_it(prose):
    prepare(["prose.txt"], "out", vocab_size=257)
    for out, overwrite in ((".", True), ("prose.txt", True), ("out", False)):
        with pytest.raises(gpt.InputError, match="already exists"):
            prepare(["prose.txt"], out, overwrite=overwrite)
    assert gpt.load_data(["out"])[0].vocab_size == 257
    prepare(["prose.txt"], "out", vocab_size=300, overwrite=True)
    assert gpt.load_data(["out"])[0].vocab_size == 300


def test_interrupted_it_leaves_nothing_and_keeps_what_was_there(prose, monkeypatch):
    prepare(["prose.txt"], "made/out", vocab_size=257)

    def interrupted(folder, *_):
        (folder / "train.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("extras.prepare.write_tokens", interrupted)
    run_main(main, "prose.txt", "--out", "made/out", "--overwrite", expect=130)
    assert [path.name for path in Path("made").iterdir()] == ["out"]
    assert gpt.load_data(["made/out"])[0].vocab_size == 257


@pytest.mark.slow
def test_memory_stays_flat_however_large_the_corpus_is(own_folder):
    peaks = []
    for megabytes in (10, 60):
        Path("big.txt").write_text(PROSE * (megabytes * 10**6 // len(PROSE)))
        peak = 0
        command = [sys.executable, "-m", "extras.prepare", own_folder / "big.txt", "--out", own_folder / "out"]
        with subprocess.Popen([*command, "--overwrite"], cwd=ROOT) as process:
            while process.poll() is None:
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.02)
        assert process.returncode == 0
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 30e6, peaks  # the text alone is 50 MB more, and its tokens are larger
