"""Tokenize a corpus larger than memory, into a folder that gpt.py maps into memory instead of reading it.

    python -m extras.prepare corpus --out data/corpus         # a folder of *.txt; files, pydoc and shakespeare work, too
    python gpt.py --data data/corpus

It writes train.bin and val.bin, two bytes an id (four if the vocabulary has more than 65,536 tokens), and
tokenizer.tiktoken: the tokens that `python gpt.py --data corpus` would train on. The corpus is read three times, to
measure and check it, to learn the vocabulary, and to tokenize it, with a few MB of it in memory for each core.
"""

import codecs
import io
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import gpt
from gpt import InputError, Tokenizer, require

FILES = {"train.bin", "val.bin", "tokenizer.tiktoken"}


def find_sources(names):
    """Names as for --data -> files (Path) and built-in texts (str), in the order of gpt.load_texts."""
    for name in names:
        path = gpt.shakespeare() if name == "shakespeare" else Path(name)
        require("json" not in path.suffix.lower(), f"{name} is JSON, not text")
        if name == "pydoc":
            yield from gpt.pydoc()
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() == ".txt"]
            yield from (file for file in files if "/." not in f"/{file.relative_to(path).as_posix()}")
        else:
            yield path


def read_pieces(source, size):
    """Stream the text that gpt.read_text returns, in pieces that tokenize as the whole does. Raises InputError."""
    pattern = re.compile(gpt.PIECE.replace("1000000", str(size)))
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # keeps half a character until the rest comes
    position, held, text, chunk = 0, "", "", True
    try:
        with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source.encode()) as file:
            while chunk:
                chunk = file.read(size)
                nul = chunk.find(0)
                require(nul < 0, f"{source} is not text: NUL at byte {position + nul}")
                position += len(chunk)
                new = held + decoder.decode(chunk, final=not chunk)
                held = "\r" if chunk and new.endswith("\r") else ""  # a \n may follow
                text += new.removesuffix(held).replace("\r\n", "\n")
                require(not re.search(r"\s{100000}", text), f"{source} is not text: 100,000 spaces in a row")
                *pieces, text = pattern.findall(text) or [""]  # the last one may go on in the next chunk
                if len(text) > 8 * size:  # no space in it: cut it anywhere
                    pieces.append(text)
                    text = ""
                yield from pieces
        yield text
    except UnicodeDecodeError as error:
        byte = position - len(error.object) + error.start  # error.object ends where the file has been read to
        raise InputError(f"{source} is not UTF-8: {error.reason} at byte {byte}") from error
    except OSError as error:
        raise InputError(f"{source} could not be read: {error}") from error


def read_corpus(sources, lengths, cut, size):
    """Stream (is_val, piece), validation from byte `cut` on; a piece of None begins each text."""
    for source, length in zip(sources, lengths, strict=True):
        begun = None
        if length == 0:
            yield cut < 0, None
        for piece in read_pieces(source, size):
            content = piece.encode()
            head = content[: max(0, cut)].decode(errors="ignore")  # never half a character
            cut -= len(content)
            for is_val, text in ((False, head), (True, piece[len(head) :])):
                if text:
                    if begun is not is_val:
                        yield is_val, None
                    yield is_val, text
                    begun = is_val


def prepare(names, out, tokenizer="bpe", vocab_size=1024, val_bytes=2**20, overwrite=False, size=10**6):
    """Write the folder `out`, whole or not at all -> number of tokens for training, and for validation."""
    out = Path(out).resolve()
    replaceable = overwrite and out.is_dir() and {file.name for file in out.iterdir()} <= FILES
    require(
        replaceable or not out.exists(), f"{out} exists: choose another --out, or add --overwrite if prepare wrote it"
    )
    sources, lengths, n_characters = list(find_sources(names)), [], 0
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for source in sources:
            lengths.append(0)
            for piece in read_pieces(source, size):
                n_characters += len(piece)
                lengths[-1] += len(piece.encode())
                bar.update(len(piece.encode()))
    n_val = min(sum(lengths) // 10, val_bytes)
    require(n_val > 0, f"{' '.join(names)} is too little text to split in two")
    corpus = (sources, lengths, sum(lengths) - n_val, size)
    if tokenizer == "bpe":  # learned from at most 16 MB, spread evenly, the same as in gpt.load_data
        training = (piece for is_val, piece in read_corpus(*corpus) if piece and not is_val)
        tokenizer = Tokenizer.bpe(islice(training, 0, None, 1 + n_characters // 2**24), vocab_size)
    else:
        tokenizer = getattr(Tokenizer, tokenizer)()
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    def encode(item):
        if item[1] is None:
            return np.array([tokenizer.eot], dtype)
        return tokenizer.encoding.encode_to_numpy(item[1], disallowed_special=()).astype(dtype)

    pieces, counts = read_corpus(*corpus), [0, 0]
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        (part / "tokenizer.tiktoken").write_text(tokenizer.dumps())
        with (
            tqdm(desc="tokenizing", total=sum(lengths), unit="B", unit_scale=True, disable=None) as bar,
            open(part / "train.bin", "wb") as train,
            open(part / "val.bin", "wb") as val,
            ThreadPoolExecutor(os.cpu_count()) as pool,  # threads do, as tiktoken releases Python's lock
        ):
            while batch := list(islice(pieces, 8 * os.cpu_count())):
                for (is_val, piece), ids in zip(batch, pool.map(encode, batch), strict=True):
                    ids.tofile(val if is_val else train)
                    counts[is_val] += len(ids)
                    bar.update(len((piece or "").encode()))
        if out.exists():
            out.rename(old)
        part.rename(out)
    except OSError as error:
        raise InputError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return counts


@gpt.command
def main(argv=None):
    parser = gpt.Parser(prog="python -m extras.prepare", description="Tokenize a corpus for python gpt.py --data OUT.")
    parser.add_argument("names", nargs="+", metavar="data", help="text files, folders of *.txt, pydoc or shakespeare")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--tokenizer", choices=("bpe", "bytes", "gpt2"), default="bpe", help="default: bpe, learned")
    parser.add_argument("--vocab_size", type=int, default=1024, help="size of a learned vocabulary (default: 1024)")
    parser.add_argument("--val_bytes", type=int, default=2**20, help="of the last tenth, at most this (default: 1 MiB)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run has written to --out")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an exception, which tidies up
    train, val = prepare(**vars(options))
    print(f"{train:,} tokens for training and {val:,} for validation; try: python gpt.py --data {options.out}")


if __name__ == "__main__":
    main()
