"""GPT-2's published weights -> a checkpoint that sample.py and all other scripts use, without a network.

    python convert_gpt2.py gpt2                     downloads, converts, checks -> checkpoints/gpt2
    python convert_gpt2.py gpt2-medium              or gpt2-large, gpt2-xl, distilgpt2
    python convert_gpt2.py owner/name               any model of GPT-2's architecture on the Hugging Face hub
    python convert_gpt2.py path/to/folder           files that you already have

The published tensors have the names of gpt.py's. Four weights in each block are stored the other way round: they were
written for x @ W with W (in, out), and nn.Linear computes x @ W.T with W (out, in). So these four are transposed. A
forgotten transpose shows as a wrong shape, except in attn.c_proj, which is square: there only the logits are wrong.
"""

import hashlib
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import requests
import torch
from requests.adapters import HTTPAdapter
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from urllib3.util import Retry

import gpt
from extras.published import FILES, SETTINGS, TRANSPOSED, find, read_config, read_end, read_json, read_tokenizer
from gpt import GPT, PRESETS, InputError, command, log, require

PARAGRAPH = (
    "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the stairs, lit the lamp "
    "and looked out over the water. In winter the waves came up to the door, and nobody visited him for weeks. He did "
    "not mind. He had his books, a stove, and a cat that slept on the warm side of the room."
)

# ---- Download the files of a model from the Hugging Face hub, each once ----
NAMES = {name: f"openai-community/{name}" for name in PRESETS if name.startswith("gpt2")}
NAMES["distilgpt2"] = "distilbert/distilgpt2"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there
CACHE = Path(".cache", "hub")
TIMEOUT = (10, 30)  # seconds: to connect, and without a byte
BUSY = (408, 429, 500, 502, 503, 504)  # ask again, after the time in Retry-After or 0, 1, 2, 4 and 8 seconds
RETRY = Retry(total=5, backoff_factor=0.5, status_forcelist=BUSY, raise_on_status=False)
RESUMES = 10  # broken connections per file


def open_session():
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=RETRY))
    session.mount("http://", HTTPAdapter(max_retries=RETRY))
    session.headers["Accept-Encoding"] = "identity"  # compressed, the answer would have another size than the file
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        require(re.fullmatch("[!-~]+", token), "HF_TOKEN contains characters that no token has")
        session.headers["Authorization"] = f"Bearer {token}"  # requests drops it when redirected to another host
    return session


def receive(response, part, have):
    """Append an answer to the first `have` bytes of a file -> is it all there? (urllib3 checks the length.)"""
    total = have + int(response.headers.get("Content-Length", 0))
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None, leave=False)
    with bar, open(part, "ab" if have else "wb") as file:
        try:
            for block in response.iter_content(2**16):
                file.write(block)
                bar.update(len(block))
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            return False
        file.flush()
        os.fsync(file.fileno())
    return True


def download(session, url, path):
    """Download a file as NAME.part, which gets its name once it is whole -> is there such a file? Raises OSError."""
    if path.exists():
        return True
    log(f"downloading {url}")
    part = path.with_name(f"{path.name}.part")
    for _ in range(RESUMES):
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            status = response.status_code
            # A large file is on another host. The hub's own answer, which redirects there, has the file's SHA-256.
            etags = [hop.headers.get("X-Linked-Etag", "") for hop in [*response.history, response]]
            checksums = re.findall("[0-9a-f]{64}", " ".join(etags))
            if status == 404:
                return False
            if status == 416 or (status == 206 and not checksums):
                part.unlink()  # longer than the file, or not to be checked: start again
                continue
            require(status not in (401, 403), f"{url} is not public, or not there: check the name, or set HF_TOKEN")
            response.raise_for_status()
            if "text/html" in response.headers.get("Content-Type", ""):
                raise OSError("the answer is a web page: is there a login page between this machine and the hub?")
            whole = receive(response, part, have if status == 206 else 0)
        if whole:
            if checksums and hashlib.sha256(np.memmap(part, mode="r")).hexdigest() not in checksums:
                part.unlink()
                raise OSError(f"the checksum of {path.name} differs")
            part.replace(path)
            return True
    raise OSError(f"the connection broke {RESUMES} times: run the same command to resume")


def download_model(name, revision):
    """A short name, or owner/name on the hub -> the folder with its files. Raises InputError."""
    repository, at = NAMES.get(name, name), quote(revision, safe="")
    valid = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository)
    require(valid, f"{name!r} is neither a folder nor owner/name nor one of {', '.join(NAMES)}")
    folder = CACHE / f"{repository.replace('/', '--')}@{at}"
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if any((folder / file).exists() for file in WEIGHTS):  # they come last
        return folder
    session = open_session()

    def fetch(file):
        return download(session, f"{endpoint}/{repository}/resolve/{at}/{file}", folder / file)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        require(fetch("config.json"), f"{endpoint}/{repository} has no config.json in {revision}: check the name")
        read_config(read_json(folder / "config.json"))  # before half a gigabyte comes
        for file in ("vocab.json", "merges.txt", "tokenizer.json", *SETTINGS):
            fetch(file)
        any(fetch(file) for file in WEIGHTS)
    except OSError as error:
        reason = f"no connection to {endpoint}" if isinstance(error, requests.ConnectionError) else error
        page = f"https://huggingface.co/{repository}/tree/{revision}"
        by_hand = f"save {FILES} from {page} in a FOLDER, and run"
        then = f"python convert_gpt2.py FOLDER --out checkpoints/{Path(name).name}"
        raise InputError(f"{name} could not be downloaded: {reason}. You can also {by_hand} {then}") from error
    return folder


