"""A published folder's config.json and tokenizer files -> GPTConfig and Tokenizer, if gpt.py computes the same.

A setting in any of its files that would make transformers compute something else, give a text other ids or end it at
another token is refused by name. Added tokens come from the text in transformers, but never in gpt.py: so they must be
names in brackets that no text has by chance, and have a use that needs none: the end of text, or padding.
"""

import json
import re

import regex

from gpt import EOT, PRESETS, SPLIT, GPTConfig, InputError, Tokenizer, log, read_text, require

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


def refuse_pointer(path):
    """Raise InputError if a file is what git leaves in its place without git-lfs."""
    with open(path, "rb") as file:
        pointer = file.read(100).startswith(b"version https://git-lfs")
    require(not pointer, f"{path} is a pointer of git-lfs, not the file: run `git lfs pull` in {path.parent}")


def read_json(path):
    """A file with a JSON object -> dict. Raises InputError."""
    refuse_pointer(path)
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    require(isinstance(found, dict), f"{path} is not a JSON object")
    return found


def read_if_there(path):
    return read_json(path) if path.is_file() else {}


# ---- config.json -> shape, or an error that names what GPT-2 and gpt.py don't compute ----
SAME = {  # what gpt.py computes, in the words of config.json
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "n_inner": None,
    "quantization_config": None,
    "auto_map": None,
    "prefix": None,
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
    shape = {}
    for ours, theirs in SHAPE.items():
        name = OTHER_NAMES.get(theirs) if OTHER_NAMES.get(theirs) in described else theirs
        if name not in described:
            log(f"config.json has no {theirs}: GPT-2's is {PRESETS['gpt2'][ours]}")
        shape[ours] = described.get(name, PRESETS["gpt2"][ours])
        require(type(shape[ours]) is int, f"config.json: {name} is {shape[ours]!r}, and must be a whole number")
    accepted = {key: (value,) for key, value in SAME.items()}
    accepted["activation_function"] = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function under three names
    accepted["n_inner"] = (None, 4 * shape["n_embd"])
    different = [key for key, values in accepted.items() if described.get(key, SAME[key]) not in values]
    details = "; ".join(f"its {key} is {described[key]!r}, and ours is {SAME[key]!r}" for key in different)
    require(not different, f"this model does not compute what gpt.py does: {details}")
    dropout = described.get("resid_pdrop", 0.1)
    require(type(dropout) in (int, float), f"config.json: resid_pdrop is {dropout!r}, not a number")
    return GPTConfig(**shape, dropout=dropout)


def read_end(folder, described):
    """The id that ends generation in transformers: generation_config.json goes before config.json."""
    path = folder / "generation_config.json"
    if path.is_file():
        described = read_json(path)
        known = r"\w+_token_id|output_\w+|_from_model_config|transformers_version|use_cache|max_\w+"
        other = [key for key in described if not re.fullmatch(known, key)]
        if other:
            log(f"{path}: {', '.join(other)} not used: choose how to sample with the flags of sample.py")
        end = described.get("eos_token_id")
    else:
        path = folder / "config.json"
        end = described.get("eos_token_id", 50256)
    ends = end if isinstance(end, list) else [end]
    single = len(set(map(str, ends))) == 1 and type(ends[0]) is int
    require(single, f"{path}: eos_token_id is {end}, and here a text ends at one token: put one id there")
    return ends[0]


# ---- The tokenizer's options ----
TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None)
UNSUPPORTED = ["add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens", "do_lower_case"]
UNSUPPORTED += ["auto_map", "fast_tokenizer_files"]


def is_plain(template):
    """Does a post-processor of tokenizer.json leave the tokens of a text as they are?"""
    kind = template["type"]
    if kind == "Sequence":
        return all(is_plain(part) for part in template["processors"])
    only_text = kind == "TemplateProcessing" and [list(part) for part in template["single"]] == [["Sequence"]]
    return kind == "ByteLevel" or only_text


