import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, ROOT, TINY, enlarge, parameters_of
from safetensors.torch import save_file

import evaluate
import explore
import export
import gpt
import sanity


@pytest.fixture
def words(own_folder):
    """A text in which no long run of tokens comes twice."""
    letters = random.Random(0)
    text = " ".join("".join(letters.choices("abcdefghij", k=letters.randint(1, 8))) for _ in range(6000))
    (own_folder / "words.txt").write_text(text)
    return text


@pytest.fixture
def mine(words):
    """A checkpoint with large weights, so that every figure has something to tell."""
    config = gpt.GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=64)
    gpt.save_checkpoint("checkpoints/mine", enlarge(gpt.GPT(config)), gpt.Tokenizer.bytes())
    return gpt.load_checkpoint("checkpoints/mine")[0]


def run(*argv, expect=None):
    if expect is None:
        return evaluate.main(["--device", "cpu", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--device", "cpu", *map(str, argv)])
    assert end.value.code == expect


def rows_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# How good.


def scored_by_transformers(folder, ids, context, stride):
    """The definition once more, with another library's model: each target once, in the first window that has it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    nats, hits, done = 0.0, 0, 1  # the first token is nobody's target
    for start in range(0, len(ids), stride):
        window = torch.tensor([ids[start : start + context]])
        with torch.no_grad():
            logs = model(window).logits[0].log_softmax(-1)
        for at, row in enumerate(logs):
            if done <= start + at + 1 < len(ids):
                nats, hits, done = nats - row[ids[start + at + 1]].item(), hits + (row.argmax() == ids[start + at + 1]).item(), done + 1
    assert done == len(ids)
    return nats, hits


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (20, 7), (32, 1)])
def test_figures_are_those_of_an_independent_computation(mine, capsys, context, stride):
    text = PROSE[:1000]
    Path("held_out.txt").write_text(text)
    export.main(["mine", "--format", "hf", "--out", "theirs"])
    capsys.readouterr()
    run("--model", "mine", "--data", "held_out.txt", "--context", context, "--stride", stride, "--dtype", "float32", "--json")
    (row,) = rows_of(capsys)
    nats, hits = scored_by_transformers("theirs", [256, *text.encode()], context, stride)
    assert row["tokens"] == len(text) and row["parameters"] == sum(p.numel() for p in mine.parameters())
    assert row["loss"] == pytest.approx(nats / len(text), abs=5e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nats / len(text)), rel=5e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), abs=5e-5)
    assert row["accuracy"] == hits / len(text) > 0


def test_unasked_it_gives_the_figure_of_the_training_log(words, capsys):
    gpt.main([*TINY, "--data", "words.txt", "--out", "checkpoints/mine", "--val_bytes", "700", "--dtype", "float32"])
    capsys.readouterr()
    run("--model", "mine", "--json", "--dtype", "float32")
    (row,) = rows_of(capsys)
    logged = min(gpt.load_run("checkpoints/mine")[0]["rows"], key=lambda row: row["val_loss"])
    assert row["split"] == "val" and row["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-5)
    run("--model", "mine", "--data", "./words.txt")
    assert "was trained on most of ./words.txt: --split val" in capsys.readouterr().err
    run("--model", "mine", "--data", "./words.txt", "--split", "val", "--json", "--dtype", "float32")
    assert rows_of(capsys)[0]["tokens"] == row["tokens"], "the part that training held out"
    run("--model", "mine", "--split", "all", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == len(words.encode()) and "was trained on most of words.txt: --split val" in err
    Path("more.txt").write_text(words[::-1])
    run("--model", "mine", "--data", "words.txt", "more.txt")
    assert "was trained on most of words.txt: the figure says little about new text" in capsys.readouterr().err


def test_new_models_of_any_width_begin_with_a_healthy_loss(words):
    for width, vocabulary, context in ((768, 257, 64), (1600, 257, 1), (192, 1024, 8), (16, 300, 3)):
        config = gpt.GPTConfig(block_size=context, vocab_size=vocabulary, n_layer=2, n_head=1, n_embd=width)
        tokens = np.array(gpt.Tokenizer.bytes().encode(words))
        subject = sanity.Subject(config, gpt.GPT(config).eval(), gpt.Tokenizer.bytes(), ["words.txt"], 1000, tokens, tokens)
        assert sanity.first_loss(subject)[2], sanity.first_loss(subject)


def test_bits_per_byte_compare_models_of_different_vocabularies(mine, words, capsys):
    tokenizer = gpt.Tokenizer.bpe([words], 300)
    config = gpt.GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=8)
    gpt.save_checkpoint("checkpoints/other", gpt.GPT(config), tokenizer)
    run("--model", "mine", "other", "--data", "words.txt", "--json", "--dtype", "float32")
    rows = rows_of(capsys)
    assert rows[0]["tokens"] != rows[1]["tokens"] == len(tokenizer.encode(words))
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / len(words.encode()), rel=1e-6)
    run("--model", "mine", "other", "--data", "words.txt")
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[0] == "mine" and f"{rows[1]['bits_per_byte']:.4f}" in table[2] and "all tokens but the first" in table[-1]
    assert table[4] == "other: words.txt; windows of 16 tokens, 16 apart"


# ---------------------------------------------------------------------------------------------------------------------
# The battery.


def test_sound_code_passes_every_check(mine, capsys):
    run("--check", "--model", "mine", "--data", "words.txt", expect=0)
    out, err = capsys.readouterr()
    assert out.count("ok   ") == len(sanity.CHECKS) and "FAIL" not in out and f"all {len(sanity.CHECKS)} checks passed" in err
    assert out.count("healthy: ") == len(sanity.CHECKS) and "Python" in err and "torch" in err


def test_it_needs_no_model(words, capsys, monkeypatch):
    monkeypatch.setattr(gpt.GPTConfig.__init__, "__defaults__", (32, 300, 2, 2, 64, 0.0))
    run("--check", "--data", "words.txt", "--json", expect=0)
    rows = rows_of(capsys)
    assert [row["check"] for row in rows] == list(sanity.CHECKS) and all(row["ok"] for row in rows)


def masked(diagonal):
    """Written-out attention whose mask begins elsewhere."""

    def attention(q, k, v, dropout=None, fused=None):
        T, S = q.shape[2], k.shape[2]
        scores = q @ k.mT / math.sqrt(q.shape[3])
        return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + diagonal), -math.inf).softmax(-1) @ v

    return attention


def broken_mask(monkeypatch):
    monkeypatch.setattr(gpt, "attention", masked(2))


def blind_mask(monkeypatch):
    monkeypatch.setattr(gpt, "attention", masked(0))


def only_fused_broken(monkeypatch):
    original = gpt.F.scaled_dot_product_attention
    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", lambda q, k, v, mask=None, p=0.0, is_causal=False: original(q, k, v))


def only_written_out_broken(monkeypatch):
    """Scores are not masked: what comes after a token counts as much as what came before it."""
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda scores, mask, value: scores)


def no_past(monkeypatch):
    monkeypatch.setattr(gpt, "attention", lambda q, k, v, dropout=None, fused=None: v[:, :, -q.shape[2] :])


def unshifted(monkeypatch):
    original = gpt.TokenDataset.batch
    monkeypatch.setattr(gpt.TokenDataset, "batch", lambda self, windows: (original(self, windows)[0],) * 2)


def shifted_twice(monkeypatch):
    original = gpt.TokenDataset.batch

    def batch(self, windows):
        x, y = original(self, windows)
        return x[:, :-1], y[:, 1:]

    monkeypatch.setattr(gpt.TokenDataset, "batch", batch)


def strange_id(monkeypatch):
    original = gpt.load_data

    def load_data(*args):
        tokenizer, train, val = original(*args)
        return tokenizer, train, np.concatenate([val, [257]])

    monkeypatch.setattr(gpt, "load_data", load_data)


def shared_text(monkeypatch):
    original = gpt.split_texts

    def split(texts, val_bytes):
        train, val = original(texts, val_bytes)
        return train, [train[-1][-1000:] + val[0], *val[1:]]

    monkeypatch.setattr(gpt, "split_texts", split)


def copied_text(monkeypatch):
    Path("words.txt").write_text(Path("words.txt").read_text()[:6000] * 2)


def large_embedding(monkeypatch):
    original = gpt.GPT.init_weights

    def init_weights(self, module):
        original(self, module)
        if isinstance(module, gpt.GPT):  # comes last
            torch.nn.init.normal_(module.transformer.wte.weight)

    monkeypatch.setattr(gpt.GPT, "init_weights", init_weights)


def frozen(monkeypatch):
    original = gpt.load_checkpoint

    def load(folder, device="cpu"):
        model, tokenizer = original(folder, device)
        model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
        return model, tokenizer

    monkeypatch.setattr(evaluate, "load_checkpoint", load)


def dropout_on(monkeypatch):
    monkeypatch.setattr(gpt.Dropout, "forward", lambda self, x: torch.nn.functional.dropout(x, self.p, True))


def dropout_off(monkeypatch):
    monkeypatch.setattr(gpt.Dropout, "forward", lambda self, x: x)


def forgetful_cache(monkeypatch):
    original = gpt.KVCache.append

    def append(self, k, v):
        k, v = original(self, k, v)
        return k[:, :, -9:], v[:, :, -9:]

    monkeypatch.setattr(gpt.KVCache, "append", append)


def lossy_file(monkeypatch):
    original = gpt.save_file
    monkeypatch.setattr(gpt, "save_file", lambda tensors, *rest: original({name: p.half().float() for name, p in tensors.items()}, *rest))


def aligned_to_the_top_left(monkeypatch):
    """What is_causal does with fewer queries than keys."""
    original = gpt.F.scaled_dot_product_attention

    def attention(q, k, v, mask=None, p=0.0, is_causal=False):
        return original(q, k, v, None if mask is None else torch.ones_like(mask).tril(), p, is_causal)

    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", attention)


def left_in_training(monkeypatch):
    original = gpt.load_checkpoint

    def load(folder, device="cpu"):
        model, tokenizer = original(folder, device)
        for module in model.modules():
            if isinstance(module, gpt.Dropout):
                module.p = 0.2
        return model.train(), tokenizer

    monkeypatch.setattr(evaluate, "load_checkpoint", load)


def silent_error(monkeypatch):
    def forward(self, x):
        raise AssertionError

    monkeypatch.setattr(gpt.MLP, "forward", forward)


def no_steps(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)


def lower_case(monkeypatch):
    original = gpt.Tokenizer.encode
    monkeypatch.setattr(gpt.Tokenizer, "encode", lambda self, text: original(self, text.lower()))


def time_first(monkeypatch):
    original = gpt.GPT.forward

    def forward(self, idx, targets=None):
        logits, loss = original(self, idx, targets)
        return logits if targets is None else logits.transpose(0, 1), loss

    monkeypatch.setattr(gpt.GPT, "forward", forward)


BREAKAGES = {
    broken_mask: {"causality", "cache"},
    blind_mask: {"causality"},
    only_fused_broken: {"causality", "cache"},
    only_written_out_broken: {"causality"},
    no_past: {"the past"},
    unshifted: {"targets", "first loss"},  # each token's embedding is its own best match in the head
    shifted_twice: {"targets"},
    strange_id: {"token ids"},
    shared_text: {"splits", "repeats"},
    copied_text: {"repeats"},
    large_embedding: {"first loss", "first logits"},
    frozen: {"gradients"},
    dropout_on: {"dropout"},
    dropout_off: {"dropout"},
    forgetful_cache: {"cache"},
    lossy_file: {"save and load"},
    no_steps: {"overfit"},
    aligned_to_the_top_left: {"cache"},
    left_in_training: {"dropout"},
    silent_error: {"shapes"},
    lower_case: {"round trip"},
    time_first: {"shapes"},
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_each_way_to_break_the_code_fails_its_check(mine, capsys, monkeypatch, breakage):
    breakage(monkeypatch)
    run("--check", "--model", "mine", "--data", "words.txt", "--json", expect=1)
    out, err = capsys.readouterr()
    failed = {row["check"] for row in map(json.loads, out.splitlines()) if not row["ok"]}
    assert failed >= BREAKAGES[breakage] and f"{len(failed)} of {len(sanity.CHECKS)} checks failed" in err
    if breakage not in (blind_mask, left_in_training, silent_error):  # nothing is sound where every number is NaN, noise or an error
        assert failed == BREAKAGES[breakage]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 2)], ids=str)
def test_the_smallest_models_pass_too(words, capsys, shape):
    config = gpt.GPTConfig(block_size=shape[0], vocab_size=300, n_layer=shape[1], n_head=1, n_embd=16)
    gpt.save_checkpoint("checkpoints/least", gpt.GPT(config), gpt.Tokenizer.bytes())
    run("--check", "--model", "least", "--data", "words.txt", "--json", expect=0)
    assert next(row for row in rows_of(capsys) if row["check"] == "targets")["measured"].endswith(": 1")


def test_every_check_can_fail():
    assert set().union(*BREAKAGES.values()) == set(sanity.CHECKS)
    readme = (ROOT / "README.md").read_text()
    assert (len(sanity.CHECKS), len(BREAKAGES)) == (15, 22) and "fifteen things" in readme and "in twenty-two ways" in readme


# ---------------------------------------------------------------------------------------------------------------------
# Looking inside.


def test_what_is_seen_inside_is_what_transformers_sees(mine, capsys):
    transformers = pytest.importorskip("transformers")
    export.main(["mine", "--format", "hf", "--out", "theirs"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs", attn_implementation="eager").double().eval()
    found, attention = explore.inspect(mine, gpt.Tokenizer.bytes(), "to be or not")
    ids = list(b"to be or not")
    with torch.no_grad():
        seen = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        assert (attention - torch.cat(seen.attentions)).abs().max() < 1e-5
        logs = seen.logits[0].log_softmax(-1)
        for at, row in enumerate(found["tokens"][1:], 1):
            assert row["entropy"] == pytest.approx(torch.distributions.Categorical(logits=logs[at - 1]).entropy().item(), rel=1e-4)
            expected = [bytes([i]).decode(errors="replace") if i < 256 else gpt.EOT for i in logs[at - 1].argsort(descending=True)[:5]]
            assert [one["token"] for one in row["expected"]] == expected
            assert row["expected"][0]["p"] == pytest.approx(logs[at - 1].max().exp().item(), rel=1e-4)
            if at < len(ids):
                assert row["log_probability"] == pytest.approx(logs[at - 1, ids[at]].item(), rel=1e-4, abs=1e-5)
                assert row["rank"] == logs[at - 1].argsort(descending=True).tolist().index(ids[at]) + 1
        added = {}
        for i, block in enumerate(theirs.transformer.h):
            block.attn.register_forward_hook(lambda _, __, out, i=i: added.update({("attention", i): out[0]}))
            block.mlp.register_forward_hook(lambda _, __, out, i=i: added.update({("mlp", i): out}))
        theirs(torch.tensor([ids]))
        for (part, i), out in added.items():
            assert found["stream"][i + 1][f"{part}_norm"] == pytest.approx(out[0].norm(dim=-1).mean().item(), rel=1e-4)
        for row, hidden in zip(found["stream"][:-1], seen.hidden_states[:-1], strict=True):
            assert row["norm"] == pytest.approx(hidden[0].norm(dim=-1).mean().item(), rel=1e-4)
            said = theirs.lm_head(theirs.transformer.ln_f(hidden[0, -1])).softmax(-1)
            assert row["says"][0]["p"] == pytest.approx(said.max().item(), rel=1e-4)
    last, model = found["stream"][-1]["says"], found["tokens"][-1]["expected"]  # after the last block, the lens is the model
    assert [one["token"] for one in last] == [one["token"] for one in model]
    assert [one["p"] for one in last] == pytest.approx([one["p"] for one in model], rel=1e-5)


def test_a_learner_sees_it_in_the_terminal_and_as_a_picture(mine, capsys):
    run("--model", "mine", "--inspect", "to be or not")
    out = capsys.readouterr().out
    assert out.count("head  1 |") == 2 and "block 1" in out and "what comes next" in out and "'o'" in out
    assert Path("attention.png").read_bytes().startswith(b"\x89PNG")
    run("--model", "mine", "--inspect", "x" * 100, "--json", "--picture", "other.png")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "the text has 100 tokens, only the last 32" in err
    assert len(found["tokens"]) == 33 and np.array(found["attention"]).shape == (2, 2, 32), "the last 32 tokens count"
    assert Path("other.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with generated text.


@pytest.mark.parametrize(
    ("ids", "loop"),
    [([1, 2, 3, 4, 5], (0, 0)), ([7, 7, 7, 7], (4, 1)), ([9, 1, 2, 1, 2, 1, 2, 8], (6, 2)), ([1, 2, 3, 1, 2], (0, 0)), ([], (0, 0)),
     ([5, 1, 2, 3, 4] * 3 + [9], (15, 5)), (list(range(70)) * 2, (0, 0))],
)  # fmt: skip
def test_the_longest_loop_is_found(ids, loop):
    assert explore.longest_loop(ids) == loop


def test_figures_of_a_text():
    row = explore.measure([1, 2, 3, 1, 2, 3, 1, 2], [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.1], [2.0] * 8, "ab\ufffdd", 10)
    assert row["surprise"] == pytest.approx(2 - 12.6 / 8)
    assert row["repeated"] == pytest.approx(2 / 5) and row["distinct_1"] == 3 / 8 and row["distinct_2"] == 3 / 7 and row["distinct_3"] == 3 / 6
    assert (row["loop"], row["period"], row["broken"], row["tokens"], row["asked"]) == (8, 3, 0.25, 8, 10)
    assert (row["entropy_start"], row["entropy_end"]) == (4.0, pytest.approx(0.3))


SICK = {
    "early end": ([1, 2, 3], [2.0] * 3, "abc"),
    "a loop": ([*range(40), *[1, 2, 3] * 20], [2.0] * 100, "x"),
    "repetition": ([*[1, 2, 3, 4, 5, 90], *range(10, 40), *[1, 2, 3, 4, 5, 91], *range(10, 41), *range(12, 39)], [2.0] * 100, "x"),
    "collapse": (range(100), [*[3.0] * 60, *[0.05] * 40], "x"),
    "gibberish": (range(100), [2.0] * 100, "a\ufffd" * 20),
    "noise": (range(100), [5.4] * 100, "x"),
    "word salad": (range(100), [2.0] * 100, "x"),
}


@pytest.mark.parametrize("sickness", SICK)
def test_each_sickness_is_named(sickness):
    ids, entropies, text = SICK[sickness]
    surprises = [entropy + 1.5 * (sickness == "word salad") for entropy in entropies]
    found = explore.verdict(explore.measure(list(ids), list(entropies), surprises, text, 100), 257)
    assert len(found) == 1 and found[0].startswith(sickness)


def test_a_healthy_text_is_left_in_peace():
    found = explore.verdict(explore.measure(list(range(100)), [2.5] * 100, [2.6] * 100, "a text", 100), 257)
    assert found == ["no problem found"]


def test_the_model_writes_and_is_diagnosed(words, capsys):
    config = gpt.GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64)
    model = gpt.GPT(config)
    gpt.save_checkpoint("checkpoints/newborn", model, gpt.Tokenizer.bytes())
    run("--model", "newborn", "--diagnose_text", "--max_new_tokens", 60, "--json")
    rows = rows_of(capsys)
    assert [row["temperature"] for row in rows] == [0, 0.5, 0.8, 1.0, 1.5]
    assert all(any(words.startswith("noise") for words in row["verdict"]) for row in rows)
    assert any("a loop" in words for words in rows[0]["verdict"]), "an untrained model, asked greedily, says one thing for ever"
    assert rows[-1]["broken"] > 0.2 and any("gibberish" in words for words in rows[-1]["verdict"])
    run("--model", "newborn", "--diagnose_text", "--max_new_tokens", 60)
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("greedy") and "noise (" in out and "a loop (" in out


def test_the_entropies_are_those_before_each_token(mine):
    (row,) = explore.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 8, (0,), 0)
    ids = gpt.Tokenizer.bytes().encode("to be")
    made = mine.generate(torch.tensor([ids]), 8, temperature=0)
    with torch.no_grad():
        entropies = torch.distributions.Categorical(logits=mine(made)[0][0, len(ids) - 1 : -1]).entropy()
    assert row["tokens"] == 8 and row["entropy_start"] == pytest.approx(entropies[:2].mean().item(), rel=1e-4)
    assert row["entropy_end"] == pytest.approx(entropies[-2:].mean().item(), rel=1e-4)


def test_what_comes_after_the_end_does_not_count(mine, monkeypatch):
    tokens = iter([*b"abcd", 256, *b"xyz"])
    seen = []

    def sample_next_token(logits, *_):
        seen.append(explore.entropy(logits[0]).item())
        return torch.tensor([[next(tokens)]])

    monkeypatch.setattr(gpt, "sample_next_token", sample_next_token)
    (row,) = explore.diagnose(mine, gpt.Tokenizer.bytes(), "to be", 100, (0,), 0)
    assert row["text"] == "abcd" and row["tokens"] == 4 and row["verdict"][0].startswith("early end (after 4 of 100 tokens)")
    assert row["entropy_end"] == pytest.approx(seen[3])


# ---------------------------------------------------------------------------------------------------------------------
# Curves.


def log(val, train=None):
    """A folder with a training log of these losses, a hundred steps apart."""
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    train = train or val
    lines = [f"{100 * i},{i},1.0,0.001,{t},{v},{v / 2},1.0" for i, (t, v) in enumerate(zip(train, val, strict=True))]
    (folder / "log.csv").write_text("\n".join(["step,tokens,seconds,lr,train_loss,val_loss,val_bits_per_byte,grad_norm", *lines]) + "\n")
    return folder


FALLING = [6.0 - 0.3 * i for i in range(12)]
CURVES = {
    "still falling": (FALLING, None, 1100),
    "plateau": ([6, 4, 3, 2.5, 2.3, 2.21, 2.205, 2.203, 2.202, 2.201, 2.2, 2.2], None, 800),
    "overfitting": ([6, 5, 4, 3.5, 3.4, 3.5, 3.7, 3.9, 4.1], [6, 5, 4, 3, 2.5, 2, 1.5, 1.2, 1], 400),
    "too fast at the start": ([6, 5, 7, 4, 3.5, 3, 2.5, 2.4, 2.35, 2.34, 2.34, 2.34], None, 200),
    "diverged": ([6, 5, 4, 5, 7, 9, 9], None, 200),
    "too short to tell": ([6, 5, 4], None, 200),
}


@pytest.mark.parametrize("what", CURVES)
def test_what_a_curve_shows_is_said_in_words_and_drawn(own_folder, what, capsys):
    val, train, step = CURVES[what]
    folder = log(val, train)
    run("--curve", folder, "--json")
    (found,) = rows_of(capsys)
    assert found["found"][0]["what"] == what and found["found"][0]["step"] == step
    assert found["best"]["val_loss"] == min(val)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    run("--curve", folder)
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith(f"{what}: ") and f"validation loss {min(val):.4f}" in out


MORE_CURVES = [  # validation, training, what it shows, from which step on
    ([6, 5, 4, 3.5, 3, 2.8, 2.9], [6, 5, 4, 3.5, 3, 2.8, 2.7], "still falling", 600),  # one worse validation is no overfitting
    ([3.0, 2.8, 2.7, 2.75, 2.9, 3.1, 3.3], [math.nan, 2.9, 2.4, 2.0, 1.7, 1.4, 1.2], "overfitting", 200),  # beyond where it began
    ([2.0, 2.2, 2.4, 2.6, 2.9], [math.nan, 1.9, 1.5, 1.2, 1.0], "overfitting", 0),
    ([10.9, 6, 4, 3.5, 7.4, 7.3, 7.2, 7.1, 7.0], [math.nan, 8, 5, 4, 7, 7.4, 7.3, 7.2, 7.1], "diverged", 300),  # still below the start
    ([10.9, 6, 4, 3.5, 7.1, 7.1, 7.1, 7.1, 7.1], [math.nan, 8, 5, 4, 7, 7.1, 7.1, 7.1, 7.1], "diverged", 300),
    ([2.300, 2.3003, 2.2998, 2.3001, 2.2999, 2.3002, 2.2997, 2.3], None, "plateau", 500),  # noise
    ([math.nan, 5, 4, 3, 2], None, "diverged", 0),
]


@pytest.mark.parametrize(("val", "train", "what", "step"), MORE_CURVES)
def test_curves_that_could_be_mistaken(own_folder, capsys, val, train, what, step):
    run("--curve", log(val, train), "--json")
    found = rows_of(capsys)[0]
    assert [(one["what"], one["step"]) for one in found["found"]] == [(what, step)]
    assert found["best"]["val_loss"] == min(loss for loss in val if not math.isnan(loss))


def test_without_a_place_for_the_picture_the_words_still_come(own_folder, capsys):
    (log(FALLING) / "curve.png").mkdir()
    run("--curve", "run", expect=2)
    out, err = capsys.readouterr()
    assert "still falling: " in out and err.startswith("error: ") and err.count("\n") == 1


def test_a_loss_that_is_no_number_is_a_divergence(own_folder, capsys):
    run("--curve", log([6, 5, math.nan, 4, 3, 2]), "--json")
    (found,) = rows_of(capsys)
    assert found["found"][0]["what"] == "diverged" and found["found"][0]["step"] == 200 and found["best"]["val_loss"] == 2


def test_the_log_of_a_real_run_is_read(words, capsys):
    gpt.main([*TINY, "--data", "words.txt", "--out", "here"])
    capsys.readouterr()
    run("--curve", "here")
    assert "best at step" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.

LOGS = {
    "nothing": (None, "there is no run/log.csv"),
    "empty": ("", "line 1, is not that of a training log"),
    "other columns": ("a,b\n1,2\n", "line 1, is not that of a training log"),
    "words": ("step,train_loss,val_loss,val_bits_per_byte\n0,1,2,3\n1,x,2,3\n", "line 3, is not that of a training log"),
    "half a line": ("step,train_loss,val_loss,val_bits_per_byte\n0,1\n", "line 2, is not that of a training log"),
    "bytes": (b"\xff\xfe\x00", "run/log.csv is not UTF-8 text"),
}


@pytest.mark.parametrize("case", LOGS)
def test_an_unreadable_log_is_one_line_and_status_2(own_folder, case, capsys):
    content, message = LOGS[case]
    Path("run").mkdir()
    if content is not None:
        Path("run/log.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    run("--curve", "run", expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and not Path("run/curve.png").exists()


BAD = {
    "no model": ([], "--model is missing"),
    "no such model": (["--model", "nobody"], "there is no checkpoint nobody"),
    "two tasks": (["--model", "mine", "--check", "--diagnose_text"], "--check and --diagnose_text are different tasks"),
    "two models": (["--model", "mine", "mine", "--inspect", "x"], "--inspect takes one model"),
    "no text": (["--model", "mine"], "mine has no text of its own"),
    "empty text": (["--model", "mine", "--data", "empty.txt"], "empty.txt is shorter than two tokens"),
    "one token": (["--model", "mine", "--data", "one.txt"], "one.txt is shorter than two tokens"),
    "not there": (["--model", "mine", "--data", "nowhere.txt"], "there is no text file nowhere.txt"),
    "context too large": (["--model", "mine", "--data", "words.txt", "--context", "33"], "--context 33 does not fit mine: 1 to 32"),
    "no context": (["--model", "mine", "--data", "words.txt", "--context", "0"], "--context 0 does not fit mine: 1 to 32"),
    "stride too large": (["--model", "mine", "--data", "words.txt", "--context", "8", "--stride", "9"], "--stride 9 would skip tokens"),
    "no stride": (["--model", "mine", "--data", "words.txt", "--stride", "0"], "--stride 0 would skip tokens"),
    "negative batch": (["--model", "mine", "--data", "words.txt", "--batch_size", "-1"], "--batch_size is -1"),
    "nothing to inspect": (["--model", "mine", "--inspect", ""], "--inspect needs a text"),
    "nothing to write": (["--model", "mine", "--diagnose_text", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
    "too little to check": (["--model", "mine", "--check", "--data", "one.txt"], "one.txt is too little text"),
    "negative seed": (["--model", "mine", "--diagnose_text", "--seed", "-1"], "--seed is -1"),
    "endless seed": (["--model", "mine", "--diagnose_text", "--seed", str(2**64)], "--seed is 18446744073709551616"),
    "no name": (["--model", "mine", "--inspect", "a", "--picture", "."], "--picture '.' names no file"),
    "one of them missing": (["--model", "mine", "nobody", "--data", "words.txt", "--json"], "there is no checkpoint nobody"),
    "no device": (["--model", "mine", "--data", "words.txt", "--device", "abacus"], "device 'abacus' is not available"),
    "no folder": (["--model", "mine", "--inspect", "a", "--picture", "no/x.png"], "there is no folder no for --picture"),
    "not a number": (["--model", "poisoned", "--diagnose_text"], "transformer.wte.weight holds numbers that are not finite"),
    "NUL": (["--model", "mine", "--data", "nul.txt"], "nul.txt has NUL bytes"),
    "unknown": (["--modle", "mine"], "did you mean --model?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("a")
    Path("nul.txt").write_bytes(b"a\0b")
    gpt.save_checkpoint("checkpoints/poisoned", mine, gpt.Tokenizer.bytes())
    weights = parameters_of("checkpoints/poisoned")
    weights["transformer.wte.weight"][0] = math.nan
    save_file(weights, "checkpoints/poisoned/model.safetensors")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
