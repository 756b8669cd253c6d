"""Prove that our model computes what transformers computes, or find the first place where it doesn't.

    python -m debug.verify_gpt2 gpt2                          logits, loss and greedy text against transformers
    python -m debug.verify_gpt2 gpt2 --diagnose               put in each known mistake on purpose: how visible is it?
    python -m debug.verify_gpt2 mine --reference hf-folder    where does my own conversion differ from the published files?
    python -m debug.verify_gpt2 gpt2 --random                 random weights of GPT-2's shape, without a download

The reference is transformers with the published files that the checkpoint was converted from; for a model of our own,
with its weights as extras.export writes them. Exit status 1 if the two differ.
"""

import functools
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gpt
from convert_gpt2 import PARAGRAPH, convert, read_json
from debug.activations import activations, places
from debug.mistakes import MISTAKES, making
from extras.export import to_hf
from gpt import GPT, GPTConfig, InputError, Tokenizer, command, find_checkpoint, load_checkpoint, log, require

TOLERANCE = 1e-5  # largest relative error of float32 logits: max |difference| / max |reference|


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def randomize(model, seed=1):
    """Weights that hide no mistake: small ones would hide a wrong GELU or mask, large embeddings a wrong epsilon."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        std = 0.05 if "wte" in name or "wpe" in name else 2 * p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3
        norm = name.endswith("weight") and p.dim() == 1
        p.data = torch.randn(p.shape, generator=generator) * std + norm
    return model.eval()


def inputs(config, tokenizer):
    """{what it is: ids (B, T)}, from one token to the whole context."""
    T = config.block_size
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, config.vocab_size, generator=generator)
    text = torch.tensor([[tokenizer.eot, *tokenizer.encode(PARAGRAPH)][:T]])
    return {
        "one token": draw((1, 1)),
        "a paragraph": text,
        "2 x random tokens": draw((2, T // 2)),
        "full context": draw((1, T)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Ours and the reference, compared.


@contextmanager
def reference_of(model, tokenizer, folder=None):
    """transformers' GPT-2 with the weights in `folder`, or with ours."""
    try:
        import transformers
    except ImportError as error:
        raise InputError("the reference is the package transformers: pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if folder is not None:
        path = Path(folder, "config.json")
        is_gpt2 = path.is_file() and read_json(path).get("model_type") == "gpt2"
        require(is_gpt2, f"{folder} does not hold the published files of a GPT-2")
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            to_hf(model, tokenizer, Path(scratch))
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        try:
            loaded, report = transformers.GPT2LMHeadModel.from_pretrained(folder or scratch, **options)
        except Exception as error:
            what = folder or "our own weights"
            raise InputError(f"transformers cannot read {what}: {type(error).__name__}, {error}") from error
        missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})  # the head is tied
        require(not missing, f"transformers finds no {', '.join(missing[:3])} in {folder}")
        theirs, ours = loaded.config, model.config
        same = all(getattr(theirs, key) == getattr(ours, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size"))
        same = same and theirs.n_positions >= ours.block_size
        require(same, f"the model in {folder} has another shape")
        yield loaded.eval()


def same_tokens(tokenizer, folder):
    """Does the published tokenizer give the same tokens as ours? None if transformers finds none in the folder."""
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:
        return None
    text = f"{PARAGRAPH}\n\n  {PARAGRAPH.upper()}\t1234 naïve 日本 🎉"
    return theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def loss_of(logits, idx):
    """Cross-entropy in nats per token; None for a single token, which has no next one."""
    if idx.shape[1] == 1:
        return None
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), idx[:, 1:].flatten()).item()


