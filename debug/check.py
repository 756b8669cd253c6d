"""Is it right? What must hold of a model, its data and its checkpoints, each tried out.

    python -m debug.check                        the code, with a new model of the default shape; no network
    python -m debug.check --model scratch        that model, and the text that it was trained on

Every check takes a Subject and gives back what it measured, what is healthy, and whether this is; beside each stands
what a failure usually means. Exit status 1 if one fails.
"""

import dataclasses
import functools
import json
import math
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import gpt
from debug.mistakes import holding
from gpt import GPT, TokenDataset, Tokenizer, command, find_checkpoint, load_checkpoint, log, require


@dataclasses.dataclass
class Subject:
    """What is checked: a model (of this shape, newly made, where none was given), its tokenizer and its text."""

    config: gpt.GPTConfig
    model: GPT
    tokenizer: Tokenizer
    names: list
    val_bytes: int
    train: np.ndarray
    val: np.ndarray

    def new(self, **fields):
        """Another model of this shape, as training would begin with it."""
        torch.manual_seed(0)
        return GPT(dataclasses.replace(self.config, **fields)).to(self.device).eval()

    @property
    def device(self):
        return next(self.model.parameters()).device

    def batch(self, rows, length=2**20):
        """The first windows of the text that can be learned -> inputs, targets (B, T), of at most this length."""
        T = min(length, self.config.block_size, len(self.train) - 1)
        data = TokenDataset(self.train, T)
        return [part.to(self.device) for part in data.batch(range(min(rows, len(data))))]


def shapes(subject):
    idx, targets = subject.batch(2)
    logits, loss = subject.model(idx, targets)
    wanted = (*idx.shape, subject.config.vocab_size)
    return (
        f"{tuple(logits.shape)}, loss {tuple(loss.shape)}",
        f"(B, T, V) = {wanted}, loss ()",
        logits.shape == wanted and loss.dim() == 0,
    )


