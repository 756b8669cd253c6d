"""A GPT in one file, to be read from top to bottom: text becomes tokens, tokens become windows, windows go through
embeddings, attention and MLPs to a loss, and the loss trains the model. `python gpt.py` does all of it.

Shapes stand beside the operations: B batch, T time (tokens in a window), C channels, H heads, D = C / H channels per
head, V vocabulary. The architecture is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"), so that the published weights fit.
"""

import argparse
import base64
import codecs
import ctypes
import dataclasses
import difflib
import functools
import gc
import hashlib
import heapq
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration. Every field is also a command-line flag, and the words beside it are its help.


def flag(default, reason, low=0, high=2**40, choices=None):
    factory = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": reason, "low": low, "high": high, "choices": choices})


def check_fields(config):
    for field in dataclasses.fields(config):
        value, kind, rule = getattr(config, field.name), field.type, field.metadata
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        expected = kind.__name__
        if rule["choices"]:
            fits, expected = value in rule["choices"], "one of " + ", ".join(rule["choices"])
        elif kind in (int, float):
            fits = fits and rule["low"] <= value <= rule["high"]
            expected = f"{rule['low']} to {rule['high']}"
        require(fits, f"{field.name} is {value!r}, expected {expected}")


@dataclasses.dataclass
class GPTConfig:
    """The shape of the model; the defaults are the preset `tiny`. Raises InputError for one that cannot be."""

    block_size: int = flag(64, "context: how many tokens the model sees at once", 1, 2**20)
    vocab_size: int = flag(1024, "bytes, merges and end of text together, for a tokenizer that is learned", 1, 2**24)
    n_layer: int = flag(4, "blocks: how often attention and MLP alternate", 1, 1000)
    n_head: int = flag(4, "attention heads per block: how many things a token can look for at once", 1, 2**16)
    n_embd: int = flag(192, "channels: the width of the residual stream", 1, 2**16)
    dropout: float = flag(0.0, "share of activations zeroed in training; if not given, 0.15 for text seen over 4 times", 0, 0.99)

    def __post_init__(self):
        check_fields(self)
        require(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def n_parameters(self):
        """Embeddings of tokens (which are the head, too) and positions; 12 C² + 13 C in each block; the final norm."""
        return (self.vocab_size + self.block_size + 2) * self.n_embd + self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd)

    @classmethod
    def preset(cls, name):
        """The model's part of a preset; raises InputError for an unknown name."""
        require(name in PRESETS, f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        return from_flags(cls, PRESETS[name])


@dataclasses.dataclass
class TrainConfig:
    """What is learned, and how; the defaults are the preset `tiny`, and README.md has the comparison that chose them."""

    data: list = flag(["pydoc"], "text files, folders of *.txt, or the names pydoc and shakespeare")
    tokenizer: str = flag("bpe", "bpe (learned from the text), bytes or gpt2", choices=("bpe", "bytes", "gpt2"))
    out: str = flag("checkpoints/scratch", "folder for the checkpoint")
    max_steps: int = flag(800, "optimizer steps", 1)
    batch_size: int = flag(32, "windows per forward pass, over all processes", 1, 2**20)
    grad_accum: int = flag(1, "forward passes per step: a larger batch in the same memory", 1, 2**20)
    stride: int = flag(0, "tokens from one window's start to the next; 0 means a quarter of the context")
    val_bytes: int = flag(2**20, "the last tenth of the text is for validation, at most this many bytes", 1)
    optimizer: str = flag("muon", "muon (AdamW beside it) or adamw", choices=("muon", "adamw"))
    lr: float = flag(4e-3, "peak learning rate", 0, 10)
    min_lr: float = flag(0.0, "learning rate at the end, as a share of the peak", 0, 1)
    warmup_steps: int = flag(40, "steps of linear warm-up, while the optimizer's averages settle")
    weight_decay: float = flag(0.1, "pull of the matrices towards zero", 0, 10)
    beta2: float = flag(0.99, "memory of AdamW's squared gradients", 0, 0.999999)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 means no limit")
    eval_interval: int = flag(100, "steps from one validation, which saves a checkpoint, to the next", 1)
    patience: int = flag(0, "validations without a new best after which training ends; 0 means never")
    seed: int = flag(1337, "the same seed on the same machine gives the same weights", 0, 2**32)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: str = flag("auto", "of matrix products; auto is bfloat16 where native", choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the model: slow to start, needs a C++ compiler")

    def __post_init__(self):
        check_fields(self)
        require(self.data and all(isinstance(name, str) for name in self.data), "--data is missing: give files of text, folders, pydoc "
                "or shakespeare")  # fmt: skip


def from_flags(config_class, flags):
    """The fields of a dataclass picked out of a dict of flags."""
    return config_class(**{f.name: flags[f.name] for f in dataclasses.fields(config_class) if f.name in flags})


GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768,
        "dropout": 0.1, "batch_size": 1, "grad_accum": 16, "optimizer": "adamw", "lr": 6e-4, "min_lr": 0.1, "beta2": 0.95,
        "warmup_steps": 700, "max_steps": 100_000, "eval_interval": 1000}  # fmt: skip
PRESETS = {  # dicts of flag defaults; flags that are given win
    "tiny": {},
    "shakespeare-10min": {"data": ["shakespeare"], "out": "checkpoints/shakespeare", "max_steps": 3500, "dropout": 0.2, "eval_interval": 250},
    "scratch-152m": GPT2 | {"n_layer": 16},
    "gpt2": GPT2,
    "gpt2-medium": GPT2 | {"n_layer": 24, "n_head": 16, "n_embd": 1024, "lr": 3e-4},
    "gpt2-large": GPT2 | {"n_layer": 36, "n_head": 20, "n_embd": 1280, "lr": 2.5e-4},
    "gpt2-xl": GPT2 | {"n_layer": 48, "n_head": 25, "n_embd": 1600, "lr": 2e-4},
}


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens. A token is a string of bytes with a number. Byte-pair encoding (Gage 1994; Sennrich et al. 2016)
# begins with the 256 bytes and keeps merging the most frequent pair of neighbours; GPT-2 merges within words only.

EOT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what GPT-2 takes for a word
LONGEST_WORD = 64  # bytes in which merges are looked for together
LONG_BLANK = regex.compile(r"(?<!\s)\s{99999}")


def train_bpe(texts, vocab_size):
    """Learn merges from an iterable of strings -> {bytes of a token: its number}, at most vocab_size of them.

    The counts of all pairs are kept up to date: a merge visits only the words that contain the pair.
    """
    counts = Counter(itertools.chain.from_iterable(regex.findall(SPLIT, text) for text in texts))
    words = []  # (its bytes, how often it occurs); a long word in pieces, as each merge goes through all of it
    for word, count in counts.items():
        spelled = list(word.encode())
        words += [(spelled[at : at + LONGEST_WORD], count) for at in range(0, len(spelled), LONGEST_WORD)]
    pairs, places = Counter(), defaultdict(set)  # pair -> how often it occurs; pair -> the words it occurs in
    for i, (word, count) in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += count
            places[pair].add(i)
    queue = [(-count, pair) for pair, count in pairs.items()]  # most frequent first; among equals, oldest tokens first
    heapq.heapify(queue)
    ranks = {bytes([byte]): byte for byte in range(256)}
    spelling = list(ranks)  # number -> bytes
    while queue and len(ranks) < vocab_size:
        count, pair = heapq.heappop(queue)
        if pairs[pair] != -count:
            continue  # an outdated entry: the pair was queued again when its count changed
        new = ranks.setdefault(spelling[pair[0]] + spelling[pair[1]], len(ranks))  # two pairs can spell the same token
        if new == len(spelling):
            spelling.append(spelling[pair[0]] + spelling[pair[1]])
        changed = Counter()
        for i in places.pop(pair):
            word, count = words[i]
            for before in itertools.pairwise(word):
                changed[before] -= count
            for at in range(len(word) - 1):
                if tuple(word[at : at + 2]) == pair:
                    word[at : at + 2] = [new]
            for after in itertools.pairwise(word):
                changed[after] += count
                places[after].add(i)
        for neighbours, change in changed.items():
            pairs[neighbours] += change
            if change and pairs[neighbours]:
                heapq.heappush(queue, (-pairs[neighbours], neighbours))
    return ranks


class Tokenizer:
    """A vocabulary on tiktoken's encoder. `eot`, the number that no token has, is the end of text: no text encodes to it."""

    def __init__(self, ranks, kind):
        self.ranks, self.kind, self.vocab_size = ranks, kind, len(ranks) + 1
        self.eot = min(set(range(self.vocab_size)) - set(ranks.values()))  # the last number, for all vocabularies made here
        self.encoding = tiktoken.Encoding(kind, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: self.eot})

    @classmethod
    def bytes(cls):
        return cls({bytes([byte]): byte for byte in range(256)}, "bytes")

    @classmethod
    def bpe(cls, texts, vocab_size):
        require(vocab_size >= 257, f"vocab_size is {vocab_size}, but the bytes and the end of text alone are 257")
        return cls(train_bpe(texts, vocab_size - 1), "bpe")

    @classmethod
    def gpt2(cls):
        """The published vocabulary of 50,257 tokens, downloaded or from tiktoken's cache."""
        try:
            published = tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise InputError(
                f"the GPT-2 vocabulary (vocab.bpe, encoder.json) could not be had: {type(error).__name__}. Go online once, "
                "or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy of it, or use --tokenizer bpe"
            ) from error
        return cls({published.decode_single_token_bytes(i): i for i in range(published.eot_token)}, "gpt2")

    def encode(self, text):
        """text -> list of token numbers. All of it is plain text, the characters `<|endoftext|>` too."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode: {error}") from error
        if LONG_BLANK.search(text):  # tiktoken's search for words overflows its stack at a million blanks
            return [i for word in regex.findall(SPLIT, text) for i in self.one_word.encode_ordinary(word)]
        return self.encoding.encode_ordinary(text)

    @functools.cached_property
    def one_word(self):
        """The same merges for a text that is one word."""
        return tiktoken.Encoding(self.kind, pat_str="(?s).+", mergeable_ranks=self.ranks, special_tokens={})

    def decode(self, ids):
        """Token numbers -> text; bytes that form no character become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Decode token by token: bytes that begin a character are held back until it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            require(0 <= i < self.vocab_size, f"token id {i} is outside the vocabulary of {self.vocab_size}")
            yield decoder.decode(self.encoding.decode_single_token_bytes(i))
        yield decoder.decode(b"", final=True)

    @functools.cached_property
    def n_bytes(self):
        """(V,) the length of each token in bytes; the end of text has none."""
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        lengths[list(self.ranks.values())] = torch.tensor([len(token) for token in self.ranks])
        return lengths

    def dumps(self):
        """The tokens in tiktoken's file format, one a line: the bytes in base64, and the number."""
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())

    @classmethod
    def loads(cls, text, kind):
        try:
            pairs = [line.split() for line in text.splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise InputError(f"a line of the tokenizer is not 'base64 number': {error}") from error
        sound = len(ranks) == len(pairs) == len(set(ranks.values()) & set(range(len(pairs) + 1)))
        require(sound and all(bytes([byte]) in ranks for byte in range(256)),
                "the tokenizer's numbers are not 0, 1, 2, ... with one left out, and every byte among them")  # fmt: skip
        return cls(ranks, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens -> windows. Text streams through the tokenizer into a flat file of token numbers, which is mapped into memory,
# so a corpus can be far larger than memory.

CACHE = Path(".cache")
CHUNK = 2**20  # bytes of text in hand at a time
BPE_SAMPLE = 2**24  # a vocabulary is learned from about this many bytes, spread evenly over the training text
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def write(path, content):
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def replacing(path):
    """A path to write to that becomes `path` once complete: readers see the old file or the new one, never half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()  # where nothing can be written, this says so
        mode = part.stat().st_mode
        yield part
        os.chmod(part, mode)  # save_file makes a file that only its owner can read
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (RuntimeError, SafetensorError) as error:  # what torch.save and save_file make of a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def digest_file(path, digest):
    """Feed a file of any size to one of hashlib's objects -> that object."""
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest


def fetch_shakespeare(path):
    import requests
    from requests.adapters import HTTPAdapter, Retry

    session, retry = requests.Session(), Retry(4, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504])
    session.mount(SHAKESPEARE, HTTPAdapter(max_retries=retry))
    hint = f"could not be downloaded from {SHAKESPEARE}: try again, or save it yourself as {path}"
    try:
        content = session.get(SHAKESPEARE, timeout=30).content
    except requests.RequestException as error:
        raise InputError(f"shakespeare {hint} ({type(error).__name__})") from error
    require(hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256, f"shakespeare {hint} (another text came)")
    write(path, content)


def write_pydoc(folder):
    """A file per topic of the language reference inside every Python; paragraphs that occurred before are left out."""
    from pydoc_data.topics import topics

    seen = set()
    for name, text in sorted(topics.items()):
        fresh = [p for p in text.split("\n\n") if (key := " ".join(p.split())) and not (key in seen or seen.add(key))]
        if fresh and not (folder / f"{name}.txt").exists():
            write(folder / f"{name}.txt", "\n\n".join(fresh).strip("\n") + "\n")


def find_texts(names):
    """Names of files, folders and built-in texts -> list of files."""
    files = []
    for name in names:
        path = Path(name)
        if name == "pydoc":
            path = CACHE / f"pydoc-{sys.version.split()[0]}"
            path.mkdir(parents=True, exist_ok=True)
            write_pydoc(path)
        elif name == "shakespeare":
            path = CACHE / "shakespeare.txt"
            if not path.exists():
                CACHE.mkdir(exist_ok=True)
                fetch_shakespeare(path)
        require(not name.endswith((".json", ".jsonl")), f"{name} is JSON, not text: finetune.py learns from .jsonl, a document a line")
        require(path.is_file() or path.is_dir(), f"there is no text at {name}: give a file, a folder, pydoc or shakespeare")
        files += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    require(files, f"there is no *.txt in {' '.join(names)}")
    return files


def split_texts(files, val_bytes):
    """Cut the bytes of all files in two -> (training, validation), each a list of (file, first byte, last byte + 1)."""
    sizes = [path.stat().st_size for path in files]
    cut, train, val = sum(sizes) - min(sum(sizes) // 10, val_bytes), [], []
    for path, size in zip(files, sizes, strict=True):
        if 0 < cut < size:
            with open(path, "rb") as file:
                file.seek(cut)
                while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # inside a character: on to the next one
                    cut += 1
        here = min(max(cut, 0), size)
        train += [(path, 0, here)] if here > 0 else []
        val += [(path, here, size)] if here < size else []
        cut -= size
    return train, val


def read_text(path, start, stop):
    """Yield the text in path[start:stop] in pieces of about CHUNK bytes, which tokenize as the whole would.

    A piece ends before a blank or line feed that follows a visible character: no word of SPLIT spans that place.
    """
    text = ""
    with open(path, "rb") as file:
        file.seek(start)
        blocks = iter(lambda: file.read(min(CHUNK, stop - file.tell())), b"")
        try:
            for new in codecs.iterdecode(blocks, "utf-8"):
                require("\0" not in new, f"{path} is not text: there is a NUL byte before byte {file.tell():,}")
                text += new
                last = regex.match(r"(?s).*\S(?=[ \n])", text)
                end = last.end() if last else len(text) // CHUNK * CHUNK  # where there are no blanks, anywhere
                if end:
                    yield text[:end]
                text = text[end:]
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text before byte {file.tell():,}: convert it first") from error
    if text:
        yield text


def fingerprint_of(files, val_bytes=0):
    digest = hashlib.sha256(b"%d" % val_bytes)
    for path in files:
        digest.update(b"%d" % path.stat().st_size)
        digest_file(path, digest)
    return digest.hexdigest()[:16]


def tokenize(segments, tokenizer, name):
    """(file, first byte, last byte + 1), ... -> their tokens in a memory-mapped file in .cache/, so a second run finds them.

    The name stands for the text. The end of text stands before each file.
    """
    vocabulary = hashlib.sha256(tokenizer.dumps().encode()).hexdigest()[:16]
    dtype, path = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32, CACHE / f"{name}-{vocabulary}.bin"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        total = sum(stop - start for _, start, stop in segments)
        bar = tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, delay=1, disable=None, leave=False)
        with replacing(path) as part, open(part, "wb") as out, bar:
            for segment in segments:
                if segment[1] == 0:
                    np.array([tokenizer.eot], dtype).tofile(out)
                for text in read_text(*segment):
                    np.array(tokenizer.encode(text), dtype).tofile(out)
                    bar.update(len(text.encode()))
    return np.memmap(path, dtype, "r")


def prepare(data, tokenizer="bpe", vocab_size=1024, val_bytes=2**20):
    """Names of texts -> Tokenizer, training tokens, validation tokens, and a fingerprint of the text.

    `tokenizer` is bpe, bytes, gpt2, or a Tokenizer.
    """
    files = find_texts(data)
    fingerprint, splits = fingerprint_of(files, val_bytes), split_texts(files, val_bytes)
    require(all(splits), f"{' '.join(data)} is too little text to split in two")
    CACHE.mkdir(exist_ok=True)
    if tokenizer == "bpe":
        path = CACHE / f"{fingerprint}-bpe{vocab_size}.tiktoken"
        if not path.exists():
            every = 1 + sum(stop - start for _, start, stop in splits[0]) // BPE_SAMPLE
            pieces = itertools.chain.from_iterable(read_text(*segment) for segment in splits[0])
            write(path, Tokenizer.bpe(itertools.islice(pieces, 0, None, every), vocab_size).dumps())
        tokenizer = Tokenizer.loads(path.read_text(), "bpe")
    elif isinstance(tokenizer, str):
        tokenizer = getattr(Tokenizer, tokenizer)()
    tokens = [tokenize(segments, tokenizer, f"{fingerprint}-{name}") for name, segments in zip(("train", "val"), splits, strict=True)]
    return tokenizer, *tokens, fingerprint


class TokenDataset:
    """Windows of block_size tokens, `stride` apart; the target of each token is the one that follows it.

    With stride = block_size, every token but the first is a target exactly once; what the last window lacks is filled
    up with targets of -1, which the loss does not count.
    """

    def __init__(self, tokens, block_size, stride=None):
        self.tokens, self.block_size, self.stride = tokens, block_size, stride or block_size
        require(self.stride <= block_size, f"stride {self.stride} would skip tokens: at most the context of {block_size}")
        require(len(tokens) >= 2, "the text is too short: a window needs at least two tokens")

    def __len__(self):
        return 1 + max(0, math.ceil((len(self.tokens) - 1 - self.block_size) / self.stride))

    def opening(self):
        """Tokens for a sample to go on from."""
        return self.tokens[:16].tolist()

    def __getitem__(self, i):
        return tuple(rows[0] for rows in self.batch([i]))

    def batch(self, windows):
        """Numbers of windows -> inputs (B, T), targets (B, T), int64."""
        tokens = self.tokens
        if isinstance(tokens, np.memmap) and tokens.nbytes == os.path.getsize(tokens.filename):  # all of a file: mapped
            tokens = np.memmap(tokens.filename, tokens.dtype, "r")  # anew, or the pages that it touched would pile up
        places = np.asarray(windows)[:, None] * self.stride + np.arange(self.block_size + 1)  # (B, T + 1)
        beyond = places >= len(tokens)
        rows = tokens[np.where(beyond, 0, places)].astype(np.int64)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(np.where(beyond, -1, rows)[:, 1:])


def training_windows(tokens, block_size, stride=0):
    """The windows to learn from; raises InputError where the text is shorter than one of them."""
    require(len(tokens) > block_size, f"{len(tokens)} tokens are shorter than a window of {block_size} + 1: give more text or a "
            "smaller --block_size")  # fmt: skip
    return TokenDataset(tokens, block_size, stride or max(1, block_size // 4))


# ---------------------------------------------------------------------------------------------------------------------
# The model. Its modules carry the names of the published GPT-2.


class Dropout(nn.Module):
    """In training, zero a share p of the activations and scale up the rest (Srivastava et al. 2014).

    On a CPU, PyTorch draws a random float per activation on one thread. Sixteen random bits choose as well, at a
    fraction of the time; p is kept to 1/65536.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        dropped = round(self.p * 2**16)  # of the 65,536 values of sixteen bits
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)  # four times sixteen each
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def attention(q, k, v, dropout=None, fused=None):
    """softmax(q kᵀ / √D + mask) v, where the mask hides what comes after each query (Vaswani et al. 2017, 3.2.1).

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D); the queries belong to the last T of the S positions. Written
    out, or PyTorch's fused kernel: on a CPU it is faster, but for its backward pass in bfloat16 at short contexts.
    """
    B, H, T, D = q.shape
    S = k.shape[2]
    p = dropout.p if dropout and dropout.training else 0.0
    if fused is None:
        fused = q.device.type != "cpu" or (p == 0 and (T >= 1024 or q.dtype == torch.float32 or not q.requires_grad))
    if fused:  # its own causal mask starts in the top left corner, which is right only for T = S
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=T == S)
    mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)  # query t sees keys 0 to S - T + t
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D**-0.5)  # mask + q kᵀ / √D, (B * H, T, S)
    weights = scores.softmax(-1)  # each row sums to 1
    if p:
        weights = dropout(weights)
    return (weights @ v.flatten(0, 1)).view(B, H, T, D)


class KVCache:
    """One block's keys and values for the tokens so far, (B, H, max_length, D) each, allocated once."""

    def __init__(self, max_length):
        self.max_length, self.length, self.k, self.v = max_length, 0, None, None

    def append(self, k, v):
        """Keys and values of T new tokens, (B, H, T, D) -> those of all S tokens, (B, H, S, D)."""
        B, H, T, D = k.shape
        if self.k is None:
            self.k, self.v = k.new_empty(B, H, self.max_length, D), v.new_empty(B, H, self.max_length, D)
        new, self.length = slice(self.length, self.length + T), self.length + T
        require(self.length <= self.max_length, f"{self.length} tokens do not fit into a cache for {self.max_length}")
        self.k[:, :, new], self.v[:, :, new] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it, in n_head ways at once."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout, self.resid_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = attention(q, k, v, self.attn_dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: four times as wide, through a smooth gate, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2's GELU is the tanh form (Hendrycks & Gimpel 2016)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each reading a normalized copy of the residual stream and adding to it (pre-LayerNorm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)  # eps 1e-5 is PyTorch's default and GPT-2's
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def check_sampling(temperature, top_k, top_p):
    require(0 <= temperature < math.inf, f"temperature is {temperature}, expected 0 or more, and finite")
    require(top_k is None or 1 <= top_k <= 2**31, f"top_k is {top_k}, expected 1 to 2**31")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, expected more than 0 and at most 1")


def choices(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) -> the tokens to choose among (B, k), and their probabilities (B, k).

    temperature divides the logits; top_k keeps the k most probable tokens; top_p, of these, the fewest that reach the
    probability p together (nucleus sampling, Holtzman et al. 2020, 3.1), and gives others the probability 0 or leaves them
    out. With top_k, or top_p below 1, the most probable come first; else tokens stand in the order of their numbers.
    """
    V, logits = logits.shape[-1], logits.float()
    if top_k is None:
        values, tokens = logits, torch.arange(V, device=logits.device).expand_as(logits)
    else:
        values, tokens = logits.topk(min(top_k, V))  # (B, k)
    scaled = (values - values.amax(-1, keepdim=True)) / min(max(temperature, 1e-9), 1e30)  # 0 and less: nothing overflows
    probs = scaled.softmax(-1)
    if top_p is not None and top_p < 1:
        likely = probs >= (1 - top_p) / (2 * probs.shape[-1])  # the others are less than half of 1 - p together: never needed
        order = values.topk(int(likely.sum(-1).max())).indices  # and sorting all of V would take longer than a model's step
        tokens, probs = tokens.gather(-1, order), probs.gather(-1, order)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill((before >= top_p) & (before > 0), 0)  # the token that crosses the threshold stays
        probs = probs / probs.sum(-1, keepdim=True)
    return tokens, probs


def next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose a token for each row of logits (B, V) -> (B, 1); options as for `choices`, and temperature 0 takes the largest."""
    require(logits.amax(-1).isfinite().all(), "the logits are not finite: the model's weights are damaged, or too large for --dtype")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    tokens, probs = choices(logits, temperature, top_k, top_p)
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64  # Apple's GPUs do not have it
    ends = probs.cumsum(-1, dtype=dtype)  # (B, k) tokens side by side on a line, each as long as it is probable
    point = torch.rand(len(probs), 1, dtype=dtype, device=probs.device, generator=generator)
    return tokens.gather(-1, torch.searchsorted(ends / ends[:, -1:], point, right=True))  # the one that a random point falls into


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final LayerNorm, and the token embedding again as the head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        tokens, positions = torch.empty(config.vocab_size, config.n_embd), torch.empty(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding.from_pretrained(tokens, freeze=False),
            "wpe": nn.Embedding.from_pretrained(positions, freeze=False),
            "drop": Dropout(config.dropout),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        if not tokens.is_meta:  # a shape without memory, as load_checkpoint makes it
            self.apply(self.init)

    def tie(self):
        """Head and token embedding are one tensor (Press & Wolf 2017)."""
        self.lm_head.weight = self.transformer.wte.weight

    def init(self, module):
        """N(0, 0.02); 2 n_layer branches add up in the residual stream, so each is scaled by one over their root."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, caches=None):
        """idx (B, T) -> what the head reads, (B, T, C). With caches, idx goes on after the tokens in them."""
        T, past, most = idx.shape[1], caches[0].length if caches else 0, self.config.block_size
        require(past + T <= most, f"{past + T} tokens do not fit into the context of {most}: pass the last {most}")
        try:
            x = self.transformer.wte(idx) + self.transformer.wpe.weight[past : past + T]  # (B, T, C) + (T, C)
        except IndexError as error:
            raise InputError(f"a token id is outside the vocabulary of {self.config.vocab_size}") from error
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V), and the loss in nats per token, None without targets.

        The loss is the mean of -log softmax(logits)[target], how surprising each target (B, T) is; -1 is not counted.
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, nats / (targets != -1).sum().clamp(min=1)

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) -> (B, T + max_new_tokens), or fewer where every row has ended; options as for `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None, generator=None, cached=True):
        """Yield the tokens that follow idx (B, T), (B, 1) at a time; of a longer idx the last block_size count.

        When the context is full, generation goes on from the last half of it. A row that reached eot is filled up with
        it, and once all rows have, generation ends. cached=False computes each step anew, with the same result.
        """
        require(idx.shape[1] > 0, "there is nothing to continue: begin with the end-of-text token")
        check_sampling(temperature, top_k, top_p)
        was_training, block_size, caches = self.training, self.config.block_size, None
        window, ended = idx[:, -block_size:], torch.zeros_like(idx[:, :1], dtype=torch.bool)
        try:
            self.eval()
            for remaining in range(max_new_tokens, 0, -1):
                if window.shape[1] > block_size:
                    window, caches = window[:, -max(1, block_size // 2) :], None
                if cached and caches is None:
                    length = min(window.shape[1] + remaining, block_size)
                    caches = [KVCache(length) for _ in self.transformer.h]
                new = window[:, caches[0].length :] if cached else window  # the whole window first, then token by token
                logits = self.lm_head(self.hidden(new, caches)[:, -1])  # (B, V)
                token = next_token(logits, temperature, top_k, top_p, generator)
                if eot is not None:
                    token = token.masked_fill(ended, eot)
                    ended |= token == eot
                window = torch.cat([window, token], dim=1)
                yield token
                if ended.all():
                    return
        finally:
            self.train(was_training)


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint is a folder of files, and reading them never runs code from them.

FILES = ("config.json", "model.safetensors", "tokenizer.tiktoken", "training_state.pt")


@contextmanager
def locked(folder):
    """Keep other runs out of a folder; the system keeps the lock, so a crash lets go of it."""
    if world()[0] > 0:  # the first process of several holds it for all
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(folder) / ".lock", blocking=False):
            for part in Path(folder).glob(".*.part"):  # what a crash has left half-written
                part.unlink()
            yield
    except Timeout as error:
        raise InputError(f"another process is at work in {folder}: wait for it to end, or choose another folder") from error


def refuse_existing(folder, overwrite=False):
    found = [name for name in FILES if (Path(folder) / name).exists()]
    resume = ", go on with its run by --resume" if "training_state.pt" in found else ""
    require(overwrite or not found, f"{folder} already holds a checkpoint: add --overwrite{resume}, or choose another --out")


def save_checkpoint(folder, model, tokenizer, weights=None, overwrite=False, **facts):
    """Write model.safetensors, tokenizer.tiktoken and config.json, the last with the facts (step=..., training=...).

    weights, {name: tensor}, stand in for the model's own. Raises InputError where there is a checkpoint already.
    """
    refuse_existing(folder, overwrite)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights or dict(model.named_parameters())  # the tied head is among them once, as the embedding
    with replacing(folder / "model.safetensors") as part:
        save_file({name: p.detach().cpu().contiguous() for name, p in tensors.items()}, part, {"format": "pt"})
    write(folder / "tokenizer.tiktoken", tokenizer.dumps())
    described = {"model": dataclasses.asdict(model.config), "tokenizer": tokenizer.kind} | facts
    write(folder / "config.json", json.dumps(described, indent=2) + "\n")


def load_checkpoint(folder, device="cpu"):
    """-> GPT in eval mode, Tokenizer. Raises InputError for a file that is missing, damaged or does not fit."""
    folder = Path(folder)
    try:
        require(all((folder / name).is_file() for name in FILES[:3]), f"{', '.join(FILES[:3])} are not all there")
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, kind = GPTConfig(**described["model"]), described["tokenizer"]
        tokenizer = Tokenizer.loads((folder / "tokenizer.tiktoken").read_text(encoding="utf-8"), kind)
        require(tokenizer.vocab_size <= config.vocab_size, "the tokenizer is larger than the model's vocabulary")
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            kinds = {file.get_slice(name).get_dtype() for name in found} - {"F32", "BF16", "F16"}
            require(not kinds, f"model.safetensors holds numbers of type {', '.join(sorted(kinds))}")
            require(len(found) == 12 * config.n_layer + 4, f"{len(found)} tensors do not make {config.n_layer} blocks")
            with torch.device("meta"):  # shapes without memory
                model = GPT(config)
            wanted = {name: list(p.shape) for name, p in model.named_parameters()}
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            require(not wrong, f"model.safetensors does not fit config.json at {', '.join(wrong[:3])}")
            weights = {name: file.get_tensor(name).float() for name in wanted}
        poisoned = [name for name, weight in weights.items() if not all(bound.isfinite() for bound in weight.aminmax())]
        require(not poisoned, f"{', '.join(poisoned[:3])} holds numbers that are not finite")
    except (OSError, SafetensorError, AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{folder} is not a readable checkpoint: {error}") from error
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.to(device).eval(), tokenizer


def plot(rows, path, marks=()):
    """The training curve as a picture: losses in nats per token, and the validation's bits per byte; marks are (step, loss, words)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, steps = figure.subplots(), [row["step"] for row in rows]
    axes.plot(steps, [row["train_loss"] for row in rows], "o-", ms=3, label="training loss, nats per token")
    axes.plot(steps, [row["val_loss"] for row in rows], "o-", ms=3, label="validation loss, nats per token")
    axes.plot(steps, [row["val_bits_per_byte"] for row in rows], "s:", ms=3, label="validation, bits per byte")
    for step, loss, words in marks:
        axes.annotate(words, (step, loss), (0, 25), textcoords="offset points", ha="center", arrowprops={"arrowstyle": "->"})
    best = min(rows, key=lambda row: row["val_loss"])
    axes.set(xlabel="step", ylim=(0, None), title=f"{rows[0]['val_bits_per_byte']:.3f} bits per byte at step {rows[0]['step']:,}, "
             f"{best['val_bits_per_byte']:.3f} at step {best['step']:,}")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    del figure, axes
    gc.collect()  # a figure is full of cycles; a hundred of them would wait in memory until Python looks for such


RUN = {"step": int, "tokens": int, "seconds": float, "losses": list, "rows": list, "best": dict, "best_weights": dict,
       "weights": dict, "optimizers": list, "config": dict, "tokenizer": list}  # fmt: skip


def save_run(run, model, tokenizer, config, publish):
    """Write the whole folder. training_state.pt is the commit point: it holds what all other files are made from."""
    folder, facts = Path(config.out), {"step": run["best"]["step"], "validation": run["best"], "training": dataclasses.asdict(config)}
    facts |= {"base": run["base"]} if "base" in run else {}
    lines = [run["rows"][0].keys(), *(row.values() for row in run["rows"])]
    try:
        if len(run["rows"]) == 1:  # later, a folder that is not there any more has been moved, or is no longer wanted
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "training_state.pt") as part:
            torch.save(run, part)
        save_checkpoint(folder, model, tokenizer, publish(run["best_weights"]), overwrite=True, **facts)
        write(folder / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
        plot(run["rows"], folder / "loss.png")
    except OSError as error:
        raise InputError(f"step {run['step']:,} could not be saved: {error}; what {folder} held before is whole, and --resume goes on "
                         "from it") from error  # fmt: skip


def load_run(folder):
    """What save_run wrote; raises InputError where there is nothing or nothing sound."""
    path = Path(folder) / "training_state.pt"
    require(path.is_file(), f"there is nothing to resume in {folder}: it has no training_state.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.load does not look at
            require(sum(entry.file_size for entry in archive.infolist()) <= path.stat().st_size, "it unpacks to more than it is")
            require(archive.testzip() is None, "its checksums are wrong")
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        require(not any(b"\nbytearray\n" in text for text in pickles), "it holds something else")  # bytearray(10**12), say
        run = torch.load(path, map_location="cpu", weights_only=True)
        require(all(type(run[key]) is kind for key, kind in RUN.items()), "it holds something else")
        require([*map(type, run["tokenizer"])] == [str, str], "its tokenizer is none")
        rows, numbers = run["rows"], [*run["losses"], *(value for row in run["rows"] for value in row.values())]
        require(rows and all(row.keys() == rows[0].keys() >= {"step", "val_loss", "train_loss", "val_bits_per_byte"} for row in rows)
                and all(type(number) in (int, float) for number in numbers), "its rows are not those of a log")  # fmt: skip
        require(math.isfinite(run["best"]["loss"] + run["best"]["step"]) and 0 <= run["step"], "its steps and losses are no numbers")
    except MemoryError:
        raise
    except Exception as error:
        reason = error if isinstance(error, InputError) else f"it is damaged, or not ours ({type(error).__name__})"
        raise InputError(f"{path} is not a readable training state: {reason}") from error
    return run


def restore(run, model, optimizers):
    """Put a run's weights, and the optimizers' averages, back in; raises InputError where they do not fit the model."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        for name in ("weights", "best_weights"):
            require(run[name].keys() == weights.keys() and all(run[name][key].shape == p.shape and run[name][key].isfinite().all()
                    for key, p in weights.items()), f"its {name} are not those of this model")  # fmt: skip
        model.load_state_dict(run["weights"], strict=False)
        for optimizer, saved in zip(optimizers, run["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            kept = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            state = {i: {key: saved["state"][i][key] for key in kept} for i in saved["state"]}
            require(all(average.shape == (() if key == "step" else params[i].shape) and average.isfinite().all()
                        for i in state for key, average in state[i].items()), "its averages are not those of this model")  # fmt: skip
            state = {i: {key: average.float().contiguous() for key, average in state[i].items()} for i in state}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"training_state.pt cannot be resumed: {error}") from error


CHANGEABLE = {"out", "max_steps", "lr", "min_lr", "warmup_steps", "grad_clip", "eval_interval", "patience", "device", "dtype",
              "compile"}  # fmt: skip


def resume_run(given, script="gpt.py", changeable=CHANGEABLE):
    """The run in given["out"], and its flags under those that are given now; raises InputError for one that cannot change."""
    run = load_run(given["out"])
    made_by = "finetune.py" if "base" in run else "gpt.py"
    require(made_by == script, f"{given['out']} is a run of {made_by}: go on with python {made_by} --resume --out {given['out']}")
    changed = sorted(key for key in given.keys() - changeable if given[key] != run["config"].get(key))
    require(not changed, f"--resume cannot change {', '.join(changed)}: begin a new run with another --out")
    return run, run["config"] | given


# ---------------------------------------------------------------------------------------------------------------------
# Training: guess the next token, measure the surprise, follow the gradient downhill.


class Muon(torch.optim.Muon):
    """Muon (Jordan 2024): momentum whose matrix is made nearly orthogonal, so all directions move alike.

    The update of torch.optim.Muon. Matrices of one shape are stacked and orthogonalized together, in bfloat16 only where
    the processor computes it natively, as emulating it takes longer than the rest of the step.
    """

    @torch.no_grad()
    def step(self):
        (group,), shapes = self.param_groups, defaultdict(list)
        dtype = resolve_dtype("auto", group["params"][0].device)
        for p in group["params"]:
            if p.grad is not None:
                shapes[tuple(sorted(p.shape))].append(p)
        for (short, long), params in shapes.items():
            stack = torch.empty(len(params), short, long, dtype=dtype, device=params[0].device)
            for p, wide in zip(params, stack, strict=True):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                wide.copy_(update if update.shape == wide.shape else update.T)
            stack /= stack.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            a, b, c = group["ns_coefficients"]
            for _ in range(group["ns_steps"]):  # Newton-Schulz: drives all singular values towards 1
                gram = stack @ stack.mT
                stack = torch.baddbmm(stack, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), stack, beta=a)
            for p, wide in zip(params, stack, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])  # a step's size is that of AdamW's: one lr serves both
                p.add_(wide if p.shape == wide.shape else wide.T, alpha=-group["lr"] * 0.2 * long**0.5)


def make_optimizers(model, config):
    """AdamW (Loshchilov & Hutter 2019), or Muon for the blocks' matrices and AdamW for all else.

    Matrices decay, vectors (biases, norms) do not.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = set(model.transformer.h.parameters()) if config.optimizer == "muon" else set()
    hidden = [p for p in trained if p.dim() == 2 and p in blocks]
    groups = [{"params": [p for p in trained if p.dim() == 2 and p not in blocks], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() != 2], "weight_decay": 0.0}]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, config.lr, betas=(0.9, config.beta2), fused=True)] if groups else []
    if hidden:
        optimizers.append(Muon(hidden, config.lr, config.weight_decay))
    return optimizers


def learning_rate(step, config):
    """Linear warm-up that does not begin at 0, then a straight line down to min_lr times the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr * (1 - (1 - config.min_lr) * progress)


def resolve_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device; auto is the fastest at hand."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        require(name != "meta", "a device without memory")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, InputError) as error:
        raise InputError(f"device {name!r} is not available here: use --device auto or cpu") from error


def memory_here():
    """Bytes of this machine's memory; infinite where it does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def resolve_dtype(name, device):
    """auto -> bfloat16 where the processor computes it natively, else float32: emulated, it would be slower."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and any(on for key, on in torch.cpu.get_capabilities().items() if "bf16" in key)
    if name == "bfloat16" and not native:
        say("bfloat16 is emulated on this processor, and slow: --dtype auto takes float32 here")
    return getattr(torch, name) if name != "auto" else torch.bfloat16 if native else torch.float32


def world():
    """This process's number, and how many there are: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device):
    """Where torchrun has started several processes, make this one of them -> its device."""
    if "LOCAL_RANK" not in os.environ:
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device


def say(text):
    if world()[0] == 0:
        tqdm.write(text, file=sys.stderr)


@torch.no_grad()
def evaluate(model, data, tokenizer, batch_size=16, dtype=torch.float32, signals=()):
    """The model on a whole TokenDataset: loss (nats per token), perplexity, bits_per_byte, accuracy, and tokens, the denominator.

    Every counted target weighs the same, however they are batched; bits per byte divides by the bytes of those targets;
    accuracy is the share of them that the model thought the most probable. A signal breaks it off, if it is one process.
    """
    (rank, processes), was_training = world(), model.training
    device, sums = next(model.parameters()).device, torch.zeros(4, dtype=torch.float64)  # nats, tokens, bytes, hits
    model.eval()
    starts = range(rank * batch_size, len(data), processes * batch_size)
    for start in tqdm(starts, desc="evaluating", unit=" batches", delay=1, disable=rank > 0 or None, leave=False):
        if signals and processes == 1:
            break
        x, y = data.batch(range(start, min(start + batch_size, len(data))))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, loss = model(x.to(device), y.to(device))
        counted = y[y != -1]
        if len(counted):
            n_bytes, hits = tokenizer.n_bytes[counted].sum(), (logits.argmax(-1).cpu() == y).sum()
            sums += torch.tensor([loss.item() * len(counted), len(counted), n_bytes, hits], dtype=torch.float64)
    if processes > 1:
        dist.all_reduce(sums := sums.to(device))
    model.train(was_training)
    nats, tokens, n_bytes, hits = sums.tolist()
    loss, bits = nats / max(tokens, 1), nats / math.log(2) / max(n_bytes, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits, "accuracy": hits / max(tokens, 1),
            "tokens": int(tokens)}  # fmt: skip


@functools.lru_cache(maxsize=2)
def window_order(n, seed, epoch):
    """All n windows once, shuffled anew in each epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def windows_of_step(n, step, config):
    """The windows of a step, (grad_accum, batch_size): a function of the step alone, so resuming needs no bookmark."""
    size = config.batch_size * config.grad_accum
    chosen = [window_order(n, config.seed, place // n)[place % n] for place in range(step * size, (step + 1) * size)]
    return np.reshape(chosen, (config.grad_accum, config.batch_size))


def gradients(model, data, step, config, dtype):
    """The forward and backward passes of a step -> its loss, the mean over the targets in all processes, and their number."""
    (rank, processes), device = world(), next(model.parameters()).device
    batches = [data.batch(windows) for windows in windows_of_step(len(data), step, config)]
    total, loss = sum(int((y != -1).sum()) for _, y in batches), torch.zeros((), device=device)
    for i, (x, y) in enumerate(batches):
        x, y = x[rank::processes].to(device), y[rank::processes].to(device)
        last = i == len(batches) - 1  # only then do the processes exchange their gradients
        with nullcontext() if last or processes == 1 else model.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                share = model(x, y)[1] * ((y != -1).sum() / max(total, 1))
            (share * processes).backward()  # times processes, as DDP takes their mean
        loss += share.detach()
    if processes > 1:
        dist.all_reduce(loss)
    return loss.item(), total


def clip(params, most):
    """Scale all gradients down together where their norm is beyond `most`, if that is not 0 -> the norm that they had."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = nn.utils.get_total_norm(grads).item()
    if 0 < most < norm:  # mostly it is not, and a pass over all gradients is spared
        torch._foreach_mul_(grads, most / norm)
    return norm


@contextmanager
def noting_signals():
    """Within, Ctrl-C and SIGTERM are only noted in the list that this yields; a second one ends the process at once.

    Not so under torchrun: it passes each signal on, which so comes twice, and itself ends what does not end.
    """
    noted, signals = [], (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def note(number, _):
        if noted and world()[1] == 1:
            os._exit(128 + number)
        noted.append(number)

    before = [signal.signal(number, note) for number in signals]
    try:
        yield noted
    finally:
        if world()[1] == 1:  # of several, one whose peer has died is to say so before torchrun's SIGTERM ends it
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


def keep_freed_memory(options=((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25), (-3, 2**30), (-8, 1))):
    """Let glibc keep what PyTorch frees: taken back by the system, it costs a fifth of a step in page faults."""
    with suppress(OSError, AttributeError, TypeError):  # another C library needs or knows no such thing
        for option, value in options:  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD (an old glibc refuses over 2**25), M_ARENA_MAX
            ctypes.CDLL(None).mallopt(option, value)


def train(model, tokenizer, train_data, val_data, config, run=None, overwrite=False, publish=None, **facts):
    """Train what requires a gradient and write the checkpoint config.out; returns the rows of its log.csv.

    run, from load_run, goes on as if it had never stopped; the facts, fingerprints of what it began with, are kept in it
    and must be the same then. publish makes the weights of an ordinary checkpoint out of those that are trained. Raises
    FloatingPointError at a loss or gradient that is not finite, and SystemExit after Ctrl-C or SIGTERM, when all is saved.
    """
    (rank, processes), device = world(), next(model.parameters()).device
    require(config.batch_size % processes == 0, f"batch_size {config.batch_size} cannot be shared among {processes} processes")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers, dtype = make_optimizers(model, config), resolve_dtype(config.dtype, device)
    publish = publish or (lambda weights: dict(model.named_parameters()) | weights)
    if run:
        changed = [what for what, fingerprint in facts.items() if run.get(what) != fingerprint]
        require(not changed, f"the {' and the '.join(changed)} changed since the run in {config.out} began: begin a new one")
        restore(run, model, optimizers)
        if rank == 0:
            save_run(run, model, tokenizer, config, publish)  # mends what a crash may have left undone
    else:
        refuse_existing(config.out, overwrite)
        run = {"step": 0, "tokens": 0, "seconds": 0.0, "losses": [], "rows": [], "best": {"loss": math.inf}, "best_weights": {},
               **facts}  # fmt: skip
    runner = torch.compile(model) if config.compile else model
    if processes > 1:
        runner = nn.parallel.DistributedDataParallel(runner)
    norm, first, before, started = 0.0, run["step"], run["tokens"], time.perf_counter()
    began = started - run["seconds"]

    def check(value, what):
        if not math.isfinite(value):
            saved = f"{config.out} holds the best checkpoint before it" if run["rows"] else "nothing was saved"
            raise FloatingPointError(f"the {what} is {value} at step {run['step']} (lr {lr:.2g}); {saved}: begin again with a "
                                     "smaller --lr, a longer --warmup_steps or --dtype float32")  # fmt: skip
        return value

    def save():
        check(torch.stack([p.detach().abs().max() for p in trained.values()]).max().item(), "largest weight")
        run["seconds"], run["optimizers"] = time.perf_counter() - began, [o.state_dict() for o in optimizers]
        run["weights"] = {name: p.detach() for name, p in trained.items()}
        run["config"] = dataclasses.asdict(model.config) | dataclasses.asdict(config)
        run["tokenizer"] = [tokenizer.dumps(), tokenizer.kind]
        if rank == 0:
            save_run(run, model, tokenizer, config, publish)

    def validate():
        figures = evaluate(model, val_data, tokenizer, config.batch_size, dtype, signals)
        if signals and processes == 1:
            return  # --resume validates first
        loss, losses = check(figures["loss"], "validation loss"), run["losses"]
        row = {"step": step, "tokens": run["tokens"], "seconds": round(time.perf_counter() - began, 2), "lr": lr,
               "train_loss": sum(losses) / len(losses) if losses else math.nan, "val_loss": loss,
               "val_bits_per_byte": figures["bits_per_byte"], "grad_norm": norm}  # fmt: skip
        run["rows"], run["losses"] = [*run["rows"], row], []
        if loss < run["best"]["loss"]:
            run["best"] = {"step": step, **figures}
            run["best_weights"] = {name: p.detach().cpu().clone() for name, p in trained.items()}
        save()
        prompt, generator = torch.tensor([val_data.opening()]), torch.Generator(device).manual_seed(config.seed)
        options = {"temperature": 0.8, "top_p": 0.9, "eot": tokenizer.eot, "generator": generator}
        ids = model.generate(prompt.to(device), 48, **options)[0, prompt.shape[1] :].tolist()
        made = tokenizer.decode(itertools.takewhile(lambda i: i != tokenizer.eot and i < tokenizer.vocab_size, ids))
        say(f"step {step:,}: " + (f"training loss {row['train_loss']:.4f}, " if losses else "") + f"validation loss {loss:.4f} "
            f"(perplexity {figures['perplexity']:.2f}), {figures['bits_per_byte']:.4f} bits per byte\n"
            f"  the model continues {tokenizer.decode(prompt[0].tolist())!r} with {made!r}")  # fmt: skip

    resumed = f"going on at step {first:,} of " if first else ""
    say(f"{resumed}{config.max_steps:,} steps of {config.batch_size * config.grad_accum} windows, {train_data.block_size} tokens at "
        f"most, on {device}, with {str(dtype).split('.')[1]} products")  # fmt: skip
    keep_freed_memory()
    model.train()
    bar = tqdm(desc="training", total=config.max_steps, initial=first, unit=" steps", disable=None if rank == 0 else True)
    with noting_signals() as signals, bar:
        while True:
            step, lr = run["step"], learning_rate(run["step"], config)
            due = step % config.eval_interval == 0 or step == config.max_steps
            if due and (not run["rows"] or run["rows"][-1]["step"] < step):
                validate()
            stop = torch.tensor(max(signals, default=0), device=device)
            if processes > 1:  # all of them stop at the same step
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            if stop and not run["rows"]:
                say("stopped before the first validation: nothing was saved")
                raise SystemExit(128 + int(stop))
            if stop:
                save()
                say(f"stopped and saved at step {step:,} (model.safetensors is of step {run['best']['step']:,}, the best "
                    f"validation); go on with: python {Path(sys.argv[0]).name} --resume --out {config.out}")  # fmt: skip
                raise SystemExit(128 + int(stop))
            in_vain = sum(row["step"] > run["best"]["step"] for row in run["rows"])
            if step >= config.max_steps or 0 < config.patience <= in_vain:
                why = "all steps are done" if step >= config.max_steps else f"{in_vain} validations brought nothing better"
                if step < config.max_steps or step == first:
                    say(f"ended at step {step:,}, as {why}; to go on, --resume with more --max_steps or --patience")
                return run["rows"]
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))  # for dropout
            loss, tokens = gradients(runner, train_data, step, config, dtype)
            check(loss, "loss")
            norm = check(clip(trained.values(), config.grad_clip), "gradient's norm")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            run["step"], run["tokens"], run["losses"] = step + 1, run["tokens"] + tokens, run["losses"] + [loss]
            speed = (run["tokens"] - before) / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


