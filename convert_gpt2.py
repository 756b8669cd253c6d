"""GPT-2's published weights -> a checkpoint of ours, which sample.py and all other scripts use without a network.

    python convert_gpt2.py gpt2                     downloads, converts, checks -> checkpoints/gpt2
    python convert_gpt2.py gpt2-medium              or gpt2-large, gpt2-xl, distilgpt2
    python convert_gpt2.py owner/name               any model of GPT-2's architecture on the Hugging Face hub
    python convert_gpt2.py path/to/folder           files that are here already

The published files call the tensors as gpt.py does. Four weights in each block lie the other way round: they were
written for x @ W with W (in, out), and nn.Linear computes x @ W.T with W (out, in). So these four are transposed. A
forgotten transpose shows as a wrong shape, except in attn.c_proj, which is square: there only the result is wrong.
"""

import dataclasses
import functools
import hashlib
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import gpt
import hub
from gpt import EOT, GPT, GPTConfig, InputError, Tokenizer, command, load_checkpoint, require, save_checkpoint, say
from hub import open_source, read_json
from models import short_name

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PARAGRAPH = (
    "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the stairs, lit the lamp and "
    "looked out over the water. In winter the waves came up to the door, and nobody visited him for weeks. He did not "
    "mind. He had his books, a stove, and a cat that slept on the warm side of the room."
)

# ---------------------------------------------------------------------------------------------------------------------
# What the files say: the shape, the vocabulary, the weights.

GPT2_VOCABULARY = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # sha256 of Tokenizer.gpt2().dumps()

SAME_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function under three names
SAME = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "n_inner": None,
        "quantization_config": None, "auto_map": None}  # fmt: skip
SHAPE = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}


def read_config(described, block_size=None):
    """config.json -> GPTConfig; raises InputError where the model computes something else than gpt.py does."""
    require("model_type" in described, "config.json has no model_type: this is no model of the Hugging Face hub")
    different = [key for key, ours in SAME.items() if described.get(key, ours) != ours]
    if described.get("activation_function") in SAME_GELU[1:]:
        different.remove("activation_function")
    if "n_inner" in different and isinstance(described.get("n_embd"), int) and described["n_inner"] == 4 * described["n_embd"]:
        different.remove("n_inner")
    require(not different, "this model does not compute what gpt.py does: " + "; ".join(
            f"its {key} is {described[key]!r}, and ours is {SAME[key]!r}" for key in different))  # fmt: skip
    missing = [theirs for theirs in SHAPE.values() if theirs not in described]
    require(not missing, f"config.json lacks {', '.join(missing)}")
    config = GPTConfig(**{ours: described[theirs] for ours, theirs in SHAPE.items()}, dropout=described.get("resid_pdrop", 0.1))
    block_size = config.block_size if block_size is None else block_size
    require(1 <= block_size <= config.block_size, f"--block_size {block_size} is not within the model's context of "
            f"{config.block_size}")  # fmt: skip
    return dataclasses.replace(config, block_size=block_size)


