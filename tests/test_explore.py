"""The page, its numbers against transformers, its JavaScript against gpt.py, and its behaviour in a real browser."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import enlarge, published, run_main

import convert_gpt2
import explore
import gpt
from debug.activations import inspect
from gpt import GPT, GPTConfig, Tokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def model(own_folder):
    """A model of bytes with 2 blocks of 2 heads, saved as `mine`."""
    torch.manual_seed(0)
    model = enlarge(GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16)))
    gpt.save_checkpoint("checkpoints/mine", model, Tokenizer.bytes())
    return model


def explored(*argv, expect=None):
    return run_main(explore.main, "--model", "mine", "--device", "cpu", *argv, expect=expect)


def page(*argv):
    explored(*argv)
    text = Path("explore.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), packed["type"]).reshape(packed["shape"])


def test_the_numbers_are_those_of_transformers(own_folder):
    theirs = published("theirs").eval()
    convert_gpt2.main(["theirs", "--out", "checkpoints/mine"])
    ids = list(b"to be or not")
    seen = inspect(gpt.load_checkpoint("mine")[0], ids)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        assert torch.allclose(seen["attention"], torch.cat(expected.attentions), atol=1e-5)
        assert torch.allclose(seen["logits"], expected.logits[0], rtol=1e-4, atol=1e-4)
        for i, hidden in enumerate(expected.hidden_states[:-1]):  # transformers' last one is normalized already
            assert torch.allclose(seen["stream_norm"][i], hidden[0].norm(dim=-1), rtol=1e-4)
            said = theirs.lm_head(theirs.transformer.ln_f(hidden[0])).softmax(-1).topk(5)
            assert torch.allclose(seen["lens_probs"][i], said.values, atol=1e-5)
        said = expected.logits[0].softmax(-1).topk(5)  # after the last block, the lens is the model
        assert torch.allclose(seen["lens_probs"][-1], said.values, atol=1e-5)
        outputs = {}
        for i, block in enumerate(theirs.transformer.h):
            block.attn.register_forward_hook(lambda _, __, out, i=i: outputs.update({("attention", i): out[0]}))
            block.mlp.register_forward_hook(lambda _, __, out, i=i: outputs.update({("mlp", i): out}))
        theirs(torch.tensor([ids]))
        for (part, i), out in outputs.items():
            assert torch.allclose(seen[f"{part}_norm"][i], out.view(-1, 16).norm(dim=-1), rtol=1e-4)


def test_the_page_carries_the_numbers(model):
    data = page("--prompt", "to be", "--max_new_tokens", 4)
    ids = [token["id"] for token in data["tokens"]]
    seen = inspect(model, ids)
    assert ids[:5] == list(b"to be") and data["n_prompt"] == 5 and 6 <= len(ids) <= 9
    low, high = np.split(unpack(data["ranges"]), 2, axis=1)
    assert np.allclose(unpack(data["logits"]) / 65535 * (high - low) + low, seen["logits"], atol=1e-3)
    rows, columns = np.tril_indices(len(ids))
    assert np.allclose(unpack(data["attention"]) / 65535, seen["attention"][:, :, rows, columns], atol=1e-5)
    log_probs = seen["logits"].log_softmax(-1)
    assert data["log_prob"][1] == pytest.approx(log_probs[0, ids[1]].item(), rel=1e-4) and data["log_prob"][0] is None
    assert data["rank"][1] == 1 + (log_probs[0] > log_probs[0, ids[1]]).sum()


def test_a_large_vocabulary_is_cut_to_the_best_and_sums_of_the_rest(monkeypatch):
    model = enlarge(GPT(GPTConfig(block_size=8, vocab_size=9000, n_layer=1, n_head=1, n_embd=16)))
    seen = inspect(model, [1, 2, 3])
    data = explore.page_data("wide", model, Tokenizer.bytes(), [1, 2, 3], 1, seen)
    assert data["logits"]["shape"] == (3, 1000) and set(data["vocabulary"]) >= set(unpack(data["ids"])[2].tolist())
    for i, temperature in enumerate(explore.TEMPERATURES[1:]):
        probs = (seen["logits"][2].double() / temperature).softmax(-1).sort(descending=True).values
        share = probs[1000:].sum() / probs[0]
        assert data["rest"][i][0][2] == pytest.approx(share.item(), rel=1e-6, abs=1e-12)


def test_the_budget_limits_the_page_and_is_remarked(model, monkeypatch, capsys):
    monkeypatch.setattr(explore, "BUDGET", 400)
    data = page("--prompt", "x" * 32)
    assert data["n_attention"] == 10 and "left out: attention of tokens after the first 10" in capsys.readouterr().err


JAVASCRIPT = """
const [logits, cases] = JSON.parse(require("fs").readFileSync(0, "utf-8"));
console.log(JSON.stringify(cases.map(([t, k, p, rest]) => distribution(logits, t, k, p, rest))));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node to run the page's JavaScript")
@pytest.mark.parametrize("carried", [60, 1000])
def test_the_page_computes_the_distribution_that_gpt_samples_from(carried):
    """At many settings; with fewer logits carried than there are, the sums over the rest stand in for them."""
    text = explore.TEMPLATE.read_text(encoding="utf-8")
    function = re.search(r"function distribution.*?\n}\n", text, re.DOTALL)[0]
    logits = (3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))).sort(descending=True).values
    settings = [(t, k, p) for t in (0, 0.1, 0.7, 1.0, 2.0) for k in (None, 1, 5, 50) for p in (None, 0.01, 0.5, 0.95)]
    cases = []
    for t, k, p in settings:
        z = (logits[0, carried:].double() - logits[0, 0]) / (t or 1)
        cases.append((t, k, p, [z.exp().sum().item(), (z * z.exp()).sum().item()]))
    given = json.dumps([logits[0, :carried].tolist(), cases])
    done = subprocess.run(
        ["node", "-e", function + JAVASCRIPT], input=given, capture_output=True, text=True, check=True
    )
    for (t, k, p), found in zip(settings, json.loads(done.stdout), strict=True):
        expected = gpt.next_token_probs(logits, t, k, p)[0] if t else torch.eye(1000)[0]
        if p is not None and (expected > 0).sum() > carried:  # the nucleus reaches beyond: shown without it
            expected = gpt.next_token_probs(logits, t, k)[0]
        assert np.allclose(found["probs"], expected[:carried], atol=1e-5), (t, k, p)
        assert found["rest"] == pytest.approx(expected[carried:].sum().item(), abs=1e-5)
        entropy = torch.special.entr(expected.double()).sum().item()
        assert found["entropy"] == pytest.approx(entropy, abs=1e-4), (t, k, p)


