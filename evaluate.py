"""Is it right, how good is it, what is wrong with it?

    python evaluate.py --check                                        is the code right? every part of it tried out
    python evaluate.py --model scratch                                how good: on the text held out from its training
    python evaluate.py --model gpt2 gpt2-finetuned --data held_out.txt              several models on one text
    python evaluate.py --model scratch --inspect "The import"         what the model thinks, token by token
    python evaluate.py --model scratch --diagnose_text                what is wrong with the text it makes
    python evaluate.py --curve checkpoints/scratch                    what its training curve shows
"""

import csv
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import gpt
import lens
import sanity
from gpt import InputError, TokenDataset, command, load_checkpoint, require, say
from hub import read_json
from models import find_checkpoint, open_model

# ---------------------------------------------------------------------------------------------------------------------
# How good: models on a text.


class StridedDataset(TokenDataset):
    """Windows that overlap; each scores only the `stride` tokens that no window before it has scored."""

    def batch(self, windows):
        x, y = super().batch(windows)
        y[torch.as_tensor(windows) > 0, : self.block_size - self.stride] = -1
        return x, y


def tokens_of(names, tokenizer, split, val_bytes):
    """Names of texts -> all their tokens, or those of the validation split, as training cuts it."""
    if split == "val":
        return gpt.prepare(names, tokenizer, val_bytes=val_bytes)[2]
    files = gpt.find_texts(names)
    tokens = gpt.tokenize([(path, 0, path.stat().st_size) for path in files], tokenizer, f"{gpt.fingerprint_of(files)}-all")
    require(len(tokens) - len(files) >= 2, f"{' '.join(names)} is shorter than two tokens: give more text")
    return tokens


def text_of(folder, args):
    """--data, or what the model was trained on -> names of texts (None if neither), the split to score, and its val_bytes."""
    training = read_json(folder / "config.json").get("training")
    own, val_bytes = (training.get("data"), training.get("val_bytes")) if isinstance(training, dict) else (None, None)
    own = [name for name in own if isinstance(name, str) and not name.endswith(".jsonl")] if isinstance(own, list) else []
    val_bytes = args.val_bytes or (val_bytes if isinstance(val_bytes, int) and val_bytes > 0 else 2**20)
    names, split = args.data or own, args.split or ("all" if args.data else "val")
    asked, learned = ({Path(name).resolve() for name in texts} for texts in (names, own))
    if split == "all" and asked & learned and not args.check:
        advice = "--split val scores the part that was held out" if asked == learned else "its figure is no measure of what it would do on new text"
        say(f"{folder} has learned most of {' '.join(name for name in names if Path(name).resolve() in learned)}: {advice}")
    return names or None, split, val_bytes if asked == learned else args.val_bytes or 2**20


