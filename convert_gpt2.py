"""GPT-2's published weights -> a checkpoint that sample.py and all other scripts use, without a network.

    python convert_gpt2.py gpt2                     downloads, converts, checks -> checkpoints/gpt2
    python convert_gpt2.py gpt2-medium              or gpt2-large, gpt2-xl, distilgpt2
    python convert_gpt2.py owner/name               any model of GPT-2's architecture on the Hugging Face hub
    python convert_gpt2.py path/to/folder           files that you already have

The published tensors have the names of gpt.py's. Four weights in each block are stored the other way round: they were
written for x @ W with W (in, out), and nn.Linear computes x @ W.T with W (out, in). So these four are transposed. A
forgotten transpose shows as a wrong shape, except in attn.c_proj, which is square: there only the logits are wrong.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import gpt
from gpt import (
    EOT,
    GPT,
    PRESETS,
    GPTConfig,
    InputError,
    Tokenizer,
    command,
    load_checkpoint,
    log,
    read_text,
    replacing,
    require,
    save_checkpoint,
)

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PARAGRAPH = (
    "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the stairs, lit the lamp "
    "and looked out over the water. In winter the waves came up to the door, and nobody visited him for weeks. He did "
    "not mind. He had his books, a stove, and a cat that slept on the warm side of the room."
)

# ---------------------------------------------------------------------------------------------------------------------
# Download the files of a model from the Hugging Face hub: each once, and checked. A download goes to NAME.ETAG.part, and
# resumes there if it breaks. It gets its final name once its size and hash match what the hub announced. HF_ENDPOINT
# (a mirror) and HF_TOKEN (for private models) have their usual meaning.

NAMES = {name: f"openai-community/{name}" for name in PRESETS if "gpt2" in name}
NAMES["distilgpt2"] = "distilbert/distilgpt2"
CACHE = Path(".cache", "hub")
TIMEOUT, PAUSE, LONGEST_PAUSE = (10, 30), 1.0, 300  # seconds
ATTEMPTS = 5


class Interrupted(Exception):
    """A download worth another attempt; `pause` is how long the server asked to wait."""

    def __init__(self, reason, pause=None):
        super().__init__(reason)
        self.pause = pause


def header(response, *names):
    """The first of these headers that is in the hub's answer or in that of the host it redirects to; or ""."""
    hops = [*response.history, response]  # a large file is a redirect, and the hub's own answer describes the file
    return next((hop.headers[name] for name in names for hop in hops if name in hop.headers), "")


def seconds_asked(response):
    """How long a busy server asks to wait, in Retry-After (seconds or a date) or RateLimit (t=seconds); or None."""
    asked = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(asked) if asked[:1].isdigit() else parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError):
        limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
        return float(limit[1]) if limit else None


def parts_of(path):
    """The incomplete download of a file, at most one NAME.ETAG.part."""
    dots = path.name.count(".") + 2
    return [part for part in path.parent.glob(f"{path.name}.*.part") if part.name.count(".") == dots]


def check_content(path, etag, size):
    """Raise Interrupted, and delete the file, unless it has the size and hash that the hub announced."""
    actual = path.stat().st_size
    digest = None
    if actual < (size or 0):
        raise Interrupted(f"the connection ended after {actual:,} of {size:,} bytes")
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        digest = hashlib.sha1(b"blob %d\0" % actual)
    if digest:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
    if (size and actual != size) or (digest and digest.hexdigest() != etag):
        path.unlink()
        raise Interrupted(f"these {actual:,} bytes are not the file: its hash should be {etag or 'unknown'}")