def characters():
    """byte -> the character that stands for it in vocab.json: printable ones are themselves, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def read_vocabulary(fetch):
    """vocab.json and merges.txt, or tokenizer.json -> {token: number}, [(left, right)], in the characters for bytes."""
    described, added = None, {}
    if path := fetch("tokenizer.json"):
        described = read_json(path)
        splits = described["pre_tokenizer"] or {}
        plain = splits.get("type") == "ByteLevel" and splits.get("use_regex", True) and not splits["add_prefix_space"]
        require(plain and described["normalizer"] is None, f"the vocabulary is not GPT-2's: by {path}, its text is changed or split "
                "in another way before it is encoded")  # fmt: skip
        added = {token["content"]: token["id"] for token in described["added_tokens"]}
    if (vocab := fetch("vocab.json")) and (merges := fetch("merges.txt")):
        lines = merges.read_text(encoding="utf-8").split("\n")
        return added | read_json(vocab), [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    require(described, "there is neither vocab.json with merges.txt nor tokenizer.json: the vocabulary is not GPT-2's, or lies "
            "elsewhere")  # fmt: skip
    return described["model"]["vocab"] | added, [
        pair.split(" ") if isinstance(pair, str) else pair for pair in described["model"]["merges"]
    ]


def read_tokenizer(fetch, ends=()):
    """The published vocabulary -> Tokenizer; raises InputError where it is laid out otherwise than GPT-2's.

    The end of text is the number that no bytes have; it must be called <|endoftext|>, or be among `ends`.
    """
    byte_of = {character: byte for byte, character in characters().items()}
    try:
        vocab, pairs = read_vocabulary(fetch)
        odd = [token for token, number in vocab.items() if not isinstance(number, int)]
        require(not odd, f"the vocabulary is not GPT-2's: the number of {odd[0] if odd else ''!r} is none")
        merged = list(dict.fromkeys(vocab["".join(pair)] for pair in pairs))
        ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in [*byte_of, *map("".join, pairs)]}
        numbers = set(ranks.values())
        others = {number: token for token, number in vocab.items() if number not in numbers}
        ordered = merged == sorted(merged)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"the vocabulary is not GPT-2's: {type(error).__name__}, {error}") from error
    require(ordered, "the vocabulary is not GPT-2's: its merges are not in the order of their numbers")
    free, more = set(range(len(ranks) + 1)) - numbers, ", ".join(map(repr, list(others.values())[:5]))
    require(len(free) == 1 and free <= others.keys(), f"the vocabulary is not GPT-2's: the first {len(ranks) + 1:,} numbers are "
            f"not those of bytes, merges and one end of text; its other tokens are {more or 'none'}")  # fmt: skip
    (end,) = free
    require(others[end] == EOT or end in ends, f"the vocabulary is not GPT-2's: number {end}, where the end of text should be, is "
            f"{others[end]!r}")  # fmt: skip
    tokenizer = Tokenizer(dict(sorted(ranks.items(), key=lambda item: item[1])), "bytes" if len(ranks) == 256 else "bpe")
    if hashlib.sha256(tokenizer.dumps().encode()).hexdigest() == GPT2_VOCABULARY:
        tokenizer.kind = "gpt2"
    return tokenizer


def find_weights(fetch):
    """The files with the weights, safetensors before pickles, whole before in shards."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = fetch(name)
        if path and path.suffix != ".json":
            return [path]
        if path:
            where = read_json(path).get("weight_map")
            shards = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
            require(shards and all(re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard) for shard in shards),
                    f"{path} does not name the files beside it")  # fmt: skip
            paths = [fetch(shard) for shard in shards]
            missing = [shard for shard, found in zip(shards, paths, strict=True) if not found]
            require(not missing, f"{path} names what is not there: {', '.join(missing)}")
            return paths
    raise InputError("there are no weights: no model.safetensors, no pytorch_model.bin, and no index of their shards")


def open_weights(paths):
    """Files -> {published name: (shape, read)}, where read() gives the tensor, and nothing stays in memory after it."""

    def read_one(path, name):
        with safe_open(path, "pt") as file:  # opened anew, since the pages that it touched would pile up
            return file.get_tensor(name)

    found = {}
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    names = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                readers = {name: (shape, functools.partial(read_one, path, name)) for name, shape in names.items()}
            else:  # a pickle: weights_only builds tensors and nothing else, whatever the file asks for
                state = torch.load(path, map_location="cpu", weights_only=True)
                for name, tensor in state.items():  # each of its numbers must be in the file, and none but once
                    real = tensor.layout == torch.strided and tensor.device.type == "cpu" and isinstance(name, str)
                    if not real or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                        raise TypeError(f"{name} is no plain tensor")
                readers = {name: (tuple(state[name].shape), functools.partial(state.pop, name)) for name in state}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}. Delete it and fetch it again") from error
        except Exception as error:
            raise InputError(f"{path} is not a file of tensors alone, and was not loaded ({type(error).__name__})") from error
        for name, reader in readers.items():
            name = name.removeprefix("transformer.")
            require(name not in found, f"{path} holds {name} a second time")
            found[name] = reader
    return found


