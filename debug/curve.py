"""What does a training curve show? Overfitting, divergence, a plateau, a run that was too short.

python -m debug.curve scratch               # a folder with the log.csv of a run, or its name under checkpoints/
"""

import csv

import numpy as np

import gpt
from extras.tables import show
from gpt import InputError, find_checkpoint, log, require

COLUMNS = ("step", "lr", "train_loss", "val_loss", "val_bits_per_byte")


def read_log(path):
    """log.csv -> its rows, {column: number}. Raises InputError if it is not a training log."""
    require(path.is_file(), f"there is no {path}: name a checkpoint that was trained here")
    try:
        lines = list(csv.DictReader(gpt.read_text(path).splitlines()))
        rows = [{key: float(line[key]) for key in COLUMNS} | {"step": int(line["step"])} for line in lines]
    except (LookupError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is not a training log: {error}") from error
    require(rows, f"{path} is empty: train for at least one validation")
    return rows


ADVICE = {
    "diverged": "start again with a smaller --lr",
    "overfitting": "use more text, --dropout or --weight_decay, fewer steps or a smaller model; the best step is saved",
    "too short to tell": "train longer, or with a smaller --eval_interval",
    "too fast at the start": "try a smaller --lr or more --warmup_steps",
    "memorizing": "the training loss is far below: more steps need more text, --dropout or --weight_decay with them",
    "ended by its schedule": "it fell to the end, as the learning rate ran out: start a new run with more --max_steps",
    "still falling": "more --max_steps will help",
    "plateau": "more steps alone won't help: try a larger model, more text or another --lr",
}


def read_curve(rows):
    """Rows of a log -> the index of the best, and [(finding, the index where it begins), ...]."""
    lr, train, val = (np.array([row[key] for row in rows]) for key in ("lr", "train_loss", "val_loss"))
    broken = ~np.isfinite(val)
    best = int(np.argmin(np.where(broken, np.inf, val)))
    last = len(val) - 1
    if broken.any():
        return best, [("diverged", int(np.argmax(broken)))]
    fall = val[0] - val[best]
    noise = max(0.01 * fall, 0.002 * val[best])
    if best < last - 1 and val[-1] - val[best] > noise:
        learned = train[best : best + 2]
        learned = learned[np.isfinite(learned)]  # at step 0 there is no training loss yet
        overfitting = len(learned) and train[-1] < min(learned[0], 0.95 * val[-1])
        return best, [("overfitting" if overfitting else "diverged", best)]
    if len(val) < 5:
        return best, [("too short to tell", last)]
    found = []
    quarter = max(2, len(val) // 4)
    rises = np.diff(val[: quarter + 1]) > max(0.02 * fall, 0.005 * val[best])
    if rises.any():
        found.append(("too fast at the start", int(np.argmax(rises)) + 1))
    falling = val[:-quarter].min() - val[best] > noise
    if val[best] - train[best] > 0.1 * val[best]:
        found.append(("memorizing", last))
    elif falling and lr[-1] < 0.1 * lr.max():
        found.append(("ended by its schedule", last))
    elif falling:
        found.append(("still falling", last))
    else:
        found.append(("plateau", last - quarter))
    return best, found


@gpt.command
def main(argv=None):
    parser = gpt.Parser(prog="python -m debug.curve", description="What does a training curve show?")
    add = parser.add_argument
    add("model", nargs="?", default="scratch", help="a folder, or a name under checkpoints/ (default: scratch)")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    folder = find_checkpoint(args.model)
    rows = read_log(folder / "log.csv")
    best, found = read_curve(rows)
    findings = [{"finding": what} | rows[at] | {"advice": ADVICE[what]} for what, at in found]
    show([{"finding": "best"} | rows[best] | {"advice": ""}, *findings], args.json)
    log(f"the curve is {folder / 'loss.png'}")


if __name__ == "__main__":
    main()
