"""A checkpoint -> files for transformers or llama.cpp, with the same logits and the same tokens there.

    python -m extras.export scratch --format hf --out my-model    # a folder for AutoModelForCausalLM and AutoTokenizer
    python -m extras.export gpt2 --format gguf --out gpt2.gguf    # a file for llama.cpp (pip install gguf)
    python -m extras.export gpt2 --format gguf --dtype q8_0 --out gpt2-q8_0.gguf

convert_gpt2.py reads what --format hf writes, and gives back the same checkpoint, bit for bit.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

import gpt
from extras.published import SAME, SHAPE, TRANSPOSED, characters
from gpt import EOT, InputError, command, load_checkpoint, log, replacing, require

GGUF_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GGUF_TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
CHARACTER = characters()


def spell(token):
    """Bytes -> their characters in vocab.json."""
    return "".join(CHARACTER[byte] for byte in token)


def vocabulary(tokenizer):
    """-> {token as vocab.json spells it: its id}, in the order of the ids, with the special tokens."""
    tokens = {spell(token): i for token, i in tokenizer.ranks.items()}
    return dict(sorted((tokens | tokenizer.special_tokens).items(), key=lambda item: item[1]))


def merges(tokenizer):
    """Tokenizer -> [(left, right)], the pairs of tokens that merge, in order of priority.

    tiktoken merges any two neighbours that spell a token, so a token of n bytes can have up to n - 1 pairs. Published
    files usually list one per token; with all of them, the same text gives the same tokens.
    """
    ranks = tokenizer.ranks
    splits = [(token[:i], token[i:]) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))]
    return [(spell(left), spell(right)) for left, right in splits if left in ranks and right in ranks]


def tokenizer_json(vocab, rules, special):
    """What the library `tokenizers` needs to know."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": i, "content": name} | options for name, i in special.items()]
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": rules, "ignore_merges": True},
    }


def config_json(config, eot):
    """GPTConfig -> that of transformers."""
    described = {key: values[0] for key, values in SAME.items() if values[0] is not None}
    described |= {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()}
    described |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    described |= {"architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32", "n_ctx": config.block_size}
    return described | {"bos_token_id": eot, "eos_token_id": eot}


def to_hf(model, tokenizer, out):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, without custom code."""
    weights = {}
    for name, p in model.named_parameters():
        weights[name] = (p.T if name.endswith(TRANSPOSED) else p).detach().contiguous()
    with replacing(out / "model.safetensors", parents=True) as part:
        save_file(weights, part, {"format": "pt"})
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (out / name).unlink(missing_ok=True)  # of the model that is overwritten
    end = next(iter(tokenizer.special_tokens))
    vocab, rules = vocabulary(tokenizer), merges(tokenizer)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    files = {
        "config.json": config_json(model.config, tokenizer.eot),
        "generation_config.json": ends | {"max_length": model.config.block_size},  # a pipeline's default is 256 more
        "tokenizer.json": tokenizer_json(vocab, rules, tokenizer.special_tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            "bos_token": end,
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
        },
        "vocab.json": vocab,
    }
    texts = {name: json.dumps(content, ensure_ascii=False, indent=2) + "\n" for name, content in files.items()}
    texts["merges.txt"] = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in rules)
    for name, text in texts.items():
        with replacing(out / name) as part:
            part.write_text(text, encoding="utf-8")


def to_gguf(model, tokenizer, out, dtype):
    """Write a file for llama.cpp: matrices in `dtype`, but vectors and positions in float32, which costs little."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("writing GGUF needs the package gguf: pip install gguf") from error
    config = model.config
    kinds = gguf.GGMLQuantizationType
    tokens = list(vocabulary(tokenizer))
    control = tokenizer.special_tokens.keys()
    types = [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
    for i in range(tokenizer.vocab_size, config.vocab_size):  # rows that no token has
        tokens.append(f"[PAD{i}]")
        types.append(gguf.TokenType.UNUSED)
    with replacing(out, parents=True) as part:
        writer = gguf.GGUFWriter(part, "gpt2")
        writer.add_name(out.stem)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{GGUF_TYPES[dtype]}" if dtype != "float32" else "ALL_F32"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        rules = merges(tokenizer) or [(EOT, EOT)]  # llama.cpp wants at least one; this pair occurs in no text
        writer.add_token_merges([f"{left} {right}" for left, right in rules])
        writer.add_bos_token_id(tokenizer.eot)
        writer.add_eos_token_id(tokenizer.eot)
        writer.add_add_bos_token(False)
        for name, p in model.named_parameters():
            module, kind = name.rsplit(".", 1)
            target = GGUF_NAMES.get(module)
            if target is None:  # transformer.h.0.ln_1 -> blk.0.attn_norm
                _, _, i, module = module.split(".", 3)
                target = f"blk.{i}.{GGUF_NAMES[module]}"
            wanted = kinds[GGUF_TYPES[dtype]] if p.dim() == 2 and "wpe" not in name else kinds.F32
            if wanted == kinds.Q8_0 and p.shape[1] % 32:  # q8_0 scales 32 neighbours together
                wanted = kinds.F16
            writer.add_tensor(f"{target}.{kind}", gguf.quants.quantize(p.detach().numpy(), wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@command
def main(argv=None):
    parser = gpt.Parser(prog="python -m extras.export", description="A checkpoint -> transformers or llama.cpp.")
    parser.add_argument("model", help="a checkpoint's folder, or its name under checkpoints/")
    formats = "hf: a folder for transformers; gguf: a file for llama.cpp"
    parser.add_argument("--format", required=True, choices=("hf", "gguf"), help=formats)
    parser.add_argument("--out", required=True, help="the folder or file to write")
    parser.add_argument("--dtype", default="float32", choices=GGUF_TYPES, help="type of matrices in gguf (float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    out = Path(args.out)
    to_folder = args.format == "hf"
    fits = args.dtype == "float32" or not to_folder
    require(fits, "--dtype goes with --format gguf: transformers takes a dtype when it loads")
    require(not (out / gpt.VOCABULARY).exists(), f"{out} is a checkpoint: choose another --out")
    exists = any(out.iterdir()) if out.is_dir() else out.exists()
    require(args.overwrite or not exists, f"{out} already exists: add --overwrite, or choose another --out")
    model, tokenizer = load_checkpoint(args.model)
    if to_folder:
        to_hf(model, tokenizer, out)
        use = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
    else:
        to_gguf(model, tokenizer, out, args.dtype)
        use = f"llama-completion -m {out} -no-cnv -p 'Learning is'"
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {n_parameters:,} parameters, vocabulary {tokenizer.vocab_size:,}")
    log(f"try: {use}")


if __name__ == "__main__":
    main()
