"""Whatever a published folder says: the same ids and greedy text as transformers', or an error with the reason."""

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROSE, published

import convert_gpt2
import gpt

transformers = pytest.importorskip("transformers")

EOT = gpt.EOT
OURS = gpt.Tokenizer.bpe([PROSE], 300)
END = OURS.eot


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A model whose greedy text soon comes to the end of text, and sometimes to the token after it."""
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


def edit(name, **changes):
    """Change a JSON file of the folder, or write it; a value of ... removes the key."""
    path = Path("hf", name)
    described = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not ...}))


def inside(name, key, **changes):
    """The same one level deeper."""
    edit(name, **{key: json.loads(Path("hf", name).read_text())[key] | changes})


def ends_at(*ids, files=("config.json", "generation_config.json")):
    for file in files:
        edit(file, eos_token_id=ids[0] if len(ids) == 1 else list(ids))


def saved(*words, **special):
    """As transformers saves a tokenizer to which these were added."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained("hf")


def rename(name):
    """Another name for the end of text, everywhere."""
    for path in Path("hf").glob("*.json"):
        path.write_text(path.read_text().replace(EOT, name))


def template(*single):
    pair = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
    single = [{"SpecialToken": {"id": part, "type_id": 0}} if part else pair[0] for part in single]
    special = {EOT: {"id": EOT, "ids": [END], "tokens": [EOT]}}
    edit("tokenizer.json", post_processor={"type": "TemplateProcessing", "single": single, "pair": pair,
                                           "special_tokens": special})  # fmt: skip


def token(content=EOT, **options):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return flags | {"content": content} | options


def an_end_of_its_own():
    saved(eos_token="<|end|>")
    ends_at(END + 1)


def padding_in_old_files():
    edit("special_tokens_map.json", pad_token="[PAD]")
    edit("added_tokens.json", **{"[PAD]": END + 1})


def a_stale_vocabulary():
    vocab = json.loads(Path("hf/vocab.json").read_text())
    edit("vocab.json", he=vocab["as"], **{"as": vocab["he"]})


def fewer_merges():
    lines = Path("hf/merges.txt").read_text().splitlines()
    Path("hf/merges.txt").write_text("\n".join(lines[:-20]) + "\n")


def as_pretrained_class(name):
    return lambda: edit("tokenizer_config.json", tokenizer_class=name)


SAME = {  # settings that give the same ids and text
    "GPT2Tokenizer": as_pretrained_class("GPT2Tokenizer"),
    "no tokenizer.json": lambda: [Path("hf/tokenizer.json").unlink(), as_pretrained_class("GPT2Tokenizer")()],
    "no vocab.json": lambda: [Path("hf", name).unlink() for name in ("vocab.json", "merges.txt")],
    "saved again": saved,
    "padding": lambda: saved(pad_token="<pad>"),
    "padding in old files": padding_in_old_files,
    "padding is the end": lambda: edit("special_tokens_map.json", pad_token=EOT),
    "an end of its own": an_end_of_its_own,
    "the end renamed": lambda: rename("</s>"),
    "its end in a list": lambda: ends_at(END, END),
    "generation_config.json goes first": lambda: ends_at(7, files=["config.json"]),
    "a template of the text alone": lambda: template(None),
    "merges at every word": lambda: inside("tokenizer.json", "model", ignore_merges=False),
    "truncation": lambda: edit("tokenizer.json", truncation={"direction": "Right", "max_length": 3, "stride": 0,
                                                              "strategy": "LongestFirst"}),
    "higher precision": lambda: edit("config.json", reorder_and_upcast_attn=True),
    "another name for n_head": lambda: edit("config.json", n_head=..., num_attention_heads=2),
}  # fmt: skip
REFUSED = {  # the reason -> a setting that does not
    "special_tokens_map.json (pad_token)": lambda: edit("special_tokens_map.json", pad_token="!"),
    "tokenizer.json (added_tokens), tokenizer_config.json (extra_special_tokens)": lambda: saved(
        extra_special_tokens=["<|user|>"]
    ),
    "by tokenizer_config.json (additional_special_tokens)": lambda: edit(
        "tokenizer_config.json", additional_special_tokens=[token("<|user|>")]
    ),
    "special_tokens_map.json (sep_token)": lambda: edit("special_tokens_map.json", sep_token="<sep>"),
    "tokenizer_config.json (bos_token)": lambda: edit("tokenizer_config.json", bos_token="<s>"),
    "tokenizer_config.json (image_token)": lambda: edit("tokenizer_config.json", image_token="<image>"),
    "a text with 'hello'": lambda: saved("hello"),
    "added_tokens.json (added_tokens)": lambda: edit("added_tokens.json", jumps=END + 1),
    "a text with 'STOP'": lambda: rename("STOP"),
    "tokenizer_config.json (added_tokens_decoder)": lambda: edit(
        "tokenizer_config.json", added_tokens_decoder={END: token(), END + 1: token("there")}
    ),
    f"two files disagree: {EOT} is id {END}, and 5": lambda: edit("added_tokens.json", **{EOT: 5}),
    "has the option lstrip": lambda: edit("tokenizer.json", added_tokens=[token(id=END, lstrip=True)]),
    "eos_token_id is None": lambda: ends_at(None),
    f"eos_token_id is [{END}, 7]": lambda: ends_at(END, 7),
    "ends at id 104, which is 'h'": lambda: ends_at(104),
    "ends at id 50256, which no token has": lambda: [
        Path("hf/generation_config.json").unlink(), edit("config.json", eos_token_id=...)
    ],
    "its post_processor adds tokens": lambda: template(EOT, None),
    "its post_processor adds tokens: {'type': 'Roberta": lambda: edit(
        "tokenizer.json",
        post_processor={"type": "RobertaProcessing", "sep": [EOT, END], "cls": [EOT, END], "trim_offsets": True,
                        "add_prefix_space": False},
    ),
    "add_bos_token is True": lambda: edit("tokenizer_config.json", add_bos_token=True),
    "add_prefix_space is True": lambda: edit("tokenizer_config.json", add_prefix_space=True),
    "split_special_tokens is True": lambda: edit("tokenizer_config.json", split_special_tokens=True),
    "its tokenizer_class is Qwen2Tokenizer": as_pretrained_class("Qwen2Tokenizer"),
    "its tokenizer_class is OPTTokenizer": lambda: [
        edit("tokenizer_config.json", tokenizer_class=...), edit("config.json", tokenizer_class="OPTTokenizer")
    ],
    "its pre_tokenizer is": lambda: inside("tokenizer.json", "pre_tokenizer", add_prefix_space=True),
    "its pre_tokenizer is {'type': 'Whitespace'": lambda: edit("tokenizer.json", pre_tokenizer={"type": "Whitespace"}),
    "its normalizer is": lambda: edit("tokenizer.json", normalizer={"type": "Lowercase"}),
    "its decoder is": lambda: edit("tokenizer.json", decoder={"type": "Fuse"}),
    "its dropout is 0.5": lambda: inside("tokenizer.json", "model", dropout=0.5),
    "disagrees with vocab.json": a_stale_vocabulary,
    "disagrees with vocab.json and merges.txt": fewer_merges,
    "its prefix is 'So,'": lambda: edit("config.json", prefix="So,"),
}  # fmt: skip
SETTINGS = SAME | REFUSED


