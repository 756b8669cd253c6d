"""A GPT in one file, to read from top to bottom: text becomes tokens, tokens become windows, windows go through
embeddings, attention and feed-forward layers to a loss, and the loss trains the model.

    python gpt.py                                # learn from Python's language reference, in about two minutes
    python gpt.py --data my.txt --n_layer 6      # your own text -> checkpoints/my; every setting is a flag
    python gpt.py --resume --out checkpoints/my --max_steps 2000
    torchrun --nproc_per_node=2 gpt.py --data my.txt --overwrite

The model is GPT-2 (Radford et al. 2019): decoder-only, autoregressive, pre-LayerNorm. Comments give the shapes:
B batch, T time (tokens), S time with cached tokens, C channels, H heads, D = C / H, V vocabulary.
"""

import argparse
import base64
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import heapq
import json
import math
import mmap
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

RANK = int(os.environ.get("RANK", "0"))  # torchrun starts WORLD_SIZE processes; this is number RANK
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


class InputError(ValueError):
    """Something the user gave can't be used; the message says what is wrong and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def log(text):
    if RANK == 0:
        tqdm.write(text, file=sys.stderr)


# ---- Configuration: every field is also a command-line flag ----
def flag(default, help, low=0, high=2**40, choices=None, shown=None):
    """A field with its help and limits; `shown` puts the default into words."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config):
    """Raise InputError for a value outside its limits."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        if choices:
            require(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}")
        elif field.type in (int, float):
            require(low <= value <= high, f"{name} is {value}, expected {low} to {high}")
        else:
            require(value not in ("", (), [], [""]), f"{name} is empty")


def from_flags(config_class, flags):
    """A config from those entries of a dict that are its fields."""
    fields = dataclasses.fields(config_class)
    return config_class(**{field.name: flags[field.name] for field in fields if field.name in flags})


@dataclasses.dataclass
class GPTConfig:
    """The shape of the model; the defaults are the preset `tiny`. Raises InputError for an impossible one."""

    block_size: int = flag(64, "context: how many tokens the model sees at once", 1, 2**20)
    vocab_size: int = flag(1024, "size of a learned vocabulary: bytes, merges and end of text", 1, 2**24)
    n_layer: int = flag(4, "number of blocks", 1, 1000)
    n_head: int = flag(4, "attention heads in each block", 1, 2**16)
    n_embd: int = flag(192, "channels: the width of the residual stream", 1, 2**16)
    dropout: float = flag(0.0, "share of activations zeroed in training", 0, 0.99, shown="0.15 for text seen > 4 times")

    def __post_init__(self):
        check_fields(self)
        require(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @classmethod
    def preset(cls, name):
        return from_flags(cls, PRESETS[name])


@dataclasses.dataclass
class TrainConfig:
    """What the model learns from, and how; the defaults are the preset `tiny`."""

    data: tuple = flag(
        ("pydoc",), "text files, folders, pydoc, shakespeare, or what extras.prepare made", shown="pydoc"
    )
    tokenizer: str = flag("bpe", "bpe is learned from the text", choices=("bpe", "bytes", "gpt2"))
    out: str = flag("checkpoints/scratch", "folder for the checkpoint", shown="checkpoints/scratch, or /my for my.txt")
    max_steps: int = flag(800, "optimizer steps", 1)
    batch_size: int = flag(32, "windows per forward pass, over all processes", 1, 2**20)
    grad_accum: int = flag(1, "gradient accumulation: forward passes per step", 1, 2**20)
    stride: int = flag(0, "tokens from the start of one window to the next", shown="a quarter of the context")
    val_bytes: int = flag(2**20, "the last tenth of the text is for validation, at most this many bytes", 1)
    optimizer: str = flag("muon", "muon for the matrices of the blocks, adamw for the rest", choices=("muon", "adamw"))
    lr: float = flag(4e-3, "peak learning rate", 0, 10)
    min_lr: float = flag(0.0, "final learning rate, as a share of the peak", 0, 1)
    warmup_steps: int = flag(40, "steps of linear warmup")
    weight_decay: float = flag(1.0, "decay of the matrices towards zero", 0, 10)
    beta2: float = flag(0.99, "AdamW's decay of the second moment", 0, 0.999999)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 means no limit")
    eval_interval: int = flag(100, "steps between validations; each saves a checkpoint", 1)
    patience: int = flag(0, "stop after this many validations without a new best; 0 means never")
    seed: int = flag(1337, "the same seed on the same machine gives the same weights", 0, 2**32)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: str = flag("auto", "auto is bfloat16 where it is native", choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "use torch.compile: slow to start, needs a C++ compiler")

    def __post_init__(self):
        check_fields(self)


GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768,
        "dropout": 0.1, "batch_size": 1, "grad_accum": 16, "optimizer": "adamw", "lr": 6e-4, "weight_decay": 0.1,
        "min_lr": 0.1, "beta2": 0.95, "warmup_steps": 700, "max_steps": 100_000, "eval_interval": 1000}  # fmt: skip
PRESETS = {  # defaults for flags; those given win
    "tiny": {},
    "shakespeare-10min": {"data": ["shakespeare"], "vocab_size": 2048, "n_layer": 6, "dropout": 0.2,
                          "weight_decay": 0.5, "max_steps": 3800, "eval_interval": 380},
    "scratch-152m": GPT2 | {"n_layer": 16},
    "gpt2": GPT2,
    "gpt2-medium": GPT2 | {"n_layer": 24, "n_head": 16, "n_embd": 1024, "lr": 3e-4},
    "gpt2-large": GPT2 | {"n_layer": 36, "n_head": 20, "n_embd": 1280, "lr": 2.5e-4},
    "gpt2-xl": GPT2 | {"n_layer": 48, "n_head": 25, "n_embd": 1600, "lr": 2e-4},
}  # fmt: skip

# ---- Text -> tokens: strings of bytes, each with an id ----
EOT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words


def merge(ids, pair, new):
    """Replace every occurrence of a pair: [1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4]."""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016): from single bytes, keep merging the most frequent pair inside words.

    texts -> {bytes of a token: its id}. A merge counts only the words anew that contain its pair.
    """
    counts = Counter(word for text in texts for word in regex.findall(SPLIT, text))
    words = [[list(word.encode()), count] for word, count in counts.items()]  # "low" -> [108, 111, 119]
    pairs = Counter()  # pair -> how often it occurs
    containing = defaultdict(set)  # pair -> the words it occurs in

    def count_pairs(i, sign):
        ids, count = words[i]
        for pair in pairwise(ids):
            pairs[pair] += sign * count
            containing[pair].add(i)

    for i in range(len(words)):
        count_pairs(i, 1)
    tokens = [bytes([byte]) for byte in range(256)]  # id -> bytes
    ranks = {token: i for i, token in enumerate(tokens)}
    queue = [(-count, pair) for pair, count in pairs.items()]  # the most frequent first; of equals, the smaller ids
    heapq.heapify(queue)
    while queue and queue[0][0] < 0 and len(ranks) < vocab_size:
        count, pair = heapq.heappop(queue)
        if pairs[pair] != -count:  # other merges have used some of it up: back into the queue
            heapq.heappush(queue, (-pairs[pair], pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:  # a + aa and aa + a spell the same
            ranks[token] = len(tokens)
            tokens.append(token)
        new = ranks[token]
        created = set()
        for i in list(containing[pair]):
            count_pairs(i, -1)
            words[i][0] = merge(words[i][0], pair, new)
            count_pairs(i, 1)
            created.update(found for found in pairwise(words[i][0]) if new in found)
        for found in created:
            heapq.heappush(queue, (-pairs[found], found))
    return ranks


class Tokenizer:
    """A vocabulary on tiktoken's encoder. No text encodes to `eot`, the id of the end-of-text token."""

    def __init__(self, ranks, kind, eot=None, special_tokens=None):
        self.ranks = ranks  # {bytes of a token: its id}
        self.kind = kind
        self.vocab_size = len(ranks) + 1
        self.eot = len(ranks) if eot is None else eot
        self.special_tokens = special_tokens or {EOT: self.eot}  # {name: id}, the end of text first
        self.encoding = tiktoken.Encoding(kind, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: self.eot})
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32  # of stored ids
        self.token_bytes = sorted(ranks, key=ranks.get)  # id -> bytes
        self.token_bytes.insert(self.eot, b"")  # the end of text has none

    @classmethod
    def bytes(cls):
        return cls({bytes([byte]): byte for byte in range(256)}, "bytes")

    @classmethod
    def bpe(cls, texts, vocab_size):
        require(vocab_size >= 257, f"vocab_size is {vocab_size}, but the bytes and the end of text alone are 257")
        return cls(train_bpe(texts, vocab_size - 1), "bpe")

    @classmethod
    def gpt2(cls):
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:
            advice = "go online once, set TIKTOKEN_CACHE_DIR to a folder with tiktoken's copy, or use --tokenizer bpe"
            raise InputError(f"GPT-2's vocab.bpe and encoder.json could not be downloaded: {advice}") from error
        return cls({gpt2.decode_single_token_bytes(i): i for i in range(gpt2.eot_token)}, "gpt2")

    def encode(self, text):
        """text -> list of ids. All of it is plain text, even the characters `<|endoftext|>`."""
        require(isinstance(text, str), f"encode takes a string, not {type(text).__name__}: decode takes ids")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """ids -> text; bytes that form no character become U+FFFD."""
        listed = not isinstance(ids, (str, bytes, int)) and getattr(ids, "ndim", 1) == 1
        require(listed, f"decode takes a list of ids, such as idx[0].tolist(), not {ids!r:.50}")
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    def dumps(self):
        """The vocabulary in tiktoken's file format, a token a line: its bytes in base64, and its id."""
        return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in self.ranks.items())

    @classmethod
    def loads(cls, text, kind, eot=None, special_tokens=None):
        """The inverse of dumps. Raises ValueError unless the ids are 0, 1, 2, ..., with eot among them."""
        pairs = [line.split() for line in text.splitlines()]
        ranks = {base64.b64decode(token): int(i) for token, i in pairs}
        ids = {*ranks.values(), len(ranks) if eot is None else eot}
        whole = len(pairs) >= 256 and ids == set(range(len(pairs) + 1))
        require(whole, "the ids of the tokenizer are not 0, 1, 2, ..., each once")
        return cls(ranks, kind, eot, special_tokens)


