"""A checkpoint and a text -> the checkpoint, adapted to the text by training all or some of its parameters.

    python finetune.py --model scratch --data my.txt --method lora
    python finetune.py --model gpt2 --data letters.txt --method last --blocks 2 --also_eval what_it_knew.txt
    python finetune.py --model gpt2 --data questions.jsonl   a line: {"prompt": ..., "completion": ...} or {"text": ...}

The loop is gpt.py's. Frozen parameters have no gradient and no optimizer state, and the backward pass stops below the
lowest trainable one.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gpt
from extras import lora
from gpt import InputError, TokenDataset, command, flag, load_checkpoint, log, require

METHODS = {  # name -> (is this parameter trained?, peak learning rate, description)
    "full": (lambda name, last: True, 1e-3, "every parameter"),
    "last": (
        lambda name, last: any(f".h.{i}." in name for i in last) or ".ln_f." in name,
        3e-3,
        "the last blocks and the final LayerNorm",
    ),
    "layernorm": (lambda name, last: ".ln_" in name, 3e-2, "gains and biases of the LayerNorms"),
    "bias": (lambda name, last: name.endswith(".bias"), 3e-2, "all biases (BitFit, Ben Zaken et al. 2022)"),
    "head": (lambda name, last: "wte" in name, 3e-3, "the head, and so the token embedding: their weights are tied"),
    "layernorm+head": (
        lambda name, last: ".ln_" in name or "wte" in name,
        3e-3,
        "the LayerNorms, and the head, which is the token embedding",
    ),
    "lora": (lambda name, last: "lora_" in name, 5e-3, "a low-rank update to each chosen projection (Hu et al. 2022)"),
}
LEARNING_RATES = ", ".join(f"{name} {rate}" for name, (_, rate, _) in METHODS.items())
JSONL = (".jsonl", ".ndjson")


@dataclasses.dataclass
class FinetuneConfig(gpt.TrainConfig):
    """The base, the method and the data; README.md shows the measurements behind the learning rates."""

    model: str = flag("gpt2", "the base: a checkpoint's folder, or a name under checkpoints/")
    method: str = flag("lora", "which parameters are trained", choices=tuple(METHODS))
    blocks: int = flag(2, "for last: how many blocks, counted from the end", 1)
    rank: int = flag(8, "for lora: rank of the update", 1)
    alpha: float = flag(16.0, "for lora: the update is scaled by alpha / rank", 1e-6)
    lora_dropout: float = flag(0.0, "for lora: dropout on the input of the update", 0, 0.99)
    targets: tuple = flag(("attn.c_attn",), f"for lora: which projections, of {', '.join(lora.TARGETS)}")
    data: tuple = flag((), "text files, folders of *.txt, pydoc, shakespeare, or .jsonl files", shown="none")
    out: str = flag(None, "folder for the result", shown="checkpoints/MODEL-finetuned")
    block_size: int = flag(256, "longest window to train on; never more than the model's context", 1)
    dropout: float = flag(0.1, "share of activations zeroed in training", 0, 0.99)
    also_eval: tuple = flag(None, "texts whose validation split is evaluated before and after", shown="none")
    save_adapter: str = flag(None, "for lora: a folder for the adapter alone, in the format of PEFT", shown="none")
    max_steps: int = flag(200, "optimizer steps", 1)
    batch_size: int = flag(8, "windows per forward pass, over all processes", 1, 2**20)
    optimizer: str = flag("adamw", "muon (with AdamW for the rest) or adamw", choices=("muon", "adamw"))
    lr: float = flag(0.0, "peak learning rate", 0, 10, shown=f"the method's own: {LEARNING_RATES}")
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
FIXED = {"model", "method", "optimizer", "block_size", "dropout", *METHOD_OF}  # --resume can't change these


# ---- Documents: examples that are trained on separately ----


class Documents:
    """(ids, position of the first target) for each example; batches are padded, and the loss ignores the padding."""

    def __init__(self, examples, block_size):
        self.examples = examples
        self.block_size = block_size

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
    for number, line in enumerate(gpt.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            found = sorted(example) if isinstance(example, dict) else type(example).__name__
            keys = {"text", "prompt", "completion"} & set(found)
            valid = isinstance(example, dict) and keys in ({"text"}, {"prompt", "completion"})
            require(valid, f'expected {{"text": ...}}, or {{"prompt": ..., "completion": ...}}, found {found}')
            require(all(isinstance(example[key], str) for key in keys), "expected strings")
            require(example.get("text", example.get("completion")), "the text to learn is empty")
            "".join(example[key] for key in keys).encode()  # JSON may hold a lone surrogate, which is not valid text
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        yield example.get("prompt"), example["text" if "text" in keys else "completion"]


def documents(paths, tokenizer, block_size, val_bytes):
    """.jsonl files -> training and validation Documents; the last tenth, at most val_bytes, is for validation."""
    pairs = [pair for path in paths for pair in read_jsonl(path)]
    too_few = f"{' '.join(map(str, paths))} has too few examples ({len(pairs)}) to hold one out for validation"
    require(len(pairs) >= 2, too_few)
    sizes = [len(completion.encode()) for _, completion in pairs]
    cut = len(pairs) - 1
    held_out = sizes[cut]
    while len(pairs) - cut < len(pairs) // 10 and held_out + sizes[cut - 1] <= val_bytes:
        cut -= 1
        held_out += sizes[cut]
    train, val = [], []
    truncated = 0
    for i, (prompt, completion) in enumerate(pairs):
        before = tokenizer.encode(prompt or "") or [tokenizer.eot]
        ids = [*before, *tokenizer.encode(completion), tokenizer.eot]
        split = train if i < cut else val
        excess = max(0, len(ids) - block_size - 1)
        if prompt is None:  # a long text becomes several windows; each begins with the last token of the one before
            starts = range(0, len(ids) - 1, block_size)
            split.extend((ids[start : start + block_size + 1], 1) for start in starts)
        else:  # a long prompt loses its beginning
            split.append((ids[excess:], max(1, len(before) - excess)))
            truncated += excess > 0
    if truncated:
        log(f"{truncated:,} of {len(pairs):,} examples are longer than {block_size} tokens and lose their beginning")
    return Documents(train, block_size), Documents(val, block_size)


# ---- Trainable parameters ----


def choose(model, config):
    """Freeze the parameters that the method doesn't train; for lora, add its matrices. Raises InputError."""
    n_layer = model.config.n_layer
    for module in model.modules():
        if isinstance(module, gpt.Dropout):
            module.p = config.dropout
    if config.method == "lora":
        lora.adapt(model, config.targets, config.rank, config.alpha, config.lora_dropout)
    fits = config.method != "last" or config.blocks <= n_layer
    require(fits, f"--blocks {config.blocks}: the model has only {n_layer}")
    is_trained = METHODS[config.method][0]
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, range(n_layer - config.blocks, n_layer)))


