"""Rows of results -> a table to read, or a JSON object a line for other programs."""

import itertools
import json
import textwrap


def cell(value):
    """A value as text: numbers of a usual size get four decimals, tiny ones an exponent, large ones no decimals."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def show(rows, as_json=False, columns=None):
    """Print dicts: as JSON objects, whole, or as aligned columns {key: title}, by default all keys of the first."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)  # ASCII, and so safe in any encoding
        return
    rows = list(rows)
    columns = columns or {key: key for key in rows[0]}
    lines = [list(columns.values())] + [[cell(row[key]) for key in columns] for row in rows]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    numeric = [any(isinstance(row[key], (int, float)) for row in rows) for key in columns]
    for line in lines:
        texts = zip(line, widths, numeric, strict=True)
        print("  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in texts).rstrip())


def side_by_side(names, texts, width):
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
