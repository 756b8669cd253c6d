"""Run the Python blocks of notes and put what they print below them.

python notes/reprint.py [--check] notes/day*.md    # --check changes nothing and prints the differences
"""

import argparse
import contextlib
import difflib
import io
import os
import sys
import tempfile
import traceback
from pathlib import Path

import regex
import torch

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = regex.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", regex.MULTILINE | regex.DOTALL)


def run_blocks(text, name):
    """Run the blocks of a note in order, in one namespace. Yields (code, what is below it, what it prints)."""
    names = {"__name__": "note"}
    for block in BLOCKS.finditer(text):
        printed = io.StringIO()
        line_numbers = "\n" * text.count("\n", 0, block.start(1))  # tracebacks name the line of the note
        with contextlib.redirect_stdout(printed):
            exec(compile(line_numbers + block[1], name, "exec"), names)
        yield block[1], block[2] or "", printed.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("notes", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing, print the differences")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401  (finds GPT-2's vocabulary, as in the tests)

    torch.set_num_threads(1)
    for path in [path.resolve() for path in options.notes]:
        text = path.read_text(encoding="utf-8")
        os.chdir(tempfile.mkdtemp())  # blocks may write files
        try:
            blocks = []
            for code, _, printed in run_blocks(text, path.name):
                blocks.append(f"```python\n{code}```\n" + (f"\n```\n{printed}```\n" if printed else ""))
        except Exception:
            print(f"{path.name} is left as it is:\n{traceback.format_exc()}")
            continue
        new = BLOCKS.sub(lambda _, left=iter(blocks): next(left), text)  # noqa: B008
        sys.stdout.writelines(difflib.unified_diff(text.splitlines(True), new.splitlines(True), path.name, "now", n=1))
        if not options.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
