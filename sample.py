"""Prompt -> text, for any checkpoint; several models side by side.

    python sample.py --model scratch --prompt "The import statement"
    python sample.py --model scratch mine --prompt "Once" --temperature 0.8 --top_p 0.9
    echo "Once upon" | python sample.py --model mine        a prompt from another program
    python sample.py --model mine                           asks for prompts in the terminal
    python sample.py --model gpt2 --adapter my-adapter      a base with the adapter that finetune.py has saved

Generated text goes to stdout, remarks to stderr. A base model continues a text; it has not been taught to answer.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import shutil
import sys
import textwrap
from pathlib import Path


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
    add("--greedy", action="store_true", help="always take the most probable token: --temperature 0")
    add("--num_samples", type=int, default=1, help="continuations per model, generated as one batch (default: 1)")
    add("--seed", type=int, default=1337, help="the same seed gives the same text (default: 1337)")
    add("--stop", nargs="+", default=[], help="end before any of these strings")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    dtypes = ("auto", "float32", "bfloat16", "int8")
    add("--dtype", default="auto", choices=dtypes, help="auto is bfloat16 where native; int8 is faster")
    add("--json", action="store_true", help="one JSON object a line: model, prompt, sample, seed, text")
    return parser


def open_model(name, device="cpu", dtype="float32", adapter=None):
    """A folder, or a name under checkpoints/ -> GPT on the device, Tokenizer; dtype is that of --dtype, or int8."""
    import torch

    from extras import int8, lora
    from gpt import load_checkpoint, require, resolve_dtype

    for folder in (Path(name), Path("checkpoints", name)):
        foreign = (folder / "config.json").exists() and not (folder / "tokenizer.tiktoken").exists()
        advice = f"if it is a GPT-2 of Hugging Face's, run python convert_gpt2.py {folder} --out DIR"
        require(not foreign, f"{folder} has no tokenizer.tiktoken, it is not a checkpoint of ours: {advice}")
        is_adapter = (folder / lora.CONFIG).exists()
        require(not is_adapter, f"{folder} is an adapter: use python sample.py --model ITS_BASE --adapter {folder}")
    device = torch.device(device)
    model, tokenizer = load_checkpoint(name)
    if adapter:
        lora.load_adapter(model, adapter, name)
    if dtype == "int8":
        return int8.quantize(model).to(device), tokenizer
    return model.to(device, resolve_dtype(dtype, device)), tokenizer


def decode_stream(tokenizer, ids):
    """Yield the text of each id; bytes are held back until a character is complete. Raises InputError."""
    from gpt import require

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        require(0 <= i < tokenizer.vocab_size, f"there is no token {i}: the ids are 0 to {tokenizer.vocab_size - 1}")
        yield decoder.decode(tokenizer.token_bytes[i])
    yield decoder.decode(b"", final=True)


def until(stops, pieces):
    """Yield pieces of text up to the first stop string; the possible beginning of one is held back."""
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
        import gpt
        from extras import native

        self.name, self.args = name, args
        self.device = gpt.resolve_device(args.device)
        self.model, self.tokenizer = open_model(name, self.device, args.dtype, args.adapter)
        native.speed_up(self.model)
        self.generator = gpt.torch.Generator(self.device).manual_seed(args.seed)

    def tokens(self, prompt):
        """The tokens that follow the prompt, step by step, (num_samples, 1) each, as from GPT.stream."""
        import gpt

        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eot]
        context = self.model.config.block_size
        if len(ids) > context:
            gpt.log(f"{self.name}: the prompt has {len(ids):,} tokens, only the last {context:,} fit into the context")
        idx = gpt.torch.tensor([ids[-context:]] * self.args.num_samples, device=self.device)  # (B, T)
        options = {"temperature": 0 if self.args.greedy else self.args.temperature, "top_k": self.args.top_k}
        options |= {"top_p": self.args.top_p, "eot": self.tokenizer.eot, "generator": self.generator}
        return self.model.stream(idx, self.args.max_new_tokens, **options)

    def text(self, ids):
        """Pieces of text from an iterable of ids, up to the end of text or a stop string."""
        ids = itertools.takewhile(lambda i: i != self.tokenizer.eot, ids)
        ids = (i for i in ids if i < self.tokenizer.vocab_size)  # a padded embedding has rows without a token
        return until(self.args.stop, decode_stream(self.tokenizer, ids))

    def speak(self, prompt):
        """Pieces of one continuation, each as soon as it is complete."""
        return self.text(token[0].item() for token in self.tokens(prompt))

    def samples(self, prompt):
        """num_samples complete continuations."""
        steps = [step.flatten().tolist() for step in self.tokens(prompt)]
        return ["".join(self.text(row)) for row in zip(*steps, strict=True)]


def columns(names, texts, width):
    """Texts side by side under their names, or one below the other if the columns would be narrow."""
    column = (width - 3 * (len(names) - 1)) // len(names)
    if column < 24:
        return "\n\n".join(f"=== {name} ===\n{text}" for name, text in zip(names, texts, strict=True))
    cells = []
    for name, text in zip(names, texts, strict=True):
        cells.append([name[:column], "-" * column])
        for line in text.splitlines():
            cells[-1] += textwrap.wrap(line, column, drop_whitespace=False) or [""]
    rows = itertools.zip_longest(*cells, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def show(speakers, prompt, args):
    """Continue the prompt with every model, and print the results."""
    if len(speakers) == args.num_samples == 1 and not args.json:
        pieces = speakers[0].speak(prompt)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    results = {speaker.name: speaker.samples(prompt) for speaker in speakers}
    for i in range(args.num_samples):
        texts = [samples[i] for samples in results.values()]
        if args.json:
            for name, text in zip(results, texts, strict=True):
                line = {"model": name, "prompt": prompt, "sample": i, "seed": args.seed, "text": text}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            continue
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        texts = [prompt + text for text in texts]
        width = shutil.get_terminal_size((120, 24)).columns
        print(texts[0] if len(texts) == 1 else columns(list(results), texts, width))


def converse(speakers, args):
    """Ask for prompts in the terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)

    print("Type the beginning of a text; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        show(speakers, prompt, args)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):  # before PyTorch is imported: help comes at once
        add_arguments(argparse.ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0])).print_help()
        return
    from extras import compiled

    compiled.begin()  # while PyTorch is imported
    import gpt

    gpt.command(run)(argv)