class Parser(argparse.ArgumentParser):
    """argparse with flags in full only, errors that are InputError, and the nearest flag named when one is unknown."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        for name, value in vars(args).items():
            for given in value if isinstance(value, list) else [value]:
                require(given != "" or name == "prompt", f"--{name} is empty: give it a value")
                require(not regex.search("[\0\ud800-\udfff]", str(given)), f"--{name} is no text: {given!r}")
        if unknown:
            asked, flags = unknown[0].split("=")[0], self._option_string_actions
            near = [flag for flag in flags if asked.strip("-") and flag.startswith(asked)] or difflib.get_close_matches(asked, flags, 1)
            self.error(f"unknown argument {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        return args

    def error(self, message):
        raise InputError(message)


def command(main):
    """For a script's main(argv): bad input becomes one line on stderr and exit status 2; failed training, 1."""

    @functools.wraps(main)
    def wrapped(argv=None):
        with suppress(AttributeError):  # a stream that is no file
            sys.stdout.reconfigure(errors="replace")  # rather than an error for what its encoding lacks
        try:
            return main(argv)
        except FloatingPointError as error:
            message, status = error, 1
        except KeyboardInterrupt:
            message, status = "interrupted", 130
        except BrokenPipeError:  # the reader of stdout has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (InputError, OSError, MemoryError) as error:
            message, status = error, 2
        except RuntimeError as error:
            if world()[1] > 1 and regex.search("peer|pipe|closed|timed out|NCCL", str(error)):
                message, status = "another process of this run has died: --resume goes on from the last save", 1
            elif "alloc" in str(error) or "out of memory" in str(error):
                message, status = "out of memory: choose a smaller model, context or batch", 2
            else:
                raise
        print("error:", " ".join(str(message).split()), file=sys.stderr)
        raise SystemExit(status)

    return wrapped


