"""Rows of results -> a table to read, or a JSON object a line for other programs."""

import json


def cell(value):
    if isinstance(value, float):
        return f"{value:,.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


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
    numeric = [isinstance(rows[0][key], (int, float)) for key in columns]
    for line in lines:
        texts = zip(line, widths, numeric, strict=True)
        print("  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in texts).rstrip())
