"""A checkpoint -> files for transformers or llama.cpp, with the same logits and the same tokens there.

    python -m extras.export scratch --format hf --out my-model           a folder for AutoModelForCausalLM and AutoTokenizer
    python -m extras.export gpt2 --format gguf --out gpt2.gguf           a file for llama.cpp (pip install gguf)
    python -m extras.export gpt2 --format gguf --dtype q8_0 --out gpt2-q8_0.gguf

convert_gpt2.py reads what --format hf writes, and gives back the same checkpoint, bit for bit.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

import gpt
from convert_gpt2 import SAME, SHAPE, TRANSPOSED, characters
from gpt import EOT, InputError, command, load_checkpoint, log, replacing, require

GGUF_NAMES = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
              "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
              "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}  # fmt: skip
GGUF_TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}


CHARACTER = characters()


def spell(token):
    """Bytes -> their characters in vocab.json."""
    return "".join(CHARACTER[byte] for byte in token)


def vocabulary(tokenizer):
    """Tokenizer -> {token as vocab.json spells it: its id}, in the order of the ids, with the end of text."""
    tokens = {spell(token): i for token, i in tokenizer.ranks.items()}
    return dict(sorted((tokens | {EOT: tokenizer.eot}).items(), key=lambda item: item[1]))


def merges(tokenizer):
    """Tokenizer -> [(left, right)], the pairs of tokens that merge, in order of priority.

    tiktoken merges any two neighbours that spell a token, so a token of n bytes can have up to n - 1 pairs. Published
    files usually list one per token; with all of them, the same text gives the same tokens.
    """
    ranks = tokenizer.ranks
    splits = [(token[:i], token[i:]) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))]
    return [(spell(left), spell(right)) for left, right in splits if left in ranks and right in ranks]


def to_hf(model, tokenizer, out):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, without custom code."""
    config, vocab, rules = model.config, vocabulary(tokenizer), merges(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().T if name.endswith(TRANSPOSED) else p.detach() for name, p in model.named_parameters()}
    with replacing(out / "model.safetensors") as part:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part, {"format": "pt"})
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": tokenizer.eot, "content": EOT, **plain, "special": True}
    bpe = {"type": "BPE", "vocab": vocab, "merges": rules, "ignore_merges": True}
    bpe |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    bpe |= {"fuse_unk": False, "byte_fallback": False}
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    weights_elsewhere = ("*.index.json", "model-*.safetensors", "pytorch_model*.bin")
    for pattern in (*weights_elsewhere, "added_tokens.json", "special_tokens_map.json"):
        for path in out.glob(pattern):  # of the model that is overwritten
            path.unlink()
    same = {key: value for key, value in SAME.items() if key not in ("quantization_config", "auto_map")}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    shape = {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()} | {"n_ctx": config.block_size}
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [added],
        "pre_tokenizer": pieces,
        "decoder": pieces,
        "model": bpe,
    }
    tokenizer_json |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    tokenizer_config |= {"bos_token": EOT, "eos_token": EOT, "clean_up_tokenization_spaces": False}
    architecture = {"architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32"}
    files = {
        "vocab.json": vocab,
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": ends | {"_from_model_config": True},
        "config.json": architecture | same | shape | dropouts | ends,
    }
    texts = {"merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in rules)}
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 2
        texts[name] = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
    for name, text in texts.items():
        with replacing(out / name) as part:
            part.write_text(text, encoding="utf-8")


def to_gguf(model, tokenizer, out, dtype):
    """Write a file for llama.cpp: matrices in `dtype`, but vectors and positions in float32, which costs little."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("writing GGUF needs the package gguf: pip install gguf") from error
    config, vocab, kinds = model.config, vocabulary(tokenizer), gguf.GGMLQuantizationType
    unused = [f"[PAD{number}]" for number in range(tokenizer.vocab_size, config.vocab_size)]  # rows that no token has
    types = [gguf.TokenType.CONTROL if number == tokenizer.eot else gguf.TokenType.NORMAL for number in vocab.values()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
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
        writer.add_token_list([*vocab, *unused])
        writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(unused))
        rules = merges(tokenizer) or [(EOT, EOT)]  # llama.cpp wants at least one; this pair occurs in no text
        writer.add_token_merges([f"{left} {right}" for left, right in rules])
        writer.add_bos_token_id(tokenizer.eot)
        writer.add_eos_token_id(tokenizer.eot)
        writer.add_add_bos_token(False)
        for name, p in model.named_parameters():
            place, kind = name.rsplit(".", 1)
            if place.startswith("transformer.h."):
                number, place = place.removeprefix("transformer.h.").split(".", 1)
                target = f"blk.{number}.{GGUF_NAMES[place]}.{kind}"
            else:
                target = f"{GGUF_NAMES[place]}.{kind}"
            wanted = kinds[GGUF_TYPES[dtype]] if p.dim() == 2 and "wpe" not in name else kinds.F32
            if wanted == kinds.Q8_0 and p.shape[1] % 32:  # q8_0 scales 32 neighbours together
                wanted = kinds.F16
            with np.errstate(over="ignore"):  # the next line says it better
                values = gguf.quants.quantize(p.detach().numpy(), wanted)
            require(
                wanted != kinds.F16 or abs(values).max() < float("inf"),
                f"{name} has values beyond the range of float16",
            )
            writer.add_tensor(target, values, raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@command
def main(argv=None):
    parser = gpt.Parser(prog="python -m extras.export", description="A checkpoint -> transformers or llama.cpp.")
    parser.add_argument("model", help="a checkpoint's folder, or its name under checkpoints/")
    formats = {"hf": "a folder for transformers", "gguf": "a file for llama.cpp"}
    parser.add_argument("--format", required=True, choices=formats, help="; ".join(map(": ".join, formats.items())))
    parser.add_argument("--out", required=True, help="the folder or file to write")
    parser.add_argument("--dtype", default="float32", choices=GGUF_TYPES, help="type of matrices in gguf (float32)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    out = Path(args.out)
    to_folder = args.format == "hf"
    default = args.dtype == "float32"
    require(default or not to_folder, "--dtype goes with --format gguf: transformers takes a dtype when it loads")
    require(not (out / gpt.VOCABULARY).exists(), f"{out} is a checkpoint: choose another --out")
    fits = not out.exists() or out.is_dir() == to_folder
    require(fits, f"--format {args.format} writes {formats[args.format]}, and {out} is not one: choose another --out")
    full = any(out.iterdir()) if out.is_dir() else out.exists()
    require(args.overwrite or not full, f"{out} already exists: add --overwrite, or choose another --out")
    model, tokenizer = load_checkpoint(args.model)
    try:
        if args.format == "hf":
            to_hf(model, tokenizer, out)
            use = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
        else:
            to_gguf(model, tokenizer, out, args.dtype)
            use = f"llama-completion -m {out} -no-cnv -p 'Learning is'"
    except OSError as error:
        raise InputError(f"{out} could not be written: {error}") from error
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {n_parameters:,} parameters, vocabulary {tokenizer.vocab_size:,}")
    log(f"try: {use}")


if __name__ == "__main__":
    main()
