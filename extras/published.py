"""A published folder's config.json and tokenizer files -> GPTConfig and Tokenizer, if gpt.py computes the same.

A setting in any of its files that would make transformers compute something else, give a text other ids or end it at
another token is refused by name. Added tokens come from the text in transformers, but never in gpt.py: so they must be
names in brackets that no text has by chance, and have a use that needs none: the end of text, or padding.
"""

import json
import re

import regex

from gpt import EOT, PRESETS, SPLIT, GPTConfig, InputError, Tokenizer, log, read_text, refuse_pointer, require

FILES = "config.json, vocab.json, merges.txt and model.safetensors"
SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


# ---- Files ----
def find(folder, *names):
    """The first of these files that the folder has. Raises InputError."""
    there = [folder / name for name in names if (folder / name).is_file()]
    require(there, f"{folder} has no {' or '.join(names)}: put {FILES} there")
    refuse_pointer(there[0])
    return there[0]


def read_json(path):
    """A file with a JSON object -> dict. Raises InputError."""
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    require(isinstance(found, dict), f"{path} is not a JSON object")
    return found


def read_if_there(path):
    return read_json(path) if path.is_file() else {}


# ---- config.json -> shape, or an error that names what GPT-2 and gpt.py don't compute ----
SAME = {  # what gpt.py computes, in the words of config.json; some has several names
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "n_inner": (None,),  # or 4 C
    "quantization_config": (None,),
    "auto_map": (None,),
    "prefix": (None,),
}
SHAPE = {"block_size": "n_positions"} | {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
OTHER_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}


def read_config(described):
    """config.json -> GPTConfig; raises InputError if the model computes anything else than gpt.py."""
    described = described | {name: described[other] for name, other in OTHER_NAMES.items() if other in described}
    shape = {}
    for ours, theirs in SHAPE.items():
        if theirs not in described:
            log(f"config.json has no {theirs}: GPT-2's is {PRESETS['gpt2'][ours]}")
        shape[ours] = described.get(theirs, PRESETS["gpt2"][ours])
        require(type(shape[ours]) is int, f"config.json: {theirs} is {shape[ours]!r}, and must be a whole number")
    accepted = SAME | {"n_inner": (None, 4 * shape["n_embd"])}
    different = [key for key, values in accepted.items() if described.get(key, values[0]) not in values]
    details = "; ".join(f"its {key} is {described[key]!r}, and ours is {SAME[key][0]!r}" for key in different)
    require(not different, f"this model does not compute what gpt.py does: {details}")
    dropout = described.get("resid_pdrop", 0.1)
    require(type(dropout) in (int, float), f"config.json: resid_pdrop is {dropout!r}, not a number")
    return GPTConfig(**shape, dropout=dropout)


def read_end(folder):
    """The id that ends generation in transformers: generation_config.json goes before config.json."""
    path = find(folder, "generation_config.json", "config.json")
    end = read_json(path).get("eos_token_id", 50256 if path.name == "config.json" else None)
    ends = end if isinstance(end, list) else [end]
    single = len(set(map(str, ends))) == 1 and type(ends[0]) is int
    require(single, f"{path}: eos_token_id is {end}, and here a text ends at one token: put one id there")
    return ends[0]


# ---- The tokenizer's options ----
TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None)
UNSUPPORTED = ["add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens", "do_lower_case"]
UNSUPPORTED += ["auto_map", "fast_tokenizer_files"]