def attempt(session, url, path):
    """Download what is still missing of a file -> the hub's commit; None if there is no such file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = parts_of(path)
    have = parts[0].stat().st_size if parts else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, etag = response.status_code, re.sub(r'^(W/)?"?|"$', "", header(response, "X-Linked-Etag", "ETag"))
        part = path.with_name(f"{path.name}.{re.sub('[^0-9a-zA-Z]', '', etag)[:64] or 'unknown'}.part")
        if status == 404:
            return None
        said = f" ({said})" if (said := header(response, "X-Error-Message")) else ""
        advice = "no such model, or it isn't public. Check the name, or set HF_TOKEN to a token that may read it"
        require(status not in (401, 403), f"the answer for {url} is {status}{said}: {advice}")
        if status in (408, 429) or status >= 500:
            raise Interrupted(f"the server answered {status}", seconds_asked(response))
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        other_file = have and not (etag and parts == [part])
        if status == 416 or (status == 206 and not resumes) or other_file:
            for stale in parts:
                stale.unlink()
            raise Interrupted("the earlier part does not belong to this file", 0)
        require(status in (200, 206), f"the answer for {url} is {status} {response.reason}")
        is_page = "text/html" in response.headers.get("Content-Type", "")
        advice = "is there a proxy or a login page between this machine and the hub?"
        require(not is_page, f"the answer for {path.name} is a web page: {advice}")
        have = have if status == 206 else 0
        size = int(header(response, "X-Linked-Size") or have + int(response.headers.get("Content-Length", -have)))
        most = size or (2**26 if path.suffix in (".json", ".txt") else math.inf)
        looks = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
        bar = tqdm(desc=path.name, total=size or None, initial=have, **looks)
        with bar, open(part, "ab" if have else "wb") as file:
            for block in response.iter_content(2**16):
                file.write(block)
                bar.update(len(block))
                if file.tell() > most:
                    break  # it can't be the file
            file.flush()
            os.fsync(file.fileno())
        check_content(part, etag, size)
        if path.suffix == ".json":
            read_json(part)
        os.replace(part, path)
        return header(response, "X-Repo-Commit")


def download(session, url, path, by_hand):
    """Attempt it until it works, through broken connections and busy servers. Raises InputError."""
    failures = most = 0
    while True:
        try:
            return attempt(session, url, path)
        except Interrupted as error:
            reason, asked = str(error), error.pause
        except requests.Timeout:
            reason, asked = f"no answer for {TIMEOUT[1]} s", None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            broken = "timed out" in str(error) or isinstance(error, requests.exceptions.ChunkedEncodingError)
            reason, asked = "the connection broke" if broken else f"no connection to {urlsplit(url).netloc}", None
        except (OSError, ValueError) as error:  # a full disk, or another of requests' exceptions
            raise InputError(f"{path.name}: {error}. You can also {by_hand}") from error
        have = sum(part.stat().st_size for part in parts_of(path))
        failures = failures + 1 if have <= most else 1  # progress earns new attempts
        most = max(most, have)
        pause = PAUSE * 2 ** (failures - 1) if asked is None else asked
        advice = f"run the same command to resume after {have:,} bytes, or {by_hand}" if have else by_hand
        worth_it = failures < ATTEMPTS and pause <= LONGEST_PAUSE
        require(worth_it, f"{path.name} could not be downloaded: {reason}. What to do: {advice}")
        log(f"{path.name}: {reason}; trying again in {pause:.0f} s")
        time.sleep(pause)


def open_source(name, revision="main"):
    """A folder, short name or owner/name -> fetch, which gives the path of a file or None, and the files' folder."""
    if (Path(name) / "config.json").is_file():
        require(revision == "main", f"--revision goes with a model on the hub, and {name} is a folder")
        return lambda file: checked(path) if (path := Path(name) / file).is_file() else None, Path(name)
    needed = "config.json, vocab.json, merges.txt and model.safetensors"
    require(not Path(name).is_dir(), f"{name} has no config.json: put {needed} there")
    repository = NAMES.get(name, name)
    valid = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository)
    require(valid, f"{name!r} is neither a folder nor owner/name nor one of {', '.join(NAMES)}")
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    folder = CACHE / f"{repository.replace('/', '--')}@{quote(revision, safe='')}"
    page = f"https://huggingface.co/{repository}/tree/{revision}"
    then = f"run python convert_gpt2.py FOLDER --out checkpoints/{Path(name).name}"
    by_hand = f"save {needed} from {page} in a FOLDER, and {then}"
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # compressed, an answer has another size than the file
    if token := os.environ.get("HF_TOKEN", "").strip():
        require(re.fullmatch("[!-~]+", token), "HF_TOKEN contains characters that no token has")

        def authorize(request):
            request.headers["Authorization"] = f"Bearer {token}"  # requests drops it when redirected to another host
            return request

        session.auth = authorize

    def fetch(file):
        pin, absent = folder / "commit", folder / f"{file}.absent"
        if (folder / file).is_file() or absent.exists():
            return None if absent.exists() else checked(folder / file)
        at = quote(read_text(pin) if pin.exists() else revision, safe="")  # all files from the commit of the first
        commit = download(session, f"{endpoint}/{repository}/resolve/{at}/{file}", folder / file, by_hand)
        if commit and not pin.exists():
            with replacing(pin) as part:
                part.write_text(commit)
        missing = f"there is no {file} at {endpoint}/{repository} in revision {revision}"
        require(commit is not None or file != "config.json", f"{missing}: check the name, or {by_hand}")
        if commit is None:
            with replacing(absent) as part:  # so that it is not asked for again
                part.touch()
            return None
        return checked(folder / file)

    return fetch, folder