def texts_of(published):
    """Texts with every added token, except those for padding."""
    names = [
        name for name in published.get_added_vocab() if name in (published.eos_token, EOT) or "pad" not in name.lower()
    ]
    return [PROSE[:300], " naïve 12 hello there!\n\nIt's", *(f"the {name} jumps{name}" for name in names)]


def ids_of(tokenizer, special, text):
    """Our ids, with special tokens put in by id, as gpt.py does it."""
    ids = []
    for piece in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        ids += [special[piece]] if piece in special else tokenizer.encode(piece)
    return ids


@torch.no_grad()
def assert_same():
    model, tokenizer = gpt.load_checkpoint("ours")
    described = json.loads(Path("ours/config.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    special = {name: i for name, i in described["special_tokens"].items() if name in theirs.get_added_vocab()}
    for text in texts_of(theirs):
        assert ids_of(tokenizer, special, text) == theirs(text)["input_ids"], text
    reference = transformers.GPT2LMHeadModel.from_pretrained("hf")
    idx = torch.arange(97, 121).view(8, 3)
    options = {"attention_mask": torch.ones_like(idx), "max_new_tokens": 10, "do_sample": False}
    exact = reference.generate(idx, **options, pad_token_id=tokenizer.eot)
    assert torch.equal(model.generate(idx, 10, temperature=0, eot=tokenizer.eot), exact)
    return exact[:, 3:]


def convert(setting):
    SETTINGS[setting]()
    convert_gpt2.convert("hf", "ours", overwrite=True)


@pytest.mark.parametrize("setting", SAME)
def test_a_setting_that_changes_no_id_is_accepted(hf, setting):
    convert(setting)
    new = assert_same()
    ended = (new == json.loads(Path("ours/config.json").read_text())["eot"]).any(dim=1)
    assert ended.any() and not ended.all(), "some texts end, and some do not"


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_changes_ids_or_the_end_is_refused_by_name(hf, setting):
    with pytest.raises(gpt.InputError, match=re.escape(setting)):
        convert(setting)
    assert not Path("ours").exists()


def accepted_or_refused(first, second):
    for setting in (first, second):
        with contextlib.suppress(Exception):  # one may have removed the other's file, or be wrong for transformers
            SETTINGS[setting]()
    with contextlib.suppress(gpt.InputError):
        convert_gpt2.convert("hf", "ours", overwrite=True)
        assert_same()


PAIRS = list(itertools.combinations(SAME, 2))


@pytest.mark.parametrize("pair", PAIRS[::9], ids="+".join)
def test_of_two_settings_too(hf, pair):
    accepted_or_refused(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_of_all_pairs_of_settings(origin, setting):
    names = list(SETTINGS)
    for other in names[names.index(setting) :]:
        shutil.rmtree("hf", ignore_errors=True)
        shutil.copytree(origin, "hf")
        accepted_or_refused(setting, other)