# ---- Files -> texts -> one long array of ids ----
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PIECE = r"(?s).{1000000}.*?\S(?=[ \n])|.+"  # cut before the space or line feed after a word, the tokens stay the same


@contextmanager
def replacing(path, parents=False):
    """Yield a path to write to, then move it to `path`: a crash leaves the old file or the new, never half of one."""
    part = path.with_name(f".{path.name}.part") / path.name
    try:
        part.parent.mkdir(parents=parents, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)  # save_file makes files that only their owner can read
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)


def decode_text(content, name):
    """UTF-8 bytes -> text, without byte-order mark, \\r\\n as \\n. Raises InputError with the place of a wrong byte."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        at = error.start + len(content) - len(error.object)  # the decoder has cut off a byte-order mark
        line = content.count(b"\n", 0, at) + 1
        coding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        advice = f"if it is {coding}, convert it with iconv -f {coding} -t utf-8"
        raise InputError(f"{name} is not UTF-8 text, see line {line}, byte {at}: {advice}") from error
    unusable = re.search(r"\0|\s{100000}", text)  # tiktoken's regular expression overflows at a million spaces
    require(not unusable, f"{name} has NUL bytes, or 100,000 spaces in a row: it isn't text")
    return text


def refuse_pointer(path):
    """Raise InputError for the lines that git leaves in place of a file if git-lfs is missing."""
    with open(path, "rb") as file:
        pointer = file.read(23) == b"version https://git-lfs"
    require(not pointer, f"{path} is a pointer of git-lfs, not the file: run `git lfs pull` in {Path(path).parent}")


def read_text(path):
    """A UTF-8 file -> its text, as decode_text reads it."""
    require(Path(path).is_file(), f"there is no text file {path}: give a file, a folder, pydoc or shakespeare")
    try:
        refuse_pointer(path)
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} could not be read: {error}") from error


def shakespeare():
    """Tiny Shakespeare (Karpathy 2015), downloaded once and checked -> its file."""
    import requests

    path = Path(".cache", "shakespeare.txt")
    if not path.exists():
        try:
            content = requests.get(SHAKESPEARE, timeout=30).content
        except requests.RequestException:
            content = b""
        same = hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256
        require(same, f"{SHAKESPEARE} could not be downloaded, or its checksum differs: save it yourself as {path}")
        with replacing(path, parents=True) as part:
            part.write_bytes(content)
    return path


def pydoc():
    """The language reference inside every Python, a text per topic, without repeated paragraphs."""
    from pydoc_data.topics import topics

    seen = {""}
    for name in sorted(topics):
        paragraphs = {" ".join(text.split()): text for text in topics[name].split("\n\n")}
        fresh = [text for words, text in paragraphs.items() if words not in seen]
        seen.update(paragraphs)
        if fresh:
            yield "\n\n".join(fresh).strip("\n") + "\n"


def load_texts(names):
    """Names of files, folders and built-in texts -> list of texts. Raises InputError if there are none."""
    texts = []
    for name in names:
        path = shakespeare() if name == "shakespeare" else Path(name)
        is_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
        require(not is_json, f"{name} is JSON, not text: finetune.py learns from .jsonl, an example a line")
        if name == "pydoc":
            texts.extend(pydoc())
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() == ".txt"]
            texts.extend(read_text(file) for file in files if "/." not in f"/{file.relative_to(path).as_posix()}")
        else:
            texts.append(read_text(path))
    require(texts, f"there is no *.txt in {' '.join(names)}")
    if any(re.match(r'\s*\[?\s*\{\s*"', text) for text in texts):
        log("a text looks like JSON, and counts with its braces and quotes: finetune.py learns what a .jsonl file says")
    return texts


def split_texts(texts, val_bytes):
    """Cut off the last tenth, at most val_bytes -> training texts, validation texts."""
    train, val = list(texts), []
    missing = min(sum(len(text.encode()) for text in texts) // 10, val_bytes)
    while missing > 0:
        text = train.pop()
        content = text.encode()
        head = content[:-missing].decode(errors="ignore")  # never half a character
        if head:
            train.append(head)
        val.insert(0, text[len(head) :])
        missing -= len(content)
    return train, val


def tokenize(texts, tokenizer):
    """Texts -> one array of ids, with the end of text before each."""
    arrays = []
    for text in texts:
        arrays.append(np.array([tokenizer.eot], tokenizer.dtype))
        for piece in tqdm(re.findall(PIECE, text), "tokenizing", unit=" MB", delay=2, disable=None, leave=False):
            arrays.append(np.array(tokenizer.encode(piece), tokenizer.dtype))
    return np.concatenate(arrays)


def load_data(names, tokenizer="bpe", vocab_size=1024, val_bytes=2**20):
    """Names of texts -> Tokenizer, training and validation ids; `tokenizer` is bpe, bytes, gpt2 or a Tokenizer."""
    folder = Path(names[0])
    if (folder / "train.bin").exists():  # made by extras.prepare: the ids stay on disk
        prepared = Tokenizer.loads(read_text(folder / "tokenizer.tiktoken"), "bpe")
        same = isinstance(tokenizer, str) or tokenizer.ranks == prepared.ranks
        require(same and len(names) == 1, f"{folder} stands alone, with a vocabulary of its own: give no other")
        return prepared, *(np.memmap(folder / name, prepared.dtype, "r") for name in ("train.bin", "val.bin"))
    data = [None]
    if RANK == 0:  # the first process reads and tokenizes for all
        texts = load_texts(names)
        size = sum(len(text) for text in texts)
        if size > 2e8:
            log(f"{size / 1e6:,.0f} MB of text: python -m extras.prepare is made for that much, and takes less memory")
        spelled = sum(text.count(EOT) for text in texts)
        if spelled:
            log(f"{EOT} is plain text, {spelled:,} times: to end a text there, put each into a file of its own")
        train, val = split_texts(texts, val_bytes)
        require(train and val, f"{' '.join(names)} is too little text to split in two")
        if tokenizer == "bpe":  # merges are learned from at most 16 MB, spread evenly over the text
            pieces = [piece for text in train for piece in re.findall(PIECE, text)]
            tokenizer = Tokenizer.bpe(pieces[:: 1 + size // 2**24], vocab_size)
        elif isinstance(tokenizer, str):
            tokenizer = getattr(Tokenizer, tokenizer)()
        data = [(tokenizer, tokenize(train, tokenizer), tokenize(val, tokenizer))]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(data)
    return data[0]


class TokenDataset:
    """Windows of block_size tokens, `stride` apart; targets are the inputs shifted by one, -1 (ignored) at the end."""

    def __init__(self, tokens, block_size, stride=None):
        self.tokens, self.block_size, self.stride = tokens, block_size, stride or block_size
        require(self.stride <= block_size, f"stride {self.stride} would skip tokens: at most the context, {block_size}")
        require(len(tokens) >= 2, "the text is too short: a window needs at least two tokens")

    def __len__(self):
        return 1 + max(0, math.ceil((len(self.tokens) - 1 - self.block_size) / self.stride))

    def batch(self, windows):
        """Indices of windows -> inputs (B, T), targets (B, T), int64."""
        tokens = self.tokens
        if isinstance(tokens.base, mmap.mmap):  # map the file anew, or every page that was read would stay in memory
            tokens = np.memmap(tokens.filename, tokens.dtype, "r")
        positions = np.asarray(windows)[:, None] * self.stride + np.arange(self.block_size + 1)  # (B, T + 1)
        beyond = positions >= len(tokens)
        rows = tokens[np.where(beyond, 0, positions)].astype(np.int64)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(np.where(beyond, -1, rows)[:, 1:])


@functools.lru_cache(maxsize=2)
def window_order(n, seed, epoch):
    """All n windows once, shuffled anew in each epoch: 8 bytes a window."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def windows_of_step(n, step, config):
    """The windows of a step, (grad_accum, batch_size): a function of the step, so resuming needs no bookmark."""
    size = config.batch_size * config.grad_accum
    chosen = [window_order(n, config.seed, i // n)[i % n] for i in range(step * size, (step + 1) * size)]
    return np.reshape(chosen, (config.grad_accum, config.batch_size))


# ---- The model, with the names of the published GPT-2 ----
class Dropout(nn.Dropout):
    """In training, zero a share p of the activations and scale up the rest (Srivastava et al. 2014)."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        p = round(self.p * 2**16) / 2**16  # sixteen random bits each: F.dropout draws floats, slowly, on one thread
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)  # -32768 to 32767, all equally likely
        keep = numbers >= p * 2**16 - 2**15
        return x * (keep.to(x.dtype) / (1 - p))


def attention(q, k, v, dropout=None, fused=None):
    """Scaled dot-product attention: softmax(q kᵀ / √D + causal mask) v (Vaswani et al. 2017, 3.2.1).

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D); the queries are the last T of the S positions. `fused` chooses
    PyTorch's kernel, by default where it is faster.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    p = dropout.p if dropout and dropout.training else 0.0
    if fused is None:  # on a CPU its dropout is slow, and so is its backward pass in bfloat16 at short contexts
        fast = p == 0 and (T >= 1024 or q.dtype == torch.float32 or not q.requires_grad)
        fused = fast or q.device.type != "cpu"
    if fused and T in (1, S):  # a single query may see everything and needs no mask
        return F.scaled_dot_product_attention(q, k, v, None, p, is_causal=T == S)
    scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # query t sees keys 0 ... S - T + t
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # each row sums to 1
    if p > 0:
        weights = dropout(weights)
    return weights @ v  # (B, H, T, D)


class KVCache:
    """One block's keys and values for the tokens so far, (B, H, max_length, D) each, allocated once."""

    def __init__(self, max_length):
        self.max_length, self.length = max_length, 0

    def append(self, k, v):
        """Keys and values of T new tokens, (B, H, T, D) -> those of all S tokens, (B, H, S, D)."""
        B, H, T, D = k.shape
        start, end = self.length, self.length + T
        require(end <= self.max_length, f"{end} tokens do not fit into a cache for {self.max_length}")
        if start == 0:
            self.k = k.new_empty(B, H, self.max_length, D)
            self.v = v.new_empty(B, H, self.max_length, D)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class CausalSelfAttention(nn.Module):
    """Each token gathers information from itself and the tokens before it, in n_head ways at once."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

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
    """The feed-forward network, each token by itself: four times as wide, a smooth nonlinearity (GELU), and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2 uses the tanh form (Hendrycks & Gimpel 2016)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each reads a normalized copy of the residual stream and adds to it (pre-LayerNorm)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)  # eps 1e-5 is PyTorch's default and GPT-2's
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final LayerNorm, and a head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        wte = torch.empty(config.vocab_size, config.n_embd)  # filled by init_weights
        wpe = torch.empty(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding.from_pretrained(wte, freeze=False)
        self.transformer["wpe"] = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.transformer["drop"] = Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # weight tying (Press & Wolf 2017)
        if not wte.is_meta:  # load_checkpoint needs no values
            self.apply(self.init_weights)

    def init_weights(self, module):
        """N(0, 0.02), biases 0; smaller where 2 n_layer projections add up in the residual stream (GPT-2, 2.3)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, caches=None):
        """idx (B, T) -> the final hidden states (B, T, C). With caches, idx follows the tokens in them."""
        past = caches[0].length if caches else 0
        end, limit = past + idx.shape[1], self.config.block_size
        require(end <= limit, f"{end} tokens do not fit into the context of {limit}: pass the last {limit}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past:end]  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V) and, given targets (B, T), the mean cross-entropy in nats; -1 is ignored."""
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        log_probs = logits.float().log_softmax(dim=-1)
        nll = F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, nll / (targets != -1).sum().clamp(min=1)

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) -> (B, T + max_new_tokens), fewer if every row has ended; options as for `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None, generator=None):
        """Yield the tokens that follow idx (B, T), one (B, 1) at a time, in the model's mode: call eval() first.

        When the context is full, its last half is kept. A row that has reached `eot` repeats it, until all have.
        """
        tensor = torch.is_tensor(idx) and idx.dim() == 2
        require(tensor, "idx is a tensor of ids, (B, T), such as torch.tensor([tokenizer.encode(text)])")
        require(idx.shape[1] > 0, "there is nothing to continue: begin with the end-of-text token")
        check_sampling(temperature, top_k, top_p)
        block_size = self.config.block_size
        window = idx[:, -block_size:]
        ended = torch.zeros_like(idx[:, :1], dtype=torch.bool)  # (B, 1)
        caches = None
        for remaining in range(max_new_tokens, 0, -1):
            if window.shape[1] > block_size:
                window = window[:, -max(1, block_size // 2) :]
                caches = None
            if caches is None:
                length = min(window.shape[1] + remaining, block_size)
                caches = [KVCache(length) for _ in self.transformer.h]
            new = window[:, caches[0].length :]  # first the whole window, then one token at a time
            logits = self.lm_head(self.hidden(new, caches)[:, -1])  # (B, V)
            token = sample_next_token(logits, temperature, top_k, top_p, generator)
            if eot is not None:
                token = token.masked_fill(ended, eot)
                ended |= token == eot
            window = torch.cat([window, token], dim=1)
            yield token
            if eot is not None and ended.all():
                return


def check_sampling(temperature, top_k, top_p):
    valid = temperature == 0 or 1e-6 <= temperature <= 1e6
    require(valid, f"temperature is {temperature}, expected 0 (greedy), or 1e-6 to 1e6")
    require(top_k is None or 1 <= top_k <= 2**31, f"top_k is {top_k}, expected 1 to 2**31")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, expected more than 0 and at most 1")


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) -> the probabilities (B, V) to sample from. A temperature below 1 favours likely tokens.

    top_k keeps the k most probable ones; top_p, of these, the fewest that add up to p (nucleus, Holtzman et al. 2020).
    """
    logits = logits.float() - logits.float().amax(dim=-1, keepdim=True)  # at most 0, so that dividing can't overflow
    if top_k is not None:
        top = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -math.inf).scatter(-1, top.indices, top.values)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(descending=True)
        outside = ranked.cumsum(dim=-1) - ranked >= top_p  # all more probable tokens reach p without this one
        outside[:, 0] = False  # the first stays, always
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(outside, 0))
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample_next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> one id per row, (B, 1), sampled from next_token_probs; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = next_token_probs(logits, temperature, top_k, top_p)
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(dim=-1, keepdim=True)  # what torch.multinomial does, without checks that wait


# ---- Device, optimizer and schedule ----
def resolve_device(name):
    """auto, cpu, cuda, cuda:1 or mps -> torch.device, one of its own for each process. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and WORLD_SIZE > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not available here: use --device auto or cpu") from error


def resolve_dtype(name, device):
    """auto -> bfloat16 where its matrix products are fast, else float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        slow = "Intel" in can.get("cpu_name", "") and not can.get("amx_bf16")  # half the speed of float32
        fast = not slow and any(value for key, value in can.items() if "bf16" in key)
    auto = "bfloat16" if fast else "float32"
    return getattr(torch, auto if name == "auto" else name)


def orthogonalize(x):
    """Bring the singular values of matrices x (N, rows, columns), rows <= columns, close to 1 (Newton-Schulz)."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT  # (N, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)  # 3.4445 x - 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized so that all directions of a matrix move alike (Jordan 2024); same shapes together."""

    def __init__(self, params, lr, weight_decay, dtype=torch.float32, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        shapes = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                shapes[p.shape].append(p)
        for (rows, columns), params in shapes.items():
            updates = []
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                updates.append(update if rows <= columns else update.T)
            scale = 0.2 * max(rows, columns) ** 0.5  # updates as large as AdamW's: one lr serves both (Liu et al. 2025)
            for p, update in zip(params, orthogonalize(torch.stack(updates).to(self.dtype)), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update if rows <= columns else update.T, alpha=-group["lr"] * scale)


def make_optimizers(model, config):
    """AdamW (Loshchilov & Hutter 2019), or Muon for the matrices of the blocks; vectors (biases, norms) don't decay."""
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif ".h." in name and config.optimizer == "muon":
            hidden.append(p)
        else:
            matrices.append(p)
    optimizers = []
    if matrices or vectors:
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, config.lr, betas=(0.9, config.beta2), fused=True))
    if hidden:
        optimizers.append(Muon(hidden, config.lr, config.weight_decay, resolve_dtype("auto", hidden[0].device)))
    return optimizers


def learning_rate(step, config):
    """Linear warmup that does not start at 0, then linear decay to min_lr times the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr * (1 - (1 - config.min_lr) * progress)


# ---- A checkpoint is a folder; no file in it is code, and a crash leaves each whole ----
CONFIG, VOCABULARY = "config.json", "tokenizer.tiktoken"
MODEL, STATE = "model.safetensors", "training_state.safetensors"


def refuse_existing(folder, overwrite=False):
    """Raise InputError if there is a checkpoint already, or if the folder can't be made."""
    exists = any(Path(folder, name).exists() for name in (CONFIG, VOCABULARY, MODEL, STATE))
    require(overwrite or not exists, f"{folder} already holds a checkpoint: add --overwrite, or choose another --out")
    there = next(path for path in [Path(folder), *Path(folder).absolute().parents] if path.exists())
    require(there.is_dir() and os.access(there, os.W_OK), f"{there} is not a folder to write to: choose another --out")


def save_tensors(path, tensors, metadata):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        require(tensor.isfinite().all(), f"{name} holds numbers that are not finite: use a smaller --lr")
    save_file(tensors, path, {"format": "pt", "metadata": json.dumps(metadata)})


def save_checkpoint(folder, model, tokenizer, weights=None, overwrite=False, keep_state=False, **metadata):
    """Write a checkpoint with its metadata (step=...); `weights`, {name: tensor}, replace the model's own."""
    refuse_existing(folder, overwrite)
    folder = Path(folder)
    with replacing(folder / MODEL, parents=not keep_state) as part:  # a folder that has vanished since is an error
        save_tensors(part, weights or dict(model.named_parameters()), metadata)  # the tied head is in it once
        for name in () if keep_state else (CONFIG, STATE):  # of the checkpoint that was there
            (folder / name).unlink(missing_ok=True)
    describe_checkpoint(folder, model, tokenizer, metadata)


def describe_checkpoint(folder, model, tokenizer, metadata):
    """Write tokenizer.tiktoken and config.json."""
    vocabulary = {"tokenizer": tokenizer.kind, "eot": tokenizer.eot, "special_tokens": tokenizer.special_tokens}
    config = {"model": dataclasses.asdict(model.config), **vocabulary, **metadata}
    for name, text in ((VOCABULARY, tokenizer.dumps()), (CONFIG, json.dumps(config, indent=2) + "\n")):
        with replacing(folder / name) as part:
            part.write_text(text)


def find_checkpoint(name):
    """A folder, or a name under checkpoints/ -> the folder. Raises InputError, which lists what is there."""
    for folder in (Path(name), Path("checkpoints", name)):
        if (folder / VOCABULARY).exists():
            return folder
    there = ", ".join(path.parent.name for path in sorted(Path("checkpoints").glob(f"*/{VOCABULARY}")))
    raise InputError(f"there is no checkpoint {name}; checkpoints/ has {there or 'none: run python gpt.py'}")


def load_checkpoint(name, device="cpu"):
    """A folder, or a name under checkpoints/ -> GPT in eval mode, Tokenizer. Raises InputError if it is damaged."""
    folder = find_checkpoint(name)
    try:
        config = json.loads(read_text(folder / CONFIG))
        kind, eot, special_tokens = config["tokenizer"], config.get("eot"), config.get("special_tokens")
        tokenizer = Tokenizer.loads(read_text(folder / VOCABULARY), kind, eot, special_tokens)
        with torch.device("meta"):  # shapes without memory
            model = GPT(GPTConfig(**config["model"]))
        require(tokenizer.vocab_size <= model.config.vocab_size, "the tokenizer is larger than the model's vocabulary")
        require((folder / MODEL).is_file(), f"{MODEL} is missing, or not a file")
        refuse_pointer(folder / MODEL)
        with safe_open(folder / MODEL, "pt") as file:
            weights = {key: nn.Parameter(file.get_tensor(key).float()) for key in file.keys()}  # noqa: SIM118
        for key, weight in weights.items():
            require(weight.isfinite().all(), f"{key} holds numbers that are not finite")
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        model.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).splitlines()[:2])[:300]  # of tensors that don't fit, the first
        raise InputError(f"{folder} is not a readable checkpoint: {reason}") from error
    return model.to(device).eval(), tokenizer


def save_run(run, model, optimizers, folder):
    """Write log.csv and, last, the training state: trained parameters, the optimizers' averages, and `run` as JSON."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in list(tensors.items()):
        for i, optimizer in enumerate(optimizers):
            tensors |= {f"{name}:{i}:{key}": average for key, average in optimizer.state.get(p, {}).items()}
    lines = [run["rows"][0].keys(), *(row.values() for row in run["rows"])]
    with replacing(folder / "log.csv") as part:
        part.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    with replacing(folder / STATE) as part:
        save_tensors(part, tensors, run)


def load_run(folder):
    """What save_run wrote -> run, its tensors, and the metadata of the best model so far. Raises InputError."""
    path = Path(folder, STATE)
    require(path.exists(), f"there is nothing to resume in {folder}: it has no {STATE} (older versions' are not read)")
    try:
        with safe_open(path, "pt") as state, safe_open(Path(folder, MODEL), "pt") as model:
            tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118
            return json.loads(state.metadata()["metadata"]), tensors, json.loads(model.metadata()["metadata"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"the run in {folder} can't be resumed: {error}") from error


def restore(tensors, model, optimizers):
    """Put the tensors of load_run back into the model and its optimizers."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if ":" in key:
            name, i, average = key.split(":")
            optimizers[int(i)].state[parameters[name]][average] = tensor.to(parameters[name].device)
        else:
            parameters[key].data.copy_(tensor)


def plot(rows, path):
    """Draw the training curve."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], "o-", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(0, None))
    axes.legend()
    with replacing(path) as part:
        axes.figure.savefig(part, dpi=120)


# ---- Training: predict the next token, measure the loss, follow the gradient downhill ----
@torch.no_grad()
def evaluate(model, data, tokenizer, batch_size=16, dtype=torch.float32, signals=()):
    """A whole TokenDataset -> loss (nats per token), perplexity, bits_per_byte, accuracy, and the number of tokens.

    Every target weighs the same. Returns None if a signal is noted meanwhile. Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(token) for token in tokenizer.token_bytes])  # (V,)
    sums = torch.zeros(4, dtype=torch.float64)  # nats, tokens, bytes, hits
    model.eval()
    starts = range(0, len(data), batch_size)
    for start in tqdm(starts, "evaluating", unit=" batches", delay=1, disable=RANK > 0 or None, leave=False):
        if signals and WORLD_SIZE == 1:
            return None
        x, y = data.batch(range(start, min(start + batch_size, len(data))))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, loss = model(x.to(device), y.to(device))
        targets = y[y != -1]
        hits = (logits.argmax(dim=-1).cpu() == y).sum()
        nats = loss.item() * len(targets)
        sums += torch.tensor([nats, len(targets), lengths[targets].sum(), hits], dtype=torch.float64)
    nats, tokens, n_bytes, hits = sums.clamp(min=1e-9).tolist()
    figures = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700))}
    return figures | {"bits_per_byte": nats / math.log(2) / n_bytes, "accuracy": hits / tokens, "tokens": round(tokens)}


def forward_backward(model, data, step, config, dtype):
    """Add up the gradients of a step -> its loss, the mean over the targets of all processes, and their number."""
    device = next(model.parameters()).device
    batches = [data.batch(windows) for windows in windows_of_step(len(data), step, config)]
    n_targets = sum((y != -1).sum().item() for x, y in batches)
    total = torch.zeros((), device=device)
    for i, (x, y) in enumerate(batches):
        x, y = (tensor[RANK::WORLD_SIZE].to(device) for tensor in (x, y))  # the windows of this process
        model.require_backward_grad_sync = i == len(batches) - 1  # DDP exchanges gradients once, after the last batch
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = model(x, y)
        loss = loss * (y != -1).sum() / n_targets  # batches need not have equally many targets
        (loss * WORLD_SIZE).backward()  # DDP takes the mean over processes where a sum is wanted
        total += loss.detach()
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total.item(), n_targets


@contextmanager
def noting_signals():
    """Yield a list that notes Ctrl-C and SIGTERM, to be obeyed between two steps; a second one ends the process."""
    noted = []

    def note(number, frame):
        if noted and WORLD_SIZE == 1:  # torchrun sends each of them twice
            os._exit(128 + number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_freed_memory():
    """Let glibc keep the memory that PyTorch frees: getting it back from the system takes a tenth of a step."""
    with suppress(OSError, AttributeError, TypeError):  # other C libraries do without
        mallopt = ctypes.CDLL(None).mallopt
        # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD (of which old versions take 32 MB at most), M_ARENA_MAX
        for option, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25), (-3, 2**30), (-8, 1)):
            mallopt(option, value)


def check_finite(value, name, step, config):
    where = f"at step {step}, lr {learning_rate(step, config):.2g}: {config.out} keeps the last checkpoint"
    require(math.isfinite(value), f"the {name} is {value} {where}; use a smaller --lr, or --dtype float32")


def train(model, tokenizer, train_data, val_data, config, resumed=None, export_weights=None, prompt=(), **fingerprints):
    """Train all parameters that require a gradient, and write the checkpoint config.out -> the rows of its log.csv.

    A run `resumed` by load_run goes on bit for bit, if its fingerprints (of the data, of a base model) are the same.
    export_weights(model) makes the weights to save, if not the model's own. The samples continue prompt, a list of
    ids. Raises InputError at a loss or gradient that isn't finite, SystemExit after Ctrl-C or SIGTERM.
    """
    folder = Path(config.out)
    device = next(model.parameters()).device
    dtype = resolve_dtype(config.dtype, device)
    best = {"step": 0, "validation": {"loss": math.inf}}
    run = {"step": 0, "tokens": 0, "seconds": 0.0, "losses": [], "grad_norm": 0.0, "rows": []}
    run["fingerprints"] = fingerprints
    if resumed:
        run, tensors, best = resumed
        same = run["fingerprints"] == fingerprints
        require(same, f"the data or the base model changed since the run in {folder} began: start a new one")
        log(f"resuming at step {run['step']:,} of {config.max_steps:,}")
    bar = tqdm(desc="training", total=config.max_steps, initial=run["step"], unit=" steps", disable=RANK > 0 or None)
    optimizers = make_optimizers(model, config)  # imports PyTorch's compiler, which takes a second
    if resumed:
        restore(tensors, model, optimizers)
    if resumed and RANK == 0:  # a crash may have come between two files, or in the middle of one
        describe_checkpoint(folder, model, tokenizer, best)
        for part in folder.glob(".*.part"):
            shutil.rmtree(part)
    run["tokenizer"] = [tokenizer.dumps(), tokenizer.kind, tokenizer.eot, tokenizer.special_tokens]
    run["config"] = dataclasses.asdict(model.config) | dataclasses.asdict(config)
    runner = torch.compile(model) if config.compile else model
    if WORLD_SIZE > 1:
        runner = nn.parallel.DistributedDataParallel(runner)
    keep_freed_memory()
    started = time.perf_counter() - run["seconds"]
    with noting_signals() as signals, bar:
        while True:
            step, rows = run["step"], run["rows"]
            lr = learning_rate(step, config)

            # validate when it is due, and save
            finished = step >= config.max_steps
            figures = None
            if (finished or step % config.eval_interval == 0) and not (rows and rows[-1]["step"] == step):
                figures = evaluate(model, val_data, tokenizer, config.batch_size, dtype, signals)
            if figures:
                check_finite(figures["loss"], "validation loss", step, config)
                run["seconds"] = time.perf_counter() - started
                train_loss = sum(run["losses"]) / len(run["losses"]) if run["losses"] else math.nan
                row = {"step": step, "tokens": run["tokens"], "seconds": round(run["seconds"], 2), "lr": lr}
                row |= {"train_loss": train_loss, "val_loss": figures["loss"]}
                row |= {"val_bits_per_byte": figures["bits_per_byte"], "grad_norm": run["grad_norm"]}
                rows.append(row)
                run["losses"] = []
                spent = tqdm.format_interval(run["seconds"])
                left = tqdm.format_interval((config.max_steps - step) * run["seconds"] / step) if step else "?"
                learned = f"training loss {train_loss:.4f}, " if step else ""
                log(f"step {step:,} of {config.max_steps:,}, {spent} so far, {left} left")
                log(f"    {learned}validation loss {figures['loss']:.4f}, {row['val_bits_per_byte']:.4f} bits per byte")
                generator = torch.Generator(device).manual_seed(config.seed + step)
                idx = torch.tensor([list(prompt) or [tokenizer.eot]], device=device)
                idx = model.generate(idx, 48, temperature=0.8, top_p=0.9, eot=tokenizer.eot, generator=generator)
                log("    " + tokenizer.decode(idx[0].tolist()).strip().replace("\n", "\n    "))
                if figures["loss"] < best["validation"]["loss"]:
                    best = {"step": step, "validation": figures, "training": dataclasses.asdict(config)}
                    weights = export_weights and export_weights(model)
                    if RANK == 0:
                        old = {"overwrite": True, "keep_state": len(rows) > 1}
                        save_checkpoint(folder, model, tokenizer, weights, **old, **best)
                if RANK == 0:
                    save_run(run, model, optimizers, folder)

            # stop when asked, or when there is nothing left to do
            stop = torch.tensor(max(signals, default=0), device=device)
            if WORLD_SIZE > 1:  # all processes stop at the same step
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            in_vain = sum(row["step"] > best["step"] for row in rows)
            if stop or finished:
                break
            if 0 < config.patience <= in_vain:
                log(f"finished early: no new best in {in_vain} validations (--patience)")
                break

            # forward, backward, clip, step
            model.train()
            seeds = np.random.SeedSequence([config.seed, step, RANK])  # dropout is a function of the step, too
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            loss, n_targets = forward_backward(runner, train_data, step, config, dtype)
            check_finite(loss, "loss", step, config)
            run["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
            check_finite(run["grad_norm"], "norm of the gradient", step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()

            # log
            run["step"] += 1
            run["tokens"] += n_targets
            run["losses"].append(loss)
            bar.update()
            speed = (bar.format_dict["rate"] or 0) * n_targets
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)

        model.eval()
        if RANK == 0 and rows:
            if stop:  # otherwise the last validation has saved all
                save_run(run, model, optimizers, folder)
            plot(rows, folder / "loss.png")
    if WORLD_SIZE > 1:  # the others wait for the first; a process that ended at once could abort in Gloo's threads
        dist.barrier()
    if stop:
        log(f"stopped at step {step:,}; go on with --resume --out {folder}" if rows else "nothing was saved")
        raise SystemExit(128 + int(stop))
    return rows


# ---- The command line ----
class Parser(argparse.ArgumentParser):
    """argparse with errors that are InputError and name the nearest flag."""

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        near = difflib.get_close_matches(unknown, re.findall(r"--\w+", self.format_help()), 1)
        if message.endswith("expected one argument"):
            message += " (one that begins with a dash goes behind =, as in --prompt=-hello)"
        raise InputError(f"{message}: " + (f"did you mean {near[0]}?" if near else "see --help"))


def add_flags(parser, *configs):
    """A flag for every field; what wasn't given is absent from the result of parse_args."""
    for config in configs:
        for field in dataclasses.fields(config):
            rule = field.metadata
            kinds = {tuple: {"nargs": "+"}, bool: {"action": argparse.BooleanOptionalAction}}
            kind = kinds.get(field.type, {"type": field.type, "choices": rule["choices"]})
            help = f"{rule['help']} (default: {rule['shown'] or field.default})"
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help, **kind)


def command(main):
    """Run a script's main(argv): what the user can mend ends in one line on stderr, with exit status 2."""

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):  # a stream that is no file
                encoding = None if stream.isatty() else "utf-8"  # a console keeps its own
                stream.reconfigure(encoding=encoding, errors="replace" if stream is sys.stdout else "backslashreplace")
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of stdout has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except InputError as error:
            message = " ".join(str(error).split())
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
            if not full:
                raise
            message = "out of memory: choose a smaller model, context or batch"
        print("error:", message, file=sys.stderr)
        sys.exit(2)

    return run


@command
def main(argv=None):
    parser = Parser(prog="gpt.py", description="Train a GPT on text, into a checkpoint for sample.py.")
    parser.add_argument("--preset", choices=PRESETS, help="defaults for the other flags (default: tiny)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add_flags(parser, GPTConfig, TrainConfig)
    given = vars(parser.parse_args(argv))
    preset, resume, overwrite = given.pop("preset"), given.pop("resume"), given.pop("overwrite")
    if resume:
        require(not (preset or overwrite), "--resume goes with neither --preset nor --overwrite")
        resumed = load_run(given.setdefault("out", TrainConfig.out))
        flags = resumed[0]["config"] | given
        require("method" not in flags, f"{flags['out']} is a run of finetune.py: resume it with that")
        fixed = {"tokenizer", "optimizer", *(field.name for field in dataclasses.fields(GPTConfig))} & given.keys()
        require(not fixed, f"--resume can't change {', '.join(sorted(fixed))}: start a new run with another --out")
        vocabulary = Tokenizer.loads(*resumed[0]["tokenizer"])
    else:
        resumed, flags = None, PRESETS[preset or "tiny"] | given
        if "data" in flags:
            flags.setdefault("out", f"checkpoints/{Path(flags['data'][0]).resolve().stem}")
        vocabulary = flags.get("tokenizer", "bpe")
    shape, config = from_flags(GPTConfig, flags), from_flags(TrainConfig, flags)
    refuse_existing(config.out, overwrite or resume)
    if WORLD_SIZE > 1:
        dist.init_process_group()
    device = resolve_device(config.device)
    compiler = device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    require(compiler or not config.compile, "--compile needs a C++ compiler: install g++, or leave it out")
    log(f"reading and tokenizing {' '.join(config.data)}")
    tokenizer, train_ids, val_ids = load_data(config.data, vocabulary, shape.vocab_size, config.val_bytes)
    fits = tokenizer.kind == "bpe" or given.get("vocab_size") in (None, tokenizer.vocab_size)
    require(fits, f"--tokenizer {tokenizer.kind} has a vocabulary of {tokenizer.vocab_size}: leave --vocab_size out")
    epochs = config.max_steps * config.batch_size * config.grad_accum * shape.block_size / len(train_ids)
    dropout = 0.15 if "dropout" not in flags and epochs > 4 else shape.dropout  # against memorizing
    shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size, dropout=dropout)
    require(len(train_ids) > shape.block_size, f"{len(train_ids)} tokens are shorter than a window: lower --block_size")
    train_data = TokenDataset(train_ids, shape.block_size, config.stride or max(1, shape.block_size // 4))
    val_data = TokenDataset(val_ids, shape.block_size)
    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    log(f"{n_parameters:,} parameters on {device}, matrix products in {dtype}")
    log(f"{len(train_ids):,} tokens, {epochs:.1f} epochs, dropout {dropout}; {len(val_ids):,} for validation")
    healthy = math.log(shape.vocab_size) + 0.0002 * shape.n_embd
    log(f"a healthy first loss is ln {shape.vocab_size} + 0.0002 x {shape.n_embd} = {healthy:.2f} nats per token")
    text = hashlib.sha256(train_ids)
    text.update(val_ids)
    rows = train(model, tokenizer, train_data, val_data, config, resumed, text=text.hexdigest())
    best = min(rows, key=lambda row: row["val_loss"])
    if RANK == 0:
        print(f"best at step {best['step']:,}: {best['val_bits_per_byte']:.4f} bits per byte; saved in {config.out}")
        log(f"the curve is {config.out}/loss.png; try: python sample.py --model {config.out}")


if __name__ == "__main__":
    main()
