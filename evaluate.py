"""How good is it? Loss, perplexity, bits per byte and accuracy of any checkpoints on any text.

    python evaluate.py --model scratch                                    # on the text held out from its training
    python evaluate.py --model gpt2 gpt2-finetuned --data held_out.txt    # several models on one text

Results go to stdout, remarks to stderr.
"""

import time
from pathlib import Path

import torch

import gpt
from extras import int8
from extras.checkpoints import require_checkpoint, training_text
from extras.tables import show
from gpt import TokenDataset, load_checkpoint, log, require


class StridedDataset(TokenDataset):
    """Windows that overlap; each scores only the `stride` tokens that no window before it has scored."""

    def batch(self, windows):
        x, y = super().batch(windows)
        y[torch.as_tensor(windows) > 0, : self.block_size - self.stride] = -1
        return x, y


def tokens_of(names, tokenizer, split, val_bytes):
    """Names of texts -> the ids of all of them, or of the validation split that training would cut off."""
    if split == "val":
        return gpt.load_data(names, tokenizer, val_bytes=val_bytes)[2]
    texts = gpt.load_texts(names)
    tokens = gpt.tokenize(texts, tokenizer)
    require(len(tokens) - len(texts) >= 2, f"{' '.join(names)} is shorter than two tokens: use more text")
    return tokens


def choose_text(name, args):
    """--data, or the text of the model's training -> names, split, val_bytes, and whether the model has learned it."""
    own, val_bytes = training_text(name)
    names = args.data or own
    require(names, f"{name} has no training text: choose a text with --data")
    split = args.split or ("all" if args.data else "val")
    asked = {Path(text).resolve() for text in names}
    learned = {Path(text).resolve() for text in own}
    val_bytes = args.val_bytes or (val_bytes if asked == learned else 2**20)
    return names, split, val_bytes, split == "all" and bool(asked & learned)


def score(name, names, split, val_bytes, args):
    """A checkpoint on a text -> a row of figures."""
    device = gpt.resolve_device(args.device)
    model, tokenizer = load_checkpoint(name)
    limit = model.config.block_size
    context = limit if args.context is None else args.context
    require(1 <= context <= limit, f"--context {context} does not fit {name}: 1 to {limit}")
    stride = context if args.stride is None else args.stride
    require(1 <= stride <= context, f"--stride {stride} would skip tokens: 1 to the context of {context}")
    row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    dtype = torch.float32
    if args.dtype == "int8":
        model = int8.quantize(model)
    else:
        dtype = gpt.resolve_dtype(args.dtype, device)
    data = StridedDataset(tokens_of(names, tokenizer, split, val_bytes), context, stride)
    started = time.perf_counter()
    row |= gpt.evaluate(model.to(device), data, tokenizer, args.batch_size or max(1, 4096 // context), dtype)
    row |= {"tokens_per_second": row["tokens"] / (time.perf_counter() - started)}
    return row | {"context": context, "stride": stride, "split": split, "data": names}


@gpt.command
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
    chosen = {require_checkpoint(name): choose_text(name, args) for name in args.model}  # before the work
    known = [name for name, text in chosen.items() if text[-1]]
    if known:
        log(f"{', '.join(known)}: trained on this text; use new text, or --split val for the part that was held out")
    show((score(name, *text[:-1], args) for name, text in chosen.items()), args.json)
    log("loss: nats per token, of all tokens but the first; only bits per byte compare different vocabularies")


if __name__ == "__main__":
    main()