# ---- model.safetensors, or the pickle pytorch_model.bin -> weights under our names ----
def read_tensors(path):
    """A file of weights -> pairs of published name and tensor, one after the other."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = list(file.keys())
            for name in names:
                with safe_open(path, "pt") as file:  # opened anew, or the pages that it touched would add up
                    tensor = file.get_tensor(name)
                yield name, tensor
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)  # builds tensors, and runs no code
            while state:
                name, tensor = state.popitem()
                yield name, tensor.contiguous()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and download it again") from error
    except Exception as error:
        raise InputError(
            f"{path} holds other things than tensors, and was not loaded: {type(error).__name__}"
        ) from error


def map_weights(tensors, model):
    """Published names and tensors -> {our name: float32 tensor}; raises InputError with the names that do not fit."""
    wanted = {}
    for name, p in model.named_parameters():
        shape = p.shape[::-1] if name.endswith(TRANSPOSED) else p.shape
        wanted[name.removeprefix("transformer.")] = tuple(shape)
    head = None
    weights = {}
    strange, problems = [], []
    for name, tensor in tensors:
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in old files
            continue
        if name == "lm_head.weight":
            head = tensor
            continue
        has, takes = tuple(tensor.shape), wanted.pop(name, None)
        if takes is None:
            strange.append(name)
        elif has != takes:
            problems.append(f"{name} is {has}, not {takes}")
        else:
            require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, not a floating-point type")
            total = tensor.sum(dtype=torch.float64)  # isfinite() of the tensor itself would take memory
            require(total.isfinite(), f"{name} holds numbers that are not finite")
            tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
            weights[f"transformer.{name}"] = tensor.contiguous().float()
    wrapped = [f"{name}, not {end}" for end in sorted(wanted) for name in strange if name.endswith(f".{end}")]
    require(not wrapped, f"the weights have a wrapper's names, {'; '.join(wrapped[:3])}, ...: save the model inside it")
    problems += [f"{name} is not GPT-2's" for name in strange] + [f"{name} is missing" for name in wanted]
    require(not problems, f"the weights do not fit config.json: {'; '.join(sorted(problems)[:8])}")
    tied = head is None or torch.equal(head.float(), weights["transformer.wte.weight"])
    require(tied, "lm_head.weight differs from wte.weight: its head is not tied, and ours is")
    return weights


def convert(name, out, block_size=None, revision="main", overwrite=False):
    """A model's name or folder -> the checkpoint folder `out`. Raises InputError."""
    local = Path(name).is_dir()
    require(not local or revision == "main", f"--revision goes with a model on the hub, and {name} is a folder")
    folder, out = Path(name) if local else download_model(name, revision), Path(out)
    require(out.resolve() != folder.resolve(), f"{out} holds the published files: choose another --out")
    config = read_config(read_json(find(folder, "config.json")))
    context = config.block_size if block_size is None else block_size
    possible = 1 <= context <= config.block_size
    require(possible, f"--block_size is {context}, expected 1 to the model's context, {config.block_size}")
    tokenizer = read_tokenizer(folder, read_end(folder))
    room = tokenizer.vocab_size <= config.vocab_size
    require(room, f"{tokenizer.vocab_size:,} tokens are more than the model's vocab_size, {config.vocab_size:,}")
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    weights = map_weights(read_tensors(find(folder, *WEIGHTS)), model)
    config.block_size = context
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:context]
    origin = {"name": name, "revision": revision, "folder": str(folder.resolve())}  # debug.verify_gpt2 compares with it
    gpt.save_checkpoint(out, model, tokenizer, weights, overwrite, source=origin)
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
    gpt.refuse_existing(out, args.overwrite)  # before anything is downloaded
    convert(args.name, out, args.block_size, args.revision, args.overwrite)
    model, tokenizer = gpt.load_checkpoint(out)
    config = model.config
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size:,} parameters, context {config.block_size:,}, vocabulary {tokenizer.vocab_size:,}")
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(PARAGRAPH)][: config.block_size + 1]])
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    guess = math.log(config.vocab_size)
    print(f"loss on a paragraph of English: {loss:.2f} nats per token; guessing: ln {config.vocab_size} = {guess:.2f}")
    if loss > guess:
        log("that is no better than guessing: the weights are untrained, or not what config.json says")
    name = out.name if out.parent == Path("checkpoints") else out
    log(f'try: python sample.py --model {name} --prompt "Learning is"\nproof: python -m debug.verify_gpt2 {name}')


if __name__ == "__main__":
    main()