def checked(path):
    """The path itself; raises InputError if a web page or a pointer was saved instead of the file."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise InputError(f"{path} could not be read: {error}") from error
    is_page = start.startswith((b"<!doctype", b"<html"))
    is_pointer = start.startswith(b"version https://git-lfs")
    require(not is_page, f"{path} is a web page, not the file: delete it and download it again")
    require(not is_pointer, f"{path} is a git-lfs pointer, not the file: `git lfs pull` gets it")
    return path


def read_json(path):
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    require(isinstance(found, dict), f"{path} is not a JSON object")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Published files -> shape, vocabulary and weights.

# sha256 of Tokenizer.gpt2().dumps()
GPT2_VOCABULARY = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
SAME_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function under three names
SAME = {  # what gpt.py computes, in the words of config.json
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "n_inner": None,
    "quantization_config": None,
    "auto_map": None,
}
SHAPE = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def read_config(described, block_size=None):
    """config.json -> GPTConfig; raises InputError if the model computes anything else than gpt.py."""
    require("model_type" in described, "config.json has no model_type: this is not a model from the Hugging Face hub")
    different = [key for key, ours in SAME.items() if described.get(key, ours) != ours]
    if described.get("activation_function") in SAME_GELU[1:]:
        different.remove("activation_function")
    width = described.get("n_embd")
    if "n_inner" in different and isinstance(width, int) and described["n_inner"] == 4 * width:
        different.remove("n_inner")
    details = "; ".join(f"its {key} is {described[key]!r}, and ours is {SAME[key]!r}" for key in different)
    require(not different, f"this model does not compute what gpt.py does: {details}")
    missing = [theirs for theirs in SHAPE.values() if theirs not in described]
    require(not missing, f"config.json lacks {', '.join(missing)}")
    odd = [key for key in SHAPE.values() if type(described[key]) is not int]
    require(not odd, f"config.json: {', '.join(odd)} must be a whole number")
    dropout = described.get("resid_pdrop", 0.1)
    require(type(dropout) in (int, float), f"config.json: resid_pdrop is {dropout!r}, not a number")
    config = GPTConfig(**{ours: described[theirs] for ours, theirs in SHAPE.items()}, dropout=dropout)
    block_size = config.block_size if block_size is None else block_size
    possible = 1 <= block_size <= config.block_size
    require(possible, f"--block_size is {block_size}, expected 1 to the model's context, {config.block_size}")
    return dataclasses.replace(config, block_size=block_size)


def characters():
    """Byte -> its character in vocab.json: itself if that is printable, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def read_vocabulary(fetch):
    """vocab.json and merges.txt, or tokenizer.json -> {token: id}, [(left, right)], spelled as there."""
    described, added = None, {}
    if path := fetch("tokenizer.json"):
        described = read_json(path)
        splits = described["pre_tokenizer"] or {}
        plain = splits.get("type") == "ByteLevel" and splits.get("use_regex", True) and not splits["add_prefix_space"]
        plain = plain and described["normalizer"] is None
        require(plain, f"the vocabulary is not GPT-2's: by {path}, its text is changed or split in another way")
        added = {token["content"]: token["id"] for token in described["added_tokens"]}
    if (vocab := fetch("vocab.json")) and (merges := fetch("merges.txt")):
        lines = read_text(merges).split("\n")
        return added | read_json(vocab), [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    require(described, "there is neither vocab.json with merges.txt nor tokenizer.json: it is not GPT-2's vocabulary")
    pairs = described["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    return described["model"]["vocab"] | added, pairs


def read_tokenizer(fetch, ends=()):
    """The published vocabulary -> Tokenizer; raises InputError if it isn't built like GPT-2's.

    The end of text is the one id that no bytes have; its name must be <|endoftext|>, or its id be among `ends`.
    """
    byte_of = {character: byte for byte, character in characters().items()}
    try:
        vocab, pairs = read_vocabulary(fetch)
        odd = [token for token, i in vocab.items() if not isinstance(i, int)]
        require(not odd, f"the vocabulary is not GPT-2's: the ids of {odd[:3]} are not whole numbers")
        merged = list(dict.fromkeys(vocab["".join(pair)] for pair in pairs))
        ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in [*byte_of, *map("".join, pairs)]}
        ids = set(ranks.values())
        others = {i: token for token, i in vocab.items() if i not in ids}
        ordered = merged == sorted(merged)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the vocabulary is not GPT-2's: {type(error).__name__}, {error}") from error
    require(ordered, "the vocabulary is not GPT-2's: its merges are not in the order of their ids")
    free = set(range(len(ranks) + 1)) - ids
    found = f"its first {len(ranks) + 1:,} ids are not bytes, merges and one end of text"
    more = ", ".join(map(repr, list(others.values())[:5])) or "none"
    usual = len(free) == 1 and free <= others.keys()
    require(usual, f"the vocabulary is not GPT-2's: {found}; its other tokens are {more}")
    (end,) = free
    known = others[end] == EOT or end in ends
    require(known, f"the vocabulary is not GPT-2's: id {end}, where the end of text should be, is {others[end]!r}")
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    tokenizer = Tokenizer(ranks, "bytes" if len(ranks) == 256 else "bpe", end)
    if hashlib.sha256(tokenizer.dumps().encode()).hexdigest() == GPT2_VOCABULARY:
        tokenizer.kind = "gpt2"
    return tokenizer


def find_weights(fetch):
    """The files with the weights: safetensors rather than pickles, one file rather than shards."""
    index = ".index.json"
    for name in ("model.safetensors", f"model.safetensors{index}", "pytorch_model.bin", f"pytorch_model.bin{index}"):
        path = fetch(name)
        if path and path.suffix != ".json":
            return [path]
        if path:
            where = read_json(path).get("weight_map")
            shards = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
            plain = all(re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard) for shard in shards)
            require(shards and plain, f"{path} does not name files next to it")
            paths = [fetch(shard) for shard in shards]
            missing = [shard for shard, found in zip(shards, paths, strict=True) if not found]
            require(not missing, f"{path} names files that are missing: {', '.join(missing)}")
            return paths
    raise InputError("there are no weights: no model.safetensors, no pytorch_model.bin, and no index of shards")


