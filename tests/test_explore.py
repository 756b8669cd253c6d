"""The page, its numbers against transformers, its JavaScript against gpt.py, and its behaviour in a real browser."""

import base64
import json
import os
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
import finetune
import gpt
from debug.activations import inspect
from extras import export, int8, tables
from gpt import GPT, GPTConfig, Tokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs chromium to open the page")


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


def check_page(data, logits, attention, tolerance=1e-4):
    """What the page carries are these logits (T, V) and attention (L, H, T, T)."""
    ids = [token["id"] for token in data["tokens"]]
    low, high = np.split(unpack(data["ranges"]), 2, axis=1)
    assert np.allclose(unpack(data["logits"]) / 65535 * (high - low) + low, logits, rtol=tolerance, atol=10 * tolerance)
    rows, columns = np.tril_indices(len(ids))
    assert np.allclose(unpack(data["attention"]) / 65535, attention[:, :, rows, columns], atol=tolerance)
    log_probs = logits.log_softmax(-1)
    assert data["log_prob"][0] is data["rank"][0] is None
    for t in range(1, len(ids)):
        assert data["log_prob"][t] == pytest.approx(log_probs[t - 1, ids[t]].item(), abs=20 * tolerance)
        assert data["rank"][t] == 1 + (log_probs[t - 1] > log_probs[t - 1, ids[t]]).sum()


def test_the_page_carries_the_numbers(model):
    data = page("--prompt", "to be", "--max_new_tokens", 4)
    ids = [token["id"] for token in data["tokens"]]
    assert ids[:5] == list(b"to be") and data["n_prompt"] == 5 and 6 <= len(ids) <= 9
    seen = inspect(model, ids)
    check_page(data, seen["logits"], seen["attention"], 1e-5)
    for key in ("stream_norm", "attention_norm", "mlp_norm"):
        assert np.allclose(unpack(data[key]), seen[key], rtol=1e-5)
    assert np.array_equal(unpack(data["lens_ids"]), seen["lens_ids"][..., :3])
    assert np.allclose(unpack(data["lens_probs"]) / 65535, seen["lens_probs"][..., :3], atol=1e-5)


@pytest.mark.parametrize("kind", ["converted", "fine-tuned", "adapter", "learned vocabulary"])
def test_every_kind_of_model_shows_the_numbers_of_transformers(own_folder, kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    vocabulary = Tokenizer.bpe(["to be or not to be"] * 9, 262) if kind == "learned vocabulary" else Tokenizer.bytes()
    published("theirs", vocabulary)
    convert_gpt2.main(["theirs", "--out", "checkpoints/mine"])
    folder, flags = "theirs", []
    if kind == "fine-tuned":
        Path("other.txt").write_text("to be or not to be, that is the question\n" * 40)
        tuned = "--model mine --data other.txt --max_steps 3 --batch_size 2 --lr 0.1 --device cpu --dtype float32"
        finetune.main(f"{tuned} --out checkpoints/tuned".split())
        export.main(["tuned", "--format", "hf", "--out", "exported"])
        folder, flags = "exported", ["--model", "tuned"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if kind == "adapter":
        settings = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        theirs = peft.get_peft_model(theirs, settings)
        theirs.save_pretrained("adapter")
        flags = ["--adapter", "adapter"]
    data = page("--prompt", "to be or", "--max_new_tokens", 4, *flags)
    with torch.no_grad():
        ids = torch.tensor([[token["id"] for token in data["tokens"]]])
        expected = theirs.eval()(ids, output_attentions=True)
    check_page(data, expected.logits[0], torch.cat(expected.attentions))
    assert ("".join(token["text"] for token in data["tokens"])).startswith("to be or")
    assert data["n_prompt"] < 8 if kind == "learned vocabulary" else data["n_prompt"] == 8


def test_an_int8_model_shows_its_own_numbers(model):
    data = page("--prompt", "to be", "--dtype", "int8")
    ids = [token["id"] for token in data["tokens"]]
    exact = model(torch.tensor([ids]))[0][0]
    rounded = int8.quantize(model)
    check_page(data, rounded(torch.tensor([ids]))[0][0].detach(), inspect(rounded, ids)["attention"])
    assert 0 < (rounded(torch.tensor([ids]))[0][0] - exact).norm() < 0.3 * exact.norm()


def wide_page():
    """A page of a vocabulary of 9,000, of which it carries 1,000 logits a token -> its data, the logits (3, 9000)."""
    torch.manual_seed(0)
    model = enlarge(GPT(GPTConfig(block_size=8, vocab_size=9000, n_layer=1, n_head=1, n_embd=16)))
    seen = inspect(model, [1, 2, 3])
    seen["logits"] *= 4  # some settings need more than 1,000 tokens, some fewer
    data = explore.page_data("wide", model, Tokenizer.bytes(), [1, 2, 3], 1, seen)
    text = explore.TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))
    Path("explore.html").write_text(text, encoding="utf-8")
    return data, seen["logits"]


