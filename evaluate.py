"""How good is it? Loss, perplexity, bits per byte and accuracy of any checkpoints on any text.

    python evaluate.py --model scratch                                    on the text held out from its training
    python evaluate.py --model gpt2 gpt2-finetuned --data held_out.txt    several models on one text

Results go to stdout, remarks to stderr.
"""

import json
import time
from pathlib import Path

import torch

import gpt
from gpt import TokenDataset, command, find_checkpoint, log, require
from sample import open_model


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
    if split == "all" and asked & learned:
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


@command
def main(argv=None):
    parser = gpt.Parser(prog="evaluate.py", description="How good is it? Any checkpoints on any text.")
    add = parser.add_argument
    add("--model", nargs="+", default=["scratch"], help="folders, or names under checkpoints/ (default: scratch)")
    add("--data", nargs="+", help="texts to score, as for gpt.py (default: those of the model's training)")
    add("--split", choices=("all", "val"), help="all of the text (default for --data), or its last tenth (otherwise)")
    add("--val_bytes", type=int, help="most bytes of the validation split (default: as in training, or 2**20)")
    add("--context", type=int, help="tokens in a window (default: the model's context)")
    add("--stride", type=int, help="tokens from window to window (default: --context); smaller is more exact, slower")
    add("--batch_size", type=int, help="windows per forward pass (default: 4,096 tokens of them)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    dtypes = ("auto", "float32", "bfloat16", "int8")
    add("--dtype", default="auto", choices=dtypes, help="auto is bfloat16 where native")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    for name in ("val_bytes", "batch_size"):
        value = getattr(args, name)
        require(value is None or 1 <= value <= 2**31, f"--{name} is {value}, expected 1 to 2**31")
    for name in args.model:
        find_checkpoint(name)  # before the work
    rows = []
    for name in args.model:
        rows.append(score(name, args))
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
    return None if args.json else show_scores(rows)


if __name__ == "__main__":
    main()
