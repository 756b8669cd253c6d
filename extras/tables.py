"""Rows of results -> a table to read, or a JSON object a line for other programs."""

import json


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
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    rows = list(rows)
    columns = columns or {key: key for key in rows[0]}
    lines = [list(columns.values())] + [[cell(row[key]) for key in columns] for row in rows]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    numeric = [any(isinstance(row[key], (int, float)) for row in rows) for key in columns]
    for line in lines:
        texts = zip(line, widths, numeric, strict=True)
        print("  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in texts).rstrip())
