"""The pictures of the notes are drawn from our own models, read on light and dark pages, and show computed numbers."""

import shutil
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import regex
import torch
from conftest import PROSE, TINY, run_main
from PIL import ImageFont

import gpt
from notes import diagrams, pictures, svg

NAMES = ["windows", "lookup", "qkv", "mask", "heads", "block", "gpt2", "tying", "cache", "transpose", "lora", "model"]
NAMES += ["freezing", "schedule", "curve", "dropout", "tokens", "sampling", "nucleus", "attention"]
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(module_folder):
    """Every picture of a run with two blocks: {name: its XML}."""
    (module_folder / "prose.txt").write_text(PROSE)
    gpt.main([*TINY, "--data", "prose.txt", "--dropout", "0.2", "--out", "run"])
    pictures.main(["--model", "run", "--curves", "run", "run", "--out", "."])
    return {path.stem: ET.parse(path).getroot() for path in module_folder.glob("*.svg")}


def words_of(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def outline(text):
    """Where a text is drawn, in a wide font: left, top, right, bottom."""
    size = float(text.get("font-size", 13))
    mono = text.get("class") == "code"
    font = "DejaVuSansMono" if mono else "DejaVuSans-Bold" if text.get("font-weight") else "DejaVuSans"
    length = ImageFont.truetype(FONTS / f"{font}.ttf", 100).getlength(text.text) * size / 100
    before = {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "start")] * length
    if text.get("transform"):
        x, y = map(float, regex.findall(r"[\d.]+", text.get("transform"))[:2])
        return x - 0.7 * size, y - length + before, x, y + before
    x, y = float(text.get("x")), float(text.get("y"))
    return x - before, y - 0.7 * size, x - before + length, y


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_reads_on_light_and_dark_pages(name, drawn):
    root = drawn[name]
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    style = root.find(f"{SVG}style").text
    dark = style.split("@media (prefers-color-scheme: dark)")[1]
    for kind in {element.get("class") for element in root.iter()} - {None, "code", "gray"}:
        assert f".{kind} {{" in style.split("@media")[0] and f".{kind} {{" in dark, kind
    for element in root.iter():
        fixed = {element.get(key) for key in ("fill", "stroke", "color")} - {None}
        assert not fixed and element.tag != f"{SVG}image"
        assert element.get("class") or element.tag not in (f"{SVG}rect", f"{SVG}path", f"{SVG}polygon")


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_large_enough_inside_the_picture_and_apart(name, drawn):
    root = drawn[name]
    texts = [text for text in root.iter(f"{SVG}text") if text.text]
    assert all(float(text.get("font-size", 13)) >= 12 for text in texts)
    places = {text: outline(text) for text in texts}
    for text, (left, top, right, bottom) in places.items():
        inside = left >= 0 and right <= int(root.get("width")) and top >= 0 and bottom <= int(root.get("height"))
        assert inside, text.text
    for a, b in combinations(texts, 2):
        (left, top, right, bottom), (x0, y0, x1, y1) = places[a], places[b]
        assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, (a.text, b.text)


def test_attention_is_that_of_the_formula(drawn):
    scores, weights, output = diagrams.attend(diagrams.QUERIES, diagrams.KEYS, diagrams.VALUES)
    assert [round(x, 2) for x in scores[2].tolist()] == [0.71, 1.41, 1.41]
    assert [round(x, 2) for x in weights[2].tolist()] == [0.2, 0.4, 0.4]
    torch.testing.assert_close(weights @ diagrams.VALUES, output)
    for number in (*scores.flatten(), *weights.flatten(), *output.flatten()):
        assert svg.number(number.item()) in words_of(drawn["qkv"])


def test_the_tied_head_multiplies_with_the_rows_of_the_embedding(drawn):
    logits = torch.tensor([-1.0, 1.0]) @ diagrams.EMBEDDING.T.float()  # the hidden state of the notes' example
    expected = [svg.number(x) for x in (*logits.tolist(), *logits.softmax(-1).tolist())]
    words = [word for word in words_of(drawn["tying"]) if regex.fullmatch(r"−?\d\.\d\d", word)]
    assert words == expected


def test_the_curve_goes_through_the_losses_of_the_log(drawn, module_folder):
    rows = gpt.load_run(module_folder / "run")[0]["rows"]
    path = next(p.get("d") for p in drawn["curve"].iter(f"{SVG}path") if "blue" in p.get("class"))
    heights = [float(y) for y in regex.findall(r"[\d.]+ ([\d.]+)", path)]
    assert np.corrcoef(heights, [row["val_loss"] for row in rows])[0, 1] < -0.9999  # y points down


def test_a_run_without_a_curve_is_refused_and_nothing_is_drawn(drawn, module_folder, own_folder, capsys):
    shutil.copytree(module_folder / "run", "stopped")
    log = Path("stopped/log.csv")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    run_main(pictures.main, "--model", "stopped", "--out", ".", expect=2)
    assert "stopped" in capsys.readouterr().err and not list(own_folder.glob("*.svg"))
