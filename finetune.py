"""A checkpoint and a text -> the checkpoint, adapted to the text by training all of it, or a small part.

    python finetune.py --model scratch --data my.txt --method lora
    python finetune.py --model gpt2 --data letters.txt --method last --blocks 2 --also_eval what_it_knew.txt
    python finetune.py --model gpt2 --data questions.jsonl          {"prompt": ..., "completion": ...} or {"text": ...} a line

The loop is gpt.py's. What is frozen keeps no gradient and no optimizer state; and where nothing below it is trained, no
backward pass goes there.
"""

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path

import torch
from tqdm import tqdm

import gpt
import lora
from gpt import InputError, TokenDataset, command, flag, load_checkpoint, require, say
from models import find_checkpoint, short_name

METHODS = {  # name -> (is this parameter trained?, peak learning rate, what that is)
    "full": (lambda name, last: True, 1e-3, "every parameter"),
    "last": (lambda name, last: any(f".h.{i}." in name for i in last) or ".ln_f." in name, 3e-3, "the last blocks and the final norm"),
    "layernorm": (lambda name, last: ".ln_" in name, 3e-2, "gains and biases of the norms"),
    "bias": (lambda name, last: name.endswith(".bias"), 3e-2, "all biases, those of the norms too (BitFit, Ben Zaken et al. 2022)"),
    "head": (lambda name, last: "wte" in name, 3e-3, "the head, which is also the token embedding: the two are tied"),
    "layernorm+head": (lambda name, last: ".ln_" in name or "wte" in name, 3e-3, "the norms, and the head, which is the embedding too"),
    "lora": (lambda name, last: "lora_" in name, 5e-3, "two thin matrices beside each chosen projection"),
}  # fmt: skip


@dataclasses.dataclass
class FinetuneConfig(gpt.TrainConfig):
    """What is adapted to what, and how; README.md tells what the learning rates were chosen from."""

    model: str = flag("gpt2", "the checkpoint to begin with: a folder, or a name under checkpoints/")
    method: str = flag("lora", f"what is trained: {', '.join(METHODS)}", choices=tuple(METHODS))
    blocks: int = flag(2, "for last: how many blocks, counted from the end", 1)
    rank: int = flag(8, "for lora: the inner width of the two thin matrices", 1)
    alpha: float = flag(16.0, "for lora: their product is scaled by alpha / rank", 1e-6)
    lora_dropout: float = flag(0.0, "for lora: dropout in front of them", 0, 0.99)
    targets: list = flag(["attn.c_attn"], f"for lora: which projections, of {', '.join(lora.TARGETS)}")
    data: list = flag([], "text files, folders of *.txt, pydoc, shakespeare, or .jsonl files")
    out: str = flag("", "folder for the result; if not given, checkpoints/MODEL-finetuned")
    block_size: int = flag(256, "longest window to train on; never more than the model's context", 1)
    dropout: float = flag(0.1, "share of activations zeroed in training", 0, 0.99)
    also_eval: list = flag([], "texts whose validation part is scored before and after: what the base knew")
    save_adapter: str = flag("", "for lora: a folder for the adapter alone, in the format of PEFT")
    max_steps: int = flag(200, "optimizer steps", 1)
    batch_size: int = flag(8, "windows per forward pass, over all processes", 1, 2**20)
    optimizer: str = flag("adamw", "muon (AdamW beside it) or adamw", choices=("muon", "adamw"))
    lr: float = flag(0.0, "peak learning rate; 0 means the method's own: " + ", ".join(f"{name} {rate}" for name, (_, rate, _) in METHODS.items()), 0, 10)
    warmup_steps: int = flag(10, "steps of linear warm-up, while the optimizer's averages settle")
    weight_decay: float = flag(0.01, "pull of the matrices towards zero", 0, 10)
    beta2: float = flag(0.999, "memory of AdamW's squared gradients", 0, 0.999999)
    eval_interval: int = flag(20, "steps from one validation, which saves a checkpoint, to the next", 1)
    patience: int = flag(5, "validations without a new best after which training ends; 0 means never")
    tokenizer: str = flag("base", "the base's own, always", choices=("base",))

    def __post_init__(self):
        super().__post_init__()
        self.lr = self.lr or METHODS[self.method][1]
        self.out = self.out or str(Path("checkpoints", f"{Path(self.model).name}-finetuned"))


