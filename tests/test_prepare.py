"""extras/prepare.py makes of a corpus larger than memory what gpt.py makes of a text, or nothing at all."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PROSE, ROOT, TINY, parameters_of

import gpt
from extras.prepare import main, prepare

WORDS = [
    "word ",
    "It's\r\n",
    "\n\n",
    "  x",
    "é ",
    "日本。",
    "👩‍👩‍👧 ",
    "\r\n",
    "\r\r\n",
    "\x1c a",
    "\u00a0 b",
    "<|endoftext|>",
]
COMMAND = [sys.executable, "-m", "extras.prepare"]


def corpus(folder, seed):
    """A folder of texts with everything that a border could fall on, and of files that do not belong to it."""
    chance = random.Random(seed)
    for name in ("a.txt", "b/c.TXT", "b/d.txt", "e.txt"):
        text = "".join(chance.choices(WORDS, k=chance.choice([0, 1, 5, 200]))) + "end"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xef\xbb\xbf" * chance.randrange(2) + text.encode())
    (folder / "empty.txt").touch()
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "notes.md").write_text("notes")


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_the_tokens_are_those_of_gpt_py_however_the_files_are_cut_into_pieces(own_folder, kind):
    for seed in range(40):
        names = [f"corpus{seed}", "pydoc"] if seed == 0 else [f"corpus{seed}"]
        corpus(Path(names[0]), seed)
        vocab_size, val_bytes, size = (
            280,
            random.Random(seed).choice([1, 2, 30, 2**20]),
            10**6 if seed == 0 else 15 + seed,
        )
        tokenizer, train, val = gpt.load_data(names, kind, vocab_size, val_bytes)
        counts = prepare(names, "out", kind, vocab_size, val_bytes, overwrite=True, size=size)
        prepared, *ids = gpt.load_data(["out"])
        assert prepared.ranks == tokenizer.ranks and counts == [len(train), len(val)]
        assert (
            np.array_equal(ids[0], train) and np.array_equal(ids[1], val) and ids[0].dtype == train.dtype == np.uint16
        )
    assert {path.name for path in Path("out").iterdir()} == {"train.bin", "val.bin", "tokenizer.tiktoken"}
    assert not list(Path().glob(".out*"))


def test_a_vocabulary_of_gpt2_is_taken_as_it_is(prose, gpt2_vocabulary):
    prepare(["prose.txt"], "out", "gpt2")
    prepared, train, _ = gpt.load_data(["out"])
    assert prepared.ranks == gpt2_vocabulary.ranks and prepared.eot == train[0] == 50256


def test_gpt_py_trains_from_the_folder_exactly_as_from_the_text(prose):
    main(["prose.txt", "--out", "data", "--vocab_size", "300"])
    flags = [*TINY, "--tokenizer", "bpe", "--vocab_size", "300"]
    gpt.main([*flags, "--data", "prose.txt", "--out", "of_text"])
    gpt.main([*flags, "--data", "data", "--out", "of_folder"])
    whole, again = parameters_of("of_text"), parameters_of("of_folder")
    assert all(whole[name].equal(again[name]) for name in whole)
    gpt.main(["--resume", "--out", "of_folder", "--max_steps", "14"])
    windows = [gpt.TokenDataset(gpt.load_data([name], "bpe", 300)[2], 16) for name in ("prose.txt", "data")]
    assert len(windows[0]) == len(windows[1])
    for one, other in zip(*(data.batch(range(len(data))) for data in windows)):
        assert one.equal(other)


def test_a_line_without_a_space_is_cut_and_loses_nothing(own_folder):
    line = "".join(random.Random(0).choices("abcé日", k=20_000))
    Path("line.txt").write_text(line, encoding="utf-8")
    prepare(["line.txt"], "out", "bytes", size=100)
    tokenizer, train, val = gpt.load_data(["out"])
    assert tokenizer.decode([*train, *val]) == line


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"a" * 50 + b"\0" + b"a" * 50, "NUL at byte 50"), (b"a\r\n" * 20 + b"\xff" + b"a" * 50, "invalid start byte at byte 60"),
     (b"\xef\xbb\xbf" + b"a" * 100 + b"\xe6\x97", "unexpected end of data at byte 103"), (b" " * 200_000, "100,000 spaces"), (b"short", "too little")],
)  # fmt: skip
def test_what_is_not_text_is_one_line_that_names_file_and_byte(own_folder, capsys, content, reason):
    Path("bad.txt").write_bytes(content)
    with pytest.raises(gpt.InputError, match=f"bad.txt.*{reason}"):
        prepare(["bad.txt"], "out", size=7 if len(content) < 1000 else 10**6)
    with pytest.raises(SystemExit) as end:
        main(["bad.txt", "--out", "out"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("out").exists()


def test_a_folder_that_is_there_is_replaced_only_if_asked_and_only_if_prepare_wrote_it(prose):
    for names, out, overwrite in (
        (["missing"], "out", False),
        (["x.json"], "out", False),
        (["prose.txt"], ".", True),
        (["prose.txt"], "prose.txt", True),
    ):
        with pytest.raises(gpt.InputError):
            prepare(names, out, overwrite=overwrite)
    prepare(["prose.txt"], "out", vocab_size=257)
    with pytest.raises(gpt.InputError, match="exists"):
        prepare(["prose.txt"], "out")
    assert gpt.load_data(["out"])[0].vocab_size == 257
    prepare(["prose.txt"], "out", vocab_size=300, overwrite=True)
    assert gpt.load_data(["out"])[0].vocab_size == 300 and [
        path.name for path in Path().iterdir() if "out" in path.name
    ] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_and_what_was_there_stays(prose, number):
    prepare(["prose.txt"], "made/out", vocab_size=257)
    Path("big.txt").write_text(PROSE * 5000)
    command = [
        *COMMAND,
        str(Path("big.txt").resolve()),
        "--out",
        str(Path("made/out").resolve()),
        "--tokenizer",
        "bytes",
        "--overwrite",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not Path("made/.out.part/train.bin").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else 130) and "Traceback" not in err
    assert [path.name for path in Path("made").iterdir()] == ["out"] and gpt.load_data(["made/out"])[
        0
    ].vocab_size == 257


@pytest.mark.slow
def test_memory_stays_flat_however_large_the_corpus_is(own_folder):
    peaks = []
    for megabytes in (10, 100):
        Path("big.txt").write_text(PROSE * (megabytes * 10**6 // len(PROSE)))
        command = [
            *COMMAND,
            str(own_folder / "big.txt"),
            "--out",
            str(own_folder / f"out{megabytes}"),
            "--vocab_size",
            "300",
        ]
        peaks.append(0)
        with subprocess.Popen(
            command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                peaks[-1] = max(peaks[-1], sum(one.memory_info().rss for one in family))
                time.sleep(0.02)
        assert process.returncode == 0
    assert peaks[1] - peaks[0] < 100e6, peaks  # the text alone is 90 MB more, and its tokens are larger
