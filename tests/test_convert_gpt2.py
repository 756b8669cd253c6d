import json
import os
import shutil
import socket
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import parameters_of, published, run_main
from safetensors.torch import load_file, save_file

import convert_gpt2
import gpt

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A published model of transformers' own making: its folder, and transformers' model."""
    folder = tmp_path_factory.mktemp("origin")
    return folder, published(folder)


@pytest.fixture
def hf(origin, own_folder):
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(origin[0], own_folder / "hf"))


def converted(folder="hf", **options):
    convert_gpt2.convert(str(folder), "ours", overwrite=True, **options)
    return gpt.load_checkpoint("ours")[0]


def edit(path, **changes):
    """Change a JSON file; a value of None removes the key."""
    described = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def put(folder, name, tensor):
    """Replace or add a tensor in model.safetensors, or remove it."""
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


def rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def as_pickle(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def refused(message, action, *args):
    with pytest.raises(gpt.InputError, match=message):
        action(*args)


ODD = {"n_positions": 90, "n_embd": 30, "n_layer": 7, "n_head": 3, "vocab_size": 300}
GPT2 = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}


@pytest.mark.parametrize("shape", [ODD, pytest.param(GPT2, marks=pytest.mark.slow)], ids=["odd", "gpt2"])
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(shape):
    reference = published("hf", **shape)
    model, context = converted(), shape["n_positions"]
    idx = torch.randint(257, (2, context), generator=torch.Generator().manual_seed(1))
    reference.double()
    for T in (1, 17, context):
        exact = reference(idx[:, :T]).logits
        error = (model(idx[:, :T])[0].double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-5, f"relative error {error:.1e} for {T} tokens"
    options = {"attention_mask": torch.ones(2, 3), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    exact = reference.generate(idx[:, :3], max_new_tokens=50, **options)
    assert torch.equal(model.generate(idx[:, :3], 50, temperature=0), exact)


def test_a_shorter_context_keeps_the_first_positions(origin):
    whole, short, idx = converted(origin[0]), converted(origin[0], block_size=8), torch.arange(8)[None]
    assert short.config.block_size == 8 and torch.equal(whole(idx)[0], short(idx)[0])


# ---- The forms that weights come in ----
def without_prefix(folder, _):
    rename(folder, lambda name: name.removeprefix("transformer."))
    for name in ("h.0.attn.bias", "h.1.attn.masked_bias"):
        put(folder, name, torch.ones(32, 32))


FORMS = {
    "as transformers saves it": lambda folder, model: None,
    "no prefix, and masks": without_prefix,
    "a pickle": lambda folder, model: as_pickle(folder, model.state_dict()),
    "float64": lambda folder, model: put(folder, "transformer.ln_f.bias", model.transformer.ln_f.bias.double()),
    "the head twice": lambda folder, model: put(folder, "lm_head.weight", model.lm_head.weight.data.clone()),
    "the MLP's width": lambda folder, model: edit(folder / "config.json", n_inner=64),
    "no settings": lambda folder, _: edit(folder / "config.json", activation_function=None, layer_norm_epsilon=None),
}


def assert_equal_weights(folder, reference):
    ours = parameters_of(folder)
    for name, theirs in reference.named_parameters():
        theirs = theirs.T if name.endswith(convert_gpt2.TRANSPOSED) else theirs
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs.float()), name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(origin, hf, form):
    FORMS[form](hf, origin[1])
    converted()
    assert_equal_weights("ours", origin[1])


# ---- What computes something else, or is damaged, is refused by name ----
class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


REFUSED = {  # what the error says -> the change of config.json, or of the folder
    "its tie_word_embeddings is False, and ours is True": {"tie_word_embeddings": False},
    "its activation_function is 'gelu', and ours is 'gelu_new'": {"activation_function": "gelu"},
    "its layer_norm_epsilon is 1e-12": {"layer_norm_epsilon": 1e-12},
    "its n_inner is 32": {"n_inner": 32},
    "its model_type is 'llama', and ours is 'gpt2'": {"model_type": "llama"},
    "n_layer is '2', and must be a whole number": {"n_layer": "2"},
    "257 tokens are more than the model's vocab_size": {"vocab_size": 200},
    "h.1.ln_1.bias is missing": lambda hf: put(hf, "transformer.h.1.ln_1.bias", None),
    "score.weight is not GPT-2's": lambda hf: put(hf, "score.weight", torch.ones(2, 16)),
    r"\(64, 16\), not \(16, 64\)": lambda hf: put(hf, "transformer.h.0.mlp.c_fc.weight", torch.ones(64, 16)),
    "ln_f.bias is torch.int8": lambda hf: put(hf, "transformer.ln_f.bias", torch.ones(16, dtype=torch.int8)),
    "ln_f.bias holds numbers": lambda hf: put(hf, "transformer.ln_f.bias", torch.full((16,), torch.nan)),
    "its head is not tied": lambda hf: put(hf, "lm_head.weight", torch.ones(257, 16)),
    "model.safetensors is damaged": lambda hf: os.truncate(hf / "model.safetensors", 5000),
    "module.*c_attn.bias, not h.0.attn.c_attn.bias; .*: save": lambda hf: rename(hf, "module.{}".format),
    "has no model.safetensors or": lambda hf: (hf / "model.safetensors").unlink(),
    "config.json is not JSON": lambda hf: (hf / "config.json").write_text("[" * 100_000),
    "has no vocab.json or": lambda hf: [(hf / name).unlink() for name in ("vocab.json", "tokenizer.json")],
    "bin holds other things than tensors": lambda hf: as_pickle(hf, {"wte.weight": Payload()}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_gpt2_or_damaged_is_refused_by_name_and_no_pickle_runs_code(hf, message):
    spoil = REFUSED[message]
    spoil(hf) if callable(spoil) else edit(hf / "config.json", **spoil)
    refused(message, converted)
    assert not os.path.exists("ours") and not os.path.exists("executed")


SMALL = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", [*SMALL, "model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_recognized_in_every_file(hf, name):
    (hf / "model.safetensors").unlink()
    (hf / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000\n")
    refused(f"{name} is a pointer of git-lfs, not the file: run `git lfs pull` in hf", converted)


def test_a_missing_size_is_gpt2s_and_other_names_are_understood(capsys):
    described = {"n_layer": 2, "num_attention_heads": 3, "max_position_embeddings": 90}
    config = convert_gpt2.read_config(described)
    assert (config.block_size, config.n_layer, config.n_head) == (90, 2, 3)
    assert (config.vocab_size, config.n_embd) == (50257, 768)
    assert "config.json has no n_embd: GPT-2's is 768" in capsys.readouterr().err


def test_gpt2s_published_vocabulary_gives_gpt2s_tokens(tmp_path, gpt2_vocabulary):
    """tiktoken's cache has encoder.json and vocab.bpe as published by OpenAI: vocab.json and merges.txt on the hub."""
    cached = [path.read_bytes() for path in Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere")).glob("*")]
    for content in cached or pytest.skip("tiktoken keeps no copy here"):
        (tmp_path / ("vocab.json" if content.startswith(b"{") else "merges.txt")).write_bytes(content)
    ours = convert_gpt2.read_tokenizer(tmp_path)
    assert ours.ranks == gpt2_vocabulary.ranks and ours.eot == gpt2_vocabulary.eot == 50256


# ---- The command ----
def test_the_command_replaces_a_run_by_a_checkpoint_that_needs_no_network(hf, capsys, monkeypatch):
    Path("checkpoints/hf").mkdir(parents=True)
    for name in ("training_state.safetensors", "log.csv", "loss.png", "config.json"):
        Path("checkpoints/hf", name).write_text("old")
    convert_gpt2.main(["hf", "--overwrite"])
    assert "checkpoints/hf: 11,216 parameters, context 32, vocabulary 257\n" in capsys.readouterr().out
    assert sorted(os.listdir("checkpoints/hf")) == ["config.json", "model.safetensors", "tokenizer.tiktoken"]
    monkeypatch.setattr(socket, "socket", None)
    assert gpt.load_checkpoint("hf")[1].encode("a") == [97]


BAD = {
    "hf --block_size 33": "expected 1 to the model's context, 32",
    "hf --out hf --overwrite": "holds the published files: choose another --out",
    "gpt2 --out hf": "already holds a checkpoint: add --overwrite",  # before anything is downloaded
    "nonsense": "is neither a folder nor owner/name nor one of gpt2",
}


@pytest.mark.parametrize("argv", BAD)
def test_bad_input_is_one_line_and_status_2_and_changes_nothing(hf, argv, monkeypatch, capsys):
    monkeypatch.setattr(convert_gpt2.requests, "Session", None)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    run_main(convert_gpt2.main, *argv.split(), expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[argv] in error
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


# ---- The download, from a server that answers as huggingface.co does, and makes trouble ----
LARGE = bytes(range(251)) * 2000  # half a megabyte: several blocks of a download


class Answer(BaseHTTPRequestHandler):
    """`trouble` has an entry for each request for the file `victim`: a status, or what goes wrong with the content."""

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": length or len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub, (host, _, name) = self.server, self.path[1:].rpartition("/")
        hub.seen.append((self.path, self.headers))
        body = hub.files.get(name)
        if host not in ("owner/name/resolve/main", "cdn") or body is None:
            return self.reply(404)
        if name == "model.safetensors" and host != "cdn":  # a large file is on another host
            location, etag = f"http://localhost:{hub.server_port}/cdn/{name}", f'"{sha256(body).hexdigest()}"'
            return self.reply(302, Location=location, X_Linked_Etag=etag)
        trouble = hub.trouble.pop(0) if hub.trouble and name == hub.victim else None
        if isinstance(trouble, int):
            return self.reply(trouble, Retry_After="0")
        if trouble == "page":
            return self.reply(200, b"<!DOCTYPE html>", Content_Type="text/html; charset=utf-8")
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if trouble != "ranges ignored" else 0
        if start >= len(body):
            return self.reply(416)
        sent = body[start:-1] + b"x" if trouble == "wrong" else body[start:]
        if trouble in ("cut", "stall"):
            sent = sent[: len(sent) // 2]
        self.reply(206 if start else 200, sent, len(body) - start)
        if trouble == "stall":
            time.sleep(1)


@pytest.fixture
def hub(monkeypatch, origin):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        server.files = {name: (origin[0] / name).read_bytes() for name in SMALL} | {"model.safetensors": LARGE}
        server.seen, server.trouble, server.victim = [], [], "model.safetensors"
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(convert_gpt2, "TIMEOUT", (2, 0.5))
        monkeypatch.setattr(convert_gpt2, "RETRY", convert_gpt2.RETRY.new(backoff_factor=0))
        yield server
        server.shutdown()


def download(name="owner/name", revision="main"):
    """What is in the folder afterwards: {name of a file: its content}."""
    folder = convert_gpt2.download_model(name, revision)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_downloaded_once_and_the_token_goes_to_the_hub_alone(hub, origin, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.files["model.safetensors"] = (origin[0] / "model.safetensors").read_bytes()
    convert_gpt2.main(["owner/name", "--out", "downloaded"])
    assert_equal_weights("downloaded", origin[1])
    tokens = {path.split("/")[1]: headers["Authorization"] for path, headers in hub.seen}
    assert tokens == {"owner": "Bearer hf_secret", "cdn": None}
    requests = len(hub.seen)
    convert_gpt2.main(["owner/name", "--out", "again"])
    assert len(hub.seen) == requests


TROUBLE = [[429], [500, 503], ["stall"], ["cut", "ranges ignored"], ["cut", 500, "cut"]]


@pytest.mark.parametrize("trouble", TROUBLE, ids=str)
@pytest.mark.parametrize("victim", ["model.safetensors", "merges.txt"])
def test_the_file_is_right_in_the_end(hub, trouble, victim):
    hub.trouble, hub.victim = list(trouble), victim
    assert download() == hub.files and not hub.trouble


def test_a_broken_download_is_resumed_even_by_a_later_run(hub):
    hub.trouble = ["cut", "cut"] + [500] * 6
    refused("500.*You can also save config.json.* from https://huggingface.co/owner/name", download)
    assert download() == hub.files
    starts = [headers["Range"] for path, headers in hub.seen if path.startswith("/cdn")]
    assert starts[0] is None and len(LARGE) // 4 < int(starts[1][6:-1]) < int(starts[-1][6:-1])


def test_a_part_of_another_version_or_longer_than_the_file_is_never_completed(hub):
    folder = Path(".cache/hub/owner--name@main")
    folder.mkdir(parents=True)
    (folder / "merges.txt.part").write_bytes(b"#older")  # small files have no checksum that would tell
    hub.trouble = ["cut"] + [500] * 6
    refused("500", download)
    hub.files["model.safetensors"] = LARGE[::-1]
    refused("the checksum of model.safetensors differs", download)
    (folder / "model.safetensors.part").write_bytes(LARGE + b"!")
    assert download() == hub.files


WRONG = [
    (["cut"] * 99, "the connection broke 10 times: run the same command to resume.* You can also save config.json"),
    ([401], "is not public, or not there: check the name, or set HF_TOKEN"),
    (["page"], "the answer is a web page"),
]


@pytest.mark.parametrize(("trouble", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_what_stays_wrong_is_never_given_its_name(hub, trouble, message):
    hub.trouble = list(trouble)
    refused(message, download)
    assert not Path(".cache/hub/owner--name@main/model.safetensors").exists()


def test_what_is_not_there_or_not_gpt2_is_refused_at_the_first_request(hub):
    hub.files["config.json"] = hub.files["config.json"].replace(b'"gpt2"', b'"llama"')
    refused("owner/nothing has no config.json in main: check the name", download, "owner/nothing")
    refused("has no config.json in refs/pr/1", download, "owner/name", "refs/pr/1")
    refused("its model_type is 'llama'", download)
    assert len(hub.seen) == 3 and "/resolve/refs%2Fpr%2F1/config.json" in hub.seen[1][0]
