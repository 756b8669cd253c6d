"""What a user calls a model -> a model that is ready to run."""

import difflib
from pathlib import Path

import lora
import quantize
from gpt import InputError, load_checkpoint, require, resolve_dtype


def find_checkpoint(name):
    """A folder, or a name under checkpoints/ -> the folder; raises InputError with the command that would make it."""
    places = Path(name), Path("checkpoints") / name
    for folder in places:
        if (folder / "tokenizer.tiktoken").is_file():  # config.json alone could be another library's
            return folder
    for folder in places:
        require(not (folder / "config.json").is_file(), f"{folder} is not a checkpoint of ours, having no tokenizer.tiktoken: if it "
                f"is a GPT-2, make one with `python convert_gpt2.py {folder} --out DIR`")  # fmt: skip
        require(not (folder / "adapter_config.json").is_file(), f"{folder} is an adapter: python sample.py --model ITS_BASE --adapter "
                f"{folder}")  # fmt: skip
    near = difflib.get_close_matches(str(name), [path.parent.name for path in Path("checkpoints").glob("*/tokenizer.tiktoken")], 1)
    require(not near, f"there is no checkpoint {name}: did you mean {', '.join(near)}?")
    made_by = {"-finetuned": f"finetune.py --model {name.removesuffix('-finetuned')}", "gpt2": f"convert_gpt2.py {name}"}
    make = next((made_by[key] for key in made_by if key in name), f"gpt.py --out {folder if Path(name).name == name else name}")
    raise InputError(f"there is no checkpoint {name}, nor {folder}: make it with `python {make}`")


def short_name(folder):
    """What --model may call a checkpoint that exists: its name alone, where that leads to it."""
    name = Path(folder).name
    return name if Path(folder) == Path("checkpoints", name) == find_checkpoint(name) else folder


def open_model(folder, device, dtype, adapter=None):
    """A checkpoint's folder -> GPT on the device, Tokenizer; dtype, that of the weights, is as for --dtype, int8 too."""
    model, tokenizer = load_checkpoint(folder)
    if adapter:
        lora.load_adapter(model, adapter, folder)
    if dtype == "int8":
        return quantize.quantize(model).to(device), tokenizer
    return model.to(device, resolve_dtype(dtype, device)), tokenizer