def check_options(folder):
    """Raise InputError for options of the tokenizer that change a text or its ids."""
    options = read_if_there(folder / "tokenizer_config.json")
    for key in UNSUPPORTED:
        require(not options.get(key), f"tokenizer_config.json: {key} is {options.get(key)!r}, which gpt.py does not do")
    kind = options.get("tokenizer_class") or read_if_there(folder / "config.json").get("tokenizer_class")
    require(kind in TOKENIZER_CLASSES, f"its tokenizer_class is {kind}, and ours is GPT2Tokenizer")
    full = read_if_there(folder / "tokenizer.json")
    if not full:
        return
    wrong = f"by {folder / 'tokenizer.json'}, text is changed or split in another way than GPT-2's"
    splits = full["pre_tokenizer"]
    usual = splits["type"] == "ByteLevel" and splits.get("use_regex", True) and not splits["add_prefix_space"]
    require(usual, f"{wrong}: its pre_tokenizer is {splits}")
    require(not full["normalizer"], f"{wrong}: its normalizer is {full['normalizer']}")
    require(full["decoder"]["type"] == "ByteLevel", f"{wrong}: its decoder is {full['decoder']}")
    template = full.get("post_processor") or {"type": "ByteLevel"}
    plain = template["type"] == "ByteLevel" or all("Sequence" in part for part in template.get("single", [template]))
    require(plain, f"{wrong}: its post_processor adds tokens: {template}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(not full["model"].get(key), f"{wrong}: its {key} is {full['model'].get(key)!r}")


# ---- Added and special tokens ----
def declared_tokens(folder):
    """Yield (file and use, content, id or None, options) for each added or special token."""
    for token in read_if_there(folder / "tokenizer.json").get("added_tokens", []):
        yield "tokenizer.json (added_tokens)", token["content"], token["id"], token
    for content, i in read_if_there(folder / "added_tokens.json").items():
        yield "added_tokens.json (added_tokens)", content, i, {}
    files = {name: read_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
    options, older = files.values()
    if "GPT2" in (options.get("tokenizer_class") or "GPT2Tokenizer"):  # with defaults of its own
        absent = [use for use in ("bos_token", "eos_token", "unk_token") if use not in options and use not in older]
        files["tokenizer_config.json"] = dict.fromkeys(absent, EOT) | options
    for file, described in files.items():
        for i, token in described.get("added_tokens_decoder", {}).items():
            yield f"{file} (added_tokens_decoder)", token["content"], int(i), token
        uses = [(key, value) for key, value in described.items() if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = described.get(key) or []
            uses += [(key, token) for token in (more.values() if isinstance(more, dict) else more)]
        for use, token in uses:
            if isinstance(token, str):
                yield f"{file} ({use})", token, None, {}
            elif isinstance(token, dict):
                yield f"{file} ({use})", token["content"], None, token


def is_unused(content, known=()):
    """Is this a token that no text has? A name in brackets that is known, or like <pad>, [unused7], <|reserved|>."""
    brackets = regex.fullmatch(r"[<\[|]\S*[\p{L}\p{N}]\S*[>\]|]", content)  # several words of SPLIT, never one
    return bool(brackets and (content in known or re.search("pad|unused|reserved", content.lower())))


def added_tokens(folder, vocab, end):
    """{content: id} of the tokens that no text gives, those of `vocab` among them. Raises InputError."""
    declared = list(declared_tokens(folder))
    ids = dict(vocab)
    for place, content, i, _ in declared:
        same = i is None or ids.setdefault(content, i) == i
        require(same, f"two files disagree: {content} is id {ids.get(content)}, and {i} in {place}")
    ends = [EOT, *(content for content, i in ids.items() if i == end)]
    padding = [content for place, content, _, _ in declared if "(pad_token)" in place]
    for place, content, _, options in declared:
        where = ", ".join(dict.fromkeys(place for place, also, _, _ in declared if also == content))
        unused = is_unused(content, ends + padding)
        away = "delete it there if your texts do not use it"
        require(unused, f"a text with {content!r} has other ids in transformers than here, by {where}: {away}")
        if content in ends:
            added = f"the vocabulary has no {content}, and transformers adds it by {where}: name another there"
            require(content in ids, added)
            odd = [key for key in ("single_word", "lstrip", "rstrip") if options.get(key)]
            require(not odd, f"{place}: {content} has the option {', '.join(odd)}, and ours has not")
    return ids


# ---- vocab.json and merges.txt -> Tokenizer ----
def characters():
    """Byte -> its character in vocab.json: itself if that is printable, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def read_vocabularies(folder):
    """vocab.json with merges.txt, and tokenizer.json: of each that is there {token: id}, [(left, right)]."""
    path = find(folder, "vocab.json", "tokenizer.json")
    if path.name == "vocab.json":
        lines = read_text(find(folder, "merges.txt")).split("\n")
        yield read_json(path), [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json")["model"]
        yield model["vocab"], [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def read_ranks(vocab, pairs):
    """-> {bytes of a token: its id}, and {content: id} of what neither a byte nor a merge makes."""
    require(all(type(i) is int for i in vocab.values()), "the vocabulary is not GPT-2's: its ids are not whole numbers")
    byte_of = {character: byte for byte, character in characters().items()}
    spelled = dict.fromkeys([*byte_of, *("".join(pair) for pair in pairs)])
    ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in spelled}
    return ranks, {token: i for token, i in vocab.items() if token not in spelled}


def build(ranks, others, end):
    """Ids of bytes and merges, of other tokens, and of the end of text -> Tokenizer. Raises InputError."""
    wrong = "the vocabulary is not GPT-2's"
    ids = [*ranks.values(), *others.values()]
    require(len(ids) == len(set(ids)), f"{wrong}: two of its tokens have the same id")
    merged = list(ranks.values())[256:]
    require(merged == sorted(merged), f"{wrong}: its merges are not in the order of their ids")
    at = [f"is {token.decode(errors='replace')!r}" for token, i in ranks.items() if i == end] or ["no token has"]
    mend = "set eos_token_id in config.json and generation_config.json to that of the end of text"
    names = {i: content for content, i in others.items()}
    require(end in names, f"{wrong}: generation ends at id {end}, which {at[0]}: {mend}")
    special = {content: others[content] for content in (names[end], EOT) if content in others}
    top = max(*ranks.values(), *special.values())
    for content, i in others.items():
        word = regex.fullmatch(SPLIT, content) or content.encode() in ranks
        require(not word, f"{wrong}: no merge makes its token {content!r}")
        if i <= top and i != end:  # no text gives it, but the model may: it is decoded as its name
            ranks[content.encode()] = i
    missing = set(range(top + 1)) - {*ranks.values(), end}
    require(not missing, f"{wrong}: no token has the ids {sorted(missing)[:5]}")
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    return Tokenizer(ranks, "bytes" if len(ranks) == 256 else "bpe", end, special)


def read_tokenizer(folder, end=None):
    """The published vocabulary -> Tokenizer; a text ends at the id `end`, by default that of <|endoftext|>.

    Raises InputError if it isn't built like GPT-2's.
    """
    try:
        check_options(folder)
        (ranks, others), *second = [read_ranks(*found) for found in read_vocabularies(folder)]
        for also_ranks, also_others in second:
            same = ranks == also_ranks and others | also_others == also_others | others  # where both have a token
            require(same, f"{folder}: tokenizer.json disagrees with vocab.json and merges.txt: delete the stale ones")
            others |= also_others
        end = others.get(EOT) if end is None else end
        return build(ranks, added_tokens(folder, others, end), end)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"the vocabulary is not GPT-2's: {type(error).__name__}, {error}") from error
