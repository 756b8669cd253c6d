"""The notes say what the code does: their Python blocks print what is below them, and their links lead somewhere."""

import sys
from pathlib import Path

import pytest
import regex
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "notes"))
import drills
from reprint import BLOCKS, run_blocks

NOTES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "notes").glob("*.md"))}
LESSONS = [name for name, text in NOTES.items() if BLOCKS.search(text)]


@pytest.fixture
def one_thread():
    """Small tensors are faster so, above all where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NUMBER = r"-?\d+\.\d+"


def same(printed, below):
    """Equal texts, but the last digit of a number with decimals may differ by one: processors round differently."""
    if regex.sub(NUMBER, "#", printed) != regex.sub(NUMBER, "#", below):
        return False
    pairs = zip(regex.findall(NUMBER, printed), regex.findall(NUMBER, below), strict=True)
    return all(abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(b.split(".")[1]) for a, b in pairs)


def test_a_wrong_digit_is_noticed():
    assert same("loss 3.1416", "loss 3.1417") and same("-0.0000", "0.0000")
    assert not same("loss 3.1416", "loss 3.1418") and not same("12 of 16", "13 of 16") and not same("1.5 a", "1.5 b")


@pytest.mark.parametrize("name", LESSONS)
def test_a_block_prints_what_is_below_it(name, one_thread, request):
    if "get_encoding" in NOTES[name]:
        request.getfixturevalue("gpt2_vocabulary")  # or the test is skipped
    for code, below, printed in run_blocks(NOTES[name], name):
        assert same(printed, below), f"{code}\n{printed}"


@pytest.mark.parametrize("name", NOTES)
def test_links_and_names_of_files_lead_somewhere(name):
    for target in regex.findall(r"\]\((?!http)([^)#]+)", NOTES[name]):
        assert (ROOT / "notes" / target).exists(), target
    for file in regex.findall(r"`((?:\w+/)?\w+\.(?:py|md))`", NOTES[name]):
        assert (ROOT / file).exists(), file


def test_the_index_links_to_every_note():
    assert set(regex.findall(r"\]\((\w+\.md)\)", NOTES["README.md"])) == NOTES.keys() - {"README.md"}


SOLUTIONS = "".join(block[1] for block in BLOCKS.finditer(NOTES["README.md"]))  # attention and train
BLOCK = """import gpt
class Block(gpt.Block):
    def __init__(self, config):
        super().__init__(config)
        self.up = None

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
"""


def drill(code, capsys):
    """Check a reader's file -> exit status, the lines printed."""
    Path("mine.py").write_text(code)
    with pytest.raises(SystemExit) as stopped:
        drills.main(["mine.py"])
    return stopped.value.code, capsys.readouterr().out.splitlines()


def test_the_drills_accept_the_solutions(capsys):
    status, lines = drill(SOLUTIONS + BLOCK, capsys)
    assert status == 0 and {line.split()[0] for line in lines} == drills.DRILLS.keys()
    assert all(line.endswith(" right") for line in lines)


@pytest.mark.parametrize(
    "right, wrong, check, hint",
    [
        ("@ v", "@ v[..., :1]", "shape", "(2, 3, 5, 16)"),
        (" / math.sqrt(D)", "", "scale", "by 1.000"),
        ("triu(1)", "triu(0)", "weights", "diagonal"),
        ("triu(1)", "triu(2)", "causality", "future"),
        ("dim=-1", "dim=-2", "weights", "dim=-1"),
        ("q @ k.mT", "k @ q.mT", "result", "query"),
        ("dim=-1)", "dim=-1).detach()", "gradient", "detach"),
        ("ids[:, 1:]", "ids[:, :-1]", "weights", "targets"),
        ("optimizer.zero_grad()", "pass", "weights", "add up"),
        ("optimizer.step()", "optimizer.zero_grad(), optimizer.step()", "weights", "throws"),
        ("torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass", "weights", "not clipped"),
        ("AdamW", "Adam", "weights", "decay"),
        ("model.train()", "pass", "mode", "train()"),
        ("loss.item()", "loss", "losses", "item()"),
        ("x + self.attn(self.ln_1(x))", "self.attn(self.ln_1(x))", "residual", "x = x +"),
        ("x + self.attn(self.ln_1(x))", "self.ln_1(x + self.attn(x))", "residual", "no LayerNorm"),
        ("self.attn(", "self.attn.c_proj(", "attention", "view"),
        ("self.ln_2(x)", "self.ln_2(x - self.attn(self.ln_1(x)))", "result", "added"),
        ("self.mlp(self.ln_2(x))", "self.mlp.c_proj(gpt.F.gelu(self.mlp.c_fc(self.ln_2(x))))", "MLP", "tanh"),
        ("self.up = None", "self.up = gpt.nn.Linear(24, 96)", "parameters", "up.weight"),
    ],
)
def test_a_drill_ends_at_a_mistake_and_names_it(right, wrong, check, hint, one_thread, capsys):
    code = SOLUTIONS if right in SOLUTIONS else BLOCK
    status, lines = drill(code.replace(right, wrong), capsys)
    (line,) = [line for line in lines if " wrong: " in line]
    assert status == 1 and line.split()[1] == check and hint in line


def test_a_drill_needs_a_file_that_defines_one(capsys):
    assert drill("x = 1", capsys) == (2, [])
    with pytest.raises(SystemExit, match="2"):
        drills.main(["missing.py"])