@torch.no_grad()
def compare(model, reference, tokenizer, new_tokens):
    """Both models on all inputs -> rows of figures; leaves the reference in float64."""
    examples = inputs(model.config, tokenizer)
    rows = []
    single = {name: reference(idx).logits for name, idx in examples.items()}
    reference.double()
    for name, idx in tqdm(examples.items(), desc="comparing", delay=1, disable=None, leave=False):
        ours, exact = model(idx)[0], reference(idx).logits
        rows.append({"input": name, "tokens": idx.numel(), "relative_error": relative_error(ours, exact),
                     "transformers_float32": relative_error(single.pop(name), exact),
                     "top1": (ours.argmax(-1) == exact.argmax(-1)).double().mean().item(),
                     "loss": loss_of(ours, idx), "reference_loss": loss_of(exact, idx)})  # fmt: skip
    prompt, count = greedy(model, tokenizer, new_tokens)
    generated = model.generate(prompt, count, temperature=0)[0]
    reference.generation_config = type(reference.generation_config)()  # the folder's may have a repetition penalty, say
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    exact = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)[0]
    rows.append({"input": "greedy text", "tokens": count, "same": first_difference(generated, exact, prompt.shape[1])})
    return rows


def greedy(model, tokenizer, new_tokens):
    """The prompt of the greedy text, and how many tokens to generate: at most what fits into the context."""
    prompt = inputs(model.config, tokenizer)["a paragraph"][:, : min(8, model.config.block_size // 2)]
    return prompt, min(new_tokens, model.config.block_size - prompt.shape[1])


def first_difference(a, b, start):
    """How many tokens after the prompt agree before the first difference."""
    differ = (a[start:] != b[start:]).nonzero()
    return differ[0].item() if len(differ) else len(a) - start


def show(rows):
    print(f"{'':<26} relative error of float32")
    print(f"{'input':<18} {'tokens':>6}  {'ours':>9}  {'transformers':>16}  {'top-1':>7}  {'loss':>9}  reference")
    for row in rows[:-1]:
        errors = f"{row['relative_error']:>9.1e}  {row['transformers_float32']:>16.1e}"
        losses = "" if row["loss"] is None else f"{row['loss']:>9.6f}  {row['reference_loss']:>9.6f}"
        print(f"{row['input']:<18} {row['tokens']:>6,}  {errors}  {row['top1']:>7.2%}  {losses}".rstrip())
    print(f"greedy text: {rows[-1]['same']} of {rows[-1]['tokens']} tokens the same")


# ---------------------------------------------------------------------------------------------------------------------
# Where two computations first differ.


def parting(ours, reference, n_layer):
    """The first place where two sets of activations differ by more than the tolerance -> (place, relative error)."""
    errors = ((what, relative_error(ours[name, side], reference[name, side])) for name, side, what in places(n_layer))
    return next((place for place in errors if not place[1] <= TOLERANCE), (None, 0.0))


@torch.no_grad()
def diagnose(model, tokenizer, new_tokens):
    """The effect of each mistake on logits, loss and greedy text -> rows of figures; the model is left unchanged."""
    idx = inputs(model.config, tokenizer)["a paragraph"]
    prompt, new_tokens = greedy(model, tokenizer, new_tokens)
    sound = activations(model, idx)
    logits = sound["lm_head", "out"]
    text = model.generate(prompt, new_tokens, temperature=0)[0]
    rows = []
    for name in tqdm(MISTAKES, desc="breaking it", delay=1, disable=None, leave=False):
        torch.manual_seed(0)  # for dropout
        with making(model, name):
            broken = activations(model, idx)
            generated = model.generate(prompt, new_tokens, temperature=0)[0]
        place, by = parting(broken, sound, model.config.n_layer)
        rows.append({"mistake": name, "relative_error": relative_error(broken["lm_head", "out"], logits),
                     "loss": loss_of(broken["lm_head", "out"], idx), "sound_loss": loss_of(logits, idx),
                     "same_tokens": first_difference(generated, text, prompt.shape[1]), "tokens": new_tokens,
                     "parts_at": place, "parts_by": by})  # fmt: skip
    return rows


def show_mistakes(rows):
    print(f"{'mistake':<31} {'logits':>7}  {'loss':>6}  {'greedy text':>11}  first difference (relative error there)")
    for row in rows:
        print(f"{row['mistake']:<31} {row['relative_error']:>7.0e}  {row['loss'] - row['sound_loss']:>+6.0e}  "
              f"{row['same_tokens']:>4} of {row['tokens']:<4}  {row['parts_at']} ({row['parts_by']:.0e})")  # fmt: skip
    loss = f"loss: nats per token, added to {rows[0]['sound_loss']:.3f}"
    print(f"logits: max |difference| / max |sound|; {loss}; greedy text: tokens before the first difference")


def find_model(args, scratch):
    """-> model, tokenizer, and the folder of the published files, or None."""
    if args.random:
        require(args.name in gpt.PRESETS, f"--random takes a preset: {', '.join(gpt.PRESETS)}")
        return randomize(GPT(GPTConfig.preset(args.name))), Tokenizer.bytes(), None
    if Path(args.name, gpt.CONFIG).is_file() and not Path(args.name, gpt.VOCABULARY).exists():  # published files
        convert(args.name, scratch)
        return *load_checkpoint(scratch), Path(args.name)
    folder = find_checkpoint(args.name)
    source = read_json(folder / "config.json").get("source", {}).get("folder")
    there = source and (Path(source) / "config.json").is_file()
    advice = "give them by --reference, or add --own, which proves the computation, but not the conversion"
    needless = not source or args.reference or args.own or args.diagnose
    require(there or needless, f"the published files in {source} are gone: {advice}")
    return *load_checkpoint(folder), source if there and not args.own else None


@command
def main(argv=None):
    parser = gpt.Parser(
        prog="python -m debug.verify_gpt2", description="Prove that our model computes what transformers computes."
    )
    add = parser.add_argument
    add("name", nargs="?", default="gpt2", help="a checkpoint, or a folder of published files (default: gpt2)")
    add("--reference", help="folder of published files (default: what the checkpoint was converted from)")
    add("--own", action="store_true", help="compare with the checkpoint's own weights: not a proof of the conversion")
    add("--random", action="store_true", help="name is a preset of gpt.py, and its weights are random: no download")
    add("--diagnose", action="store_true", help="put in each known mistake on purpose, and show its effect")
    add("--new_tokens", type=int, default=200, help="length of the greedy text (default: 200)")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(1 <= args.new_tokens <= 2**31, f"--new_tokens is {args.new_tokens}, expected 1 to 2**31")
    chosen = [flag for flag in ("reference", "own", "random") if getattr(args, flag)]
    require(len(chosen) < 2, f"--{' and --'.join(chosen)} exclude each other")
    require(not (args.diagnose and args.reference), "--diagnose goes without --reference: it needs none")
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer, folder = find_model(args, scratch)
        require(model.config.block_size > 1, "a context of one token leaves nothing to compare")
        if args.diagnose:
            log("each mistake is compared with the same model without it; leave out --diagnose to compare with GPT-2")
            rows = diagnose(model, tokenizer, args.new_tokens)
            return print("\n".join(map(json.dumps, rows))) if args.json else show_mistakes(rows)
        folder = args.reference or folder
        log(f"reference: transformers in float64, with {folder or 'our weights as exported by extras.export'}")
        with reference_of(model, tokenizer, folder) as reference:
            rows = compare(model, reference, tokenizer, args.new_tokens)
            errors = torch.tensor([row["relative_error"] for row in rows[:-1]], dtype=torch.float64)
            worst = errors.max().item()  # nan if any is
            alike = same_tokens(tokenizer, folder) if folder else None
            equal = worst <= TOLERANCE and rows[-1]["same"] == rows[-1]["tokens"] and alike is not False
            place, by = None, 0.0
            if not equal:
                idx = inputs(model.config, tokenizer)["a paragraph"]
                place, by = parting(activations(model, idx), activations(reference, idx), model.config.n_layer)
    if args.json:
        verdict = {"equal": equal, "worst": worst, "same_tokens": alike, "parts_at": place, "parts_by": by}
        print("\n".join(map(json.dumps, [*rows, verdict])))
    else:
        show(rows)
        wrong = []
        if not worst <= TOLERANCE:
            wrong.append(f"the relative error is {worst:.1e}, more than {TOLERANCE:.0e}")
        if rows[-1]["same"] < rows[-1]["tokens"]:
            wrong.append("the greedy text differs")
        if alike is False:
            wrong.append("the same text has other tokens")
        if place:
            wrong.append(f"they first differ at {place}, with a relative error of {by:.0e}")
        if equal:
            print(f"equal: the largest relative error is {worst:.1e}; {TOLERANCE:.0e} is allowed")
        else:
            print(f"different: {'; '.join(wrong)}")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