def check_options(folder, described):
    """Raise InputError for options of the tokenizer that change a text or its ids."""
    options = read_if_there(folder / "tokenizer_config.json")
    for key in UNSUPPORTED:
        require(not options.get(key), f"tokenizer_config.json: {key} is {options.get(key)!r}, which gpt.py does not do")
    kind = options.get("tokenizer_class") or described.get("tokenizer_class")
    require(kind in TOKENIZER_CLASSES, f"its tokenizer_class is {kind}, and ours is GPT2Tokenizer")
    full = read_if_there(folder / "tokenizer.json")
    if not full:
        return
    wrong = f"by {folder / 'tokenizer.json'}, text is changed or split in another way than GPT-2's"
    splits, model = full["pre_tokenizer"], full["model"]
    usual = splits["type"] == "ByteLevel" and splits.get("use_regex", True) and not splits["add_prefix_space"]
    require(usual, f"{wrong}: its pre_tokenizer is {splits}")
    require(not full["normalizer"], f"{wrong}: its normalizer is {full['normalizer']}")
    require(full["decoder"]["type"] == "ByteLevel", f"{wrong}: its decoder is {full['decoder']}")
    template = full.get("post_processor")
    require(not template or is_plain(template), f"{wrong}: its post_processor adds tokens: {template}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(key), f"{wrong}: its {key} is {model.get(key)!r}")


# ---- Added and special tokens ----
def declared_tokens(folder):
    """Yield (file, use, content, id or None, token as described) for each added or special token."""
    for token in read_if_there(folder / "tokenizer.json").get("added_tokens", []):
        yield "tokenizer.json", "added_tokens", token["content"], token["id"], token
    for content, i in read_if_there(folder / "added_tokens.json").items():
        yield "added_tokens.json", "added_tokens", content, i, {}
    files = {name: read_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
    options, older = files.values()
    if "GPT2" in (options.get("tokenizer_class") or "GPT2Tokenizer"):  # with defaults of its own
        absent = [use for use in ("bos_token", "eos_token", "unk_token") if use not in options and use not in older]
        files["tokenizer_config.json"] = dict.fromkeys(absent, EOT) | options
    for file, described in files.items():
        for i, token in described.get("added_tokens_decoder", {}).items():
            yield file, "added_tokens_decoder", token["content"], int(i), token
        uses = [(key, value) for key, value in described.items() if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = described.get(key) or []
            uses += [(key, token) for token in (more.values() if isinstance(more, dict) else more)]
        for use, token in uses:
            if isinstance(token, dict):
                yield file, use, token["content"], None, token
            elif isinstance(token, str):
                yield file, use, token, None, {}


def is_marker(content):
    """Is this a name in brackets, as </s>, [PAD] and <|endoftext|> are? They are several words of SPLIT, never one."""
    return regex.fullmatch(r"[<\[|]\S*[\p{L}\p{N}]\S*[>\]|]", content) is not None


def is_unused(content):
    """Is this the name of a token that fills up a batch or a vocabulary, as <pad>, [unused7] and <|reserved_0|> do?"""
    return is_marker(content) and re.search("pad|unused|reserved", content.lower()) is not None


def added_tokens(folder, vocab, end):
    """{content: id} of the tokens that no text gives, those of `vocab` among them. Raises InputError."""
    declared = list(declared_tokens(folder))
    ids = dict(vocab)
    for file, _, content, i, _ in declared:
        same = i is None or ids.setdefault(content, i) == i
        require(same, f"two files disagree: {content} is id {ids.get(content)}, and {i} in {file}")
    names = [content for content, i in ids.items() if i == end]
    padding = {content for _, use, content, _, _ in declared if use == "pad_token"}
    for file, _, content, _, token in declared:
        harmless = is_unused(content) or content in (*names, *padding, EOT) and is_marker(content)
        where = ", ".join(dict.fromkeys(f"{file} ({use})" for file, use, also, *_ in declared if also == content))
        away = "delete it there if your texts do not use it"
        require(harmless, f"a text with {content!r} has other ids in transformers than here, by {where}: {away}")
        used = content in (*names, EOT)
        absent = f"the vocabulary has no {content}, and transformers adds it by {where}: name another token there"
        require(content in ids or not used, absent)
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token.get(key)]
        require(not odd or not used, f"{file}: {content} has the option {', '.join(odd)}, and ours has not")
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
    """Ids of bytes and merges, of other tokens, and of the end of text -> Tokenizer, {special token: id}."""
    wrong = "the vocabulary is not GPT-2's"
    names = {i: content for content, i in others.items()}
    twice = len(names) < len(others) or names.keys() & ranks.values()
    require(not twice, f"{wrong}: two of its tokens have the same id")
    at = [f"is {token.decode(errors='replace')!r}" for token, i in ranks.items() if i == end] or ["no token has"]
    choices = ", ".join(f"{i} ({content})" for i, content in names.items()) or "an added token, and this has none"
    mend = f"set eos_token_id in config.json and generation_config.json to the end of text: {choices}"
    require(end in names, f"{wrong}: generation ends at id {end}, which {at[0]}: {mend}")
    special = {content: others[content] for content in (names[end], EOT) if content in others}
    merged = list(ranks.values())[256:]
    require(merged == sorted(merged), f"{wrong}: its merges are not in the order of their ids")
    ranks = dict(ranks)
    top = max(*ranks.values(), *special.values())
    for content, i in others.items():
        word = regex.fullmatch(SPLIT, content) or content.encode() in ranks
        require(not word, f"{wrong}: no merge makes its token {content!r}")
        if i <= top and i != end:  # no text gives it, but the model may: it is decoded as its name
            ranks[content.encode()] = i
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    missing = set(range(top + 1)) - {*ranks.values(), end}
    require(not missing, f"{wrong}: no token has the ids {sorted(missing)[:5]}")
    return Tokenizer(ranks, "bytes" if len(ranks) == 256 else "bpe", end), special


def read_tokenizer(folder, end=None, described=None):
    """The published vocabulary -> Tokenizer, {special token: id}; raises InputError if it isn't built like GPT-2's.

    A text ends at the id `end`, by default that of <|endoftext|>; `described` is config.json.
    """
    try:
        check_options(folder, described or {})
        (ranks, others), *second = [read_ranks(*found) for found in read_vocabularies(folder)]
        for also_ranks, also_others in second:
            both = others.keys() & also_others.keys()
            same = ranks == also_ranks and all(others[token] == also_others[token] for token in both)
            require(same, f"{folder}: tokenizer.json disagrees with vocab.json and merges.txt: delete the stale ones")
            others |= also_others
        end = others.get(EOT) if end is None else end
        return build(ranks, added_tokens(folder, others, end), end)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"the vocabulary is not GPT-2's: {type(error).__name__}, {error}") from error