def open_weights(paths):
    """Files -> {published name: (shape, read)}; read() gives the tensor, and keeps nothing in memory."""

    def read_one(path, name):
        with safe_open(path, "pt") as file:  # opened anew, or the pages it touched would add up
            return file.get_tensor(name)

    found = {}
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    names = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                readers = {name: (shape, functools.partial(read_one, path, name)) for name, shape in names.items()}
            else:  # a pickle: weights_only builds tensors and runs no code
                state = torch.load(path, map_location="cpu", weights_only=True)
                for name, tensor in state.items():  # all of its values must be in the file
                    real = tensor.layout == torch.strided and tensor.device.type == "cpu" and isinstance(name, str)
                    if not real or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                        raise TypeError(f"{name} is not a plain tensor")
                readers = {name: (tuple(state[name].shape), functools.partial(state.pop, name)) for name in state}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}. Delete it and download it again") from error
        except Exception as error:
            reason = f"{path} has other things than tensors in it, and was not loaded ({type(error).__name__})"
            raise InputError(reason) from error
        for name, reader in readers.items():
            name = name.removeprefix("transformer.")
            require(name not in found, f"{path} has {name} a second time")
            found[name] = reader
    return found


def map_weights(found, model):
    """Published tensors -> {our name: float32 tensor}; raises InputError with the names that do not fit the model."""
    wanted = {}
    for name, p in model.named_parameters():
        shape = p.shape[::-1] if name.endswith(TRANSPOSED) else p.shape
        wanted[name.removeprefix("transformer.")] = tuple(shape)
    mask = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # a buffer in old files
    found = {name: reader for name, reader in found.items() if not mask.fullmatch(name)}
    head = found.pop("lm_head.weight", None)
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not GPT-2's" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        has, takes = found[name][0], wanted[name]
        if has != takes and not (name == "wpe.weight" and has[1:] == takes[1:] and has[0] >= takes[0]):
            problems.append(f"{name} is {has}, not {takes}")
    more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
    require(not problems, f"the weights do not fit config.json: {'; '.join(sorted(problems)[:8])}{more}")
    weights = {}
    for name, (_, read) in tqdm(found.items(), desc="converting", unit=" tensors", delay=1, disable=None, leave=False):
        tensor = read()
        known = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        require(known and tensor.isfinite().all(), f"{name} is {tensor.dtype}, or not finite")
        if name == "wpe.weight":
            tensor = tensor[: model.config.block_size]
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        weights[f"transformer.{name}"] = tensor.contiguous().float()
    tied = head is None or torch.equal(head[1]().float(), weights["transformer.wte.weight"])
    require(tied, "lm_head.weight differs from wte.weight: its head is not tied, and ours is")
    return weights


