"""Download the files of a model from the Hugging Face hub: each once, and checked.

A download goes to NAME.ETAG.part, and resumes there if it breaks. It gets its final name once its size and hash match
what the hub announced. HF_ENDPOINT (a mirror) and HF_TOKEN (for private models) have their usual meaning.
"""

import hashlib
import json
import math
import os
import re
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
from tqdm import tqdm

from gpt import PRESETS, InputError, log, read_text, replacing, require

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
