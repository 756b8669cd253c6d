"""Prove that our model computes what transformers computes, or find the first block where it does not.

    python -m debug.verify_gpt2 gpt2                          # logits, loss and greedy text against transformers
    python -m debug.verify_gpt2 mine --reference hf-folder    # the same against published files of your choice
    python -m debug.verify_gpt2 gpt2 --random                 # random weights of GPT-2's shape, without a download
    python -m debug.verify_gpt2 gpt2 --diagnose               # make each known mistake on purpose: how visible is it?

The reference is transformers with the published files that the checkpoint was converted from or, for a model of our
own, with its weights as extras.export writes them. The exit status is 1 if the two differ.
"""

import functools
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gpt
from convert_gpt2 import PARAGRAPH
from debug.activations import activations, relative_error, steps
from debug.mistakes import MISTAKES, making
from extras.checkpoints import read_config
from extras.export import to_hf
from extras.published import is_unused
from extras.tables import show
from gpt import GPT, GPTConfig, InputError, Tokenizer, load_checkpoint, log, require

TOLERANCE = 1e-5  # largest relative error of float32 logits


def randomize(model, seed=1):
    """Weights that hide no mistake: small ones would hide a wrong GELU or mask, large embeddings a wrong epsilon."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        std = 0.05 if "wte" in name or "wpe" in name else 2 * p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3
        norm = name.endswith("weight") and p.dim() == 1
        p.data = torch.randn(p.shape, generator=generator) * std + norm
    return model.eval()


def inputs(config, tokenizer):
    """{name: ids (B, T)}, from one token to the whole context."""
    T = config.block_size
    draw = functools.partial(torch.randint, config.vocab_size, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[tokenizer.eot, *tokenizer.encode(PARAGRAPH)][:T]])
    return {
        "one token": draw((1, 1)),
        "a paragraph": text,
        "2 x random tokens": draw((2, T // 2)),
        "full context": draw((1, T)),
    }


def greedy_prompt(config, tokenizer, new_tokens):
    """-> a prompt (1, T), and the number of tokens to generate: at most what fits into the context."""
    prompt = inputs(config, tokenizer)["a paragraph"][:, : min(8, config.block_size // 2)]
    return prompt, min(new_tokens, config.block_size - prompt.shape[1])


def tokens_in_common(a, b):
    """How many tokens agree before the first difference."""
    return (a == b).long().cumprod(0).sum().item()


def loss_of(logits, idx):
    """Cross-entropy in nats per token; None for a single token, which has no next one."""
    if idx.shape[1] == 1:
        return None
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), idx[:, 1:].flatten()).item()


def first_difference(ours, reference, n_layer):
    """The first activations that differ by more than the tolerance -> (what is computed there, relative error)."""
    for name, side, what in steps(n_layer):
        error = relative_error(ours[name, side], reference[name, side])
        if not error <= TOLERANCE:  # NaN is a difference, too
            return what, error
    return None, 0.0


# ---- Our model and the reference, compared ----
# settings of config.json that change the precision or the form of the same computation
SAME_RESULT = {"reorder_and_upcast_attn": False, "return_dict": True, "torchscript": False}
SAME_SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size")


def load_reference(model, tokenizer, folder=None):
    """transformers' GPT-2 with the weights in `folder` or with ours, and the ids at which it ends a text.

    Raises InputError if they don't fit.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("the reference is the package transformers: pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    with tempfile.TemporaryDirectory() as exported:
        if folder is None:
            to_hf(model, tokenizer, Path(exported))
        try:
            described, _ = transformers.GPT2Config.get_config_dict(folder or exported)
            config = transformers.GPT2Config.from_dict(described | SAME_RESULT)
            options["config"] = config
            reference, report = transformers.GPT2LMHeadModel.from_pretrained(folder or exported, **options)
        except Exception as error:
            raise InputError(f"transformers can't load {folder or 'our weights'}: {error}") from error
    missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})  # the head is tied
    require(not missing, f"{', '.join(missing[:3])} is missing in {folder}")
    same = all(getattr(config, key) == getattr(model.config, key) for key in SAME_SHAPE)
    require(same and config.n_positions >= model.config.block_size, f"the model in {folder} has a different shape")
    end = reference.generation_config.eos_token_id
    reference.generation_config = transformers.GenerationConfig()  # the folder's may have a repetition penalty
    return reference.eval(), end if isinstance(end, list) else [end]


def insert(tokenizer, special, text):
    """text -> ids, with the names of special tokens replaced by their ids."""
    ids = []
    for piece in re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]:
        ids += [special[piece]] if piece in special else tokenizer.encode(piece)
    return ids


def different_text(tokenizer, folder):
    """The first text, with special and added tokens, to which the published tokenizer gives other ids, or None."""
    import transformers

    try:
        published = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"transformers can't load the tokenizer in {folder}: {error}") from error
    added = published.get_added_vocab()
    special = {name: i for name, i in tokenizer.special_tokens.items() if name in added}
    texts = [f"{PARAGRAPH}\n\n  {PARAGRAPH.upper()}\t1234 naïve 日本 🎉", " begins with a space", "a"]
    texts += [f"a {name} b{name}c" for name in added if name in special or not is_unused(name, [published.pad_token])]
    return next((text for text in texts if published(text)["input_ids"] != insert(tokenizer, special, text)), None)