def map_weights(found, model):
    """Published tensors -> {our name: float32 tensor}; raises InputError with the names that do not fit the model."""
    positions, wanted = model.config.block_size, {}
    for name, p in model.named_parameters():
        wanted[name.removeprefix("transformer.")] = tuple(p.shape[::-1]) if name.endswith(TRANSPOSED) else tuple(p.shape)
    found = {name: reader for name, reader in found.items() if not re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name)}
    head = found.pop("lm_head.weight", None)
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not GPT-2's" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        has, takes = found[name][0], wanted[name]
        if has != takes and not (name == "wpe.weight" and has[1:] == takes[1:] and has[0] >= takes[0]):
            problems.append(f"{name} is {has}, not {takes}")
    more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
    require(not problems, f"the weights do not fit config.json: {'; '.join(sorted(problems)[:8])}{more}")
    weights = {}
    for name, (_, read) in tqdm(found.items(), desc="converting", unit=" tensors", delay=1, disable=None, leave=False):
        tensor = read()
        known = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        require(known and tensor.isfinite().all(), f"{name} is {tensor.dtype}, or not finite")
        tensor = tensor[:positions] if name == "wpe.weight" else tensor.T if name.endswith(TRANSPOSED) else tensor
        weights[f"transformer.{name}"] = tensor.contiguous().float()
    untied = head and not (head[0] == wanted["wte.weight"] and torch.equal(head[1]().float(), weights["transformer.wte.weight"]))
    require(not untied, "lm_head.weight differs from wte.weight: the head is not tied, and ours is")
    return weights


def convert(name, out, block_size=None, revision="main", overwrite=False):
    """A model's name or folder -> the checkpoint folder `out`. Raises InputError."""
    fetch, folder = open_source(name, revision)
    out = Path(out)
    require(out.resolve() != folder.resolve(), f"{out} holds the published files themselves: choose another --out")
    require(not out.exists() or out.is_dir(), f"{out} is a file: choose another --out")
    described = read_json(fetch("config.json"))
    config, end = read_config(described, block_size), described.get("eos_token_id")
    tokenizer = read_tokenizer(fetch, end if isinstance(end, list) else [end])
    require(tokenizer.vocab_size <= config.vocab_size, f"the vocabulary has {tokenizer.vocab_size:,} tokens, but the model only "
            f"{config.vocab_size:,} rows for them")  # fmt: skip
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    weights = map_weights(open_weights(find_weights(fetch)), model)
    source = {"name": name, "revision": revision, "folder": str(folder.resolve())}
    save_checkpoint(out, model, tokenizer, weights, overwrite, source=source)
    for leftover in ("training_state.pt", "log.csv", "loss.png"):  # of the checkpoint that was overwritten
        (out / leftover).unlink(missing_ok=True)


@command
def main(argv=None):
    parser = gpt.Parser(prog="convert_gpt2.py", description="GPT-2's published weights -> a checkpoint of ours.")
    parser.add_argument("name", help=f"{', '.join(hub.NAMES)}, owner/name on the Hugging Face hub, or a folder")
    parser.add_argument("--out", help="folder for the checkpoint (default: checkpoints/NAME)")
    parser.add_argument("--block_size", type=int, help="keep this many positions only: a shorter context")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    args = parser.parse_args(argv)
    out = Path(args.out or Path("checkpoints", Path(args.name).resolve().name))
    gpt.refuse_existing(out, args.overwrite)
    gpt.keep_freed_memory([(-3, 2**20)])  # only small pieces (M_MMAP_THRESHOLD), or half of what was read stays beside what is made
    convert(args.name, out, args.block_size, args.revision, args.overwrite)
    model, tokenizer = load_checkpoint(out)
    config = model.config
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(PARAGRAPH)][: config.block_size + 1]])
    with torch.no_grad():
        loss, guess = model(ids[:, :-1], ids[:, 1:])[1].item(), math.log(config.vocab_size)
    size = model.config.n_parameters
    print(f"{out}: {size:,} parameters in {12 * config.n_layer + 4} tensors, {4 * config.n_layer} of them transposed; context "
          f"{config.block_size:,}, vocabulary {tokenizer.vocab_size:,}\nloss on a paragraph of English: {loss:.2f} nats per "
          f"token, where guessing has ln {config.vocab_size} = {guess:.2f}")  # fmt: skip
    if loss > guess:
        say("that is no better than guessing: these weights are untrained, or not what config.json says")
    shown = short_name(out)
    say(f'try: python sample.py --model {shown} --prompt "Learning is"\nproof: python verify_gpt2.py {shown}')


if __name__ == "__main__":
    main()
