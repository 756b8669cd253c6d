"""Boxes, arrows, matrices and axes as SVG that reads on light and on dark pages; one picture is 720 wide.

    picture = Picture("hello", "A box and an arrow", "What the picture shows, for a screen reader", height=60)
    picture.box(10, 10, 100, 40, "tokens", "blue")
    picture.arrow((110, 30), (180, 30))
    print(picture.render())

An SVG that <img> shows inherits no color from its page, so it brings its own for both color schemes.
"""

import math
from xml.sax.saxutils import escape, quoteattr

STYLE = """
.picture { color: #1f2328; font: 13px system-ui, -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
.picture text { fill: currentColor }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.gray { fill: currentColor; stroke: currentColor }
.blue { fill: #0969da; stroke: #0969da }
.orange { fill: #c2560c; stroke: #c2560c }
.teal { fill: #0f766e; stroke: #0f766e }
.violet { fill: #7c3aed; stroke: #7c3aed }
@media (prefers-color-scheme: dark) {
  .picture { color: #e6edf3 }
  .blue { fill: #58a6ff; stroke: #58a6ff }
  .orange { fill: #f0953f; stroke: #f0953f }
  .teal { fill: #2dd4bf; stroke: #2dd4bf }
  .violet { fill: #b794f6; stroke: #b794f6 }
}
"""


def number(value):
    """1 -> 1, 0.704 -> 0.70, -inf -> −∞, as a matrix shows them."""
    if value == -math.inf:
        return "−∞"
    return f"{value:.2f}".replace("-", "−") if isinstance(value, float) else str(value)


class Picture:
    """A list of SVG elements. Coordinates are pixels from the upper left corner; (x, y) of a text is its middle."""

    def __init__(self, name, title, description, height, width=720):
        self.name, self.width, self.height = name, width, height
        self.parts = [f'<title id="{name}-title">{escape(title)}</title>']
        self.parts += [f'<desc id="{name}-desc">{escape(description)}</desc>', f"<style>{STYLE}</style>"]

    def add(self, tag, content=None, **attributes):
        """An element: font_size=12 becomes font-size="12", class_ becomes class, and None is left out."""
        said = ""
        for key, value in attributes.items():
            value = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
            said += "" if value is None else f" {key.strip('_').replace('_', '-')}={quoteattr(str(value))}"
        self.parts.append(f"<{tag}{said}/>" if content is None else f"<{tag}{said}>{escape(content)}</{tag}>")

    def text(self, x, y, words, size=13, anchor="middle", bold=False, code=False, turned=False):
        """One or more lines around the height y; turned ones read upwards."""
        lines = str(words).split("\n")
        for i, line in enumerate(lines):
            down = y + (i - (len(lines) - 1) / 2) * size * 1.25 + 0.35 * size
            place = {"x": float(x), "y": float(down)}
            if turned:
                place = {"transform": f"translate({x + 0.35 * size:.1f} {y:.1f}) rotate(-90)"}
            style = {"font_size": None if size == 13 else size, "font_weight": 600 if bold else None}
            shown = {"text_anchor": None if anchor == "start" else anchor, "class_": "code" if code else None}
            self.add("text", line, **place, **style, **shown)

    def box(self, x, y, width, height, words="", hue="gray", fill=0.14, line=1.5, dashed=False, round=5, **style):
        """A rectangle with words in its middle."""
        shape = {"x": float(x), "y": float(y), "width": float(width), "height": float(height), "rx": round}
        dashes = "5 4" if dashed else None
        faint = 0.5 if hue == "gray" else None
        strokes = {"stroke_width": line, "stroke_opacity": faint, "stroke_dasharray": dashes}
        self.add("rect", **shape, class_=hue, fill_opacity=f"{fill:.2g}", **strokes)
        if words != "":
            self.text(x + width / 2, y + height / 2, words, **style)

    def line(self, *points, hue="gray", width=1.5, dashes=None, opacity=None):
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.add("path", d=path, class_=hue, style="fill: none", stroke_width=width, stroke_dasharray=dashes,
                 stroke_opacity=opacity)  # fmt: skip

    def arrow(self, *points, hue="gray", width=1.5):
        """A line through the points with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        dx, dy = 8 * (x - x0) / length, 8 * (y - y0) / length
        foot = (x - dx, y - dy)
        self.line(*points[:-1], foot, hue=hue, width=width)
        head = [(x, y), (foot[0] - dy / 2, foot[1] + dx / 2), (foot[0] + dy / 2, foot[1] - dx / 2)]
        self.add("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in head), class_=hue, stroke_width=0)

    def plus(self, x, y):
        """The circle in which two paths of the residual stream are added."""
        self.add("circle", cx=x, cy=y, r=9, class_="gray", style="fill: none", stroke_width=1.5)
        self.line((x - 5, y), (x + 5, y))
        self.line((x, y - 5), (x, y + 5))

    def matrix(self, x, y, rows, hue="gray", cell=(44, 26), names=(), columns=(), title="", strong=None):
        """Numbers in cells; `hue` may be a function of (row, column), strong(row, column) cells are filled more."""
        width, height = cell
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                here = hue(i, j) if callable(hue) else hue
                fill = 0.32 if strong and strong(i, j) else 0.1
                self.box(x + j * width, y + i * height, width, height, number(value), here, fill, line=1, round=0)
        for i, name in enumerate(names):
            self.text(x - 7, y + (i + 0.5) * height, name, anchor="end")
        for j, name in enumerate(columns):
            self.text(x + (j + 0.5) * width, y - 10, name, size=12)
        if title:
            self.text(x + len(rows[0]) * width / 2, y - (28 if columns else 14), title, bold=True)

    def axes(self, frame, x_ticks, y_ticks, x_label, y_label, title=""):
        """A frame (x, y, width, height) with ticks [(value, label), ...] -> the functions from values to pixels."""
        x, y, width, height = frame
        (x_low, _), *_, (x_high, _) = x_ticks
        (y_low, _), *_, (y_high, _) = y_ticks

        def across(value):
            return x + width * (value - x_low) / (x_high - x_low)

        def down(value):
            return y + height * (1 - (value - y_low) / (y_high - y_low))

        for value, label in x_ticks:
            self.line((across(value), y + height), (across(value), y + height + 5), width=1)
            self.text(across(value), y + height + 16, label, size=12)
        for value, label in y_ticks:
            if label:
                self.line((x, down(value)), (x + width, down(value)), width=1, opacity=0.18)
                self.text(x - 8, down(value), label, size=12, anchor="end")
        self.line((x, y), (x, y + height), (x + width, y + height), width=1)
        self.text(x + width / 2, y + height + 36, x_label)
        if y_label:
            self.text(x - 20 - 8 * max(len(label) for _, label in y_ticks), y + height / 2, y_label, turned=True)
        if title:
            self.text(x + width / 2, y - 16, title, bold=True)
        return across, down

    def render(self):
        """-> the text of an SVG file."""
        named = f'role="img" aria-labelledby="{self.name}-title {self.name}-desc"'
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" {size} {named}>'
        return "\n".join([start, *self.parts, "</svg>", ""])


def ticks(low, high, most=6):
    """Round numbers that reach from `low` to `high`, with their labels: 0, 0.9 -> [(0.0, "0"), (0.2, "0.2"), ...]."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    numbers = [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return [(value, f"{value:,.10g}") for value in numbers]
