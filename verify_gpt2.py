"""The proof that our model computes what the reference computes, and the place where a wrong one parts from it.

    python verify_gpt2.py gpt2                          beside transformers in float64: logits, loss, greedy text
    python verify_gpt2.py gpt2 --diagnose               each known mistake, put in on purpose: how far does it show?
    python verify_gpt2.py mine --reference hf-folder    where does my own conversion part from the published files?
    python verify_gpt2.py gpt2 --random                 the same for random weights of GPT-2's shape, with no download

The reference is the published files where they were converted from, read by transformers; for a model of our own, its
weights as export.py writes them. Exit status 1 if the two differ.
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
from convert_gpt2 import PARAGRAPH, convert
from export import to_hf
from gpt import GPT, GPTConfig, InputError, Tokenizer, command, load_checkpoint, require, say
from hub import read_json
from mistakes import MISTAKES, making
from models import find_checkpoint

TOLERANCE = 1e-5  # largest relative error of float32 logits: max |difference| / max |reference|


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def randomize(model, seed=1):
    """Weights that hide nothing: small ones would keep a wrong GELU or mask under the tolerance, and large embeddings a
    wrong epsilon."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        std = 0.05 if "wte" in name or "wpe" in name else 2 * p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3
        norm = name.endswith("weight") and p.dim() == 1
        p.data = torch.randn(p.shape, generator=generator) * std + norm
    model.tie()
    return model.eval()


def inputs(config, tokenizer):
    """{what it is: token numbers (B, T)}, from one token to the whole context."""
    T, generator = config.block_size, torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, config.vocab_size, generator=generator)
    text = torch.tensor([[tokenizer.eot, *tokenizer.encode(PARAGRAPH)][:T]])
    return {"one token": draw((1, 1)), "a paragraph": text, "2 x random tokens": draw((2, T // 2)), "full context": draw((1, T))}


# ---------------------------------------------------------------------------------------------------------------------
# Ours beside the reference.


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
        kind = read_json(path).get("model_type") if (path := Path(folder) / "config.json").is_file() else None
        require(kind == "gpt2", f"{folder} does not hold the published files of a GPT-2")
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            to_hf(model, tokenizer, Path(scratch))
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        try:
            loaded, report = transformers.GPT2LMHeadModel.from_pretrained(folder or scratch, **options)
        except Exception as error:
            raise InputError(f"transformers cannot read {folder or 'our own weights'}: {type(error).__name__}, {error}") from error
        missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})  # the head is tied
        require(not missing, f"transformers finds no {', '.join(missing[:3])} in {folder}")
        theirs, ours = loaded.config, model.config
        require((theirs.n_layer, theirs.n_head, theirs.n_embd, theirs.vocab_size) == (ours.n_layer, ours.n_head, ours.n_embd,
                ours.vocab_size) and theirs.n_positions >= ours.block_size, f"the model in {folder} has another shape")  # fmt: skip
        yield loaded.eval()


def same_tokens(tokenizer, folder):
    """Does the published tokenizer give the same tokens as ours? None where transformers finds none in the folder."""
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:  # noqa: BLE001 (whatever it is that the folder lacks)
        return None
    text = f"{PARAGRAPH}\n\n  {PARAGRAPH.upper()}\t1234 naïve 日本 🎉"
    return theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def loss_of(logits, idx):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), idx[:, 1:].flatten()).item() if idx.shape[1] > 1 else None


@torch.no_grad()
def compare(model, reference, tokenizer, new_tokens):
    """Both models on all inputs -> rows of figures; the reference ends in float64."""
    examples, rows = inputs(model.config, tokenizer), []
    single = {name: reference(idx).logits for name, idx in examples.items()}
    reference.double()
    for name, idx in tqdm(examples.items(), desc="comparing", delay=1, disable=None, leave=False):
        ours, exact = model(idx)[0], reference(idx).logits
        rows.append({"input": name, "tokens": idx.numel(), "relative_error": relative_error(ours, exact),
                     "transformers_float32": relative_error(single.pop(name), exact),
                     "top1": (ours.argmax(-1) == exact.argmax(-1)).double().mean().item(),
                     "loss": loss_of(ours, idx), "reference_loss": loss_of(exact, idx)})  # fmt: skip
    prompt, count = greedy(model, tokenizer, new_tokens)
    try:
        made = model.generate(prompt, count, temperature=0)[0]
    except InputError:  # logits that are not finite choose no token: none is the same
        made = prompt.new_full((prompt.shape[1] + count,), -1)
    reference.generation_config = type(reference.generation_config)()  # plain: the folder's may punish repetitions, say
    exact = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[0]  # fmt: skip
    rows.append({"input": "greedy text", "tokens": count, "same": first_difference(made, exact, prompt.shape[1])})
    return rows


