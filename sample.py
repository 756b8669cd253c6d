"""Prompt -> text, for any checkpoint; several models side by side.

    python sample.py --prompt "The import statement"
    python sample.py --model scratch mine --prompt "Once" --temperature 0.8 --top_p 0.9
    echo "Once upon" | python sample.py --model mine        a prompt from another program
    python sample.py --model mine                           asks for prompts in the terminal
    python sample.py --model gpt2 --adapter my-adapter      a base with the adapter that finetune.py has saved

Generated text goes to stdout, remarks to stderr. A base model continues a text; it has not been taught to answer.
"""

# ruff: noqa: E402 (PyTorch takes seconds to import, and --help needs none of it)
import argparse
import codecs
import contextlib
import importlib
import itertools
import os
import shutil
import sys


def add_arguments(parser):
    add = parser.add_argument
    add("--model", nargs="+", default=["scratch"], help="folders, or names under checkpoints/ (default: scratch)")
    add("--adapter", help="a folder with a LoRA adapter, ours or PEFT's, to put on the model")
    add("--prompt", help="the text to continue (default: --prompt_file, or stdin; in a terminal, it asks for prompts)")
    add("--prompt_file", help="a UTF-8 file with the text to continue")
    add("--max_new_tokens", type=int, default=200, help="generate at most this many tokens (default: 200)")
    add("--temperature", type=float, default=0.8, help="below 1 safer, above 1 wilder, 0 greedy (default: 0.8)")
    add("--top_k", type=int, help="sample from the k most probable tokens only")
    add("--top_p", type=float, help="sample from the fewest tokens whose probabilities add up to p (nucleus sampling)")
    add("--num_samples", type=int, default=1, help="continuations per model, generated as one batch (default: 1)")
    add("--seed", type=int, default=1337, help="the same seed gives the same text (default: 1337)")
    add("--stop", nargs="+", default=[], help="end before any of these strings")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "int8"), help="auto: bfloat16 if native")
    add("--no-native", action="store_true", help="generate in PyTorch, even if there is a C compiler")
    add("--json", action="store_true", help="one JSON object a line: model, prompt, sample, seed, text")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0])).parse_args()

import torch

import gpt
from extras import int8, lora, native, tables
from extras.checkpoints import require_checkpoint
from gpt import InputError, require


def open_model(name, device="cpu", dtype="float32", adapter=None):
    """A folder, or a name under checkpoints/ -> GPT on the device, Tokenizer; dtype is that of --dtype, or int8."""
    require_checkpoint(name)
    model, tokenizer = gpt.load_checkpoint(name)
    if adapter:
        lora.load_adapter(model, adapter, name)
    if dtype == "int8":
        return int8.quantize(model).to(device), tokenizer
    return model.to(device, native.resolve_dtype(dtype, torch.device(device))), tokenizer


def decode_stream(tokenizer, ids):
    """Yield the text of each id; bytes are held back until a character is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.token_bytes[i])
    yield decoder.decode(b"", final=True)


def until(stops, pieces):
    """Yield pieces of text up to the first stop string; what could be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            yield held[: min(found)]
            return
        unsure = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - unsure]
        held = held[len(held) - unsure :]
    yield held


class Speaker:
    """A checkpoint, ready to continue prompts."""

    def __init__(self, name, args):
        self.name, self.args = name, args
        model, self.tokenizer = open_model(name, gpt.resolve_device(args.device), args.dtype, args.adapter)
        self.model = model if args.no_native else native.speed_up(model)
        self.generator = torch.Generator(model.transformer.wpe.weight.device).manual_seed(args.seed)

    def tokens(self, prompt):
        """The tokens that follow the prompt, step by step, (num_samples, 1) each, as from GPT.stream."""
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eot]
        context = self.model.config.block_size
        if len(ids) > context:
            gpt.log(f"{self.name}: the prompt has {len(ids):,} tokens, only the last {context:,} fit into the context")
        idx = torch.tensor([ids[-context:]] * self.args.num_samples, device=self.generator.device)  # (B, T)
        choice = (self.args.temperature, self.args.top_k, self.args.top_p)
        return self.model.stream(idx, self.args.max_new_tokens, *choice, self.tokenizer.eot, self.generator)

    def text(self, ids):
        """Pieces of text from an iterable of ids, up to the end of text or a stop string."""
        ids = itertools.takewhile(lambda i: i != self.tokenizer.eot, ids)
        ids = (i for i in ids if i < self.tokenizer.vocab_size)  # a padded embedding has rows without a token
        return until(self.args.stop, decode_stream(self.tokenizer, ids))