OF = {"blocks": "last"} | dict.fromkeys(("rank", "alpha", "lora_dropout", "targets", "save_adapter"), "lora")  # flags of one method


# ---------------------------------------------------------------------------------------------------------------------
# Documents: examples that do not run into each other.


class Documents:
    """(tokens, first target) for each example; a batch is padded to its longest, and what pads is never counted."""

    def __init__(self, examples, block_size):
        self.examples, self.block_size = examples, block_size

    def __len__(self):
        return len(self.examples)

    def opening(self):
        """Tokens for a sample to go on from: a prompt as it is in the examples, or the beginning of a text."""
        tokens, first = self.examples[0]
        return tokens[: first if first > 1 else 16]

    def batch(self, windows):
        """Numbers of examples -> inputs (B, T), targets (B, T), -1 where nothing is to be learned."""
        rows = [self.examples[i] for i in windows]
        T = max(len(tokens) for tokens, _ in rows) - 1
        x, y = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), -1)
        for i, (tokens, first) in enumerate(rows):
            x[i, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            y[i, first - 1 : len(tokens) - 1] = torch.tensor(tokens[first:])
        return x, y


def read_jsonl(path):
    """Yield (prompt, completion) for each line; the prompt of a {"text": ...} is None. Raises InputError with the line's number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.strip():
                    continue
                example = json.loads(line.decode("utf-8"))
                found = sorted(example) if isinstance(example, dict) else type(example).__name__
                keys = {"text", "prompt", "completion"} & set(found)
                require(isinstance(example, dict) and keys in ({"text"}, {"prompt", "completion"}),
                        f'expected {{"text": ...}}, or {{"prompt": ..., "completion": ...}}, found {found}')  # fmt: skip
                require(all(isinstance(example[key], str) for key in keys), "expected strings")
                require(example.get("text", example.get("completion")), "there is nothing to learn: the text is empty")
                "".join(example[key] for key in keys).encode()  # a lone surrogate is valid JSON, and no text
            except (ValueError, RecursionError) as error:
                what = f"{error.msg}, at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{path}, line {number}: {what}") from error
            yield example.get("prompt"), example["text" if "text" in keys else "completion"]


def documents(paths, tokenizer, block_size, val_bytes):
    """.jsonl files -> training and validation Documents (the last tenth, at most val_bytes), and a fingerprint."""
    pairs = [pair for path in paths for pair in read_jsonl(path)]
    sizes = [len(completion.encode()) for _, completion in pairs]
    require(len(pairs) >= 2, f"{' '.join(map(str, paths))} has too few examples ({len(pairs)}) to learn from some and validate on others")
    cut, held_out = len(pairs) - 1, sizes[-1]
    while len(pairs) - cut < len(pairs) // 10 and held_out + sizes[cut - 1] <= val_bytes:
        cut, held_out = cut - 1, held_out + sizes[cut - 1]
    splits, shortened = ([], []), 0
    for i, (prompt, completion) in enumerate(pairs):
        before = tokenizer.encode(prompt or "") or [tokenizer.eot]
        tokens = [*before, *tokenizer.encode(completion), tokenizer.eot]
        if prompt is None:  # a text is learned whole, window after window; each begins with the last token of the one before
            pieces = [(tokens[at : at + block_size + 1], 1) for at in range(0, len(tokens) - 1, block_size)]
        else:  # of a prompt that is too long, the end counts
            dropped = max(0, len(tokens) - block_size - 1)
            pieces, shortened = [(tokens[dropped:], max(1, len(before) - dropped))], shortened + (dropped > 0)
        splits[i >= cut].extend(pieces)
    if shortened:
        say(f"{shortened:,} of {len(pairs):,} examples are longer than {block_size} tokens and lose their beginning")
    fingerprint = hashlib.sha256(json.dumps([pairs, val_bytes]).encode()).hexdigest()[:16]
    return Documents(splits[0], block_size), Documents(splits[1], block_size), fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# What is trained.


def choose(model, config):
    """Freeze what the method does not train; for lora, put the thin matrices in. Raises InputError."""
    layers = model.config.n_layer
    for module in model.modules():
        if isinstance(module, gpt.Dropout):
            module.p = config.dropout
    if config.method == "lora":
        lora.adapt(model, config.targets, config.rank, config.alpha, config.lora_dropout)
    require(config.method != "last" or config.blocks <= layers, f"--blocks {config.blocks}: the model has only {layers}")
    wanted, last = METHODS[config.method][0], range(layers - config.blocks, layers)
    for name, p in model.named_parameters():
        p.requires_grad_(wanted(name, last))


def kept(model, data, config, dtype):
    """Bytes that a forward pass over a batch keeps for the backward pass, measured by running it."""
    sizes, mine = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
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
    """The table before training: what is trainable, how much that is, and the memory it takes."""
    total = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    groups, blocks = {}, [i for i, block in enumerate(model.transformer.h) if any(p.requires_grad for p in block.parameters())]
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = re.sub(r"\.\d+\.", f".{min(blocks, default=0)}-{max(blocks, default=0)}.", name.removeprefix("transformer."))
            groups.setdefault(kind, []).append(p)
    trained = sum(p.numel() for group in groups.values() for p in group)
    say(f"{config.method}: {METHODS[config.method][2]}; peak learning rate {config.lr:g}")
    for kind, group in groups.items():
        say(f"  {kind:<24} {len(group):>3} x {tuple(group[0].shape)!s:<14} {sum(p.numel() for p in group):>13,}")
    say(f"  {trained:,} of {total:,} values are trained, {trained / total:.3%}")
    state = 8 if config.optimizer == "adamw" else 4
    sizes = {"weights": 4 * total, "gradients": 4 * trained, "optimizer": state * trained, "activations": kept(model, data, config, dtype)}
    sizes["together"] = sum(sizes.values())
    say("  memory: " + ", ".join(f"{what} {tqdm.format_sizeof(size, 'B')}" for what, size in sizes.items()))


def load_data(names, tokenizer, block_size, config):
    """-> training data, validation data, fingerprint of the text."""
    if any(name.endswith(".jsonl") for name in names):
        require(all(name.endswith(".jsonl") for name in names), f"{' '.join(names)} mixes .jsonl with other texts: give one kind")
        missing = [name for name in names if not Path(name).is_file()]
        require(not missing, f"there is no file {', '.join(missing)}")
        return documents(names, tokenizer, block_size, config.val_bytes)
    _, train_tokens, val_tokens, text = gpt.prepare(names, tokenizer, val_bytes=config.val_bytes)
    return gpt.training_windows(train_tokens, block_size, config.stride), TokenDataset(val_tokens, block_size), text


def report(rows, config, tokenizer, device, dtype, old, before):
    """What has become of the new text's loss, and of the old one's, with the weights that were saved."""
    best = min(rows, key=lambda row: row["val_loss"])
    if best["step"] == 0:
        say("no validation was better than the base's, and what is saved computes what the base computes: more text or a smaller --lr")
    print(f"{config.method}: {rows[0]['val_bits_per_byte']:.4f} bits per byte before, {best['val_bits_per_byte']:.4f} at step "
          f"{best['step']:,}; saved in {config.out}" + (f", the adapter alone in {config.save_adapter}" if config.save_adapter else ""))  # fmt: skip
    if old:
        after = gpt.evaluate(load_checkpoint(config.out)[0].to(device), old, tokenizer, config.batch_size, dtype)
        print(f"{' '.join(config.also_eval)}: {before['bits_per_byte']:.4f} bits per byte before, {after['bits_per_byte']:.4f} after: "
              f"{after['bits_per_byte'] - before['bits_per_byte']:+.4f} forgotten")  # fmt: skip
    say(f"try: python sample.py --model {config.model} {short_name(config.out)}")


@command
def main(argv=None):
    parser = gpt.Parser(prog="finetune.py", description="Adapt a checkpoint to a text by training all of it, or a small part.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    gpt.add_flags(parser, FinetuneConfig)
    given = vars(parser.parse_args(argv))
    resume, overwrite, run, flags = given.pop("resume"), given.pop("overwrite"), None, given.keys()
    if resume:
        require("out" in given and not overwrite, "--resume needs --out, and goes without --overwrite")
        run, given = gpt.resume_run(given, "finetune.py", gpt.CHANGEABLE | {"also_eval", "save_adapter"})
    config = gpt.from_flags(FinetuneConfig, given)
    odd = sorted(name for name in flags & OF.keys() if OF[name] != config.method)
    require(not odd, f"--{', --'.join(odd)} goes with --method {' and '.join({OF[name] for name in odd})}, not {config.method}")
    base = find_checkpoint(config.model)
    require(base.resolve() != Path(config.out).resolve(), f"--out {config.out} is the base itself: choose another folder")
    if not resume:
        gpt.refuse_existing(config.out, overwrite)
    if config.save_adapter and not (overwrite or (resume and config.save_adapter == run["config"].get("save_adapter"))):
        full = Path(config.save_adapter).is_dir() and any(Path(config.save_adapter).glob("adapter_*"))
        require(not full, f"{config.save_adapter} already holds an adapter: add --overwrite, or choose another folder")
    device = gpt.join_processes(gpt.resolve_device(config.device))
    dtype = gpt.resolve_dtype(config.dtype, device)
    model, tokenizer = load_checkpoint(base)
    torch.manual_seed(config.seed)
    choose(model, config)
    model.to(device)
    block_size = min(config.block_size, model.config.block_size)
    train_data, val_data, text = load_data(config.data, tokenizer, block_size, config)
    old = load_data(config.also_eval, tokenizer, block_size, config)[1] if config.also_eval else None
    before = gpt.evaluate(model, old, tokenizer, config.batch_size, dtype) if old else None
    describe(model, train_data, config, dtype)
    passes = config.max_steps * config.batch_size * config.grad_accum / len(train_data)
    if isinstance(train_data, TokenDataset):
        passes *= block_size / train_data.stride
        say(f"{' '.join(config.data)}: {len(train_data.tokens):,} tokens to learn from, each seen {passes:.1f} times; "
            f"{len(val_data.tokens):,} to validate on")  # fmt: skip
    else:
        say(f"{' '.join(config.data)}: {len(train_data):,} examples to learn from, each seen {passes:.1f} times; {len(val_data):,} to validate on")

    publish = functools.partial(lora.merged, model)  # an ordinary checkpoint, also where only a part is trained
    if config.save_adapter:
        Path(config.save_adapter).mkdir(parents=True, exist_ok=True)  # if that fails, then before the work
    facts = {"text": text, "base": gpt.digest_file(base / "model.safetensors", hashlib.sha256()).hexdigest()}
    alone = gpt.world()[0] == 0
    with gpt.locked(config.out):
        rows = gpt.train(model, tokenizer, train_data, val_data, config, run, overwrite, publish, **facts)
    if gpt.dist.is_initialized():
        gpt.dist.destroy_process_group()
    if alone:
        if config.save_adapter:
            lora.save_adapter(model, Path(config.save_adapter), base, gpt.load_run(config.out)["best_weights"])
        report(rows, config, tokenizer, device, dtype, old, before)


if __name__ == "__main__":
    main()
