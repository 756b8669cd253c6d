"""What is wrong with the text that a model generates?

    python -m debug.text                              # at five temperatures: loops, repetition, collapse, noise, ...
    python -m debug.text --model gpt2 --prompt "Learning is" --max_new_tokens 400

distinct-n is from Li et al. 2016, "A Diversity-Promoting Objective Function".
"""

import math
from collections import Counter

import numpy as np
import torch

import gpt
from debug.activations import entropy, hooked
from extras.checkpoints import training_text
from extras.tables import show
from gpt import load_checkpoint, log, require

TEMPERATURES = (0, 0.5, 0.8, 1.0, 1.5)
SAMPLES = 8  # a single one is a coin flip: repetition was 0 to 47% over eight seeds


def longest_loop(ids, longest_period=64):
    """The longest stretch that repeats itself with some period -> (its tokens, its period); (0, 0) if there is none."""
    ids, best = np.asarray(ids), (0, 0)
    for period in range(1, min(longest_period, len(ids) // 2) + 1):
        run = longest = 0
        for same in ids[period:] == ids[:-period]:
            run = run + 1 if same else 0
            longest = max(longest, run)
        if longest >= period and longest + period > best[0]:
            best = (longest + period, period)
    return best


def repeated(ids, n=4):
    """The share of n-grams that occurred before: 1 - distinct-n."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def measure(ids, entropies, losses, text, asked):
    """A generated text: its ids, the entropy before each, the loss of each, and the string -> figures."""
    loop, period = longest_loop(ids)
    row = {"tokens": len(ids), "asked": asked, "repeated": repeated(ids), "loop": loop, "period": period}
    entropies, losses = entropies or [0.0], losses or [0.0]  # of an empty text
    quarter = max(1, len(ids) // 4)
    row["entropy_start"] = float(np.mean(entropies[:quarter]))
    row["entropy_end"] = float(np.mean(entropies[-quarter:]))
    row["excess_loss"] = float(np.mean(losses) - np.mean(entropies))  # 0 on average for tokens drawn at temperature 1
    row["broken"] = text.count("\ufffd") / max(1, len(text))
    return row


ADVICE = {
    "early end": "right for a short answer; otherwise the training text ends too often",
    "a loop": "sample with --temperature 0.8 --top_p 0.9; if that loops, too, train longer or on more text",
    "repetition": "a higher temperature, or more training",
    "collapse": "the model is sure of its own repetition: sample, or choose a longer context",
    "word salad": "the tokens are less probable than the model expects: a lower temperature, or --top_p 0.9",
    "gibberish": "a lower temperature or --top_p 0.9; at every temperature, more training",
    "noise": "the model has hardly learned anything yet",
}


def verdict(row, vocab_size):
    """Figures -> what is wrong: keys of ADVICE, or "no problem found"."""
    collapsed = row["entropy_end"] < min(0.1 * row["entropy_start"], 0.5)
    loop = row["loop"] >= max(12, row["tokens"] / 4)
    found = {
        "early end": row["tokens"] < row["asked"] / 4,
        "a loop": loop,
        "repetition": row["repeated"] > 0.3 and not loop,
        "collapse": row["tokens"] >= 20 and collapsed,
        "word salad": row["excess_loss"] > 1,
        "gibberish": row["broken"] > 0.01,
        "noise": row["entropy_start"] > 0.8 * math.log(vocab_size),
    }
    return [name for name, wrong in found.items() if wrong] or ["no problem found"]


class Runs:
    """Hashes of all runs of a text, of any length: polynomials modulo 2**64 (Karp and Rabin 1987)."""

    def __init__(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        base = 0x9E3779B97F4A7C15
        powers = np.cumprod(np.full(len(codes), base, np.uint64))
        self.sums = np.append(np.uint64(0), np.cumsum(codes * powers))
        self.scale = np.cumprod(np.full(len(codes), pow(base, -1, 2**64), np.uint64))

    def of(self, length):
        """A hash for each run of this length; the same run has the same hash in every text."""
        sums = self.sums[length:] - self.sums[: max(0, len(self.sums) - length)]
        return sums * self.scale[: len(sums)]


def find_runs(texts, source, length):
    """For each text, where its runs of this length begin that source (Runs) has, too; not those of one character."""
    wanted = [Runs(text).of(length) for text in texts]
    table = np.zeros(2**20, bool)  # few hashes of the source pass this, and only they are looked up
    table[np.concatenate(wanted) >> 44] = True
    hashes = source.of(length)
    hashes = hashes[table[hashes >> 44]]
    found = []
    for text, own in zip(texts, wanted, strict=True):
        starts = np.flatnonzero(np.isin(own, hashes)).tolist()
        found.append([start for start in starts if len(set(text[start : start + length])) > 1])
    return found


def copied(texts, source, least=50):
    """The longest run of characters that is in source (Runs), too, and each text's share of runs of `least` or more.

    Runs of one repeated character don't count.
    """
    longest, low, high = "", 1, max(map(len, texts))
    while low < high:  # binary search: no run is longer than high, and one of low was found, unless low is 1
        length = (low + high + 1) // 2
        found = zip(texts, find_runs(texts, source, length), strict=True)
        runs = [text[starts[0] : starts[0] + length] for text, starts in found if starts]
        if runs:
            longest, low = runs[0], length
        else:
            high = length - 1
    shares = []
    for text, starts in zip(texts, find_runs(texts, source, least), strict=True):
        covered = {i for start in starts for i in range(start, start + least)}
        shares.append(len(covered) / max(1, len(text)))
    return longest, shares


def generate(model, tokenizer, prompt, max_new_tokens, temperature, seed):
    """Continue a prompt SAMPLES times, greedily once -> for each its ids, the entropy before each, the loss of each."""
    device = next(model.parameters()).device
    idx = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]] * (SAMPLES if temperature else 1), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    steps = []
    with hooked({"head": (model.lm_head, "out")}) as seen:
        for tokens in model.stream(idx, max_new_tokens, temperature, eot=tokenizer.eot, generator=generator):
            logits = seen["head"].pop().float()  # (B, V)
            losses = -logits.log_softmax(-1).gather(1, tokens)  # (B, 1)
            steps.append((tokens[:, 0], entropy(logits), losses[:, 0]))  # (B,) each
    columns = [torch.stack(values, dim=1).tolist() for values in zip(*steps, strict=True)]  # (B, T) each
    for ids, entropies, losses in zip(*columns, strict=True):
        end = ids.index(tokenizer.eot) if tokenizer.eot in ids else len(ids)
        yield ids[:end], entropies[:end], losses[:end]


def diagnose(model, tokenizer, prompt, max_new_tokens, temperatures, seed, source=None):
    """Continue a prompt at each temperature (0 is greedy) -> rows: medians, what most samples show, the first text.

    source, the Runs of the training text, is what copied runs are looked for in.
    """
    for temperature in temperatures:
        measured, texts = [], []
        for ids, entropies, losses in generate(model, tokenizer, prompt, max_new_tokens, temperature, seed):
            text = tokenizer.decode(i for i in ids if i < tokenizer.vocab_size).removesuffix("\ufffd")  # cut at the end
            measured.append(measure(ids, entropies, losses, text, max_new_tokens))
            texts.append(text)
        row = {"temperature": temperature, "samples": len(texts)}
        row |= {key: float(np.median([figures[key] for figures in measured])) for key in measured[0]}
        shares = [round(figures["repeated"], 2) for figures in measured]
        row["repeated_range"] = [min(shares), max(shares)]
        if source:
            row["copied_run"], shares = copied(texts, source)
            row["copied"] = float(np.mean(shares))
        verdicts = Counter(name for figures in measured for name in verdict(figures, model.config.vocab_size))
        shown = [name for name, count in verdicts.items() if count > len(texts) / 2 and name in ADVICE]
        yield row | {"verdict": shown or ["no problem found"], "text": texts[0]}


def load_source(name, limit=2**24):
    """The Runs of the text that a model was trained on, or None, with a remark that says why."""
    names, _ = training_text(name)
    if not names:
        return log("copies can't be found: the checkpoint names no training text")
    try:
        text = "\0".join(gpt.load_texts(names))
    except gpt.InputError as error:
        return log(f"copies can't be found without the training text: {error}")
    if len(text) > limit:
        log(f"copies are looked for in the first {limit:,} characters of the training text")
    return Runs(text[:limit])


@gpt.command
def main(argv=None):
    parser = gpt.Parser(prog="python -m debug.text", description="What is wrong with the text that a model generates?")
    add = parser.add_argument
    add("--model", default="scratch", help="a folder, or a name under checkpoints/ (default: scratch)")
    add("--prompt", default="The", help="the text to continue (default: The)")
    add("--max_new_tokens", type=int, default=200, help="generate at most this many tokens (default: 200)")
    add("--seed", type=int, default=1337, help="the same seed gives the same text (default: 1337)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    require(1 <= args.max_new_tokens <= 2**31, f"--max_new_tokens is {args.max_new_tokens}, expected 1 to 2**31")
    require(0 <= args.seed <= 2**32, f"--seed is {args.seed}, expected 0 to 2**32")
    model, tokenizer = load_checkpoint(args.model, gpt.resolve_device(args.device))
    source = load_source(args.model)
    rows = diagnose(model, tokenizer, args.prompt, args.max_new_tokens, TEMPERATURES, args.seed, source)
    if args.json:
        return show(rows, True)
    rows = list(rows)
    keys = ("temperature", "samples", "tokens", "repeated", "repeated_range", "loop", "entropy_start", "entropy_end")
    columns = {key: key.replace("_", " ") for key in keys}
    columns |= {"copied": "in copied runs"} if source else {}
    show(rows, columns=columns | {"verdict": "verdict"})
    for row in rows:
        print(f"{row['temperature']:g}: {row['text'][:160]!r}")
    if source:
        longest = max((row["copied_run"] for row in rows), key=len)
        print(f"the longest run that is in the training text, too: {longest!r}")
    found = {name for row in rows for name in row["verdict"]}
    for name in sorted(found & ADVICE.keys()):
        log(f"{name}: {ADVICE[name]}")


if __name__ == "__main__":
    main()
