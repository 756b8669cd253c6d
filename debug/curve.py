"""What does a training curve show? Overfitting, a plateau, a run that was too short or too fast, in words.

python -m debug.curve scratch               a folder with the log.csv of a run, or its name under checkpoints/
"""

import csv
import json
from pathlib import Path

import numpy as np

import gpt
from gpt import InputError, command, log, require


def read_log(path):
    """log.csv -> its rows, as numbers. Raises InputError with the line that is wrong."""
    require(path.is_file(), f"there is no {path}: name the folder of a checkpoint that was trained here")
    text = gpt.read_text(path)
    number = 1
    try:
        lines = list(csv.DictReader(text.splitlines()))
        columns = ("step", "train_loss", "val_loss", "val_bits_per_byte")
        valid = lines and set(columns) <= lines[0].keys()
        require(valid, f"it should have rows with the columns {', '.join(columns)}")
        rows = []
        for number, line in enumerate(lines, 2):
            rows.append({key: float(line[key]) for key in columns} | {"step": int(line["step"])})
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}, line {number}, is not that of a training log: {error}") from error
    return rows


def read_curve(rows):
    """Rows of a log -> the index of the best, and [(what the curve shows, the index of the row, in words)]."""
    step, train, val = (np.array([row[key] for row in rows]) for key in ("step", "train_loss", "val_loss"))
    broken = ~np.isfinite(val)
    best = int(np.argmin(np.where(broken, np.inf, val)))
    if broken.any():
        at = int(np.argmax(broken))
        words = f"the validation loss is {val[at]} at step {step[at]:,}: start again with a smaller --lr"
        return best, [("diverged", at, words)]
    fall = val[0] - val[best]
    last = len(val) - 1
    learned = train[best : best + 2]
    learned = learned[np.isfinite(learned)][:1]  # the training loss at the best step; at step 0 there is none yet
    if best < last - 1 and val[-1] - val[best] > max(0.01 * fall, 0.002 * val[best]):
        if len(learned) and train[-1] < learned[0]:
            words = (
                f"from step {step[best]:,} on, the validation loss rises, {val[best]:.3f} to {val[-1]:.3f}, and the "
                f"training loss falls, {learned[0]:.3f} to {train[-1]:.3f}: use more text, more --dropout, fewer steps "
                "or a smaller model; the checkpoint holds the best step"
            )
            return best, [("overfitting", best, words)]
        words = (
            f"from step {step[best]:,} on, both losses rise, validation's {val[best]:.3f} to {val[-1]:.3f}: "
            "start again with a smaller --lr"
        )
        return best, [("diverged", best, words)]
    if len(val) < 5:
        words = f"{len(val)} validations: train longer, or with a smaller --eval_interval"
        return best, [("too short to tell", last, words)]
    found = []
    quarter = max(2, len(val) // 4)
    tolerance = max(0.02 * fall, 0.005 * val[best])
    early = next((i for i in range(1, quarter + 1) if val[i] - val[i - 1] > tolerance), None)
    if early:
        words = (
            f"the validation loss rises from {val[early - 1]:.3f} to {val[early]:.3f} at step {step[early]:,}: "
            "try a smaller --lr or more --warmup_steps"
        )
        found.append(("too fast at the start", early, words))
    gain = val[:-quarter].min() - val[best]
    if gain > max(0.01 * fall, 0.002 * val[best]):
        words = (
            f"the last quarter of the run brought {gain:.3f} of all {fall:.3f} nats: more --max_steps will bring more"
        )
        found.append(("still falling", last, words))
    else:
        words = (
            f"from step {step[last - quarter]:,} on, the validation loss hardly moves, {val[last - quarter]:.3f} to "
            f"{val[-1]:.3f}: try a larger model, more text or another --lr; more steps alone will not help"
        )
        found.append(("plateau", last - quarter, words))
    return best, found


@command
def main(argv=None):
    parser = gpt.Parser(prog="python -m debug.curve", description="What a training curve shows.")
    add = parser.add_argument
    add("model", nargs="?", default="scratch", help="a folder, or a name under checkpoints/ (default: scratch)")
    add("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    folder = Path("checkpoints", args.model)
    folder = folder if (folder / "log.csv").is_file() and not Path(args.model).is_dir() else Path(args.model)
    rows = read_log(folder / "log.csv")
    best, found = read_curve(rows)
    if args.json:
        findings = [{"what": what, "step": rows[at]["step"], "words": words} for what, at, words in found]
        print(json.dumps({"folder": str(folder), "best": rows[best], "found": findings}))
    else:
        print(
            f"best at step {rows[best]['step']:,} of {rows[-1]['step']:,}: validation loss "
            f"{rows[best]['val_loss']:.4f}, {rows[best]['val_bits_per_byte']:.4f} bits per byte"
        )
        print("\n".join(f"{what}: {words}" for what, _, words in found), flush=True)
    gpt.plot(rows, folder / "curve.png")
    log(f"the curve is {folder / 'curve.png'}")


if __name__ == "__main__":
    main()
