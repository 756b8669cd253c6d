"""A checkpoint and a text -> the checkpoint, adapted to the text by training all or some of its parameters.

    python finetune.py --data my.txt                                     # the last two blocks of checkpoints/scratch
    python finetune.py --model gpt2 --data letters.txt --method lora --also_eval what_it_knew.txt
    python finetune.py --model gpt2 --data questions.jsonl               # {"prompt": ..., "completion": ...} a line

The training loop is gpt.py's. Frozen parameters have no gradient and no optimizer state, and the backward pass stops
below the lowest trainable one.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import gpt
from extras import lora
from extras.checkpoints import require_checkpoint
from extras.tables import show
from gpt import InputError, TokenDataset, command, flag, load_checkpoint, log, require

METHODS = {  # name -> (pattern in the names of the trainable parameters, peak learning rate, description)
    "full": (r"", 1e-3, "every parameter"),
    "last": (r"\.h\.(LAST)\.|\.ln_f\.", 3e-3, "the last blocks and the final LayerNorm"),
    "layernorm": (r"\.ln_", 3e-2, "gains and biases of the LayerNorms"),
    "bias": (r"\.bias$", 3e-2, "all biases (BitFit, Ben Zaken et al. 2022)"),
    "head": (r"\.wte\.", 3e-3, "the head, and so the token embedding: their weights are tied"),
    "layernorm+head": (r"\.ln_|\.wte\.", 3e-3, "the LayerNorms, and the head, which is the token embedding"),
    "lora": (r"\.lora_", 5e-3, "a low-rank update to each chosen projection (Hu et al. 2022)"),
}


@dataclasses.dataclass
class FinetuneConfig(gpt.TrainConfig):
    """The base, the method and the data; README.md shows the measurements behind the learning rates."""

    model: str = flag("scratch", "the base: a checkpoint's folder, or a name under checkpoints/")
    method: str = flag("last", "which parameters are trained", choices=tuple(METHODS))
    blocks: int = flag(2, "for last: how many blocks, counted from the end", 1)
    rank: int = flag(8, "for lora: rank of the update", 1)
    alpha: float = flag(16.0, "for lora: the update is scaled by alpha / rank", 1e-6)
    lora_dropout: float = flag(0.0, "for lora: dropout on the input of the update", 0, 0.99)
    targets: tuple = flag(("attn.c_attn",), "for lora: which projections of a block", shown="attn.c_attn")
    data: tuple = flag((), "text files, folders of *.txt, pydoc, shakespeare, or .jsonl files", shown="none")
    out: str = flag(None, "folder for the checkpoint", shown="checkpoints/MODEL-finetuned")
    block_size: int = flag(256, "longest window to train on; never more than the model's context", 1)
    dropout: float = flag(0.1, "share of activations zeroed in training", 0, 0.99)
    also_eval: tuple = flag(None, "texts whose validation split is evaluated before and after", shown="none")
    save_adapter: str = flag(None, "for lora: a folder for the adapter alone, in the format of PEFT", shown="none")
    max_steps: int = flag(200, "optimizer steps", 1)
    batch_size: int = flag(8, "windows per forward pass, over all processes", 1, 2**20)
    optimizer: str = flag("adamw", "muon (with AdamW for the rest) or adamw", choices=("muon", "adamw"))
    lr: float = flag(0.0, "peak learning rate", 0, 10, shown="the method's own")
    warmup_steps: int = flag(10, "steps of linear warmup")
    weight_decay: float = flag(0.01, "decay of the matrices towards zero", 0, 10)
    beta2: float = flag(0.999, "AdamW's decay of the second moment", 0, 0.999999)
    eval_interval: int = flag(20, "steps between validations; each saves a checkpoint", 1)
    patience: int = flag(5, "stop after this many validations without a new best; 0 means never")
    tokenizer: str = flag("base", "always the base's own", choices=("base",))

    def __post_init__(self):
        super().__post_init__()
        self.lr = self.lr or METHODS[self.method][1]
        self.out = self.out or str(Path("checkpoints", f"{Path(self.model).name}-finetuned"))


METHOD_OF = {"blocks": "last"} | dict.fromkeys(("rank", "alpha", "lora_dropout", "targets", "save_adapter"), "lora")
FIXED = {"method", "optimizer", "block_size", "dropout", *METHOD_OF}  # --resume can't change these


# ---- Examples: each is trained on separately ----
class Documents:
    """(ids, position of the first target) for each example; batches are padded, and the loss ignores the padding."""

    def __init__(self, examples):
        self.examples = examples
        self.tokens = np.concatenate([(first, *ids) for ids, first in examples])  # for the fingerprint

    def __len__(self):
        return len(self.examples)

    def batch(self, windows):
        """Indices of examples -> inputs (B, T), targets (B, T), -1 for prompts and padding."""
        rows = [self.examples[i] for i in windows]
        T = max(len(ids) for ids, _ in rows) - 1
        x = torch.zeros(len(rows), T, dtype=torch.int64)
        y = torch.full((len(rows), T), -1)
        for i, (ids, first) in enumerate(rows):
            x[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            y[i, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
        return x, y


def read_jsonl(path):
    """Yield (prompt, completion) for each line, (None, text) for {"text": ...}. Raises InputError with the line."""
    for number, line in enumerate(gpt.read_text(path).rstrip().split("\n"), 1):
        try:
            example = json.loads(line)
            prompt = example.get("prompt")
            text = example["text"] if prompt is None else example["completion"]
            (text + (prompt or "")).encode()  # raises for other types, and for lone surrogates, which JSON may hold
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            expected = 'expected {"text": ...} or {"prompt": ..., "completion": ...}'
            raise InputError(f"{path}, line {number}: {expected}, {error!r}") from error
        yield prompt, text


def documents(paths, tokenizer, block_size, val_bytes):
    """.jsonl files -> training and validation Documents; the last tenth, at most val_bytes, is for validation."""
    pairs = [pair for path in paths for pair in read_jsonl(path)]
    require(len(pairs) >= 2, f"{' '.join(map(str, paths))} has too few examples to hold one out for validation")
    sizes = np.cumsum([len(text.encode()) for _, text in reversed(pairs)])
    n_val = max(1, min(len(pairs) // 10, np.searchsorted(sizes, val_bytes, "right")))
    train, val = [], []
    truncated = 0
    for i, (prompt, text) in enumerate(pairs):
        split = train if i < len(pairs) - n_val else val
        before = tokenizer.encode(prompt or "") or [tokenizer.eot]
        ids = [*before, *tokenizer.encode(text), tokenizer.eot]
        excess = max(0, len(ids) - block_size - 1)
        if prompt is None:  # a long text becomes several windows; each begins with the last token of the one before
            starts = range(0, len(ids) - 1, block_size)
            split.extend((ids[start : start + block_size + 1], 1) for start in starts)
        else:  # a long prompt loses its beginning
            split.append((ids[excess:], max(1, len(before) - excess)))
            truncated += excess > 0
    if truncated:
        log(f"{truncated:,} of {len(pairs):,} examples are longer than {block_size} tokens and lose their beginning")
    return Documents(train), Documents(val)


def load_data(names, tokenizer, block_size, config):
    """Names of texts, or of .jsonl files -> training and validation data."""
    if any(name.lower().endswith((".jsonl", ".ndjson")) for name in names):
        return documents(names, tokenizer, block_size, config.val_bytes)
    _, train_ids, val_ids = gpt.load_data(names, tokenizer, val_bytes=config.val_bytes)
    stride = config.stride or max(1, block_size // 4)
    return TokenDataset(train_ids, block_size, stride), TokenDataset(val_ids, block_size)


# ---- Which parameters are trained ----
def choose(model, config):
    """Freeze the parameters that the method doesn't train; for lora, add its matrices. Raises InputError."""
    for module in model.modules():
        if isinstance(module, gpt.Dropout):
            module.p = config.dropout
    if config.method == "lora":
        lora.adapt(model, config.targets, config.rank, config.alpha, config.lora_dropout)
    n_layer = model.config.n_layer
    fits = config.method != "last" or config.blocks <= n_layer
    require(fits, f"--blocks {config.blocks}: the model has only {n_layer}")
    last = "|".join(str(i) for i in range(n_layer - config.blocks, n_layer))
    pattern = METHODS[config.method][0].replace("LAST", last)
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(pattern, name) is not None)