def test_a_large_vocabulary_is_cut_to_the_best_and_sums_of_the_rest(own_folder):
    data, logits = wide_page()
    assert data["logits"]["shape"] == (3, 1000) and set(data["vocabulary"]) >= set(unpack(data["ids"])[2].tolist())
    for i, temperature in enumerate(explore.TEMPERATURES[1:]):
        probs = (logits[2].double() / temperature).softmax(-1).sort(descending=True).values
        share = probs[1000:].sum() / probs[0]
        assert unpack(data["rest"])[i, 0, 2] == pytest.approx(share.item(), rel=1e-5, abs=1e-12)


def test_the_budget_limits_the_page_and_is_remarked(model, monkeypatch, capsys):
    monkeypatch.setattr(explore, "BUDGET", 2500)
    data = page("--prompt", "x" * 32)
    assert data["n_attention"] == 25 and data["logits"]["shape"][0] == unpack(data["lens_ids"]).shape[1] == 4
    assert "attention for 25 and predictions for 4 of 32 tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-xl"])
def test_the_largest_page_of_gpt2_is_below_5_mb(preset, monkeypatch):
    """1,024 tokens, random numbers of the sizes that GPT-2 has; they repeat no token, so all names are needed."""
    config = GPTConfig.preset(preset)
    T, V, L = config.block_size, config.vocab_size, config.n_layer
    seen = {"logits": torch.randn(T, V), "attention": torch.rand(1, 1, T, T).expand(L, config.n_head, T, T)}
    seen |= {"lens_ids": torch.randint(V, (L + 1, T, 5)), "lens_probs": torch.rand(L + 1, T, 5)}
    seen |= {"stream_norm": torch.rand(L + 1, T), "attention_norm": torch.rand(L, T), "mlp_norm": torch.rand(L, T)}
    monkeypatch.setattr(explore, "spell", lambda tokenizer, i: "twelve bytes")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=1))
    model.config = config
    data = explore.page_data(preset, model, Tokenizer.bytes(), [0] * T, T, seen)
    assert 3e6 < len(json.dumps(data, separators=(",", ":"))) < 4.9e6


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
    if "🙂" in prompt:
        assert data["tokens"][0]["text"] == "<f0>", "part of a character: its byte"
    if len(prompt) == 100:
        assert "only the last 32 fit into the context" in capsys.readouterr().err and data["n_prompt"] == 32


def test_a_token_that_is_markup_is_data(own_folder):
    vocabulary = Tokenizer(Tokenizer.bytes().ranks | {b"</script><b>": 256}, "bpe")
    shape = GPTConfig(block_size=8, vocab_size=258, n_layer=1, n_head=1, n_embd=8)
    gpt.save_checkpoint("checkpoints/mine", GPT(shape), vocabulary)
    assert page("--prompt", "a")["vocabulary"]["256"] == "</script><b>"
    assert "</script><b>" not in Path("explore.html").read_text(encoding="utf-8")


def test_characters_that_cannot_be_seen_are_shown_as_bytes():
    vocabulary = Tokenizer(Tokenizer.bytes().ranks | {b"\xd7\xa9": 256, b"\xe2\x80\xae": 257, b"\xf0\x9f": 258}, "bpe")
    texts = [explore.spell(vocabulary, i) for i in (256, 257, 258, 27, 10, 259, 300)]
    assert texts == ["ש", "<e280ae>", "<f09f>", "<1b>", "\n", "<|endoftext|>", "<300>"]


def test_the_terminal_shows_tables_and_json_all_numbers(model, capsys):
    explored("--prompt", "to be", "--max_new_tokens", 0, "--text")
    out = capsys.readouterr().out
    assert "expected next" in out and "logit lens" in out and "block 1" in out
    probs = inspect(model, list(b"to be"))["logits"][3].softmax(-1)  # after "to b"
    rank = 1 + (probs > probs[ord("e")]).sum().item()
    assert re.search(rf"^ +4  'e' +{re.escape(tables.cell(probs[ord('e')].item()))} +{rank} ", out, re.MULTILINE)
    explored("--prompt", "to be", "--max_new_tokens", 0, "--json")
    found = json.loads(capsys.readouterr().out)
    assert np.array(found["attention"]).shape == (2, 2, 5, 5) and np.array(found["logits"]).shape == (5, 257)
    assert not Path("explore.html").exists()


