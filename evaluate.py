"""Is it right, how good is it, what is wrong with it?

    python evaluate.py --check                                        is the code right? tests every part of it
    python evaluate.py --model scratch                                how good: on the text held out from its training
    python evaluate.py --model gpt2 gpt2-finetuned --data held_out.txt              several models on one text
    python evaluate.py --model scratch --inspect "The import"         what the model expects, token by token
    python evaluate.py --model scratch --diagnose_text                what is wrong with the text it generates
    python evaluate.py --curve checkpoints/scratch                    what its training curve shows

Results go to stdout, remarks to stderr.
"""

import csv
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import explore
import gpt
import sanity
from gpt import InputError, TokenDataset, command, find_checkpoint, load_checkpoint, log, require
from models import open_model

# ---- How good: models on a text ----


class StridedDataset(TokenDataset):
    """Windows that overlap; each scores only the `stride` tokens that no window before it has scored."""

    def batch(self, windows):
        x, y = super().batch(windows)
        y[torch.as_tensor(windows) > 0, : self.block_size - self.stride] = -1
        return x, y


def tokens_of(names, tokenizer, split, val_bytes):
    """Names of texts -> all their tokens, or those of the validation split, as training cuts it."""
    if split == "val":
        return gpt.load_data(names, tokenizer, val_bytes=val_bytes)[2]
    texts = gpt.load_texts(names)
    tokens = gpt.tokenize(texts, tokenizer)
    require(len(tokens) - len(texts) >= 2, f"{' '.join(names)} is shorter than two tokens: use more text")
    return tokens


def text_of(folder, args):
    """--data, or the text of the model's training -> names (None without either), split, and its val_bytes."""
    training = json.loads(gpt.read_text(folder / gpt.CONFIG)).get("training", {})
    own = [name for name in training.get("data", []) if not name.endswith((".jsonl", ".ndjson"))]
    names = args.data or own
    split = args.split or ("all" if args.data else "val")
    asked = {Path(name).resolve() for name in names}
    learned = {Path(name).resolve() for name in own}
    if split == "all" and asked & learned and not args.check:
        advice = "the figure says little about new text"
        if asked == learned:
            advice = "--split val scores the part that was held out"
        seen = [name for name in names if Path(name).resolve() in learned]
        log(f"{folder} was trained on most of {' '.join(seen)}: {advice}")
    val_bytes = args.val_bytes or (training.get("val_bytes") if asked == learned else None) or 2**20
    return names or None, split, val_bytes