def add_flags(parser, *configs):
    """A flag for every field of the dataclasses; in what is parsed, those that were not given are absent."""
    for field in itertools.chain.from_iterable(map(dataclasses.fields, configs)):
        default = field.default if field.default is not dataclasses.MISSING else " ".join(field.default_factory())
        options = {"help": f"{field.metadata['help']} (default: {default})".replace("%", "%%"), "default": argparse.SUPPRESS}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = str if field.type is list else field.type
            options |= {"nargs": "+"} if field.type is list else {"metavar": field.type.__name__.upper()}
        parser.add_argument(f"--{field.name}", **options)


@command
def main(argv=None):
    parser = Parser(prog="gpt.py", description="Train a GPT on text, into a checkpoint for sample.py.")
    parser.add_argument("--preset", help=f"defaults for the other flags: {', '.join(PRESETS)} (default: tiny)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add_flags(parser, GPTConfig, TrainConfig)
    given = vars(parser.parse_args(argv))
    preset, resume, overwrite = given.pop("preset"), given.pop("resume"), given.pop("overwrite")
    GPTConfig.preset(preset or "tiny")
    values, run = PRESETS[preset or "tiny"] | given, None
    if resume:
        require(preset is None and not overwrite, "--resume goes with neither --preset nor --overwrite")
        run, values = resume_run({"out": TrainConfig.out} | given)
    shape, config = from_flags(GPTConfig, values), from_flags(TrainConfig, values)
    device = join_processes(resolve_device(config.device))
    if not resume:
        refuse_existing(config.out, overwrite)
    vocabulary = Tokenizer.loads(*run["tokenizer"]) if resume else config.tokenizer
    tokenizer, train_tokens, val_tokens, text = prepare(config.data, vocabulary, shape.vocab_size, config.val_bytes)
    asked = given.get("vocab_size", tokenizer.vocab_size)
    require(asked == tokenizer.vocab_size or tokenizer.kind == "bpe", f"--vocab_size {asked} does not fit {tokenizer.kind}")
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    train_data, val_data = training_windows(train_tokens, shape.block_size, config.stride), TokenDataset(val_tokens, shape.block_size)
    passes = config.max_steps * config.batch_size * config.grad_accum * shape.block_size / len(train_tokens)
    if "dropout" not in values and passes > 4:  # what is seen often is learned by heart unless something stands against it
        shape = dataclasses.replace(shape, dropout=0.15)
    size = shape.n_parameters
    require(16 * size < memory_here() or device.type != "cpu", f"{size:,} parameters need {16 * size / 1e9:,.0f} GB for weights, "
            f"gradients and averages, and this machine has {memory_here() / 1e9:,.0f} GB")  # fmt: skip
    torch.manual_seed(config.seed)
    model, healthy = GPT(shape).to(device), math.log(shape.vocab_size) + 0.0002 * shape.n_embd
    say(
        f"{size:,} parameters: {shape.n_layer} blocks, {shape.n_head} heads, {shape.n_embd} channels, context "
        f"{shape.block_size}; {tokenizer.kind} vocabulary of {tokenizer.vocab_size:,}\n"
        f"{' '.join(config.data)}: {len(train_tokens):,} tokens to learn from, each seen {passes:.1f} times, with a dropout of "
        f"{shape.dropout}; {len(val_tokens):,} to validate on\n"
        f"a healthy first loss: ln {shape.vocab_size} + 0.0002 x {shape.n_embd} = {healthy:.2f} nats per token"
    )
    with locked(config.out):
        rows = train(model, tokenizer, train_data, val_data, config, run, overwrite, text=text)
    best = min(rows, key=lambda row: row["val_loss"])
    if world()[0] == 0:
        print(f"best at step {best['step']:,}: validation loss {best['val_loss']:.4f}, {best['val_bits_per_byte']:.4f} bits "
              f"per byte; saved in {config.out}, the curve as {config.out}/loss.png")  # fmt: skip
        say(f"try: python sample.py --model {config.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
