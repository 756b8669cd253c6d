"""The page: its numbers against transformers and gpt.py, its behaviour in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import enlarge, published, run_main

import convert_gpt2
import explore
import finetune
import gpt
from debug.activations import inspect
from extras import export, int8, tables
from gpt import GPT, GPTConfig, Tokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs chromium to open the page")


def explored(*argv, expect=None):
    return run_main(explore.main, "--model", "mine", "--device", "cpu", *argv, expect=expect)


def page(*argv):
    explored(*argv)
    text = Path("explore.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def ids_of(data):
    return [token["id"] for token in data["tokens"]]


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), packed["type"]).reshape(packed["shape"])


@torch.no_grad()
def seen_by_transformers(theirs, ids):
    """What inspect finds, without inspect."""
    trunk, streams, attention, mlp = theirs.transformer, [], [], []
    for block in trunk.h:
        block.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
        block.attn.register_forward_hook(lambda _, given, out: attention.append(out[0]))
        block.mlp.register_forward_hook(lambda _, given, out: mlp.append(out))
    trunk.ln_f.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    out = theirs.eval()(torch.tensor([ids]), output_attentions=True)
    stream = torch.cat(streams)  # (L + 1, T, C)
    said = theirs.lm_head(trunk.ln_f(stream)).softmax(-1).topk(3)  # (L + 1, T, 3)
    found = {"logits": out.logits[0], "attention": torch.cat(out.attentions)}
    found |= {"lens_ids": said.indices, "lens_probs": said.values, "stream_norm": stream.norm(dim=-1)}
    return found | {"attention_norm": torch.cat(attention).norm(dim=-1), "mlp_norm": torch.cat(mlp).norm(dim=-1)}


def check_page(data, seen):
    """The page carries these numbers."""
    ids, logits = ids_of(data), seen["logits"]
    low, high = np.split(unpack(data["ranges"]), 2, axis=1)
    assert np.allclose(unpack(data["logits"]) / 65535 * (high - low) + low, logits, rtol=1e-4, atol=1e-3)
    rows, columns = np.tril_indices(len(ids))
    assert np.allclose(unpack(data["attention"]) / 65535, seen["attention"][:, :, rows, columns], atol=1e-4)
    for key in ("stream_norm", "attention_norm", "mlp_norm"):
        assert np.allclose(unpack(data[key]), seen[key], rtol=1e-4)
    assert np.array_equal(unpack(data["lens_ids"]), seen["lens_ids"][..., :3])
    assert np.allclose(unpack(data["lens_probs"]) / 65535, seen["lens_probs"][..., :3], atol=1e-4)
    log_probs = logits.log_softmax(-1)
    assert data["log_prob"][0] is data["rank"][0] is None
    for t in range(1, len(ids)):
        assert data["log_prob"][t] == pytest.approx(log_probs[t - 1, ids[t]].item(), abs=2e-3)
        assert data["rank"][t] == 1 + (log_probs[t - 1] > log_probs[t - 1, ids[t]]).sum()


@pytest.mark.parametrize("kind", ["converted", "fine-tuned", "adapter"])
def test_the_numbers_of_every_kind_of_model_are_those_of_transformers(own_folder, kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    vocabulary = Tokenizer.bpe(["to be or not to be"] * 9, 262) if kind == "converted" else Tokenizer.bytes()
    published("theirs", vocabulary)
    convert_gpt2.main(["theirs", "--out", "checkpoints/mine"])
    folder, flags = "theirs", []
    if kind == "fine-tuned":
        Path("other.txt").write_text("to be or not to be, that is the question\n" * 40)
        tuned = ["--model", "mine", "--data", "other.txt", "--out", "tuned", "--dtype", "float32"]
        finetune.main([*tuned, "--max_steps", "3", "--lr", "0.1"])
        export.main(["tuned", "--format", "hf", "--out", "exported"])
        folder, flags = "exported", ["--model", "tuned"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if kind == "adapter":
        settings = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        peft.get_peft_model(theirs, settings).save_pretrained("adapter")  # which changes `theirs`, too
        flags = ["--adapter", "adapter"]
    data = page("--prompt", "to be or", "--max_new_tokens", 4, *flags)
    ids, prompt = ids_of(data), vocabulary.encode("to be or")
    assert ids[: data["n_prompt"]] == prompt and 1 <= len(ids) - len(prompt) <= 4
    check_page(data, seen_by_transformers(theirs, ids))


def test_an_int8_model_shows_its_own_numbers(mine):
    data = page("--prompt", "to be", "--dtype", "int8")
    exact = inspect(mine, ids_of(data))
    check_page(data, inspect(int8.quantize(mine), ids_of(data)))
    with pytest.raises(AssertionError):
        check_page(data, exact)


def test_the_budget_limits_the_page_and_is_remarked(mine, monkeypatch, capsys):
    monkeypatch.setattr(explore, "BUDGET", 2500)
    data = page("--prompt", "x" * 32)
    assert data["n_attention"] == 25 and data["logits"]["shape"][0] == unpack(data["lens_ids"]).shape[1] == 4
    assert "attention for 25 and predictions for 4 of 32 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_the_largest_page_of_gpt2_is_below_5_mb(monkeypatch):
    """1,024 tokens, random numbers of the sizes that GPT-2 has; they repeat no token, so all names are needed."""
    config = GPTConfig.preset("gpt2")
    T, V, L = config.block_size, config.vocab_size, config.n_layer
    seen = {"logits": torch.randn(T, V), "attention": torch.rand(1, 1, T, T).expand(L, config.n_head, T, T)}
    seen |= {"lens_ids": torch.randint(V, (L + 1, T, 5)), "lens_probs": torch.rand(L + 1, T, 5)}
    seen |= {"stream_norm": torch.rand(L + 1, T), "attention_norm": torch.rand(L, T), "mlp_norm": torch.rand(L, T)}
    monkeypatch.setattr(explore, "spell", lambda tokenizer, i: "twelve bytes")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=1))
    model.config = config
    data = explore.page_data("gpt2", model, Tokenizer.bytes(), [0] * T, T, seen)
    assert 3e6 < len(json.dumps(data, separators=(",", ":"))) < 4.9e6


@pytest.mark.parametrize("prompt", ["", "🙂 שלום عربي\n", "x" * 100])
def test_any_prompt_is_shown_as_far_as_the_context_reaches(mine, prompt):
    data = page("--prompt", prompt, "--max_new_tokens", 2)
    assert ids_of(data)[: data["n_prompt"]] == list(bytes(prompt, "utf-8")[-32:] or [256])


def test_a_token_is_shown_as_data_never_markup_and_as_bytes_where_it_cannot_be_seen(own_folder):
    more = {b"\xd7\xa9": 256, b"\xe2\x80\xae": 257, b"\xf0\x9f": 258, b"</script><b>": 259}
    vocabulary = Tokenizer(Tokenizer.bytes().ranks | more, "bpe")
    shape = GPTConfig(block_size=8, vocab_size=262, n_layer=1, n_head=1, n_embd=8)
    gpt.save_checkpoint("checkpoints/mine", GPT(shape), vocabulary)
    texts = [*page("--prompt", "a")["vocabulary"].values()]
    assert texts[256:] == ["ש", "<e280ae>", "<f09f>", "</script><b>", "<|endoftext|>", "<261>"]
    assert (texts[27], texts[10]) == ("<1b>", "\n")
    assert "</script><b>" not in Path("explore.html").read_text(encoding="utf-8")


def test_the_terminal_shows_tables_and_json_all_numbers(mine, capsys):
    explored("--prompt", "to be", "--max_new_tokens", 0, "--text")
    out = capsys.readouterr().out
    assert "expected next" in out and "logit lens" in out and "block 1" in out
    seen = inspect(mine, list(b"to be"))
    probs = seen["logits"][3].softmax(-1)  # after "to b"
    rank = 1 + (probs > probs[ord("e")]).sum().item()
    assert re.search(rf"^ +4  'e' +{re.escape(tables.cell(probs[ord('e')].item()))} +{rank} ", out, re.MULTILINE)
    explored("--prompt", "to be", "--max_new_tokens", 0, "--json")
    found = json.loads(capsys.readouterr().out)
    assert all(np.allclose(found[key], x, rtol=1e-4, atol=1e-5) for key, x in seen.items())
    assert not Path("explore.html").exists()


BAD = [
    ([], "one of the arguments --prompt --prompt_file is required"),
    (["--prompt", "a", "--adapter", "mine", "--dtype", "int8"], "--adapter goes with float32 or bfloat16"),
    (["--prompt", "a", "--out", "no/x.html"], "could not be written"),
    (["--prompt", "a", "--out", "mine.html"], "is not a page of explore.py: add --overwrite"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(mine, argv, message, capsys):
    Path("mine.html").write_text("a page of mine")
    explored(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
    assert Path("mine.html").read_text() == "a page of mine"


def test_a_page_of_ours_is_replaced_and_another_only_if_asked(mine):
    assert page("--prompt", "a") != page("--prompt", "b")
    Path("explore.html").write_text("another")
    page("--prompt", "a", "--overwrite")


class Browser:
    """Chromium, driven over a pipe in its DevTools protocol: messages are JSON, a zero byte ends each."""

    def __init__(self, folder):
        to_it, self.to = os.pipe()
        self.back, from_it = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        pipes = f"exec 93<&{to_it} 94>&{from_it}; exec 3<&93 4>&94"  # it reads file descriptor 3, and writes to 4
        command = ["bash", "-c", f'{pipes}; exec timeout 200 "$@"', "bash", BROWSER, *flags]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(to_it, from_it), **silent)
        os.close(to_it), os.close(from_it)
        self.answers, self.events, self.target, self.count = os.fdopen(self.back, "rb"), [], {}, 0
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.target = {"sessionId": self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def read(self):
        message = b""
        while not message.endswith(b"\0"):
            message += self.answers.read(1) or pytest.fail("the browser has ended")
        found = json.loads(message[:-1])
        assert found.get("method") != "Runtime.exceptionThrown", found
        return found

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.target}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, width=1000):
        self.events = []
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.call("Page.navigate", url=Path("explore.html").resolve().as_uri())
        while "Page.loadEventFired" not in [event.get("method") for event in self.events]:
            self.events.append(self.read())

    def run(self, javascript):
        found = self.call("Runtime.evaluate", expression=javascript, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, shift=False):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)

    def slide(self, name, value):
        self.run(f"$('{name}').value = {value}; $('{name}').dispatchEvent(new Event('input'))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.target = {}
    browser.call("Browser.close")
    browser.process.wait(60)


STATE = "[state.token, state.block, state.head].join(' ')"


@needs_browser
def test_the_page_opens_without_network_and_shows_text_as_text(mine, browser):
    page("--prompt", "to <b>be</b> or\n", "--max_new_tokens", 3)
    for width in (1000, 360):
        browser.open(width)
        names = [event["method"] for event in browser.events]
        assert not {"Runtime.consoleAPICalled", "Log.entryAdded"} & {*names}
        assert names.count("Network.requestWillBeSent") == 1, "the page itself, and nothing else"
        assert browser.run("document.documentElement.scrollWidth") <= width, "nothing is cut off"
    text = browser.run("$('token-list').textContent")
    assert text.startswith("to·<b>be</b>·or↵")
    assert browser.run("document.querySelectorAll('main b').length") == 0 and browser.run(STATE) == "15 0 0"


@needs_browser
def test_keys_clicks_and_the_pointer_choose_tokens_blocks_and_heads(mine, browser):
    data = page("--prompt", "to be or not", "--max_new_tokens", 3)
    weights = inspect(mine, ids_of(data))["attention"]
    browser.open()
    browser.run("$('token-list').children[3].click(); $('token-list').children[3].focus()")
    states = [browser.run(STATE)]
    for key, shift in (("ArrowRight", False), ("ArrowDown", False), ("ArrowRight", True), ("ArrowDown", False)):
        browser.press(key, shift)
        states.append(browser.run(STATE))
    assert states == ["3 0 0", "4 0 0", "4 1 0", "4 1 1", "4 1 1"], "the last key stays at the last block"
    assert browser.run("document.activeElement === $('token-list').children[4]"), "the focus goes along"
    titles = browser.run("[...$('attention-list').children].map((button) => button.title)")
    assert titles[:5] == [f"weight {w:.4f}" for w in weights[1, 1, 4, :5]]
    assert {*titles[5:]} == {"hidden by the causal mask"}
    assert "add up to 1.000" in browser.run("$('attention-facts').textContent")
    browser.run("$('map').scrollIntoView()")
    box = browser.run("(({ x, y, width }) => [x, y, width])($('map').getBoundingClientRect())")
    x, y = (box[i] + box[2] * place / data["n_attention"] for i, place in enumerate((2.5, 7.5)))
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    facts = browser.run("$('map-facts').textContent")
    assert "(position 7)" in facts and "(position 2)" in facts and f"weight {weights[1, 1, 7, 2]:.4f}" in facts


@needs_browser
def test_everything_has_a_name_for_screen_readers(mine, browser):
    page("--prompt", "to be or not")
    browser.open()
    nodes = [node for node in browser.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    for role in ("button", "link", "slider", "image", "group", "navigation", "region", "table", "list"):
        names = [node["name"]["value"] for node in nodes if node["role"]["value"] == role]
        assert names and all(names), role


@needs_browser
@pytest.mark.parametrize("vocabulary", [257, 9000])
def test_the_sliders_show_the_distribution_that_gpt_samples_from(own_folder, browser, vocabulary):
    """Of a whole vocabulary, and of one of which the page carries 1,000 logits and sums of the rest."""
    model = enlarge(GPT(GPTConfig(block_size=8, vocab_size=vocabulary, n_layer=1, n_head=1, n_embd=16)))
    model.transformer.ln_f.weight.data *= 4  # some settings need more than 1,000 tokens, some fewer
    gpt.save_checkpoint("checkpoints/mine", model, Tokenizer.bytes())
    page("--prompt", "abc", "--max_new_tokens", 0)
    logits = inspect(model, list(b"abc"))["logits"][1:2]
    browser.open()
    browser.run("choose({ token: 1 }); const seen = [], compute = distribution;")
    browser.run("distribution = (...given) => (seen[0] = compute(...given));")
    beyond = 0
    for t, k, p in product((0, 2, 10, 20), (0, 1, 40), (100, 80, 50)):
        for slider, value in (("temperature", t), ("top-k", k), ("top-p", p)):
            browser.slide(slider, value)
        found = dict(browser.run("logitsAt(1).map(({ id }, i) => [id, seen[0].probs[i]])"))
        facts = browser.run("$('next-facts').textContent")
        expected = torch.zeros(vocabulary).index_fill(0, logits.argmax(), 1)
        if t:
            expected = gpt.next_token_probs(logits, t / 10, k or None, p / 100)[0]
        if (expected > 0).sum() > len(found) and p < 100:  # the nucleus has tokens that the page lacks
            expected = gpt.next_token_probs(logits, t / 10)[0]
            assert "top-p would keep some of these, and is not applied" in facts
            beyond += 1
        assert max(abs(expected[i].item() - q) for i, q in found.items()) < 5e-4, (t, k, p)
        assert browser.run("seen[0].rest") == pytest.approx(1 - sum(expected[i].item() for i in found), abs=1e-4)
        entropy = torch.special.entr(expected.double()).sum().item()
        assert float(re.search(r"entropy ([0-9.]+)", facts)[1]) == pytest.approx(entropy, abs=2e-3), (t, k, p)
    assert len(found) == min(vocabulary, 1000) and (beyond > 0) == (vocabulary > 1000)
    assert browser.run("$('bars').children.length") >= 12 and browser.run("$('lens').rows.length") == 3