def score(name, args):
    """A checkpoint on a text -> a row of figures."""
    device = gpt.resolve_device(args.device)
    int8 = args.dtype == "int8"
    model, tokenizer = open_model(name, device, "int8" if int8 else "float32")
    names, split, val_bytes = text_of(find_checkpoint(name), args)
    require(names, f"{name} has no text of its own: choose one with --data")
    limit = model.config.block_size
    context = limit if args.context is None else args.context
    require(1 <= context <= limit, f"--context {context} does not fit {name}: 1 to {limit}")
    stride = context if args.stride is None else args.stride
    require(1 <= stride <= context, f"--stride {stride} would skip tokens: 1 to the context of {context}")
    data = StridedDataset(tokens_of(names, tokenizer, split, val_bytes), context, stride)
    started = time.perf_counter()
    dtype = torch.float32 if int8 else gpt.resolve_dtype(args.dtype, device)
    figures = gpt.evaluate(model, data, tokenizer, args.batch_size or max(1, 4096 // context), dtype)
    speed = figures["tokens"] / (time.perf_counter() - started)
    with torch.device("meta"):  # int8 weights are not parameters
        parameters = sum(p.numel() for p in gpt.GPT(model.config).parameters())
    row = {"model": name, "parameters": parameters, "data": names}
    return row | {"split": split, "context": context, "stride": stride, **figures, "tokens_per_second": speed}


def show_scores(rows):
    print(
        f"{'model':<24} {'parameters':>13} {'tokens':>10} {'loss':>8} {'perplexity':>10} {'bits/byte':>9} "
        f"{'accuracy':>8} {'tokens/s':>8}"
    )
    for row in rows:
        print(
            f"{row['model']:<24} {row['parameters']:>13,} {row['tokens']:>10,} {row['loss']:>8.4f} "
            f"{row['perplexity']:>10.2f} {row['bits_per_byte']:>9.4f} {row['accuracy']:>8.2%} "
            f"{row['tokens_per_second']:>8,.0f}"
        )
    for row in rows:
        text = f"{' '.join(row['data'])}{', its validation split' if row['split'] == 'val' else ''}"
        print(f"{row['model']}: {text}; windows of {row['context']:,} tokens, {row['stride']:,} apart")
    print(
        "loss: nats per token, over all tokens but the first. "
        "Between different vocabularies, only bits per byte compare."
    )


# ---- What a training curve shows ----


def read_log(path):
    """log.csv -> its rows, as numbers. Raises InputError with the line that is wrong."""
    require(path.is_file(), f"there is no {path}: name the folder of a checkpoint that was trained here")
    text = gpt.read_text(path)
    number = 1
    try:
        lines = list(csv.DictReader(text.splitlines()))
        columns = ("step", "train_loss", "val_loss", "val_bits_per_byte")
        valid = lines and set(columns) <= lines[0].keys()
        require(valid, f"it should have rows with the columns {', '.join(columns)}")
        rows = []
        for number, line in enumerate(lines, 2):
            rows.append({key: float(line[key]) for key in columns} | {"step": int(line["step"])})
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}, line {number}, is not that of a training log: {error}") from error
    return rows


def read_curve(rows):
    """Rows of a log -> the index of the best, and [(what the curve shows, the index of the row, in words)]."""
    step, train, val = (np.array([row[key] for row in rows]) for key in ("step", "train_loss", "val_loss"))
    broken = ~np.isfinite(val)
    best = int(np.argmin(np.where(broken, np.inf, val)))
    if broken.any():
        at = int(np.argmax(broken))
        words = f"the validation loss is {val[at]} at step {step[at]:,}: start again with a smaller --lr"
        return best, [("diverged", at, words)]
    fall = val[0] - val[best]
    last = len(val) - 1
    learned = train[best : best + 2]
    learned = learned[np.isfinite(learned)][:1]  # the training loss at the best step; at step 0 there is none yet
    if best < last - 1 and val[-1] - val[best] > max(0.01 * fall, 0.002 * val[best]):
        if len(learned) and train[-1] < learned[0]:
            words = (
                f"from step {step[best]:,} on, the validation loss rises, {val[best]:.3f} to {val[-1]:.3f}, and the "
                f"training loss falls, {learned[0]:.3f} to {train[-1]:.3f}: use more text, more --dropout, fewer steps "
                "or a smaller model; the checkpoint holds the best step"
            )
            return best, [("overfitting", best, words)]
        words = (
            f"from step {step[best]:,} on, both losses rise, validation's {val[best]:.3f} to {val[-1]:.3f}: "
            "start again with a smaller --lr"
        )
        return best, [("diverged", best, words)]
    if len(val) < 5:
        words = f"{len(val)} validations: train longer, or with a smaller --eval_interval"
        return best, [("too short to tell", last, words)]
    found = []
    quarter = max(2, len(val) // 4)
    tolerance = max(0.02 * fall, 0.005 * val[best])
    early = next((i for i in range(1, quarter + 1) if val[i] - val[i - 1] > tolerance), None)
    if early:
        words = (
            f"the validation loss rises from {val[early - 1]:.3f} to {val[early]:.3f} at step {step[early]:,}: "
            "try a smaller --lr or more --warmup_steps"
        )
        found.append(("too fast at the start", early, words))
    gain = val[:-quarter].min() - val[best]
    if gain > max(0.01 * fall, 0.002 * val[best]):
        words = (
            f"the last quarter of the run brought {gain:.3f} of all {fall:.3f} nats: more --max_steps will bring more"
        )
        found.append(("still falling", last, words))
    else:
        words = (
            f"from step {step[last - quarter]:,} on, the validation loss hardly moves, {val[last - quarter]:.3f} to "
            f"{val[-1]:.3f}: try a larger model, more text or another --lr; more steps alone will not help"
        )
        found.append(("plateau", last - quarter, words))
    return best, found


def curve(folder, as_json):
    rows = read_log(Path(folder) / "log.csv")
    best, found = read_curve(rows)
    if as_json:
        findings = [{"what": what, "step": rows[at]["step"], "words": words} for what, at, words in found]
        print(json.dumps({"folder": folder, "best": rows[best], "found": findings}))
    else:
        print(
            f"best at step {rows[best]['step']:,} of {rows[-1]['step']:,}: validation loss "
            f"{rows[best]['val_loss']:.4f}, {rows[best]['val_bits_per_byte']:.4f} bits per byte"
        )
        print("\n".join(f"{what}: {words}" for what, _, words in found), flush=True)
    picture = Path(folder) / "curve.png"
    gpt.plot(rows, picture)
    log(f"the curve is {picture}")


# ---- The command line ----


def check(args):
    """Run all checks and print their rows; returns whether all have passed."""
    device = gpt.resolve_device(args.device)
    names, tokenizer, config, val_bytes = args.data, "bpe", gpt.GPTConfig(), args.val_bytes or 2**20
    if args.model:
        model, tokenizer = load_checkpoint(args.model[0], device)
        config = model.config
        names, _, val_bytes = text_of(find_checkpoint(args.model[0]), args)
    names = names or ["pydoc"]
    tokenizer, train, val = gpt.load_data(names, tokenizer, config.vocab_size, val_bytes)
    if not args.model:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        torch.manual_seed(0)
        model = gpt.GPT(config).to(device).eval()
    log(sanity.versions(device, gpt.resolve_dtype("auto", device)))
    subject = sanity.Subject(config, model, tokenizer, names, val_bytes, train, val)
    failed = []
    for row in sanity.battery(subject):
        if not row["ok"]:
            failed.append(row["check"])
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{'ok' if row['ok'] else 'FAIL':<5} {row['check']:<14} {row['measured']}")
            print(f"{'':<20} healthy: {row['healthy']}; otherwise: {row['failure']}", flush=True)
    total = len(sanity.CHECKS)
    log(f"{len(failed)} of {total} checks failed: {', '.join(failed)}" if failed else f"all {total} checks passed")
    return not failed


@command
def main(argv=None):
    parser = gpt.Parser(prog="evaluate.py", description="Is it right, how good is it, what is wrong with it?")
    add = parser.add_argument
    add("--model", nargs="+", help="checkpoints: folders, or names under checkpoints/")
    add("--data", nargs="+", help="texts to score, as for gpt.py (default: those of the model's training)")
    add("--split", choices=("all", "val"), help="all of the text (default for --data), or its last tenth (otherwise)")
    add("--val_bytes", type=int, help="most bytes of the validation split (default: as in training, or 2**20)")
    add("--context", type=int, help="tokens in a window (default: the model's context)")
    add("--stride", type=int, help="tokens from window to window (default: --context); smaller is more exact, slower")
    add("--batch_size", type=int, help="windows per forward pass (default: 4,096 tokens of them)")
    add("--check", action="store_true", help="test every part of the code; with --model, of that model")
    add("--inspect", metavar="PROMPT", help="what the model expects in this text, token by token and block by block")
    add("--picture", default="attention.png", help="for --inspect: the picture to write (default: attention.png)")
    add("--diagnose_text", action="store_true", help="generate text, and say what is wrong with it")
    add("--prompt", default="The", help="for --diagnose_text: the text to continue (default: The)")
    add("--max_new_tokens", type=int, default=200, help="for --diagnose_text: tokens to generate (default: 200)")
    add("--seed", type=int, default=1337, help="for --diagnose_text (default: 1337)")
    add("--curve", metavar="DIR", help="what the training curve of a checkpoint shows")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    dtypes = ("auto", "float32", "bfloat16", "int8")
    add("--dtype", default="auto", choices=dtypes, help="for scoring; auto is bfloat16 where native")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    modes = ("check", "inspect", "diagnose_text", "curve")
    modes = [mode for mode in modes if getattr(args, mode) not in (None, False)]
    require(len(modes) < 2, f"--{' and --'.join(modes)} are different tasks: choose one")
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, expected 0 or more")
    require(Path(args.picture).name, f"--picture {args.picture!r} names no file")
    require(Path(args.picture).parent.is_dir(), f"there is no folder {Path(args.picture).parent} for --picture")
    for name in ("val_bytes", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        require(value is None or 1 <= value <= 2**31, f"--{name} is {value}, expected 1 to 2**31")
    if args.curve is not None:
        return curve(args.curve, args.json)
    require(args.model or args.check, "--model is missing: name a checkpoint, or use --check alone")
    require(len(args.model or []) < 2 or not modes, f"--{''.join(modes)} takes one model at a time")
    if args.check:
        return sys.exit(0 if check(args) else 1)
    if not modes:
        for name in args.model:
            find_checkpoint(name)  # before the work
        rows = []
        for name in args.model:
            rows.append(score(name, args))
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
        return None if args.json else show_scores(rows)
    model, tokenizer = open_model(args.model[0], gpt.resolve_device(args.device))
    if args.inspect is not None:
        found, attention = explore.inspect(model, tokenizer, args.inspect)
        if args.json:
            print(json.dumps(found | {"attention": attention[:, :, -1].tolist()}), flush=True)
        else:
            explore.show_inspection(found, attention)
        explore.plot_attention(attention, [row["token"] for row in found["tokens"][:-1]], Path(args.picture))
        return log(f"attention of every head: {args.picture}")
    rows = explore.diagnose(model, tokenizer, args.prompt, args.max_new_tokens, (0, 0.5, 0.8, 1.0, 1.5), args.seed)
    return print("\n".join(map(json.dumps, rows))) if args.json else explore.show_diagnosis(list(rows))


if __name__ == "__main__":
    main()