BAD = [
    (["--prompt", "a", "--out", "no/x.html"], "could not be written"),
    ([], "one of the arguments --prompt --prompt_file is required"),
    (["--prompt", "a", "--prompt_file", "mine.html"], "not allowed with argument --prompt"),
    (["--prompt_file", "none.txt"], "there is no text file none.txt"),
    (["--prompt", "a", "--adapter", "mine", "--dtype", "int8"], "--adapter goes with float32 or bfloat16"),
    (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
    (["--prompt", "a", "--model", "nothing"], "nothing"),
    (["--prompt", "a", "--out", "checkpoints"], "is not a page of explore.py"),
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


class Browser:
    """Chromium, driven over a pipe in its DevTools protocol: messages are JSON, a zero byte ends each."""

    def __init__(self, folder):
        to_it, self.to = os.pipe()
        self.back, from_it = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        pipes = f"exec 93<&{to_it} 94>&{from_it}; exec 3<&93 4>&94"  # it reads file descriptor 3, and writes to 4
        command = ["bash", "-c", f'{pipes}; exec timeout 200 "$@"', "bash", BROWSER, *flags]
        self.process = subprocess.Popen(
            command, pass_fds=(to_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
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
        return json.loads(message[:-1])

    def call(self, method, **params):
        self.count += 1
        os.write(
            self.to, json.dumps({"id": self.count, "method": method, "params": params, **self.target}).encode() + b"\0"
        )
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path="explore.html", width=1000, scheme="light"):
        self.events = []
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while "Page.loadEventFired" not in [event["method"] for event in self.events]:
            self.events.append(self.read())

    def run(self, javascript):
        found = self.call("Runtime.evaluate", expression=javascript, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, shift=False):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)

    def mouse(self, kind, x, y):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

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
def test_the_page_opens_without_network_and_shows_text_as_text(model, browser):
    page("--prompt", "to <b>be</b> or\n", "--max_new_tokens", 3)
    for scheme in ("light", "dark"):
        for width in (1000, 360):
            browser.open(width=width, scheme=scheme)
            names = [event["method"] for event in browser.events]
            assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & {*names}
            assert names.count("Network.requestWillBeSent") == 1, "the page itself, and nothing else"
            assert browser.run("document.documentElement.scrollWidth") <= width, "nothing is cut off"
    text = browser.run("$('token-list').textContent")
    assert text.startswith("to·<b>be</b>·or↵")
    assert browser.run("document.querySelectorAll('main b').length") == 0 and browser.run(STATE) == "15 0 0"


@needs_browser
def test_keys_clicks_and_the_pointer_choose_tokens_blocks_and_heads(model, browser):
    data = page("--prompt", "to be or not", "--max_new_tokens", 3)
    weights = inspect(model, [token["id"] for token in data["tokens"]])["attention"]
    browser.open()
    browser.run("$('token-list').children[3].click(); $('token-list').children[3].focus()")
    states = [browser.run(STATE)]
    for key, shift in (("ArrowRight", False), ("ArrowDown", False), ("ArrowRight", True), ("ArrowDown", False)):
        browser.press(key, shift)
        states.append(browser.run(STATE))
    assert states == ["3 0 0", "4 0 0", "4 1 0", "4 1 1", "4 1 1"], "the last key stays at the last block"
    assert browser.run("document.activeElement === $('token-list').children[4]"), "the focus goes along"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "and is seen"
    titles = browser.run("[...$('attention-list').children].map((button) => button.title)")
    assert titles[:5] == [f"weight {w:.4f}" for w in weights[1, 1, 4, :5]] and {*titles[5:]} == {
        "hidden by the causal mask"
    }
    assert "add up to 1.000" in browser.run("$('attention-facts').textContent")
    browser.run("$('heads').children[1].focus()")
    browser.press("ArrowLeft")
    assert browser.run(STATE) == "4 1 0" and browser.run("document.activeElement === $('heads').children[0]")
    browser.run("$('map').scrollIntoView()")
    box = browser.run("(({ x, y, width }) => [x, y, width])($('map').getBoundingClientRect())")
    x, y = (box[i] + box[2] * place / data["n_attention"] for i, place in enumerate((2.5, 7.5)))
    browser.mouse("mouseMoved", x, y)
    facts = browser.run("$('map-facts').textContent")
    assert "(position 7)" in facts and "(position 2)" in facts and f"weight {weights[1, 0, 7, 2]:.4f}" in facts
    browser.mouse("mousePressed", x, y)
    browser.mouse("mouseReleased", x, y)
    assert browser.run(STATE) == "7 1 0"
    pixel = "$('map').firstChild.getContext('2d').getImageData({}, {}, 1, 1).data[3]"
    assert browser.run(pixel.format(2, 7)) > 0 == browser.run(pixel.format(7, 2)), "the mask's triangle stays empty"


@needs_browser
def test_everything_has_a_name_for_screen_readers_and_tab_stops_once_a_group(model, browser):
    page("--prompt", "to be or not", "--max_new_tokens", 3)
    browser.open()
    nodes = [node for node in browser.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = {}
    for node in nodes:
        roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    controls = ("button", "link", "slider", "image", "group", "navigation", "region", "table", "list", "columnheader")
    for role in controls:
        assert roles.get(role) and all(roles[role]), (role, roles.get(role))
    assert len(roles["slider"]) == 5 and len(roles["link"]) == 6 and "Canvas" not in roles
    values = browser.run("[...document.querySelectorAll('input')].map((slider) => slider.ariaValueText)")
    assert values == ["0 of 0–1", "0 of 0–1", "1.0", "off", "off"]
    live = browser.run("[...document.querySelectorAll('[aria-live=polite]')].map((line) => line.id)")
    assert live == ["token-facts", "attention-facts", "next-facts"]
    stops = []
    browser.run("document.activeElement.blur()")
    for _ in range(15):
        browser.press("Tab")
        stops.append(browser.run("(({ id, parentNode }) => id || parentNode.id)(document.activeElement)"))
    order = ["diagram"] * 6 + [
        "token-list",
        "block",
        "head",
        "attention-list",
        "heads",
        "temperature",
        "top-k",
        "top-p",
        "blocks",
    ]
    assert stops == order


@needs_browser
@pytest.mark.parametrize("wide", [False, True])
def test_the_sliders_show_the_distribution_that_gpt_samples_from(model, browser, wide):
    """Of a whole vocabulary, and of one of which the page carries 1,000 logits and sums of the rest."""
    data, logits = wide_page() if wide else (page("--prompt", "to be", "--max_new_tokens", 0), None)
    if not wide:
        logits = inspect(model, [token["id"] for token in data["tokens"]])["logits"]
    browser.open()
    browser.run("choose({ token: 1 }); const seen = [], compute = distribution;")
    browser.run("distribution = (...given) => (seen[0] = compute(...given));")
    beyond = 0
    settings = [
        (10, 0, 100),
        (2, 0, 100),
        (20, 0, 100),
        (10, 5, 100),
        (10, 0, 50),
        (2, 0, 50),
        (15, 40, 80),
        (0, 0, 100),
    ]
    for t, k, p in settings:
        for slider, value in (("temperature", t), ("top-k", k), ("top-p", p)):
            browser.slide(slider, value)
        expected = torch.zeros(logits.shape[1]).index_fill(0, logits[1].argmax(), 1)
        if t:
            expected = gpt.next_token_probs(logits[1:2], t / 10, k or None, p / 100)[0]
        found = dict(browser.run("logitsAt(1).map(({ id }, i) => [id, seen[0].probs[i]])"))
        facts = browser.run("$('next-facts').textContent")
        if (expected > 0).sum() > len(found) and p < 100:  # the nucleus has tokens that the page lacks
            expected = gpt.next_token_probs(logits[1:2], t / 10)[0]
            assert "top-p would keep some of these, and is not applied" in facts
            beyond += 1
        assert max(abs(expected[i].item() - q) for i, q in found.items()) < 5e-4, (t, k, p)
        assert browser.run("seen[0].rest") == pytest.approx(1 - sum(expected[i].item() for i in found), abs=1e-4)
        entropy = torch.special.entr(expected.double()).sum().item()
        assert float(re.search(r"entropy ([0-9.]+)", facts)[1]) == pytest.approx(entropy, abs=2e-3), (t, k, p)
    assert (len(found), beyond) == ((1000, 1) if wide else (257, 0))
    assert browser.run("$('bars').children.length") >= 12
    assert browser.run("$('lens').rows.length") == data["model"]["n_layer"] + 2