def score(name, args):
    """A checkpoint on a text -> a row of figures."""
    folder = find_checkpoint(name)
    names, split, val_bytes = text_of(folder, args)
    require(names, f"{name} has no text of its own: give one by --data")
    device, int8 = gpt.resolve_device(args.device), args.dtype == "int8"
    model, tokenizer = open_model(folder, device, "int8" if int8 else "float32")
    context = model.config.block_size if args.context is None else args.context
    require(1 <= context <= model.config.block_size, f"--context {context} does not fit {name}: 1 to {model.config.block_size}")
    stride = context if args.stride is None else args.stride
    require(1 <= stride <= context, f"--stride {stride} would skip tokens: 1 to the context of {context}")
    data = StridedDataset(tokens_of(names, tokenizer, split, val_bytes), context, stride)
    began = time.perf_counter()
    dtype = torch.float32 if int8 else gpt.resolve_dtype(args.dtype, device)
    figures = gpt.evaluate(model, data, tokenizer, args.batch_size or max(1, 4096 // context), dtype)
    return {"model": name, "parameters": model.config.n_parameters, "data": names, "split": split, "context": context, "stride": stride, **figures,
            "tokens_per_second": figures["tokens"] / (time.perf_counter() - began)}  # fmt: skip


def show_scores(rows):
    print(f"{'model':<24} {'parameters':>13} {'tokens':>10} {'loss':>8} {'perplexity':>10} {'bits/byte':>9} {'accuracy':>8} {'tokens/s':>8}")
    for row in rows:
        print(f"{row['model']:<24} {row['parameters']:>13,} {row['tokens']:>10,} {row['loss']:>8.4f} {row['perplexity']:>10.2f} "
              f"{row['bits_per_byte']:>9.4f} {row['accuracy']:>8.2%} {row['tokens_per_second']:>8,.0f}")  # fmt: skip
    for row in rows:
        text = f"{' '.join(row['data'])}{', the part held out for validation' if row['split'] == 'val' else ''}"
        print(f"{row['model']}: {text}; windows of {row['context']:,} tokens, {row['stride']:,} apart")
    print("loss: nats per token, over all tokens but the first, which nothing precedes. Between different vocabularies only bits per byte compare.")


# ---------------------------------------------------------------------------------------------------------------------
# What a training curve shows.


def read_log(path):
    """log.csv -> its rows, as numbers. Raises InputError with the line that is wrong."""
    require(path.is_file(), f"there is no {path}: give the folder of a checkpoint that was trained here")
    number = 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        wanted = ("step", "train_loss", "val_loss", "val_bits_per_byte")
        require(lines and set(wanted) <= lines[0].keys(), f"it should have lines under the names {', '.join(wanted)}")
        rows = []
        for number, line in enumerate(lines, 2):
            require(len(line["step"]) < 16, f"step {line['step'][:20]} is no number of steps")
            rows.append({key: float(line[key]) for key in wanted} | {"step": int(line["step"])})
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}, line {number}, is not that of a training log: {error}") from error
    return rows


def read_curve(rows):
    """Rows of a log -> the number of the best, and [(what the curve shows, the number of the row, in words)]."""
    step, train, val = (np.array([row[key] for row in rows]) for key in ("step", "train_loss", "val_loss"))
    broken = ~np.isfinite(val)
    best = int(np.argmin(np.where(broken, np.inf, val)))
    if broken.any():
        at = int(np.argmax(broken))
        return best, [("diverged", at, f"the validation loss is {val[at]} at step {step[at]:,}: begin again with a smaller --lr")]
    fall, last, learned = val[0] - val[best], len(val) - 1, train[best : best + 2]
    learned = learned[np.isfinite(learned)][:1]  # the training loss at the best step; at step 0 there is none yet
    if best < last - 1 and val[-1] - val[best] > max(0.01 * fall, 0.002 * val[best]):
        if len(learned) and train[-1] < learned[0]:
            words = (f"from step {step[best]:,} on, the validation loss rises, {val[best]:.3f} to {val[-1]:.3f}, and the training loss falls, "
                     f"{learned[0]:.3f} to {train[-1]:.3f}: more text, more --dropout, fewer steps or a smaller model; the checkpoint "
                     "holds the best step")  # fmt: skip
            return best, [("overfitting", best, words)]
        words = f"from step {step[best]:,} on, both losses rise, validation's {val[best]:.3f} to {val[-1]:.3f}: begin again with a smaller --lr"
        return best, [("diverged", best, words)]
    if len(val) < 5:
        return best, [("too short to tell", last, f"{len(val)} validations: train longer, or with a smaller --eval_interval")]
    found, quarter = [], max(2, len(val) // 4)
    early = next((i for i in range(1, quarter + 1) if val[i] - val[i - 1] > max(0.02 * fall, 0.005 * val[best])), None)
    if early:
        found.append(("too fast at the start", early, (f"the validation loss rises from {val[early - 1]:.3f} to {val[early]:.3f} at step "
                      f"{step[early]:,}: try a smaller --lr or a longer --warmup_steps")))  # fmt: skip
    before = val[:-quarter].min()
    if before - val[best] > max(0.01 * fall, 0.002 * val[best]):
        found.append(("still falling", last, (f"the last quarter of the run brought {before - val[best]:.3f} of all {fall:.3f} nats: more "
                      "--max_steps will bring more")))  # fmt: skip
    else:
        found.append(("plateau", last - quarter, (f"from step {step[last - quarter]:,} on, the validation loss hardly moves, "
                      f"{val[last - quarter]:.3f} to {val[-1]:.3f}: a larger model, more text or another --lr; more steps alone will not help")))  # fmt: skip
    return best, found


def curve(folder, as_json):
    rows = read_log(Path(folder) / "log.csv")
    best, found = read_curve(rows)
    if as_json:
        print(json.dumps({"folder": str(folder), "best": rows[best], "found": [{"what": what, "step": rows[at]["step"], "words": words}
                                                                               for what, at, words in found]}))  # fmt: skip
    else:
        print(f"best at step {rows[best]['step']:,} of {rows[-1]['step']:,}: validation loss {rows[best]['val_loss']:.4f}, "
              f"{rows[best]['val_bits_per_byte']:.4f} bits per byte")  # fmt: skip
        print("\n".join(f"{what}: {words}" for what, _, words in found), flush=True)
    picture = Path(folder) / "curve.png"
    gpt.plot(rows, picture, [(rows[at]["step"], rows[at]["val_loss"], what) for what, at, _ in found])
    say(f"the curve, with these points: {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def check(args):
    """Print the battery's rows; returns whether all is well."""
    device = gpt.resolve_device(args.device)
    names, tokenizer, config, val_bytes = args.data, "bpe", gpt.GPTConfig(), args.val_bytes or 2**20
    if args.model:
        folder = find_checkpoint(args.model[0])
        model, tokenizer = load_checkpoint(folder, device)
        config, (names, _, val_bytes) = model.config, text_of(folder, args)
    names = names or ["pydoc"]
    tokenizer, train, val, _ = gpt.prepare(names, tokenizer, config.vocab_size, val_bytes)
    if not args.model:
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        torch.manual_seed(0)
        model = gpt.GPT(config).to(device).eval()
    say(sanity.versions(device, gpt.resolve_dtype("auto", device)))
    subject, failed = sanity.Subject(config, model, tokenizer, names, val_bytes, train, val), []
    for row in sanity.battery(subject):
        failed += [] if row["ok"] else [row["check"]]
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{'ok' if row['ok'] else 'FAIL':<5} {row['check']:<14} {row['measured']}\n{'':<20} healthy: {row['healthy']}; else: "
                  f"{row['failure']}", flush=True)  # fmt: skip
    say(f"{len(failed)} of {len(sanity.CHECKS)} checks failed: {', '.join(failed)}" if failed else f"all {len(sanity.CHECKS)} checks passed")
    return not failed


@command
def main(argv=None):
    parser = gpt.Parser(prog="evaluate.py", description="Is it right, how good is it, what is wrong with it?")
    add = parser.add_argument
    add("--model", nargs="+", help="checkpoints: folders, or names under checkpoints/")
    add("--data", nargs="+", help="texts to score, as for gpt.py (default: those of the model's training)")
    add("--split", choices=("all", "val"), help="all of the text, or its last tenth, which training holds out (default: all of --data, else val)")
    add("--val_bytes", type=int, help="the validation split is at most this many bytes (default: as in training, or 2**20)")
    add("--context", type=int, help="tokens in a window (default: the model's context)")
    add("--stride", type=int, help="tokens from one window to the next (default: --context); smaller: more exact, and slower")
    add("--batch_size", type=int, help="windows at a time (default: 4,096 tokens of them)")
    add("--check", action="store_true", help="try out every part of the code; with --model, of that model")
    add("--inspect", metavar="PROMPT", help="what the model thinks of this text, token by token and block by block")
    add("--picture", default="attention.png", help="for --inspect: the picture to write (default: attention.png)")
    add("--diagnose_text", action="store_true", help="let the model write, and say what is wrong with it")
    add("--prompt", default="The", help="for --diagnose_text: what it continues (default: The)")
    add("--max_new_tokens", type=int, default=200, help="for --diagnose_text: how much it writes (default: 200)")
    add("--seed", type=int, default=1337, help="for --diagnose_text (default: 1337)")
    add("--curve", metavar="DIR", help="what the training curve of a checkpoint shows")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "int8"), help="of scoring; auto is bfloat16 where native")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    modes = [flag for flag in ("check", "inspect", "diagnose_text", "curve") if getattr(args, flag) not in (None, False)]
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
    require(len(args.model or []) < 2 or not modes, f"--{modes and modes[0]} takes one model at a time")
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
    model, tokenizer = load_checkpoint(find_checkpoint(args.model[0]), gpt.resolve_device(args.device))
    if args.inspect is not None:
        found, attention = lens.inspect(model, tokenizer, args.inspect)
        if args.json:
            print(json.dumps(found | {"attention": attention[:, :, -1].tolist()}), flush=True)
        else:
            lens.show_inspection(found, attention)
        lens.plot_attention(attention, [row["token"] for row in found["tokens"][:-1]], Path(args.picture))
        return say(f"attention of every head: {args.picture}")
    rows = lens.diagnose(model, tokenizer, args.prompt, args.max_new_tokens, (0, 0.5, 0.8, 1.0, 1.5), args.seed)
    return print("\n".join(map(json.dumps, rows))) if args.json else lens.show_diagnosis(list(rows))


if __name__ == "__main__":
    main()