def read_prompt(args):
    """The text of --prompt, --prompt_file or stdin. Raises InputError if it isn't UTF-8."""
    from gpt import InputError, read_text

    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    source = "standard input" if args.prompt is None else "--prompt"
    try:
        if args.prompt is not None:
            args.prompt.encode()  # bytes of another encoding arrive as lone surrogates
            return args.prompt.removeprefix("\ufeff").replace("\r\n", "\n")
        sys.stdin.reconfigure(encoding="utf-8-sig")  # \r\n becomes \n, as in every text stream
        return sys.stdin.read().rstrip("\n")
    except UnicodeError as error:
        raise InputError(f"{source} is not UTF-8 text: {error}") from error


def run(argv):
    from gpt import Parser, check_sampling, require

    args = add_arguments(Parser(prog="sample.py")).parse_args(argv)
    check_sampling(args.temperature, args.top_k, args.top_p)
    require(1 <= args.max_new_tokens <= 2**31, f"--max_new_tokens is {args.max_new_tokens}, expected 1 to 2**31")
    require(1 <= args.num_samples <= 4096, f"--num_samples is {args.num_samples}, expected 1 to 4096")
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, expected 0 or more")
    require(all(args.stop), "--stop is empty: give a string that ends the text")
    require(len(set(args.model)) == len(args.model), "--model names a checkpoint twice")
    require(args.adapter is None or len(args.model) == 1, "--adapter belongs to one model: use one --model")
    require(args.adapter is None or args.dtype != "int8", "--adapter goes with float32 or bfloat16, not with int8")
    require(args.prompt is None or args.prompt_file is None, "--prompt and --prompt_file exclude each other")
    dialogue = args.prompt is None and args.prompt_file is None and sys.stdin.isatty()
    prompt = None if dialogue else read_prompt(args)
    speakers = [Speaker(name, args) for name in args.model]
    if dialogue:
        return converse(speakers, args)
    try:
        show(speakers, prompt, args)
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print()  # so that the message that follows has a line of its own
        raise


if __name__ == "__main__":
    main()