@torch.no_grad()
def compare(model, reference, tokenizer):
    """Both models on all inputs -> rows of figures. Leaves the reference in float64, which is exact in comparison."""
    examples = inputs(model.config, tokenizer)
    single = {name: reference(idx).logits for name, idx in examples.items()}
    reference.double()
    for name, idx in tqdm(examples.items(), desc="comparing", delay=1, disable=None, leave=False):
        ours, exact = model(idx)[0], reference(idx).logits
        row = {"input": name, "tokens": idx.numel(), "relative_error": relative_error(ours, exact)}
        row["transformers_float32"] = relative_error(single[name], exact)
        row["top1"] = (ours.argmax(-1) == exact.argmax(-1)).double().mean().item()
        yield row | {"loss": loss_of(ours, idx), "reference_loss": loss_of(exact, idx)}


@torch.no_grad()
def verify(model, reference, ends, tokenizer, folder, new_tokens):
    """-> the rows of compare, and a verdict."""
    rows = list(compare(model, reference, tokenizer))
    worst = torch.tensor([row["relative_error"] for row in rows]).max().item()  # NaN if any is
    prompt, count = greedy_prompt(model.config, tokenizer, new_tokens)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    exact = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
    same = tokens_in_common(model.generate(prompt, count, temperature=0)[0], exact[0]) - prompt.shape[1]
    different = different_text(tokenizer, folder) if folder else None
    same_end = set(ends) == {tokenizer.eot}
    computes_the_same = worst <= TOLERANCE and same == count
    verdict = {"equal": computes_the_same and not different and same_end, "relative_error": worst}
    verdict |= {"greedy_tokens": count, "same_greedy_tokens": same, "same_end": same_end}
    verdict |= {"same_vocabulary": different is None if folder else None, "different_text": different}
    where, error = None, 0.0
    if not computes_the_same:
        idx = inputs(model.config, tokenizer)["a paragraph"]
        where, error = first_difference(activations(model, idx), activations(reference, idx), model.config.n_layer)
    return rows, verdict | {"first_difference": where, "error_there": error}


# ---- The known mistakes, made on purpose ----
@torch.no_grad()
def diagnose(model, tokenizer, new_tokens):
    """The effect of each mistake on logits, loss and greedy text -> rows of figures; the model is left unchanged."""
    idx = inputs(model.config, tokenizer)["a paragraph"]
    prompt, count = greedy_prompt(model.config, tokenizer, new_tokens)
    sound = activations(model, idx)
    logits = sound["lm_head", "out"]
    text = model.generate(prompt, count, temperature=0)[0]
    for name in tqdm(MISTAKES, desc="making mistakes", delay=1, disable=None, leave=False):
        torch.manual_seed(0)  # for dropout
        with making(model, name):
            broken = activations(model, idx)
            same = tokens_in_common(model.generate(prompt, count, temperature=0)[0], text) - prompt.shape[1]
        where, error = first_difference(broken, sound, model.config.n_layer)
        change = loss_of(broken["lm_head", "out"], idx) - loss_of(logits, idx)
        row = {"mistake": name, "logits": relative_error(broken["lm_head", "out"], logits), "loss": change}
        yield row | {"same_greedy_tokens": same, "first_difference": where, "error_there": error}


def load(args):
    """The model to verify -> model, tokenizer, and the folder of published files, or None."""
    if args.random:
        require(args.model in gpt.PRESETS, f"--random takes a preset: {', '.join(gpt.PRESETS)}")
        return randomize(GPT(GPTConfig.preset(args.model))), Tokenizer.bytes(), None
    folder = args.reference or read_config(args.model).get("source", {}).get("folder")
    there = folder is None or args.diagnose or Path(folder, "config.json").is_file()
    require(there, f"there are no published files in {folder}: name their folder with --reference")
    return *load_checkpoint(args.model), folder


@gpt.command
def main(argv=None):
    parser = gpt.Parser(
        prog="python -m debug.verify_gpt2", description="Does our model compute what transformers does?"
    )
    add = parser.add_argument
    add("model", nargs="?", default="scratch", help="a folder, or a name under checkpoints/ (default: scratch)")
    add("--reference", help="folder of published files (default: those that the checkpoint was converted from)")
    add("--random", action="store_true", help="the model is a preset of gpt.py with random weights: no download")
    add("--diagnose", action="store_true", help="make each known mistake on purpose, and show its effect")
    add("--new_tokens", type=int, default=200, help="length of the greedy text (default: 200)")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(1 <= args.new_tokens <= 2**31, f"--new_tokens is {args.new_tokens}, expected 1 to 2**31")
    alone = not (args.reference and (args.random or args.diagnose))
    require(alone, "--reference goes with neither --random nor --diagnose")
    model, tokenizer, folder = load(args)
    require(model.config.block_size > 1, "a context of one token leaves nothing to compare")
    if args.diagnose:
        log("each mistake is compared with the same model without it")
        return show(diagnose(model, tokenizer, args.new_tokens), args.json)
    log(f"reference: transformers in float64, with {folder or 'our weights as exported by extras.export'}")
    reference, ends = load_reference(model, tokenizer, folder)
    rows, verdict = verify(model, reference, ends, tokenizer, folder, args.new_tokens)
    show(rows, args.json)
    show([verdict], args.json)
    sys.exit(0 if verdict["equal"] else 1)


if __name__ == "__main__":
    main()