def activation_bytes(model, data, config, dtype):
    """Bytes that a forward pass over a batch keeps for the backward pass, measured by running it."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = data.batch(range(min(config.batch_size, len(data))))
    device = next(model.parameters()).device
    model.train()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model(x.to(device), y.to(device))
    model.eval()
    return sum(sizes.values())


def describe(model, data, config, dtype):
    """Log the trainable parameters, and the memory that training takes."""
    total = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    groups = {}  # name of a parameter, for a range of blocks -> those parameters
    blocks = [i for i, block in enumerate(model.transformer.h) if any(p.requires_grad for p in block.parameters())]
    for name, p in model.named_parameters():
        if p.requires_grad:
            span = f".{min(blocks, default=0)}-{max(blocks, default=0)}."
            groups.setdefault(re.sub(r"\.\d+\.", span, name.removeprefix("transformer.")), []).append(p)
    trained = sum(p.numel() for group in groups.values() for p in group)
    log(f"{config.method}: {METHODS[config.method][2]}; peak learning rate {config.lr:g}")
    for name, group in groups.items():
        log(f"  {name:<24} {len(group):>3} x {tuple(group[0].shape)!s:<14} {sum(p.numel() for p in group):>13,}")
    log(f"  {trained:,} of {total:,} parameters are trained, {trained / total:.3%}")
    sizes = {"weights": 4 * total, "gradients": 4 * trained}
    sizes["optimizer"] = (8 if config.optimizer == "adamw" else 4) * trained
    sizes["activations"] = activation_bytes(model, data, config, dtype)
    sizes["total"] = sum(sizes.values())
    log("  memory: " + ", ".join(f"{name} {tqdm.format_sizeof(size, 'B')}" for name, size in sizes.items()))


# ---- The run ----


def load_data(names, tokenizer, block_size, config):
    """Names of texts, or of .jsonl files -> training and validation data."""
    if any(name.endswith(JSONL) for name in names):
        same = all(name.endswith(JSONL) for name in names)
        require(same, f"{' '.join(names)} mixes .jsonl with other texts: use one kind")
        return documents(names, tokenizer, block_size, config.val_bytes)
    _, train_ids, val_ids = gpt.load_data(names, tokenizer, val_bytes=config.val_bytes)
    too_short = f"{' '.join(names)} is shorter than a window: use more text or a smaller --block_size"
    require(len(train_ids) > block_size, too_short)
    stride = config.stride or max(1, block_size // 4)
    return TokenDataset(train_ids, block_size, stride), TokenDataset(val_ids, block_size)


def fingerprint(*datasets):
    """sha256 of the ids."""
    digest = hashlib.sha256()
    for data in datasets:
        digest.update(json.dumps(data.examples).encode() if isinstance(data, Documents) else data.tokens)
    return digest.hexdigest()


def report(rows, config, tokenizer, device, dtype, old, before):
    """Print the loss on the new text, and on the old one, before and after, with the weights that were saved."""
    best = min(rows, key=lambda row: row["val_loss"])
    if best["step"] == 0:
        log("no validation was better than the base's, so the saved model is the base: use more text or a smaller --lr")
    adapter = f", the adapter alone in {config.save_adapter}" if config.save_adapter else ""
    print(
        f"{config.method}: {rows[0]['val_bits_per_byte']:.4f} bits per byte before, {best['val_bits_per_byte']:.4f} "
        f"at step {best['step']:,}; saved in {config.out}{adapter}"
    )
    if old:
        model = load_checkpoint(config.out)[0].to(device)
        after = gpt.evaluate(model, old, tokenizer, config.batch_size, dtype)["bits_per_byte"]
        print(
            f"{' '.join(config.also_eval)}: {before:.4f} bits per byte before, {after:.4f} after: "
            f"{after - before:+.4f} forgotten"
        )
    log(f"try: python sample.py --model {config.model} {config.out}")


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
    for name, method in METHOD_OF.items():
        fits = name not in given or method == config.method
        require(fits, f"--{name} goes with --method {method}, not {config.method}")
    model, tokenizer = load_checkpoint(config.model)
    base = gpt.find_checkpoint(config.model)
    same = base.resolve() == Path(config.out).resolve()
    require(not same, f"--out {config.out} is the base itself: choose another folder")
    if not resume:
        gpt.refuse_existing(config.out, overwrite)
    if config.save_adapter:
        lora.prepare_folder(config.save_adapter, overwrite or resume)
    if gpt.WORLD_SIZE > 1:
        gpt.dist.init_process_group()
    device = gpt.resolve_device(config.device)
    dtype = gpt.resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    choose(model, config)
    model.to(device)
    block_size = min(config.block_size, model.config.block_size)
    train_data, val_data = load_data(config.data, tokenizer, block_size, config)
    old, before = None, None
    if config.also_eval:
        old = load_data(config.also_eval, tokenizer, block_size, config)[1]
        before = gpt.evaluate(model, old, tokenizer, config.batch_size, dtype)["bits_per_byte"]
    describe(model, train_data, config, dtype)
    epochs = config.max_steps * config.batch_size * config.grad_accum / len(train_data)
    sizes = f"{len(train_data):,} examples for {epochs:.1f} epochs; {len(val_data):,} for validation"
    if isinstance(train_data, TokenDataset):
        epochs *= block_size / train_data.stride
        sizes = f"{len(train_data.tokens):,} tokens for {epochs:.1f} epochs; {len(val_data.tokens):,} for validation"
    log(f"{' '.join(config.data)}: {sizes}")

    def export_weights(model):
        """The weights of an ordinary checkpoint; with --save_adapter, the adapter is written, too."""
        if config.save_adapter and gpt.RANK == 0:
            lora.save_adapter(model, config.save_adapter, base)
        return lora.merged(model)

    fingerprints = {"text": fingerprint(train_data, val_data)}
    weights = np.memmap(base / gpt.MODEL, mode="r")  # hashed without reading all of it into memory
    fingerprints["base"] = hashlib.sha256(weights).hexdigest()
    rows = gpt.train(model, tokenizer, train_data, val_data, config, run, export_weights, **fingerprints)
    if gpt.RANK == 0:
        report(rows, config, tokenizer, device, dtype, old, before)


if __name__ == "__main__":
    main()
