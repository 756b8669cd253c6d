"""What is wrong with the text that a model generates?

    python -m debug.text                              at five temperatures: loops, repetition, collapse, noise, ...
    python -m debug.text --model gpt2 --prompt "Learning is" --max_new_tokens 400

distinct-n is from Li et al. 2016, "A Diversity-Promoting Objective Function".
"""

import json
import math

import numpy as np
import torch

import gpt
from debug.activations import entropy, hooked
from gpt import command, load_checkpoint, require

TEMPERATURES = (0, 0.5, 0.8, 1.0, 1.5)


def longest_loop(ids, longest_period=64):
    """The longest stretch that repeats what stands one period before it -> (its tokens, its period); (0, 0) without one."""
    ids, best = np.asarray(ids), (0, 0)
    for period in range(1, min(longest_period, len(ids) // 2) + 1):
        run = longest = 0
        for same in ids[period:] == ids[:-period]:
            run = run + 1 if same else 0
            longest = max(longest, run)
        if longest >= period and longest + period > best[0]:
            best = (longest + period, period)
    return best


def ngrams(ids, n):
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


def measure(ids, entropies, surprises, text, asked):
    """A generated text, as token numbers, the entropy before each, -ln of its probability, and as a string -> figures."""
    fours, quarter = ngrams(ids, 4), max(1, len(ids) // 4)
    loop, period = longest_loop(ids)
    return {"tokens": len(ids), "asked": asked, "repeated": 1 - len(set(fours)) / len(fours) if fours else 0.0, "loop": loop, "period": period,
            **{f"distinct_{n}": len(set(ngrams(ids, n))) / max(1, len(ids) - n + 1) for n in (1, 2, 3)},
            "entropy_start": float(np.mean(entropies[:quarter])) if entropies else 0.0,
            "entropy_end": float(np.mean(entropies[-quarter:])) if entropies else 0.0,
            "surprise": float(np.mean(surprises) - np.mean(entropies)) if entropies else 0.0,
            "broken": text.count("\ufffd") / max(1, len(text))}  # fmt: skip


def verdict(row, vocab_size):
    """Figures -> what is wrong, in words, with what usually helps."""
    found = []
    if row["tokens"] < row["asked"] / 4:
        found.append(f"early end (after {row['tokens']} of {row['asked']} tokens): right for a short answer; else the end of text is too "
                     "frequent in what was learned")  # fmt: skip
    if row["loop"] >= max(12, row["tokens"] / 4):
        found.append(f"a loop ({row['loop']} tokens, repeating every {row['period']}): sample with --temperature 0.8 --top_p 0.9; if that loops "
                     "too, train longer or on more text")  # fmt: skip
    elif row["repeated"] > 0.3:
        found.append(
            f"repetition ({row['repeated']:.0%} of its 4-grams occurred before): a higher temperature, or more training"
        )
    if row["tokens"] >= 20 and row["entropy_end"] < 0.1 * row["entropy_start"] and row["entropy_end"] < 0.5:
        found.append(f"collapse (entropy falls from {row['entropy_start']:.2f} to {row['entropy_end']:.2f} nats): the model is sure of its own "
                     "repetition; sample, or choose a longer context")  # fmt: skip
    if row["surprise"] > 1:
        found.append(f"word salad (what was drawn surprises the model itself, {row['surprise']:.1f} nats beyond what it expects): a lower "
                     "temperature, or --top_p 0.9")  # fmt: skip
    if row["broken"] > 0.01:
        found.append(f"gibberish ({row['broken']:.0%} of the characters are broken): a lower temperature or --top_p 0.9; at every temperature, it "
                     "is too little training")  # fmt: skip
    if row["tokens"] and row["entropy_start"] > 0.8 * math.log(vocab_size):
        found.append(f"noise (entropy {row['entropy_start']:.2f} of at most {math.log(vocab_size):.2f} nats): the model has hardly learned "
                     "anything yet")  # fmt: skip
    return found or ["no problem found"]


def diagnose(model, tokenizer, prompt, max_new_tokens, temperatures, seed):
    """Continue a prompt at each temperature (0 is greedy) -> rows of figures, the text, and what is wrong with it."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    for temperature in temperatures:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        made, entropies, surprises = [], [], []
        with hooked({"head": (model.lm_head, "out")}) as seen:
            for token in model.stream(
                torch.tensor([ids], device=device), max_new_tokens, temperature, eot=tokenizer.eot, generator=generator
            ):
                logits = seen["head"].pop()[0].float()
                if token.item() != tokenizer.eot:
                    made.append(token.item())
                    entropies.append(entropy(logits).item())
                    surprises.append(-logits.log_softmax(-1)[token.item()].item())
        text = tokenizer.decode(i for i in made if i < tokenizer.vocab_size).removesuffix(
            "\ufffd"
        )  # the last may be cut
        row = measure(made, entropies, surprises, text, max_new_tokens)
        yield {"temperature": temperature, **row, "text": text, "verdict": verdict(row, model.config.vocab_size)}


def show_diagnosis(rows):
    print(f"{'':<16} {'tokens':>7} {'repeated':>8} {'loop':>5} {'distinct 1 2 3':>16} {'entropy':>13} {'broken':>7}")
    for row in rows:
        name = f"temperature {row['temperature']:g}" if row["temperature"] else "greedy"
        distinct = " ".join(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3))
        print(f"{name:<16} {row['tokens']:>7,} {row['repeated']:>8.0%} {row['loop']:>5,} {distinct:>16} {row['entropy_start']:>5.2f} -> "
              f"{row['entropy_end']:.2f} {row['broken']:>7.1%}")  # fmt: skip
        print("".join(f"    {words}\n" for words in row["verdict"]) + f"    {row['text'][:160]!r}")
    print("repeated: share of 4-grams that occurred before; loop: tokens in the longest one; distinct: share of different tokens, pairs, "
          "triples; entropy: of the next token in nats, first and last quarter")  # fmt: skip


@command
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
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, expected 0 or more")
    model, tokenizer = load_checkpoint(args.model, gpt.resolve_device(args.device))
    rows = diagnose(model, tokenizer, args.prompt, args.max_new_tokens, TEMPERATURES, args.seed)
    return print("\n".join(map(json.dumps, rows))) if args.json else show_diagnosis(list(rows))


if __name__ == "__main__":
    main()
