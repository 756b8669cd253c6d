import json

from conftest import rows_of

from extras.tables import show

ROWS = [{"name": "a", "loss": None, "n": 1}, {"name": "longer", "loss": 2.5e-06, "n": 12345}]


def test_a_table_is_aligned_and_every_number_is_readable(capsys):
    show(ROWS, columns={"name": "name", "n": "tokens", "loss": "loss"})
    assert capsys.readouterr().out == "name    tokens     loss\na            1\nlonger  12,345  2.5e-06\n"
    show([{"loss": 3.14159, "speed": 2812.7, "data": ["a.txt", "b.txt"]}])
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=2) == ["3.1416", "2,813", "a.txt, b.txt"]


def test_json_is_one_object_a_line(capsys):
    show(iter(ROWS), True, {"name": "name"})
    assert rows_of(capsys) == ROWS


def test_json_is_a_line_in_any_encoding(capsys):
    """Even the characters at which Python's splitlines cuts."""
    row = {"text": "né 你好 🙂\u2028\x85\n\ud800"}
    show([row], True)
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out) == row and len(out.splitlines()) == 1
