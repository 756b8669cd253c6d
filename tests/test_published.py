"""Whatever a published folder says: the same ids and greedy text as transformers', or an error with the reason."""

import contextlib
import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import PROSE, published

import convert_gpt2
import gpt
from debug import verify_gpt2

transformers = pytest.importorskip("transformers")

EOT, OURS = gpt.EOT, gpt.Tokenizer.bpe([PROSE], 300)
END, PAD = OURS.eot, OURS.eot + 1
FULL, OPTIONS, MAP, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A model whose greedy text soon comes to the end of text, or to the token after it, but not always."""
    folder = tmp_path_factory.mktemp("origin")
    model = published(folder, OURS, seed=1, vocab_size=END + 4)
    with torch.no_grad():
        rows = model.transformer.wte.weight
        model.transformer.ln_f.bias += 9 * (rows[END] + rows[END + 1])
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def hf(origin, own_folder):
    return Path(shutil.copytree(origin, "hf"))


def read(name):
    return json.loads(Path("hf", name).read_text()) if Path("hf", name).exists() else {}


def edit(files):
    """{file: {key: value}} -> changes in these files; a value of ... removes the key."""
    for name, changes in files.items():
        described = read(name) | changes
        Path("hf", name).write_text(json.dumps({key: value for key, value in described.items() if value is not ...}))


def inside(key, **changes):
    """Changes of one part of tokenizer.json."""
    edit({FULL: {key: read(FULL)[key] | changes}})


def saved(*words, **special):
    """As transformers saves a tokenizer to which these were added."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained("hf")


def remove(*names):
    for name in names:
        Path("hf", name).unlink()


def template(*before):
    text, special = {"Sequence": {"id": "A", "type_id": 0}}, {EOT: {"id": EOT, "ids": [END], "tokens": [EOT]}}
    described = {"type": "TemplateProcessing", "single": [*before, text], "pair": [text], "special_tokens": special}
    return {FULL: {"post_processor": described}}


def ends_at(*ids):
    end = {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}
    return {CONFIG: end, GENERATION: end}


def token(content=EOT, **options):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return flags | {"content": content} | options


def merges(change):
    path = Path("hf/merges.txt")
    path.write_text("\n".join(change(path.read_text().splitlines())))


SAME = {  # settings that give the same ids and text
    "no tokenizer.json": lambda: [remove(FULL), edit({OPTIONS: {"tokenizer_class": "GPT2Tokenizer"}})],
    "no vocab.json": lambda: remove("vocab.json", "merges.txt"),
    "padding": lambda: saved(pad_token="<pad>"),
    "padding in old files": {MAP: {"pad_token": "[FILL]"}, ADDED: {"[FILL]": PAD}},
    "a filled vocabulary": lambda: saved("<|reserved_0|>", "[unused1]"),
    "padding is the end": {MAP: {"pad_token": EOT}},
    "an end of its own": lambda: [saved(eos_token="<|end|>"), edit(ends_at(END + 1))],
    "its end in a list": ends_at(END, END),
    "generation_config.json goes first": {CONFIG: {"eos_token_id": 7}},
    "a template of the text alone": template(),
}
REFUSED = {  # the reason -> a setting that gives others
    "special_tokens_map.json (pad_token)": {MAP: {"pad_token": "!"}},
    "tokenizer_config.json (additional_special_tokens)": {OPTIONS: {"additional_special_tokens": [token("<|user|>")]}},
    "tokenizer.json (added_tokens), tokenizer_config.json (extra": lambda: saved(extra_special_tokens=["<|user|>"]),
    "tokenizer_config.json (added_tokens_decoder)": {OPTIONS: {"added_tokens_decoder": {END + 1: token("there")}}},
    "added_tokens.json (added_tokens)": {ADDED: {"jumps": END + 1}},
    "a text with 'hello'": lambda: saved("hello"),
    f"two files disagree: {EOT} is id {END}, and 5": {ADDED: {EOT: 5}},
    "has the option lstrip": {FULL: {"added_tokens": [token(id=END, lstrip=True)]}},
    f"eos_token_id is [{END}, 7]": ends_at(END, 7),
    "ends at id 104, which is 'h'": ends_at(104),
    "ends at id 50256, which no token has": lambda: [remove(GENERATION), edit({CONFIG: {"eos_token_id": ...}})],
    "its post_processor adds tokens": template({"SpecialToken": {"id": EOT, "type_id": 0}}),
    "add_bos_token is True": {OPTIONS: {"add_bos_token": True}},
    "add_prefix_space is True": {OPTIONS: {"add_prefix_space": True}},
    "is OPTTokenizer": {OPTIONS: {"tokenizer_class": ...}, CONFIG: {"tokenizer_class": "OPTTokenizer"}},
    "its pre_tokenizer is": lambda: inside("pre_tokenizer", add_prefix_space=True),
    "its normalizer is": {FULL: {"normalizer": {"type": "Lowercase"}}},
    "its decoder is": {FULL: {"decoder": {"type": "Fuse"}}},
    "its dropout is 0.5": lambda: inside("model", dropout=0.5),
    "disagrees with vocab.json and merges.txt": lambda: merges(lambda lines: lines[:-20]),
    "its merges are not in the order of their ids": lambda: [remove(FULL), merges(lambda lines: lines[::-1])],
    "two of its tokens have the same id": lambda: [remove(FULL), edit({"vocab.json": {EOT: 7}})],
    "no merge makes its token 'word'": lambda: [remove(FULL), edit({"vocab.json": {"word": END + 1}})],
}
SETTINGS = SAME | REFUSED


def apply(setting):
    change = SETTINGS[setting]
    change() if callable(change) else edit(change)


@torch.no_grad()
def assert_same():
    """verify_gpt2 compares the ids, and greedy text ends where transformers' does; which rows ended?"""
    model, tokenizer = gpt.load_checkpoint("ours")
    assert verify_gpt2.different_text(tokenizer, "hf") is None
    idx = torch.arange(97, 121).view(8, 3)
    options = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 10, "do_sample": False}
    reference = transformers.GPT2LMHeadModel.from_pretrained("hf")
    exact = reference.generate(idx, **options, pad_token_id=tokenizer.eot)
    assert torch.equal(model.generate(idx, 10, temperature=0, eot=tokenizer.eot), exact)
    return (exact == tokenizer.eot).any(dim=1)


@pytest.mark.parametrize("setting", SAME)
def test_a_setting_that_changes_no_id_is_accepted(hf, setting):
    apply(setting)
    convert_gpt2.convert("hf", "ours")
    ended = assert_same()
    assert ended.any() and not ended.all(), "some texts end, and some do not"


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_changes_ids_or_the_end_is_refused_by_name(hf, setting):
    apply(setting)
    with pytest.raises(gpt.InputError, match=re.escape(setting)):
        convert_gpt2.convert("hf", "ours")
    assert not Path("ours").exists()


PAIRS = [*combinations(SETTINGS, 2)]
FAST = PAIRS[::53]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair not in FAST]


@pytest.mark.parametrize(("first", "second"), FAST + SLOW)
def test_two_settings_are_refused_or_change_nothing(hf, first, second):
    for setting in (first, second):
        with contextlib.suppress(Exception):  # one may have removed the other's file, or be wrong for transformers
            apply(setting)
    with contextlib.suppress(gpt.InputError):
        convert_gpt2.convert("hf", "ours")
        assert_same()