def show(speakers, prompt, args, before=""):
    """Continue the prompt with every model, and print the results, each after `before`."""
    if len(speakers) == args.num_samples == 1 and not args.json:
        pieces = speakers[0].text(step.item() for step in speakers[0].tokens(prompt))
        for piece in itertools.chain([before], pieces, ["\n"]):
            print(piece, end="", flush=True)
        return
    results = {}
    for speaker in speakers:
        rows = torch.cat(list(speaker.tokens(prompt)), dim=1).tolist()  # num_samples lists of ids
        results[speaker.name] = ["".join(speaker.text(row)) for row in rows]
    for i in range(args.num_samples):
        if args.json:
            row = {"prompt": prompt, "sample": i, "seed": args.seed}
            tables.show([{"model": name} | row | {"text": texts[i]} for name, texts in results.items()], as_json=True)
            continue
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        texts = [before + texts[i] for texts in results.values()]
        width = shutil.get_terminal_size((120, 24)).columns
        print(tables.side_by_side(list(results), texts, width) if len(texts) > 1 else texts[0])


def converse(speakers, args):
    """Ask for prompts in the terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing
    gpt.log(f"loaded {', '.join(str(gpt.find_checkpoint(speaker.name)) for speaker in speakers)}")
    gpt.log("Type the beginning of a text: it will be continued, not answered. Ctrl-C ends a text, Ctrl-D ends all.")
    while True:
        try:
            show(speakers, input("> "), args)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print(file=sys.stderr)


def read_prompt(args):
    """The text of --prompt, --prompt_file or stdin; None if that is a terminal. Raises InputError if not UTF-8."""
    if args.prompt_file is not None:
        return gpt.read_text(args.prompt_file).removesuffix("\n")  # which editors and echo add
    if args.prompt is None and sys.stdin.isatty():
        return None
    try:
        data = sys.stdin.buffer.read() if args.prompt is None else os.fsencode(args.prompt)
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeError as error:
        raise InputError(f"the prompt is not UTF-8 text: {error}") from error
    return text.removesuffix("\n") if args.prompt is None else text


@gpt.command
def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    i = words.index("--prompt") if "--prompt" in words[:-1] else None
    if i is not None and not words[i + 1].startswith("--"):  # argparse would take the prompt -hello for a flag
        words[i : i + 2] = [f"--prompt={words[i + 1]}"]
    args = add_arguments(gpt.Parser(prog="sample.py", description=__doc__.splitlines()[0])).parse_args(words)
    gpt.check_sampling(args.temperature, args.top_k, args.top_p)
    require(1 <= args.max_new_tokens <= 2**31, f"--max_new_tokens is {args.max_new_tokens}, expected 1 to 2**31")
    require(1 <= args.num_samples <= 4096, f"--num_samples is {args.num_samples}, expected 1 to 4096")
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, expected 0 or more")
    require(all(args.stop), "--stop is empty: give a string that ends the text")
    require(len(set(args.model)) == len(args.model), "--model names a checkpoint twice")
    require(args.adapter is None or len(args.model) == 1, "--adapter belongs to one model: use one --model")
    require(args.adapter is None or args.dtype != "int8", "--adapter goes with float32 or bfloat16, not with int8")
    require(args.prompt is None or args.prompt_file is None, "--prompt and --prompt_file exclude each other")
    if any("\\n" in text for text in (args.prompt or "", *args.stop)):
        gpt.log(r"\n is a backslash and an n here; for a line feed write $'one\ntwo' in bash, or use --prompt_file")
    if args.num_samples > 1 and args.temperature == 0:
        gpt.log("at temperature 0 all samples are the same: use --num_samples 1, or a higher --temperature")
    prompt = read_prompt(args)
    speakers = [Speaker(name, args) for name in args.model]
    return converse(speakers, args) if prompt is None else show(speakers, prompt, args, before=prompt)


if __name__ == "__main__":
    main()
