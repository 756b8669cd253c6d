import hashlib
import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import convert_gpt2
import gpt

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
LARGE = bytes(range(251)) * 2000  # half a megabyte: several blocks of a download
FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": LARGE, "merges.txt": b"#version: 0.2\n"}


class Hub(ThreadingHTTPServer):
    """Answers as huggingface.co does, except for the trouble it is told to make: one entry of `trouble` a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.trouble, self.seen = dict(FILES), [], []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, headers=(), body=b"", length=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", len(body) if length is None else length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        place = self.path.strip("/").split("/")
        self.server.seen.append((self.path, dict(self.headers)))
        if place[0] == "old":  # a repository that was renamed
            return self.reply(307, {"Location": self.path.replace("/old/gpt2", "/owner/name", 1)})
        if self.headers["Accept-Encoding"] != "identity":
            return self.reply(500)  # a compressed answer would have neither the size nor the ranges of the file
        body = self.server.files.get(place[-1])
        if place[:2] == ["owner", "name"]:
            if place[2:4] not in (["resolve", "main"], ["resolve", COMMIT]) or body is None:
                return self.reply(404, {"X-Error-Code": "EntryNotFound"})
            if len(body) > 1000:
                linked = {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": len(body)}
                cdn = f"http://localhost:{self.server.server_port}/cdn/{place[-1]}"  # another host
                return self.reply(302, linked | {"X-Repo-Commit": COMMIT, "Location": cdn, "ETag": '"of the redirect"'})
        if place[0] not in ("owner", "cdn"):
            return self.reply(401)
        etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        self.content(body, {"ETag": f'W/"{etag}"', "X-Repo-Commit": COMMIT, "Content-Type": "text/plain"})

    do_HEAD = do_GET

    def content(self, body, headers):
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and trouble != "ranges ignored" else 0
        if trouble == "hash":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if trouble == "longer":
            body += b"more"
        if start >= len(body):
            return self.reply(416)
        if isinstance(trouble, int):
            return self.reply(trouble)
        if trouble in ("429 1 s", "429 date", "429 a day"):
            after = {"429 1 s": "1", "429 date": formatdate(time.time() + 1, usegmt=True), "429 a day": "86400"}[
                trouble
            ]
            return self.reply(429, {"Retry-After": after})
        if trouble == "html":
            return self.reply(
                200, {"Content-Type": "text/html; charset=utf-8"}, b"<!DOCTYPE html><title>Log in</title>"
            )
        if wanted and trouble != "ranges ignored":
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        if trouble == "wrong range":
            headers["Content-Range"], part = f"bytes 7-{len(body) - 1}/{len(body)}", body[7:]
        status = 206 if "Content-Range" in headers else 200
        if trouble == "stall":
            self.reply(status, headers, part[: len(part) // 2], len(part))
            time.sleep(1)
        elif trouble == "cut":
            self.reply(status, headers, part[: len(part) // 2], len(part))
        elif trouble == "short":
            self.reply(status, headers, part[: len(part) // 2])
        else:
            return self.reply(status, headers, part)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(convert_gpt2, "TIMEOUT", (2, 0.5))
        monkeypatch.setattr(convert_gpt2, "PAUSE", 0.01)
        yield server
        server.shutdown()


def leftovers(folder):
    return sorted(path.name for path in folder.rglob("*.part"))


def test_files_come_as_they_are_and_only_once(server):
    fetch, folder = convert_gpt2.open_source("owner/name")
    for name, content in FILES.items():
        assert fetch(name).read_bytes() == content
    assert fetch("vocab.json") is None, "what is not there is no error: it may be optional"
    requests = len(server.seen)
    fetch, _ = convert_gpt2.open_source("owner/name")
    assert [fetch(name) for name in FILES] == [folder / name for name in FILES] and len(server.seen) == requests
    assert not leftovers(folder)


def test_every_file_comes_from_the_commit_of_the_first(server):
    fetch, folder = convert_gpt2.open_source("owner/name")
    for name in FILES:
        fetch(name)
    asked = [path for path, _ in server.seen if path.startswith("/owner")]
    assert asked[0].split("/")[4] == "main" and {path.split("/")[4] for path in asked[1:]} == {COMMIT}
    assert (folder / "commit").read_text() == COMMIT


def test_a_renamed_repository_is_followed(server, monkeypatch):
    monkeypatch.setitem(convert_gpt2.NAMES, "gpt2", "old/gpt2")
    fetch, _ = convert_gpt2.open_source("gpt2")
    for name, content in FILES.items():
        assert fetch(name).read_bytes() == content


def test_a_revision_is_asked_for_and_kept_apart(server):
    server.files = {name: content + b" " for name, content in FILES.items()}
    _, main = convert_gpt2.open_source("owner/name")
    fetch, folder = convert_gpt2.open_source("owner/name", "refs/pr/1")
    with pytest.raises(gpt.InputError, match="no config.json .* in revision refs/pr/1"):
        fetch("config.json")  # this server has main only
    assert "/resolve/refs%2Fpr%2F1/config.json" in server.seen[0][0] and folder != main


def test_what_is_not_there_is_not_asked_for_again(server):
    assert convert_gpt2.open_source("owner/name")[0]("vocab.json") is None
    requests = len(server.seen)
    assert convert_gpt2.open_source("owner/name")[0]("vocab.json") is None and len(server.seen) == requests


def test_an_index_and_its_file_do_not_share_what_is_downloaded_of_them(server):
    fetch, folder = convert_gpt2.open_source("owner/name")
    folder.mkdir(parents=True)
    other = folder / f"model.safetensors.index.json.{'0' * 40}.part"
    other.write_bytes(b"{" * 1000)
    assert fetch("model.safetensors").read_bytes() == LARGE and other.exists()
    assert "Range" not in server.seen[-1][1]


@pytest.mark.parametrize(("headers", "seconds"), [({"Retry-After": "1.5"}, 1.5), ({"Retry-After": "-1"}, None), ({}, None),
                         ({"RateLimit": '"resolvers";r=0;t=7'}, 7), ({"Retry-After": "soon"}, None)], ids=str)  # fmt: skip
def test_the_wait_that_a_server_asks_for(headers, seconds):
    assert convert_gpt2.seconds_asked(type("Response", (), {"headers": headers})) == seconds


@pytest.mark.parametrize("token", ["hf_se cret", "hf_\u00e9"])
def test_a_token_that_is_none_is_not_printed(token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(gpt.InputError) as error:
        convert_gpt2.open_source("owner/name")
    assert token not in str(error.value)


def test_the_token_goes_to_the_hub_and_to_nobody_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    fetch, _ = convert_gpt2.open_source("owner/name")
    fetch("model.safetensors")
    tokens = {path.split("/")[1]: headers.get("Authorization") for path, headers in server.seen}
    assert tokens == {"owner": "Bearer hf_secret", "cdn": None}


TROUBLE = ["cut", "short", "stall", "hash", "longer", 429, "429 1 s", "429 date", 500, 503, 408]


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_can_be_retried_is_retried_until_the_file_is_right(server, trouble, name, capsys):
    server.trouble = [trouble]
    fetch, folder = convert_gpt2.open_source("owner/name")
    if name == "config.json":
        server.files[name] = FILES[name] + b" " * 900
    assert fetch(name).read_bytes() == server.files[name] and not leftovers(folder)
    assert "trying again" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["cut", "short"])
def test_a_broken_download_goes_on_where_it_stopped(server, trouble):
    server.trouble = [trouble]
    fetch, _ = convert_gpt2.open_source("owner/name")
    assert fetch("model.safetensors").read_bytes() == LARGE
    ranges = [headers.get("Range") for path, headers in server.seen if path.startswith("/cdn")]
    assert ranges[0] is None and int(ranges[1].removeprefix("bytes=").rstrip("-")) > len(LARGE) // 4


def test_many_breaks_are_survived_as_long_as_each_brings_something(server):
    server.files["model.safetensors"] = LARGE * 40
    server.trouble = ["cut"] * 8
    fetch, _ = convert_gpt2.open_source("owner/name")
    assert fetch("model.safetensors").read_bytes() == LARGE * 40


def test_breaks_and_wrong_content_in_turn_do_not_go_on_for_ever(server):
    server.trouble = ["cut", "hash"] * 9
    with pytest.raises(gpt.InputError, match="its hash should be|could not be downloaded"):
        convert_gpt2.open_source("owner/name")[0]("model.safetensors")


def test_a_later_run_goes_on_with_what_an_earlier_one_got(server, monkeypatch):
    server.trouble = ["cut"] + [500] * 9
    fetch, folder = convert_gpt2.open_source("owner/name")
    with pytest.raises(
        gpt.InputError,
        match="could not be downloaded.*500.*run the same command to resume after [0-9,]+ bytes, or save config.json",
    ):
        fetch("model.safetensors")
    assert len(leftovers(folder)) == 1 and not (folder / "model.safetensors").exists()
    server.trouble = []
    fetch, _ = convert_gpt2.open_source("owner/name")
    assert fetch("model.safetensors").read_bytes() == LARGE
    assert "Range" in server.seen[-1][1]


@pytest.mark.parametrize("trouble", ["ranges ignored", "wrong range"])
def test_a_server_that_does_not_honour_ranges_spoils_nothing(server, trouble):
    server.trouble = ["cut", trouble]
    fetch, folder = convert_gpt2.open_source("owner/name")
    assert fetch("model.safetensors").read_bytes() == LARGE and not leftovers(folder)
    assert sum(path.startswith("/cdn") for path, _ in server.seen) == (2 if trouble == "ranges ignored" else 3)


def test_a_file_that_changed_on_the_hub_is_begun_anew(server):
    server.trouble = ["cut"] + [500] * 9
    with pytest.raises(gpt.InputError):
        convert_gpt2.open_source("owner/name")[0]("model.safetensors")
    server.trouble, server.files["model.safetensors"] = [], LARGE[::-1]
    fetch, folder = convert_gpt2.open_source("owner/name")
    assert fetch("model.safetensors").read_bytes() == LARGE[::-1] and not leftovers(folder)


def test_a_part_longer_than_the_file_is_begun_anew(server):
    fetch, folder = convert_gpt2.open_source("owner/name")
    folder.mkdir(parents=True)
    (folder / f"model.safetensors.{hashlib.sha256(LARGE).hexdigest()}.part").write_bytes(LARGE + b"!")
    assert fetch("model.safetensors").read_bytes() == LARGE and not leftovers(folder)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (["hash"] * 9, "its hash should be"),
        (["short"] * 9, "could not be downloaded"),
        ([500] * 9, "the server answered 500"),
        (["429 a day"], "the server answered 429"),
        (["stall"] * 9, "the connection broke|no answer for 0.5 s"),
        ([401], "no such model, or it isn't public.*HF_TOKEN"),
        ([403], "no such model, or it isn't public.*HF_TOKEN"),
        ([400], "the answer for .* is 400"),
        (["html"], "is a web page"),
    ],
)
def test_what_stays_wrong_is_never_given_its_name(server, trouble, message):
    server.files["config.json"] += b" " * 500
    server.trouble = trouble
    fetch, folder = convert_gpt2.open_source("owner/name")
    with pytest.raises(gpt.InputError, match=f"(?s){message}"):
        fetch("config.json")
    assert not (folder / "config.json").exists()


def test_json_that_is_none_is_not_kept(server):
    server.files["vocab.json"] = b"not json"
    fetch, folder = convert_gpt2.open_source("owner/name")
    with pytest.raises(gpt.InputError, match="is not JSON"):
        fetch("vocab.json")
    assert not (folder / "vocab.json").exists()


def test_a_model_that_is_not_there_says_how_to_go_on(server):
    del server.files["config.json"]
    with pytest.raises(gpt.InputError, match="there is no config.json.*check the name, or save config.json"):
        convert_gpt2.open_source("owner/name")[0]("config.json")


def test_no_network_at_all_says_how_to_go_on(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(convert_gpt2, "PAUSE", 0.001)
    with pytest.raises(
        gpt.InputError,
        match="no connection to 127.0.0.1:9. What to do: save config.json.* from https://huggingface.co/openai",
    ):
        convert_gpt2.open_source("gpt2")[0]("config.json")


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "../up", "owner/", "-/x y"])
def test_a_name_that_is_none_is_refused_without_asking_the_network(name, monkeypatch):
    monkeypatch.setattr(convert_gpt2.requests, "Session", None)
    with pytest.raises(gpt.InputError, match="is neither a folder nor"):
        convert_gpt2.open_source(name)


def test_a_bad_endpoint_is_one_error(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(gpt.InputError, match="Invalid URL"):
        convert_gpt2.open_source("owner/name")[0]("config.json")


def test_a_folder_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_gpt2.requests, "Session", None)
    (tmp_path / "mine").mkdir()
    with pytest.raises(gpt.InputError, match="mine has no config.json"):
        convert_gpt2.open_source("mine")
    for content, what in (
        (b"\n <!DOCTYPE html><p>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    ):
        (tmp_path / "mine" / "merges.txt").write_bytes(content)
        (tmp_path / "mine" / "config.json").write_text("{}")
        with pytest.raises(gpt.InputError, match=f"merges.txt is {what}"):
            convert_gpt2.open_source("mine")[0]("merges.txt")
    with pytest.raises(gpt.InputError, match="--revision goes with a model on the hub"):
        convert_gpt2.open_source("mine", "v2")
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    fetch, folder = convert_gpt2.open_source("mine")
    assert fetch("config.json") == folder / "config.json" and fetch("vocab.json") is None