def greedy(model, tokenizer, new_tokens):
    """The prompt for a greedy text, and its length: as far as the context reaches."""
    prompt = inputs(model.config, tokenizer)["a paragraph"][:, : min(8, model.config.block_size // 2)]
    return prompt, min(new_tokens, model.config.block_size - prompt.shape[1])


def first_difference(a, b, start):
    """How many tokens after the prompt are the same before the first that differs."""
    differ = (a[start:] != b[start:]).nonzero()
    return differ[0].item() if len(differ) else len(a) - start


def show(rows):
    print(f"{'':<26} relative error of float32\n{'input':<18} {'tokens':>6}  {'ours':>9}  {'transformers':>16}  "
          f"{'top-1':>7}  {'loss':>9}  reference")  # fmt: skip
    for row in rows[:-1]:
        losses = "" if row["loss"] is None else f"{row['loss']:>9.6f}  {row['reference_loss']:>9.6f}"
        print(f"{row['input']:<18} {row['tokens']:>6,}  {row['relative_error']:>9.1e}  {row['transformers_float32']:>16.1e}  "
              f"{row['top1']:>7.2%}  {losses}".rstrip())  # fmt: skip
    print(f"greedy text: {rows[-1]['same']} of {rows[-1]['tokens']} tokens the same")  # as far as the context reaches


# ---------------------------------------------------------------------------------------------------------------------
# Where two computations part. The modules of both models have the same names, so what goes through them compares.

STEPS = [("ln_1", "in", "the residual stream"), ("ln_1", "out", "LayerNorm 1"), ("attn.c_attn", "out", "queries, keys, values"),
         ("attn.c_proj", "in", "attention: scores, scaling, mask, softmax"), ("attn.c_proj", "out", "attention's projection"),
         ("ln_2", "in", "the residual sum after attention"), ("ln_2", "out", "LayerNorm 2"), ("mlp.c_fc", "out", "the MLP's first layer"),
         ("mlp.c_proj", "in", "GELU"), ("mlp.c_proj", "out", "the MLP's second layer")]  # fmt: skip


def places(n_layer):
    """All places that are compared, in the order of the computation: (module, side, what is computed there)."""
    yield "transformer.wte", "out", "token embedding"
    yield "transformer.drop", "out", "token plus position embedding"
    for i in range(n_layer):
        yield from ((f"transformer.h.{i}.{module}", side, f"block {i}, {what}") for module, side, what in STEPS)
    yield "transformer.ln_f", "in", "the residual stream after the last block"
    yield "transformer.ln_f", "out", "the final LayerNorm"
    yield "lm_head", "out", "the head"


@torch.no_grad()
def activations(model, idx):
    """What goes into and comes out of every module on the way: {(module, side): tensor}."""
    seen, hooks = {}, []
    for name, side, _ in places(model.config.n_layer):

        def note(module, given, made=None, key=(name, side)):
            seen[key] = (given[0] if made is None else made).detach().clone()

        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(note) if side == "in" else module.register_forward_hook(note))
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def parting(ours, reference, n_layer):
    """The first place where two sets of activations differ by more than the tolerance -> (what it is, by how much)."""
    errors = ((what, relative_error(ours[name, side], reference[name, side])) for name, side, what in places(n_layer))
    return next((place for place in errors if not place[1] <= TOLERANCE), (None, 0.0))


@torch.no_grad()
def diagnose(model, tokenizer, new_tokens):
    """Each mistake's effect on the logits, the loss and the greedy text -> rows of figures; the model ends as it began."""
    idx = inputs(model.config, tokenizer)["a paragraph"]
    prompt, new_tokens = greedy(model, tokenizer, new_tokens)
    sound, rows = activations(model, idx), []
    logits, text = sound["lm_head", "out"], model.generate(prompt, new_tokens, temperature=0)[0]
    for name in tqdm(MISTAKES, desc="breaking it", delay=1, disable=None, leave=False):
        torch.manual_seed(0)  # for dropout
        with making(model, name):
            broken = activations(model, idx)
            made = model.generate(prompt, new_tokens, temperature=0)[0]
        place, by = parting(broken, sound, model.config.n_layer)
        rows.append({"mistake": name, "relative_error": relative_error(broken["lm_head", "out"], logits),
                     "loss": loss_of(broken["lm_head", "out"], idx), "sound_loss": loss_of(logits, idx),
                     "same_tokens": first_difference(made, text, prompt.shape[1]), "tokens": new_tokens,
                     "parts_at": place, "parts_by": by})  # fmt: skip
    return rows


def show_mistakes(rows):
    print(f"{'mistake':<31} {'logits':>7}  {'loss':>6}  {'greedy text':>11}  parts first at (relative error there)")
    for row in rows:
        print(f"{row['mistake']:<31} {row['relative_error']:>7.0e}  {row['loss'] - row['sound_loss']:>+6.0e}  "
              f"{row['same_tokens']:>4} of {row['tokens']:<4}  {row['parts_at']} ({row['parts_by']:.0e})")  # fmt: skip
    print("logits: max |difference| / max |sound|; loss: nats per token, beside "
          f"{rows[0]['sound_loss']:.3f}; greedy text: tokens before the first that differs")  # fmt: skip


def find_model(args, scratch):
    """-> model, tokenizer, and the folder of the published files if there is one."""
    if args.random:
        return randomize(GPT(GPTConfig.preset(args.name))), Tokenizer.bytes(), None
    try:
        folder = find_checkpoint(args.name)
    except InputError:
        if not (Path(args.name) / "config.json").is_file():
            raise
        convert(args.name, scratch)
        return *load_checkpoint(scratch), Path(args.name)
    source = read_json(folder / "config.json").get("source", {}).get("folder")
    there = source and (Path(source) / "config.json").is_file()
    require(there or not source or args.reference or args.own or args.diagnose, f"the published files in {source} are gone: give "
            f"them by --reference, or add --own, which proves the computation, but not the conversion")  # fmt: skip
    return *load_checkpoint(folder), source if there and not args.own else None


@command
def main(argv=None):
    parser = gpt.Parser(prog="verify_gpt2.py", description="Proof that our model computes what transformers computes.")
    add = parser.add_argument
    add("name", nargs="?", default="gpt2", help="a checkpoint, or a folder of published files (default: gpt2)")
    add("--reference", help="folder of published files to compare with (default: what the checkpoint was converted from)")
    add("--own", action="store_true", help="compare with the checkpoint's own weights: proves the computation, not the conversion")
    add("--random", action="store_true", help="name is a preset of gpt.py, and its weights are random: no download")
    add("--diagnose", action="store_true", help="put each known mistake in on purpose, and show how far it moves the model")
    add("--new_tokens", type=int, default=200, help="length of the greedy text (default: 200)")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(1 <= args.new_tokens <= 2**31, f"--new_tokens is {args.new_tokens}, expected 1 to 2**31")
    chosen = [flag for flag in ("reference", "own", "random") if getattr(args, flag)]
    require(len(chosen) < 2 and not (args.diagnose and args.reference), f"--{' and --'.join(chosen)} exclude each other, and "
            "--diagnose compares with the sound model itself")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer, folder = find_model(args, scratch)
        require(model.config.block_size > 1, "a context of one token leaves nothing to compare")
        if args.diagnose:
            say("each mistake beside the same model without it; whether that is GPT-2's is for the command without --diagnose")
            rows = diagnose(model, tokenizer, args.new_tokens)
            return print("\n".join(map(json.dumps, rows))) if args.json else show_mistakes(rows)
        folder = args.reference or folder
        say(f"reference: transformers in float64, with {f'the files in {folder}' if folder else 'our weights by way of export.py'}")
        with reference_of(model, tokenizer, folder) as reference:
            rows = compare(model, reference, tokenizer, args.new_tokens)
            worst = torch.tensor([row["relative_error"] for row in rows[:-1]], dtype=torch.float64).max().item()  # nan, if any is
            alike = same_tokens(tokenizer, folder) if folder else None
            equal = worst <= TOLERANCE and rows[-1]["same"] == rows[-1]["tokens"] and alike is not False
            place, by = None, 0.0
            if not equal:
                idx = inputs(model.config, tokenizer)["a paragraph"]
                place, by = parting(activations(model, idx), activations(reference, idx), model.config.n_layer)
    if args.json:
        print("\n".join(map(json.dumps, [*rows, {"equal": equal, "worst": worst, "same_tokens": alike, "parts_at": place, "parts_by": by}])))
    else:
        show(rows)
        wrong = [f"a relative error of {worst:.1e}, where {TOLERANCE:.0e} is allowed"] * (not worst <= TOLERANCE)
        wrong += ["another greedy text"] * (rows[-1]["same"] < rows[-1]["tokens"])
        wrong += ["other tokens for the same text"] * (alike is False)
        parts = f"; they part first at {place}, with a relative error of {by:.0e} there" if place else ""
        print(f"different: {' and '.join(wrong)}{parts}" if wrong else f"equal: no relative error over {worst:.1e}, where "
              f"{TOLERANCE:.0e} is allowed")  # fmt: skip
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