@pytest.mark.parametrize("prompt", ["", "🙂 שלום عربي\n", "x" * 100, "</script><b>&amp;"])
def test_any_prompt_is_data(model, prompt, capsys):
    data = page("--prompt", prompt, "--max_new_tokens", 2)
    ids = bytes(prompt, "utf-8")[-32:] or [256]
    assert [token["id"] for token in data["tokens"]][: data["n_prompt"]] == list(ids)
    assert "</script><b>" not in Path("explore.html").read_text(encoding="utf-8")
    if "🙂" in prompt:
        assert data["tokens"][0]["text"] == "<f0>", "part of a character: its byte"


def test_the_terminal_shows_tables_and_json_all_numbers(model, capsys):
    explored("--prompt", "to be", "--max_new_tokens", 0, "--text")
    out = capsys.readouterr().out
    assert "expected next" in out and "logit lens" in out and "block 1" in out
    explored("--prompt", "to be", "--max_new_tokens", 0, "--json")
    found = json.loads(capsys.readouterr().out)
    assert np.array(found["attention"]).shape == (2, 2, 5, 5) and np.array(found["logits"]).shape == (5, 257)
    assert not Path("explore.html").exists()


def test_int8_models_can_be_explored(model):
    assert len(page("--prompt", "to be", "--dtype", "int8")["tokens"]) > 5


BAD = [
    (["--prompt", "a", "--out", "no/x.html"], "could not be written"),
    ([], "required: --prompt"),
    (["--prompt", "a", "--out", "mine.html"], "is not a page of explore.py: add --overwrite"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(model, argv, message, capsys):
    Path("mine.html").write_text("a page of mine")
    explored(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
    assert Path("mine.html").read_text() == "a page of mine"


def test_a_page_of_ours_is_replaced_and_another_only_if_asked(model):
    for _ in range(2):
        explored("--prompt", "a")
    Path("explore.html").write_text("another")
    explored("--prompt", "a", "--overwrite")
    assert explore.MARK in Path("explore.html").read_text(encoding="utf-8")


BEFORE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
</script>"""
AFTER = """<script>
const $$ = (query) => [...document.querySelectorAll(query)];
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const slide = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
const chosen = () => $$("#token-list .token").findIndex((button) => button.ariaPressed === "true");
const found = { tokens: $$("#token-list .token").map((button) => button.textContent), start: chosen() };
$$("#token-list .token")[3].click();
found.clicked = chosen();
press("ArrowRight");
found.moved = chosen();
press("ArrowDown");
press("]");
found.block = $("block").value + $("head").value;
found.heads = $$(".head").map((button) => button.ariaPressed);
found.facts = $("attention-facts").textContent;
found.weights = $$("#attention-list .token").map((button) => button.title);
const entropy = () => Number($("next-facts").textContent.match(/entropy ([0-9.]+)/)[1]);
slide("temperature", 10);
found.entropy = [entropy()];
slide("temperature", 20);
found.entropy.push(entropy());
slide("top-k", 1);
found.entropy.push(entropy());
found.bars = $$(".bar").length;
found.lens = $$("#lens tr").length;
found.markup = $$("main b").length;
found.errors = errors;
document.title = "RESULT" + btoa(unescape(encodeURIComponent(JSON.stringify(found)))) + "END";
</script>"""


@pytest.mark.skipif(not BROWSER, reason="needs chromium to open the page")
def test_the_page_works_in_a_browser_without_network(model):
    data = page("--prompt", "to <b>be</b> or\n", "--max_new_tokens", 3)
    text = Path("explore.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", ""), "nothing is fetched"
    Path("driven.html").write_text(text.replace("<head>", "<head>" + BEFORE).replace("</body>", AFTER + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    url = Path("driven.html").resolve().as_uri()
    done = subprocess.run([BROWSER, *flags, url], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(base64.b64decode(re.search("RESULT(.*?)END", done.stdout)[1]))
    assert found["errors"] == [] and found["markup"] == 0
    assert "".join(found["tokens"][:16]) == "to·<b>be</b>·or↵" and found["start"] == 15
    assert (found["clicked"], found["moved"], found["block"]) == (3, 4, "11")
    assert found["heads"] == ["false", "true"] and "add up to 1.000" in found["facts"]
    ids = [token["id"] for token in data["tokens"]]
    weights = inspect(model, ids)["attention"][1, 1, 4]
    assert found["weights"][2] == f"weight {weights[2]:.4f}" and found["weights"][5] == "hidden by the causal mask"
    logits = inspect(model, ids)["logits"][4:5]
    expected = [torch.special.entr(gpt.next_token_probs(logits, t)).sum().item() for t in (1.0, 2.0)]
    assert found["entropy"] == pytest.approx([*expected, 0], abs=2e-3)
    assert found["bars"] >= 12 and found["lens"] == 1 + 3
