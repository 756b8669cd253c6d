"""The ratios of python -m bench as bars, in one picture for light pages and dark."""

import gpt

GRAY = "#808080"  # readable on white and on black, as the ground is transparent


def draw(rows, path):
    """Rows of bench.__main__.measure -> a bar for each workload, one set of axes for each part."""
    import matplotlib
    from matplotlib.figure import Figure

    parts = {}
    for row in rows:
        parts.setdefault(row["part"], {})[row["name"]] = row["ratio"]
    sizes = [len(ratios) for ratios in parts.values()]
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GRAY)
    with matplotlib.rc_context(colors | {"svg.fonttype": "none", "axes.titlelocation": "left"}):
        figure = Figure(figsize=(8, 0.5 * len(parts) + 0.3 * sum(sizes)), layout="constrained")
        grid = figure.subplots(len(parts), squeeze=False, height_ratios=sizes)[:, 0]
        for axes, (part, ratios) in zip(grid, parts.items(), strict=True):
            ours = ["#2f81f7" if ".py" in name else "#8b949e" for name in ratios]
            bars = axes.barh(list(ratios), list(ratios.values()), color=ours)
            axes.bar_label(bars, fmt="%.2f", padding=3)
            axes.set(title=f"{part}: speed relative to {next(iter(ratios))}", xlim=(0, 1.1 * max(ratios.values())))
            axes.set_xticks([])
            axes.invert_yaxis()
            axes.spines[["top", "right", "bottom"]].set_visible(False)
        with gpt.replacing(path) as part:
            figure.savefig(part, transparent=True, dpi=110)