def activation_bytes(model, data, config, dtype):
    """Bytes that a forward pass over a batch keeps for the backward pass, measured by running it."""
    sizes = {}  # address -> bytes

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    x, y = data.batch(range(min(config.batch_size, len(data))))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model.train()(x.to(device), y.to(device))
    model.eval()
    for p in model.parameters():
        sizes.pop(p.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def describe(model, data, config, dtype):
    """Print, as remarks, the trainable parameters and the memory that training takes."""
    sizes = Counter()  # name, with * for the number of the block -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            sizes[re.sub(r"\.\d+\.", ".*.", name)] += p.numel()
    trained = sizes.total()
    total = sum(p.numel() for p in model.parameters())
    memory = {"weights": 4 * total, "gradients": 4 * trained, "optimizer": 8 * trained}  # AdamW's two averages
    memory["activations"] = activation_bytes(model, data, config, dtype)
    memory["total"] = sum(memory.values())
    with contextlib.redirect_stdout(sys.stderr):
        show([{"trainable": name, "parameters": size} for name, size in sizes.items()])
        print(f"{trained:,} of {total:,} parameters are trained, {trained / total:.3%}; peak lr {config.lr:g}\n")
        show([{"memory": name, "bytes": size} for name, size in memory.items()])


# ---- The run ----
def first_prompt(data, tokenizer):
    """The prompt of the first example; of a text, its first tokens."""
    x, y = data.batch([0])
    n = (y[0] != -1).int().argmax().item() + 1
    return tokenizer.decode(x[0, :n].tolist()) or tokenizer.decode(x[0, :8].tolist()).strip().strip("\ufffd")


def report(rows, config, old, before, tokenizer, dtype, prompt):
    """Print bits per byte on the new text, and on the old one, before and after."""
    best = min(rows, key=lambda row: row["val_loss"])
    first, last = rows[0]["val_bits_per_byte"], best["val_bits_per_byte"]
    scores = [{"bits per byte": " ".join(config.data), "before": first, "after": last}]
    if old:
        model, _ = load_checkpoint(config.out, gpt.resolve_device(config.device))
        after = gpt.evaluate(model, old, tokenizer, config.batch_size, dtype)["bits_per_byte"]
        scores.append({"bits per byte": " ".join(config.also_eval), "before": before, "after": after})
    show(scores)
    adapter = f", the adapter in {config.save_adapter}" if config.save_adapter else ""
    print(f"best at step {best['step']:,}; saved in {config.out}{adapter}")
    log("try: " + shlex.join(["python", "sample.py", "--model", config.model, config.out, "--prompt", prompt]))


@command
def main(argv=None):
    parser = gpt.Parser(prog="finetune.py", description="Adapt a checkpoint to a text by training all or some of it.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    gpt.add_flags(parser, FinetuneConfig)
    given = vars(parser.parse_args(argv))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    flags, run = given, None
    if resume:
        require("out" in given and not overwrite, "--resume needs --out, and goes without --overwrite")
        run = gpt.load_run(given["out"])
        begun = run[0]["config"]
        require("method" in begun, f"{given['out']} is a run of gpt.py: resume it with that")
        changed = sorted(name for name in FIXED & given.keys() if given[name] != begun[name])
        require(not changed, f"--resume can't change {', '.join(changed)}: start a new run")
        flags = begun | given
    config = gpt.from_flags(FinetuneConfig, flags)
    for name in METHOD_OF.keys() & given.keys():
        require(config.method == METHOD_OF[name], f"--{name} goes with --method {METHOD_OF[name]}")
    model, tokenizer = load_checkpoint(require_checkpoint(config.model))
    base = gpt.find_checkpoint(config.model)
    require(Path(config.out).resolve() != base.resolve(), f"{base} is the base itself: choose another --out")
    gpt.refuse_existing(config.out, overwrite or resume)
    export_weights = None
    if config.method == "lora":
        export_weights = lora.exporter(config.save_adapter, base, overwrite or resume)
    if gpt.WORLD_SIZE > 1:
        gpt.dist.init_process_group()
    device = gpt.resolve_device(config.device)
    dtype = gpt.resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    choose(model.to(device), config)
    block_size = min(config.block_size, model.config.block_size)
    train_data, val_data = load_data(config.data, tokenizer, block_size, config)
    old, before = None, None
    if config.also_eval:
        _, old = load_data(config.also_eval, tokenizer, block_size, config)
        before = gpt.evaluate(model, old, tokenizer, config.batch_size, dtype)["bits_per_byte"]
    if gpt.RANK == 0:
        describe(model, train_data, config, dtype)
    log(f"{len(train_data):,} windows to learn from, {len(val_data):,} for validation")
    contents = {"training": train_data.tokens, "validation": val_data.tokens}
    contents["base"] = np.memmap(base / gpt.MODEL, mode="r")  # hashed without reading all of it into memory
    fingerprints = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    rows = gpt.train(model, tokenizer, train_data, val_data, config, run, export_weights, **fingerprints)
    if gpt.RANK == 0:
        report(rows, config, old, before, tokenizer, dtype, first_prompt(val_data, tokenizer))


if __name__ == "__main__":
    main()