def convert(name, out, block_size=None, revision="main", overwrite=False):
    """A model's name or folder -> the checkpoint folder `out`. Raises InputError."""
    fetch, folder = open_source(name, revision)
    out = Path(out)
    require(out.resolve() != folder.resolve(), f"{out} holds the published files themselves: choose another --out")
    require(not out.exists() or out.is_dir(), f"{out} is a file: choose another --out")
    described = read_json(fetch("config.json"))
    config, end = read_config(described, block_size), described.get("eos_token_id")
    tokenizer = read_tokenizer(fetch, end if isinstance(end, list) else [end])
    room = tokenizer.vocab_size <= config.vocab_size
    require(room, f"{tokenizer.vocab_size:,} tokens are more than the model's vocab_size, {config.vocab_size:,}")
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    weights = map_weights(open_weights(find_weights(fetch)), model)
    source = {"name": name, "revision": revision, "folder": str(folder.resolve())}
    save_checkpoint(out, model, tokenizer, weights, overwrite, source=source)
    for leftover in ("log.csv", "loss.png"):  # of the run that was overwritten
        (out / leftover).unlink(missing_ok=True)


@command
def main(argv=None):
    parser = gpt.Parser(prog="convert_gpt2.py", description="GPT-2's published weights -> a checkpoint.")
    parser.add_argument("name", help=f"{', '.join(NAMES)}, owner/name on the Hugging Face hub, or a folder")
    parser.add_argument("--out", help="folder for the checkpoint (default: checkpoints/NAME)")
    parser.add_argument("--block_size", type=int, help="keep only this many positions: a shorter context")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    args = parser.parse_args(argv)
    out = Path(args.out or Path("checkpoints", Path(args.name).resolve().name))
    gpt.refuse_existing(out, args.overwrite)
    with suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: freed tensors go back to the system at once
    convert(args.name, out, args.block_size, args.revision, args.overwrite)
    model, tokenizer = load_checkpoint(out)
    config = model.config
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(PARAGRAPH)][: config.block_size + 1]])
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    guess = math.log(config.vocab_size)
    size = sum(p.numel() for p in model.parameters())
    tensors = f"{12 * config.n_layer + 4} tensors, {4 * config.n_layer} of them transposed"
    shape = f"context {config.block_size:,}, vocabulary {tokenizer.vocab_size:,}"
    print(f"{out}: {size:,} parameters in {tensors}; {shape}")
    print(f"loss on a paragraph of English: {loss:.2f} nats per token; guessing: ln {config.vocab_size} = {guess:.2f}")
    if loss > guess:
        log("that is no better than guessing: the weights are untrained, or not what config.json says")
    clear = out == Path("checkpoints", out.name) and not Path(out.name).exists()
    shown = out.name if clear else out
    log(f'try: python sample.py --model {shown} --prompt "Learning is"\nproof: python -m debug.verify_gpt2 {shown}')


if __name__ == "__main__":
    main()
