"""Is it right? What must hold of a model and its text, each tried out.

    python -m debug.check                        is the installation sound? A new model of the default shape; no network
    python -m debug.check --model scratch        that checkpoint, and the text that it was trained on
    python -m debug.check --data my.txt          a new model, and your text

The exit status is 1 if a check fails.
"""

import math
import platform
import sys
from dataclasses import replace

import numpy as np
import torch

import gpt
from debug.activations import relative_error
from extras.checkpoints import training_text
from extras.tables import show
from gpt import GPT, GPTConfig, TokenDataset, load_checkpoint, log


class Subject:
    """What is checked: a model, its tokenizer, and the ids of its training and validation text."""

    def __init__(self, model, tokenizer, train, val):
        self.model, self.tokenizer = model, tokenizer
        self.train, self.val = train, val
        self.config = model.config
        self.device = next(model.parameters()).device

    def new_model(self, dropout=0.0):
        """An untrained model of the same shape."""
        torch.manual_seed(0)
        return GPT(replace(self.config, dropout=dropout)).to(self.device).eval()

    def batch(self, rows, length):
        """The first windows of the training text, of at most this length -> inputs, targets (B, T)."""
        data = TokenDataset(self.train, min(length, self.config.block_size, len(self.train) - 1))
        x, y = data.batch(range(min(rows, len(data))))
        return x.to(self.device), y.to(self.device)


# ---- The checks: each returns what it measured, in words, and whether that is healthy ----
def shapes(subject):
    idx, targets = subject.batch(2, 256)
    logits, loss = subject.model(idx, targets)
    expected = (*idx.shape, subject.config.vocab_size)
    return f"logits {tuple(logits.shape)}, loss {tuple(loss.shape)}", logits.shape == expected and loss.dim() == 0