@torch.no_grad()
def first_loss(subject):
    """On random tokens, as a text may have few different ones, and luck with those."""
    T, V = min(64, subject.config.block_size), subject.config.vocab_size
    data = TokenDataset(np.random.default_rng(0).integers(V, size=1 + 1024 // T * T), T)
    loss = subject.new(dropout=0.0)(*(part.to(subject.device) for part in data.batch(range(len(data)))))[1].item()
    healthy = math.log(subject.config.vocab_size) + 0.0002 * subject.config.n_embd
    return (
        f"{loss:.3f} nats per token",
        f"ln V + 0.0002 n_embd = {healthy:.3f}, give or take 0.15",
        abs(loss - healthy) < 0.15,
    )


@torch.no_grad()
def first_logits(subject):
    logits = subject.new(dropout=0.0)(subject.batch(4, 256)[0])[0]
    mean, std, healthy = logits.mean().item(), logits.std().item(), 0.02 * math.sqrt(subject.config.n_embd)
    return (f"mean {mean:.3f}, deviation {std:.3f}", f"mean 0, deviation 0.02 sqrt(n_embd) = {healthy:.3f}, to a third",
            abs(mean) < healthy and 2 / 3 < std / healthy < 3 / 2)  # fmt: skip


def token_ids(subject):
    low, high = int(min(subject.train.min(), subject.val.min())), int(max(subject.train.max(), subject.val.max()))
    V = subject.config.vocab_size
    return f"{low:,} to {high:,}", f"within 0 to {V - 1:,}", low >= 0 and high < V


def round_trip(subject):
    """On what no text may break: letters of every kind, every byte of ASCII, and the characters of the special token."""
    text = "".join(map(chr, range(128))) + f" naïve Привет 你好 🙂🏽 {gpt.EOT}\r\n\tx  y"
    ids = subject.tokenizer.encode(text)
    same = subject.tokenizer.decode(ids) == text and subject.tokenizer.eot not in ids
    return (
        f"{len(text)} characters, {len(ids)} tokens, {'the same' if same else 'another text'} again",
        "the same text",
        same,
    )


def shift(subject):
    """How many places behind its input does each target come from?"""
    T = min(subject.config.block_size, len(subject.train) // 4)
    tokens = np.asarray(subject.train[: 64 * T])
    data = TokenDataset(tokens, T, 1)
    picked = np.linspace(2, len(data) - 3, min(32, len(data) - 4), dtype=int)  # with two tokens more on both sides
    x, y = data.batch(picked)
    places = picked[:, None] + np.arange(x.shape[1])
    found = [s for s in range(-2, 4) if np.array_equal(tokens[places + s], y)]
    sound = np.array_equal(tokens[places], x) and found == [1]
    return f"distance from input to target: {' or '.join(map(str, found)) or 'none of -2 to 3'}", "exactly 1", sound


def splits(subject):
    """Training and validation texts together are the text, each character once."""
    if Path(subject.names[0], "train.bin").exists():
        return "split by extras.prepare", "every character in one split", True
    texts = gpt.load_texts(subject.names)
    train, val = gpt.split_texts(texts, subject.val_bytes)
    sizes = [len("".join(part)) for part in (train, val, texts)]
    same = "".join(train + val) == "".join(texts)
    return f"{sizes[0]:,} + {sizes[1]:,} characters of {sizes[2]:,}", "every character in one split", same


RUN = 32  # tokens in a row


def repeats(subject, most=2**21):
    """The share of validation that occurs in what is learned: runs of RUN tokens, by their rolling hashes."""

    def hashes(tokens):
        found = np.zeros(max(0, len(tokens) - RUN + 1), np.uint64)
        for i in range(RUN):
            found = (
                found * np.uint64(6364136223846793005)
                + np.asarray(tokens[i : len(tokens) - RUN + 1 + i], np.uint64)
                + np.uint64(1)
            )
        return found

    val = hashes(subject.val[:most])
    seen = np.zeros(len(val), bool)
    for start in range(0, len(subject.train), most):
        seen |= np.isin(val, hashes(subject.train[start : start + most + RUN - 1]))
    share = float(seen.mean()) if len(val) else 0.0
    return f"{share:.1%} of validation's runs of {RUN} tokens", "under 10%", share < 0.1


def moved(subject, tokens, seen):
    """Change some tokens of a text: how far do the logits at the places seen move? In attention's written-out form and the fused."""
    idx, original = subject.batch(1, 128)[0], gpt.attention
    changed, moves = idx.clone(), []
    changed[:, tokens] = (changed[:, tokens] + 1) % subject.config.vocab_size
    for fused in (False, True):
        with torch.no_grad(), holding(gpt, "attention", functools.partial(original, fused=fused)):
            before, after = (subject.model(text)[0][:, seen] for text in (idx, changed))
        moves.append(((after - before).abs().max() / before.abs().max()).item())
    return moves


def causality(subject):
    half = max(1, subject.batch(1, 128)[0].shape[1] // 2)
    moves = moved(subject, slice(half, None), slice(half))
    return (
        f"the first half moves by {max(moves):.0e} if the rest changes",
        "at most 1e-5",
        all(move <= 1e-5 for move in moves),
    )


def past(subject):
    """The token before the last changes what is said next only by way of attention."""
    if subject.config.block_size == 1:
        return "a context of one token has no past", "over 1e-6", True
    moves = moved(subject, -2, -1)
    return (
        f"the last logits move by {min(moves):.0e} if the token before changes",
        "over 1e-6",
        all(move > 1e-6 for move in moves),
    )


def gradients(subject):
    model = subject.model
    model.zero_grad()
    model(*subject.batch(2))[1].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    total = sum(1 for _ in model.parameters())
    model.zero_grad()
    return (
        f"{total - len(without)} of {total} tensors" + (f", not {', '.join(without[:3])}" if without else ""),
        "all of them",
        not without,
    )


def overfit(subject, most=100):
    """Two windows, over and over: a model that can learn anything knows them by heart soon."""
    model, (idx, targets) = subject.new(dropout=0.0), subject.batch(2, 32)
    optimizer = torch.optim.AdamW(
        model.parameters(), 0.3 / subject.config.n_embd, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for step in range(most):
        loss = model(idx, targets)[1]
        if loss < 0.5:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return f"{loss.item():.3f} nats per token after {step} steps", f"under 0.5 before step {most}", loss.item() < 0.5


def dropout(subject):
    model, idx = subject.new(dropout=0.5), subject.batch(1, 64)[0]
    with torch.no_grad():
        quiet = torch.equal(model(idx)[0], model(idx)[0]) and torch.equal(subject.model(idx)[0], subject.model(idx)[0])
        noisy = not torch.equal(model.train()(idx)[0], model(idx)[0])
    return (
        f"eval: two passes {'alike' if quiet else 'differ'}; train: they {'differ' if noisy else 'are alike'}",
        "alike, differ",
        quiet and noisy,
    )


@torch.no_grad()
def cache(subject):
    idx, caches = subject.batch(1, 32)[0], [gpt.KVCache(subject.config.block_size) for _ in subject.model.transformer.h]
    whole = subject.model(idx)[0]
    pieces = [
        subject.model.hidden(part, caches)
        for part in (idx[:, :8], idx[:, 8:12], *idx[:, 12:].split(1, dim=1))
        if part.shape[1]
    ]
    error = ((subject.model.lm_head(torch.cat(pieces, dim=1)) - whole).abs().max() / whole.abs().max()).item()
    return f"relative difference {error:.0e}", "at most 1e-5", error <= 1e-5


@torch.no_grad()
def save_and_load(subject):
    idx = subject.batch(1)[0]
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_checkpoint(Path(folder, "saved"), subject.model, subject.tokenizer)
        model, tokenizer = gpt.load_checkpoint(Path(folder, "saved"))
    same = (
        torch.equal(model.to(subject.device)(idx)[0], subject.model(idx)[0]),
        tokenizer.ranks == subject.tokenizer.ranks,
    )
    return (
        f"logits {'equal' if same[0] else 'differ'}, vocabulary {'equal' if same[1] else 'differs'}",
        "equal, bit for bit",
        all(same),
    )


CHECKS = {  # what is checked -> (how, what a failure usually means)
    "shapes": (shapes, "a transpose or view that mixes up batch, time and heads"),
    "first loss": (
        first_loss,
        "an initialization bug: the embedding at N(0, 1) gives hundreds; far below: targets that are the inputs themselves",
    ),
    "first logits": (first_logits, "an embedding or head with a wrong deviation, or a final norm that is missing"),
    "token ids": (token_ids, "tokens of another vocabulary, or a file of tokens read with the wrong width"),
    "round trip": (round_trip, "a vocabulary without some bytes, or text that is changed on its way in"),
    "targets": (shift, "a model that learns to copy its input (0) or to skip a token (2)"),
    "splits": (splits, "validation text that is trained on: the validation loss is too good"),
    "repeats": (repeats, "copies of one text on both sides of the cut: the validation loss rewards learning by heart"),
    "causality": (causality, "a mask that is off by one or missing: training loss falls fast, samples are nonsense"),
    "the past": (past, "a mask that hides too much, or attention that is not connected"),
    "gradients": (gradients, "a frozen parameter, a part that the loss does not depend on, or a detached tensor"),
    "overfit": (overfit, "a model or optimizer that cannot learn at all; no amount of data will help"),
    "dropout": (
        dropout,
        "alike in training: dropout is off; different in eval: it is never switched off, and no figure is exact",
    ),
    "cache": (cache, "positions or the mask that do not count what is cached: samples get worse the longer they are"),
    "save and load": (save_and_load, "tensors that are left out, converted or tied wrongly"),
}


def versions(device, dtype):
    return (f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}; {device}, "
            f"{torch.get_num_threads()} threads, {str(dtype).split('.')[1]} by --dtype auto")  # fmt: skip


def battery(subject):
    """Try every check -> rows of check, measured, healthy, ok, failure; one that raises an error has failed."""
    for name, (check, failure) in CHECKS.items():
        try:
            measured, healthy, ok = check(subject)
        except Exception as error:
            measured, healthy, ok = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "no error", False
        yield {"check": name, "measured": measured, "healthy": healthy, "ok": bool(ok), "failure": failure}


def text_of(folder, args):
    """--data, or the text of the model's training -> names, and the val_bytes that cut it."""
    training = json.loads(gpt.read_text(folder / gpt.CONFIG)).get("training", {})
    own = [name for name in training.get("data", []) if not name.endswith((".jsonl", ".ndjson"))]
    names = args.data or own
    same = {Path(name).resolve() for name in names} == {Path(name).resolve() for name in own}
    return names, args.val_bytes or (training.get("val_bytes") if same else None) or 2**20


def run(args):
    """Run all checks and print their rows; returns whether all have passed."""
    device = gpt.resolve_device(args.device)
    names, tokenizer, config, val_bytes = args.data, "bpe", gpt.GPTConfig(), args.val_bytes or 2**20
    if args.model:
        model, tokenizer = load_checkpoint(args.model, device)
        config = model.config
        names, val_bytes = text_of(find_checkpoint(args.model), args)
    names = names or ["pydoc"]
    tokenizer, train, val = gpt.load_data(names, tokenizer, config.vocab_size, val_bytes)
    if not args.model:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        torch.manual_seed(0)
        model = gpt.GPT(config).to(device).eval()
    log(versions(device, gpt.resolve_dtype("auto", device)))
    subject = Subject(config, model, tokenizer, names, val_bytes, train, val)
    failed = []
    for row in battery(subject):
        if not row["ok"]:
            failed.append(row["check"])
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{'ok' if row['ok'] else 'FAIL':<5} {row['check']:<14} {row['measured']}")
            print(f"{'':<20} healthy: {row['healthy']}; otherwise: {row['failure']}", flush=True)
    total = len(CHECKS)
    log(f"{len(failed)} of {total} checks failed: {', '.join(failed)}" if failed else f"all {total} checks passed")
    return not failed


@command
def main(argv=None):
    parser = gpt.Parser(prog="python -m debug.check", description="Is it right? Tests every part of the code.")
    add = parser.add_argument
    add("--model", help="check this one: a folder, or a name under checkpoints/ (default: a new one)")
    add("--data", nargs="+", help="texts, as for gpt.py (default: those of the model's training, or pydoc)")
    add("--val_bytes", type=int, help="most bytes of the validation split (default: as in training, or 2**20)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(
        args.val_bytes is None or 1 <= args.val_bytes <= 2**31, f"--val_bytes is {args.val_bytes}, expected 1 to 2**31"
    )
    sys.exit(0 if run(args) else 1)


if __name__ == "__main__":
    main()
