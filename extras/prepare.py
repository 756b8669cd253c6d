"""Tokenize a corpus larger than memory, into a folder that gpt.py maps into memory instead of reading it.

    python -m extras.prepare corpus --out data/corpus         # a folder of *.txt, or files
    python gpt.py --data data/corpus

It writes train.bin and val.bin, two bytes an id (four if the vocabulary has more than 65,536 tokens), and
tokenizer.tiktoken: the tokens that `python gpt.py --data corpus` would train on. It reads the corpus three times: to
measure and check it, to learn the vocabulary, and to tokenize it.
"""

import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import gpt
from gpt import InputError, Tokenizer, require

FILES = {"train.bin", "val.bin", "tokenizer.tiktoken"}


def find_files(names):
    """Files and folders of *.txt -> files, in the order of gpt.load_texts."""
    files = []
    for name in map(Path, names):
        if name.is_dir():
            texts = [path for path in sorted(name.rglob("*")) if path.suffix.lower() == ".txt"]
            files.extend(path for path in texts if "/." not in f"/{path.relative_to(name).as_posix()}")
        else:
            require(name.is_file(), f"there is no text file {name}: give files, or folders of *.txt")
            files.append(name)
    return files


def is_text(text):
    """Whether it has no NUL byte and no 100,000 spaces in a row, which fill a block of 50,000."""
    blocks = (text[i : i + 50_000] for i in range(0, len(text), 50_000))
    spaces = any(block.isspace() for block in blocks) and re.search(r"\s{100000}", text)  # alone, the search is slow
    return "\0" not in text and not spaces


def read_pieces(path, size=10**6):
    """Stream the text that gpt.read_text returns, in pieces of `size` characters that tokenize as the whole does."""
    pattern = re.compile(gpt.PIECE.replace("1000000", str(size)))
    held, rest = "", ""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for chunk in iter(lambda: file.read(size), ""):
                chunk = held + chunk
                held = "\r" if chunk.endswith("\r") else ""  # a \n may follow
                text = rest + chunk.removesuffix(held).replace("\r\n", "\n")
                require(is_text(text), f"{path} has NUL bytes, or 100,000 spaces in a row: it isn't text")
                *pieces, rest = pattern.findall(text) or [""]  # the last piece may go on in the next chunk
                yield from pieces
                if len(rest) > 8 * size:  # no space in it: cut it anywhere
                    yield rest
                    rest = ""
        if rest + held:
            yield rest + held
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def read_corpus(files, cut, size):
    """Stream (split, piece): "train" up to byte `cut`, then "val"; a piece of None begins each text."""
    position = 0
    for path in files:
        previous = None
        for piece in read_pieces(path, size):
            content = piece.encode()
            head = content[: max(0, cut - position)].decode(errors="ignore")  # never half a character
            position += len(content)
            for split, text in (("train", head), ("val", piece[len(head) :])):
                if text and split != previous:
                    yield split, None
                    previous = split
                if text:
                    yield split, text


def prepare(names, out, tokenizer="bpe", vocab_size=1024, val_bytes=2**20, overwrite=False, size=10**6):
    """Write the folder `out`, whole or not at all -> number of tokens {"train": ..., "val": ...}.

    `tokenizer` is bpe, bytes, gpt2 or a Tokenizer, as in gpt.load_data.
    """
    out = Path(out)
    ours = out.is_dir() and {path.name for path in out.iterdir()} <= FILES
    message = f"{out} already exists: add --overwrite (which replaces only what prepare wrote), or choose another --out"
    require(not out.exists() or (overwrite and ours), message)
    require(1 <= vocab_size <= 2**24, f"vocab_size is {vocab_size}, expected 257 to {2**24}")
    require(1 <= val_bytes <= 2**40, f"val_bytes is {val_bytes}, expected 1 to {2**40}")
    files = find_files(names)
    n_bytes, n_characters = 0, 0
    for path in tqdm(files, "measuring", unit=" files", disable=None, leave=False):
        for piece in read_pieces(path, size):
            n_bytes += len(piece.encode())
            n_characters += len(piece)
    n_val = min(n_bytes // 10, val_bytes)
    require(n_val > 0, f"{' '.join(names)} is too little text to split in two")
    cut = n_bytes - n_val
    if tokenizer == "bpe":  # merges are learned from at most 16 MB, spread evenly over the text, as in gpt.load_data
        train = (piece for split, piece in read_corpus(files, cut, size) if piece and split == "train")
        tokenizer = Tokenizer.bpe(islice(train, 0, None, 1 + n_characters // 2**24), vocab_size)
    elif isinstance(tokenizer, str):
        tokenizer = getattr(Tokenizer, tokenizer)()
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True)
        (part / "tokenizer.tiktoken").write_text(tokenizer.dumps())
        counts = write_tokens(part, tokenizer, read_corpus(files, cut, size), n_bytes)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        raise InputError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def write_tokens(folder, tokenizer, corpus, n_bytes):
    """Tokenize the pieces of read_corpus on all cores, into train.bin and val.bin -> number of tokens of each."""
    counts = {"train": 0, "val": 0}
    n_cores = os.cpu_count()
    waiting = deque()  # what the pool encodes, in order

    def encode(piece):
        ids = [tokenizer.eot] if piece is None else tokenizer.encoding.encode_to_numpy(piece, disallowed_special=())
        return np.asarray(ids).astype(tokenizer.dtype)

    def write(split, piece, encoded):
        ids = encoded.result()
        ids.tofile(files[split])
        counts[split] += len(ids)
        bar.update(len((piece or "").encode()))

    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="tokenizing", total=n_bytes, unit="B", unit_scale=True, disable=None))
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in counts}
        pool = stack.enter_context(ThreadPoolExecutor(n_cores))
        for split, piece in corpus:
            waiting.append((split, piece, pool.submit(encode, piece)))
            if len(waiting) > 2 * n_cores:
                write(*waiting.popleft())
        while waiting:
            write(*waiting.popleft())
    return counts


@gpt.command
def main(argv=None):
    parser = gpt.Parser(prog="python -m extras.prepare", description="Tokenize a corpus for python gpt.py --data OUT.")
    parser.add_argument("names", nargs="+", metavar="data", help="text files, or folders of *.txt")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--tokenizer", choices=("bpe", "bytes", "gpt2"), default="bpe", help="default: bpe, learned")
    parser.add_argument("--vocab_size", type=int, default=1024, help="size of a learned vocabulary (default: 1024)")
    parser.add_argument("--val_bytes", type=int, default=2**20, help="of the last tenth, at most this (default: 1 MiB)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run has written to --out")
    options = parser.parse_args(argv)
    counts = prepare(**vars(options))
    print(f"{counts['train']:,} tokens for training, {counts['val']:,} for validation")
    gpt.log(f"try: python gpt.py --data {options.out}")


if __name__ == "__main__":
    main()