@torch.no_grad()
def first_loss(subject):
    """On random tokens, as a text may consist of only a few."""
    V, T = subject.config.vocab_size, min(64, subject.config.block_size)
    tokens = torch.randint(V, (1024 // T, T + 1), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1].to(subject.device), tokens[:, 1:].to(subject.device)
    loss = subject.new_model()(x, y)[1].item()
    healthy = math.log(V) + 0.0002 * subject.config.n_embd
    return f"{loss:.2f} nats per token, healthy is {healthy:.2f}", abs(loss - healthy) < 0.15


def round_trip(subject):
    """Every byte of ASCII, letters of several bytes, and the characters of the end-of-text token."""
    text = "".join(map(chr, range(128))) + f" naïve Привет 你好 🙂🏽 {gpt.EOT}\r\n\tx  y"
    ids = subject.tokenizer.encode(text)
    same = subject.tokenizer.decode(ids) == text and subject.tokenizer.eot not in ids
    return f"{len(ids)} tokens decode to {'the same' if same else 'a different'} text", same


def targets(subject):
    x, y = subject.batch(8, 64)
    T = x.shape[1]
    found = [shift for shift in range(4) if torch.equal(x[:, shift:], y[:, : T - shift])]
    return f"the targets are the inputs shifted by {found}, expected [1]", found == [1]


RUN = 32  # tokens


def hashes(tokens):
    """A number for each run of RUN tokens, in the first 8 million of a text."""
    factors = np.random.default_rng(0).integers(2**63, size=RUN, dtype=np.uint64)
    return np.correlate(np.asarray(tokens[: 2**23], np.uint64), factors, "valid")


def repeats(subject):
    share = np.isin(hashes(subject.val), hashes(subject.train)).mean()
    return f"{share:.1%} of validation's runs of {RUN} tokens are in the training text", share < 0.1


@torch.no_grad()
def causality(subject):
    """Change a token in the middle: no logits before it may move, and the last ones must."""
    idx = subject.batch(1, 128)[0]
    middle = idx.shape[1] // 2
    changed = idx.clone()
    changed[:, middle] = (changed[:, middle] + 1) % subject.config.vocab_size
    before, after = subject.model(idx)[0], subject.model(changed)[0]  # (1, T, V)
    earlier = relative_error(after[:, :middle], before[:, :middle])
    last = relative_error(after[:, -1], before[:, -1])
    ok = earlier <= 1e-5 and last > 1e-6
    return f"a changed token moves earlier logits by {earlier:.0e}, the last by {last:.0e}", ok


def gradients(subject):
    model = subject.model
    model.zero_grad()
    model(*subject.batch(2, 256))[1].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    total = len(list(model.parameters()))
    missing = f": none for {', '.join(without[:3])}" if without else ""
    return f"{total - len(without)} of {total} parameter tensors have a gradient{missing}", not without


def overfit(subject, steps=100):
    model = subject.new_model()
    idx, targets = subject.batch(2, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.3 / subject.config.n_embd, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(steps):
        loss = model(idx, targets)[1]
        if loss < 0.5:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return f"two windows: {loss.item():.2f} nats per token after {steps} steps or fewer", loss.item() < 0.5


@torch.no_grad()
def dropout(subject):
    idx = subject.batch(1, 64)[0]
    model = subject.new_model(dropout=0.5)
    quiet = all(torch.equal(each(idx)[0], each(idx)[0]) for each in (model, subject.model))
    noisy = not torch.equal(model.train()(idx)[0], model(idx)[0])
    return f"two passes are equal in eval: {quiet}, in training: {not noisy}", quiet and noisy


@torch.no_grad()
def cache(subject):
    """The same text at once, and in pieces of 8, of 4 and of single tokens."""
    model, idx = subject.model, subject.batch(1, 32)[0]
    caches = [gpt.KVCache(subject.config.block_size) for _ in model.transformer.h]
    pieces = [idx[:, :8], idx[:, 8:12], *idx[:, 12:].split(1, dim=1)]
    cached = torch.cat([model.hidden(piece, caches) for piece in pieces if piece.shape[1]], dim=1)
    error = relative_error(model.lm_head(cached), model(idx)[0])
    return f"logits with and without the KV cache differ by {error:.0e}", error <= 1e-5


CHECKS = {  # name -> (the check, what a failure usually means)
    "shapes": (shapes, "a transpose or view that mixes up batch, time and heads, or ids outside the vocabulary"),
    "first loss": (first_loss, "a wrong initialization, a missing final norm, or targets that are the inputs"),
    "round trip": (round_trip, "a vocabulary without some bytes, or text that is changed before it is encoded"),
    "targets": (targets, "a model that learns to copy its input (0) or to skip a token (2)"),
    "repeats": (repeats, "copies on both sides of the split: the validation loss rewards memorizing"),
    "causality": (causality, "a causal mask that is off by one, missing, or hides too much"),
    "gradients": (gradients, "a frozen parameter, or a detached tensor"),
    "overfit": (overfit, "a model or optimizer that can't learn at all"),
    "dropout": (dropout, "dropout that is never on, or never off"),
    "cache": (cache, "positions or a mask that ignore the cached tokens: the longer the text, the worse"),
}


def run_checks(subject):
    """Yield a row for each check; one that raises an error has failed."""
    for name, (check, failure) in CHECKS.items():
        try:
            measured, ok = check(subject)
        except Exception as error:
            measured, ok = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False
        yield {"check": name, "ok": bool(ok), "measured": measured, "failure": failure}


def load_subject(name, data, device):
    """The named checkpoint or a new model, and its text: `data`, that of its training, or pydoc."""
    names, val_bytes, tokenizer = [], 2**20, "bpe"
    if name:
        model, tokenizer = load_checkpoint(name, device)
        names, val_bytes = training_text(name)
    names = data or names or ["pydoc"]
    log(f"checking {name or 'a new model'} on {' '.join(names)}")
    tokenizer, train, val = gpt.load_data(names, tokenizer, val_bytes=val_bytes)
    if not name:
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size)).to(device).eval()
    enough = model.config.block_size >= 4 and min(len(train), len(val)) >= RUN
    gpt.require(enough, f"a check needs a context of 4 tokens, and a text of {10 * RUN} tokens: use more")
    return Subject(model, tokenizer, train, val)


@gpt.command
def main(argv=None):
    parser = gpt.Parser(prog="python -m debug.check", description="Is it right? Checks a model and its text.")
    add = parser.add_argument
    add("--model", help="a folder, or a name under checkpoints/ (default: a new model)")
    add("--data", nargs="+", help="texts, as for gpt.py (default: those of the model's training, or pydoc)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--verbose", action="store_true", help="what each failure would mean, even where there is none")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    device = gpt.resolve_device(args.device)
    subject = load_subject(args.model, args.data, device)
    log(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    log(f"{device}, {torch.get_num_threads()} threads, --dtype auto is {gpt.resolve_dtype('auto', device)}")
    rows = list(run_checks(subject))
    show(rows, args.json, {"check": "check", "ok": "ok", "measured": "measured"})
    failed = [row for row in rows if not row["ok"]]
    for row in rows if args.verbose else failed:
        log(f"{row['check']}: a failure usually means {row['failure']}")
    log(f"{len(failed)} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
