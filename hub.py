"""Files of a model on the Hugging Face hub -> files here: each downloaded once, checked, and only then given its name.

A download goes to NAME.ETAG.part and goes on from there when it breaks. It takes its final name when its size and its
hash are those that the hub announced. HF_ENDPOINT (a mirror) and HF_TOKEN (for private models) mean what they mean
everywhere in that ecosystem.
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

import gpt
from gpt import InputError, require, say

NAMES = {"distilgpt2": "distilbert/distilgpt2"} | {name: f"openai-community/{name}" for name in gpt.PRESETS if "gpt2" in name}
TIMEOUT, ATTEMPTS, PAUSE, LONGEST_PAUSE = (10, 30), 5, 1.0, 300  # seconds, except for the attempts


class Interrupted(Exception):
    """A download that is worth another attempt; `pause` is how long the server asked to wait."""

    def __init__(self, reason, pause=None):
        super().__init__(reason)
        self.pause = pause


def header(response, *names):
    """The first of these headers that the hub, or whom it sends us to, has given; or ""."""
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
    """What has been downloaded of a file, and not yet been found complete: at most one NAME.ETAG.part."""
    return [part for part in path.parent.glob(f"{path.name}.*.part") if part.name.count(".") == path.name.count(".") + 2]


def check_content(path, etag, size):
    """Raise Interrupted, and drop the file, unless it has the size and the hash that were announced."""
    actual, digest = path.stat().st_size, None
    if actual < (size or 0):
        raise Interrupted(f"the connection ended after {actual:,} of {size:,} bytes")
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        digest = hashlib.sha1(b"blob %d\0" % actual)
    if digest:
        gpt.digest_file(path, digest)
    if (size and actual != size) or (digest and digest.hexdigest() != etag):
        path.unlink()
        raise Interrupted(f"{actual:,} bytes came that are not the file: its hash should be {etag or 'unknown'}")


def attempt(session, url, path):
    """Download what is still missing of url -> the hub's commit; None where there is no such file."""
    parts = parts_of(path)
    have = parts[0].stat().st_size if parts else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, etag = response.status_code, re.sub(r'^(W/)?"?|"$', "", header(response, "X-Linked-Etag", "ETag"))
        part = path.with_name(f"{path.name}.{re.sub('[^0-9a-zA-Z]', '', etag)[:64] or 'unknown'}.part")
        if status == 404:
            return None
        said = f" ({said})" if (said := header(response, "X-Error-Message")) else ""
        require(status not in (401, 403), f"the answer for {url} is {status}{said}: there is no such model, or it is not public. "
                "Check the name, or set HF_TOKEN to a token that may read it")  # fmt: skip
        if status in (408, 429) or status >= 500:
            raise Interrupted(f"the server answered {status}", seconds_asked(response))
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 416 or (status == 206 and not resumes) or (have and not (etag and parts == [part])):  # nothing to go on from
            for stale in parts:
                stale.unlink()
            raise Interrupted("what was downloaded before does not fit any more", 0)
        require(status in (200, 206), f"the answer for {url} is {status} {response.reason}")
        require("text/html" not in response.headers.get("Content-Type", ""), f"a web page came in place of {path.name}: is a "
                "proxy or a login page between this machine and the hub?")  # fmt: skip
        have = have if status == 206 else 0
        size = int(header(response, "X-Linked-Size") or have + int(response.headers.get("Content-Length", -have)))
        most = size or (2**26 if path.suffix in (".json", ".txt") else math.inf)
        bar = tqdm(total=size or None, initial=have, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
        with bar, open(part, "ab" if have else "wb") as file:
            for block in response.iter_content(2**16):
                file.write(block)
                bar.update(len(block))
                if file.tell() > most:
                    break  # it is not the file, and need not be read to its end
            file.flush()
            os.fsync(file.fileno())
        check_content(part, etag, size)
        if path.suffix == ".json":
            read_json(part)
        os.replace(part, path)
        return header(response, "X-Repo-Commit")


def download(session, url, path, by_hand):
    """url -> path, through broken connections and busy servers; returns as `attempt`. Raises InputError."""
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
        except (requests.RequestException, ValueError) as error:
            raise InputError(f"{path.name}: {error}. You can also {by_hand}") from error
        have = sum(part.stat().st_size for part in parts_of(path))
        failures = failures + 1 if have <= most else 1  # what gets further than ever may go on failing
        most = max(most, have)
        pause = PAUSE * 2 ** (failures - 1) if asked is None else asked
        again = f"the same command goes on after {have:,} bytes; or " if have else ""
        require(failures < ATTEMPTS and pause <= LONGEST_PAUSE, f"{path.name} could not be downloaded: {reason}. What to do: {again}"
                f"{by_hand}")  # fmt: skip
        say(f"{path.name}: {reason}; trying again in {pause:.0f} s")
        time.sleep(pause)


def open_source(name, revision="main"):
    """A folder, a model's short name or owner/name -> fetch(file name) -> its path or None, and where that is."""
    if (Path(name) / "config.json").is_file():
        require(revision == "main", f"--revision goes with a model on the hub, and {name} is a folder")
        return lambda file: checked(path) if (path := Path(name) / file).is_file() else None, Path(name)
    require(not Path(name).is_dir(), f"{name} has no config.json: it takes that, vocab.json, merges.txt and model.safetensors")
    repository = NAMES.get(name, name)
    require(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository), f"{name!r} is neither a folder nor owner/name nor one of "
            f"{', '.join(NAMES)}")  # fmt: skip
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    folder = gpt.CACHE / "hub" / f"{repository.replace('/', '--')}@{quote(revision, safe='')}"
    by_hand = ("save config.json, vocab.json, merges.txt and model.safetensors from "
               f"https://huggingface.co/{repository}/tree/{revision} in a folder FOLDER, and run python convert_gpt2.py FOLDER --out "
               f"checkpoints/{Path(name).name}")  # fmt: skip
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # a compressed answer has neither the size nor the ranges of the file
    if token := os.environ.get("HF_TOKEN", "").strip():
        require(re.fullmatch("[!-~]+", token), "HF_TOKEN has characters in it that no token has")
        session.auth = lambda request: request.headers.update({"Authorization": f"Bearer {token}"}) or request  # other hosts
        # are not shown it: requests drops this header where a redirect leads elsewhere

    def fetch(file):
        pin, absent = folder / "commit", folder / f"{file}.absent"
        if (folder / file).is_file() or absent.exists():
            return None if absent.exists() else checked(folder / file)
        with gpt.locked(folder):  # all files come from one commit, though they be fetched on different days
            at = quote(pin.read_text() if pin.exists() else revision, safe="")
            commit = download(session, f"{endpoint}/{repository}/resolve/{at}/{file}", folder / file, by_hand)
            if commit and not pin.exists():
                gpt.write(pin, commit)
        require(commit is not None or file != "config.json", f"there is no {file} at {endpoint}/{repository} in revision "
                f"{revision}: check the name, or {by_hand}")  # fmt: skip
        if commit is None:
            absent.touch()  # no need to ask again, with or without a network
            return None
        return checked(folder / file)

    return fetch, folder


def checked(path):
    """The path itself; raises InputError where a page or a pointer was saved in place of the file."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    require(not start.startswith((b"<!doctype", b"<html")), f"{path} is a web page, not the file: delete it and fetch it again")
    require(not start.startswith(b"version https://git-lfs"), f"{path} is a pointer of git-lfs, not the file: `git lfs pull` gets it")
    return path


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    require(isinstance(found, dict), f"{path} holds no JSON object")
    return found
