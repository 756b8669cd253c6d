import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROSE, ROOT, TINY, enlarge, interrupt, parameters_of
from safetensors.torch import load_file, save_file

import finetune
import gpt
import sample
from extras import export, lora
from finetune import METHODS, Documents, FinetuneConfig

OTHER = (
    "Wherefore art thou, Romeo? Deny thy father and refuse thy name; or, if thou wilt not, be but sworn my love.\n" * 60
)
SHORT = [
    "--max_steps",
    "8",
    "--eval_interval",
    "4",
    "--batch_size",
    "4",
    "--warmup_steps",
    "2",
    "--device",
    "cpu",
    "--block_size",
    "16",
]


@pytest.fixture
def base(own_folder):
    """A checkpoint whose weights are large enough that every change matters, and a text that it has not seen."""
    model = enlarge(gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=257, n_layer=3, n_head=2, n_embd=16)))
    gpt.save_checkpoint("checkpoints/scratch", model, gpt.Tokenizer.bytes())
    (own_folder / "other.txt").write_text(OTHER)
    (own_folder / "prose.txt").write_text(PROSE)
    return model


def tune(*flags, expect=None, data="other.txt"):
    argv = ["--model", "scratch", "--data", data, *SHORT, *map(str, flags)]
    if expect is None:
        return finetune.main(argv)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(argv)
    assert stopped.value.code == expect


# ---------------------------------------------------------------------------------------------------------------------
# What is trained.


def trained(model, method, **fields):
    finetune.choose(model, FinetuneConfig(data=["x"], method=method, **fields))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


COUNTS = {  # for GPT-2 small, from its shape: 12 blocks, 768 channels, 50,257 tokens, 1,024 positions
    ("full", ()): 124_439_808,
    ("last", (("blocks", 2),)): 2 * (12 * 768**2 + 13 * 768) + 2 * 768,
    ("layernorm", ()): 25 * 2 * 768,
    ("bias", ()): 12 * (3 + 1 + 4 + 1) * 768 + 25 * 768,
    ("head", ()): 50257 * 768,
    ("layernorm+head", ()): 50257 * 768 + 25 * 2 * 768,
    ("lora", ()): 12 * 8 * (768 + 3 * 768),
    ("lora", (("rank", 4), ("targets", lora.TARGETS))): 12 * 4 * (4 + 2 + 5 + 5) * 768,
}


@pytest.mark.parametrize(("method", "fields", "count"), [(*key, count) for key, count in COUNTS.items()], ids=str)
def test_counts_are_those_of_the_closed_forms(method, fields, count):
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig.preset("gpt2"))
        fields = {key: list(value) if key == "targets" else value for key, value in fields}
        found = sum(p.numel() for p in trained(model, method, **fields).values())
    assert found == count


def test_the_counts_in_the_documents_are_these():
    counts = {method: count for (method, fields), count in COUNTS.items() if not fields or method == "last"}
    assert (counts["layernorm"], counts["bias"], counts["head"], counts["lora"]) == (
        38_400,
        102_144,
        38_597_376,
        294_912,
    )
    assert counts["bias"] - 25 * 768 == 82_944  # without the biases of the norms


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_stays_bit_identical_and_what_is_trained_changes(base, method):
    tune("--method", method, *(["--blocks", 1] if method == "last" else []), "--out", "tuned", "--lr", "0.01")
    wanted = set(trained(gpt.load_checkpoint("checkpoints/scratch")[0], method, blocks=1))
    if method == "lora":
        wanted = {name.replace("lora_A", "weight").replace("lora_B", "weight") for name in wanted}
    before, after = parameters_of("checkpoints/scratch"), parameters_of("tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "full":
        changed |= {"transformer.wpe.weight"}
    assert changed == wanted


def test_frozen_parts_have_no_gradient_and_no_optimizer_state(base):
    tune("--method", "last", "--blocks", 1, "--out", "tuned")
    tensors = gpt.load_run("tuned")[1]
    names = set(trained(base, "last", blocks=1))
    assert {name for name in tensors if ":" not in name} == names
    assert {name.split(":")[0] for name in tensors if ":" in name} == names


def test_the_backward_pass_ends_where_nothing_below_is_trained(base):
    trained(base, "last", blocks=1)
    visited = []
    for i, block in enumerate(base.transformer.h):
        block.mlp.c_fc.register_full_backward_hook(lambda *_, i=i: visited.append(i))
    base.train()
    base(torch.arange(16)[None], torch.arange(16)[None])[1].backward()
    assert visited == [2] and base.transformer.h[1].mlp.c_fc.weight.grad is None


def test_activations_kept_for_the_backward_pass_shrink_with_the_trainable_part(base):
    data = gpt.TokenDataset(np.arange(200), 16)
    kept = []
    for method in ("full", "last", "layernorm"):
        model = gpt.load_checkpoint("checkpoints/scratch")[0]
        trained(model, method, blocks=1, dropout=0.0)
        kept.append(finetune.activation_bytes(model, data, FinetuneConfig(data=["x"], batch_size=4), torch.float32))
    assert kept[1] < kept[0] / 2 and kept[1] < kept[2] < kept[0]


# ---------------------------------------------------------------------------------------------------------------------
# LoRA.


@torch.no_grad()
def moved(model):
    """LoRA away from its beginning, where B is zero."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model.eval()


@torch.no_grad()
def test_lora_begins_as_the_base_bit_for_bit(base):
    idx = torch.arange(16)[None]
    before = base(idx)[0]
    lora.adapt(base, lora.TARGETS, rank=4, alpha=32, dropout=0.5)
    assert all(p.requires_grad == ("lora_" in name) for name, p in base.named_parameters())
    assert torch.equal(base.eval()(idx)[0], before)


@pytest.mark.parametrize("targets", [["attn.c_attn"], list(lora.TARGETS), ["mlp.c_proj", "attn.c_proj"]], ids=str)
@torch.no_grad()
def test_merged_and_unmerged_lora_compute_the_same(base, targets):
    idx = torch.arange(16)[None]
    before = base(idx)[0]
    moved(lora.adapt(base, targets, rank=3, alpha=12))
    unmerged = base(idx)[0]
    assert (unmerged - before).abs().max() > 0.1 * before.abs().max()
    merged = gpt.GPT(base.config).eval()
    merged.load_state_dict(lora.merged(base), strict=False)
    assert (merged(idx)[0] - unmerged).abs().max() / unmerged.abs().max() < 1e-5


@torch.no_grad()
def test_the_adapter_alone_gives_the_same_logits_here_and_in_peft(base):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    idx = torch.arange(16)[None]
    moved(lora.adapt(base, ["attn.c_attn", "mlp.c_proj"], rank=3, alpha=12))
    lora.save_adapter(base, Path("adapter"), "scratch")
    ours = lora.load_adapter(gpt.load_checkpoint("checkpoints/scratch")[0], "adapter")
    assert torch.equal(ours(idx)[0], base(idx)[0])
    export.main(["scratch", "--format", "hf", "--out", "theirs"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs")
    theirs = peft.PeftModel.from_pretrained(theirs, "adapter").eval().double()
    exact = theirs(idx).logits
    assert (base(idx)[0] - exact).abs().max() / exact.abs().max() < 1e-5


def test_sampling_with_the_adapter_is_sampling_from_the_merged_checkpoint(base, capsys):
    tune("--out", "tuned", "--save_adapter", "adapter")
    assert "saved in tuned, the adapter alone in adapter\n" in capsys.readouterr().out
    texts = []
    for model in (["scratch", "--adapter", "adapter"], ["tuned"], ["scratch"]):
        sample.main(["--model", *model, "--prompt", "the", "--greedy", "--max_new_tokens", "30", "--dtype", "float32"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    sample.main(["--model", "tuned", "--adapter", "adapter", "--prompt", "the", "--max_new_tokens", "1"])
    assert "the adapter in adapter was made for checkpoints/scratch, not for tuned" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        sample.main(["--model", "scratch", "tuned", "--adapter", "adapter", "--prompt", "a"])
    assert end.value.code == 2 and "--adapter belongs to one model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        sample.main(["--model", "scratch", "--adapter", "nowhere", "--prompt", "a"])
    assert end.value.code == 2 and "there is no adapter in nowhere" in capsys.readouterr().err


@torch.no_grad()
def test_an_adapter_made_by_peft_is_read(base):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    export.main(["scratch", "--format", "hf", "--out", "theirs"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(theirs, settings).eval()
    theirs.save_pretrained("adapter")
    ours = lora.load_adapter(base, "adapter")
    idx = torch.arange(16)[None]
    exact = theirs.double()(idx).logits
    assert (ours(idx)[0] - exact).abs().max() / exact.abs().max() < 1e-5


def test_training_lora_ends_where_peft_ends(base):
    """The same beginning, windows and optimizer: the validation loss of both is the same to rounding."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    rate = 0.02
    flags = [
        "--method",
        "lora",
        "--dropout",
        "0",
        "--dtype",
        "float32",
        "--lr",
        rate,
        "--max_steps",
        40,
        "--patience",
        0,
    ]
    tune(*flags, "--out", "tuned", "--grad_clip", 0, "--weight_decay", 0, "--beta2", 0.999, "--seed", 3)
    export.main(["scratch", "--format", "hf", "--out", "theirs"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs", attn_implementation="eager")
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, settings)
    torch.manual_seed(3)
    model, tokenizer = gpt.load_checkpoint("checkpoints/scratch")
    config = finetune.FinetuneConfig(**{key: value for key, value in gpt.load_run("tuned")[0]["config"].items()
                                        if key in FinetuneConfig.__dataclass_fields__})  # fmt: skip
    finetune.choose(model, config)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(ours[name.removeprefix(lora.PREFIX).replace(".default.weight", "")])
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], betas=(0.9, 0.999), weight_decay=0
    )
    _, train_tokens, val_tokens = gpt.load_data(["other.txt"], tokenizer)
    data, val = gpt.TokenDataset(train_tokens, 16, 4), gpt.TokenDataset(val_tokens, 16)
    for step in range(40):
        optimizer.param_groups[0]["lr"] = gpt.learning_rate(step, config)
        x, y = data.batch(gpt.windows_of_step(len(data), step, config)[0])
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, y = val.batch(range(len(val)))
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1).item()
    rows = gpt.load_run("tuned")[0]["rows"]
    assert rows[-1]["val_loss"] == pytest.approx(loss, rel=1e-4) and loss < rows[0]["val_loss"] - 0.1


def climb(monkeypatch, begin):
    """From a step on, training makes everything worse."""
    original = gpt.forward_backward

    def uphill(model, data, step, config, dtype):
        loss = original(model, data, step, config, dtype)
        for p in model.parameters():
            if p.grad is not None and step >= begin:
                p.grad *= -1
        return loss

    monkeypatch.setattr(gpt, "forward_backward", uphill)


def test_a_run_that_learned_nothing_says_so(base, monkeypatch, capsys):
    climb(monkeypatch, 0)
    tune("--out", "tuned", "--method", "full")
    assert "the saved model is the base" in capsys.readouterr().err
    assert all(torch.equal(p, parameters_of("checkpoints/scratch")[name]) for name, p in parameters_of("tuned").items())


def test_the_adapter_that_is_saved_is_that_of_the_best_validation(base, monkeypatch):
    climb(monkeypatch, 4)
    tune("--out", "tuned", "--save_adapter", "adapter", "--dtype", "float32", "--max_steps", 16, "--beta2", 0.5)
    assert gpt.load_run("tuned")[2]["step"] < 16
    ours = lora.load_adapter(gpt.load_checkpoint("checkpoints/scratch")[0], "adapter")
    merged, _ = gpt.load_checkpoint("tuned")
    idx = torch.arange(16)[None]
    assert (ours(idx)[0] - merged(idx)[0]).abs().max() / merged(idx)[0].abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The run.


@pytest.mark.parametrize("method", ["lora", "last"])
def test_resuming_is_the_same_as_never_stopping(base, method, monkeypatch):
    flags = ["--method", method, *(["--lora_dropout", "0.1"] if method == "lora" else [])]
    tune(*flags, "--out", "whole")
    with interrupt(monkeypatch, step=5):
        tune(*flags, "--out", "parts", expect=130)
    torch.manual_seed(99)
    finetune.main(["--resume", "--out", "parts"])
    whole, parts = gpt.load_run("whole")[1], gpt.load_run("parts")[1]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    for name, weight in parameters_of("whole").items():
        assert torch.equal(weight, parameters_of("parts")[name])


def test_a_run_whose_base_has_changed_is_not_resumed(base, capsys):
    tune("--out", "tuned")
    before = Path("tuned/model.safetensors").read_bytes()
    for model in (
        enlarge(base, seed=5),
        gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16)),
    ):
        gpt.save_checkpoint("checkpoints/scratch", model, gpt.Tokenizer.bytes(), overwrite=True)
        with pytest.raises(SystemExit) as end:
            finetune.main(["--resume", "--out", "tuned", "--max_steps", "12"])
        assert (
            end.value.code == 2
            and "the data or the base model changed since the run in tuned began" in capsys.readouterr().err
        )
        assert Path("tuned/model.safetensors").read_bytes() == before


def test_a_run_whose_text_has_changed_is_not_resumed(base, capsys):
    tune("--out", "tuned")
    Path("other.txt").write_text(OTHER[1:])
    with pytest.raises(SystemExit) as end:
        finetune.main(["--resume", "--out", "tuned", "--max_steps", "12"])
    assert end.value.code == 2 and "the data or the base model changed" in capsys.readouterr().err


def test_resuming_changes_the_schedule_but_not_the_method(base, capsys):
    tune("--out", "tuned")
    finetune.main(
        ["--resume", "--out", "tuned", "--max_steps", "12", "--lr", "0.001", "--also_eval", "prose.txt", "--rank", "8"]
    )
    assert "prose.txt: " in capsys.readouterr().out and gpt.load_run("tuned")[0]["step"] == 12
    changes = {
        "model": "tuned",
        "method": "full",
        "rank": "4",
        "targets": "attn.c_proj",
        "save_adapter": "adapter",
        "block_size": "8",
    }
    for flag, value in changes.items():
        with pytest.raises(SystemExit) as end:
            finetune.main(["--resume", "--out", "tuned", f"--{flag}", value])
        assert end.value.code == 2 and f"--resume can't change {flag}" in capsys.readouterr().err


def test_an_adapter_is_not_overwritten_unasked(base, capsys):
    tune("--out", "tuned", "--save_adapter", "adapter")
    tune("--out", "again", "--save_adapter", "adapter", expect=2)
    assert "adapter already holds an adapter" in capsys.readouterr().err
    finetune.main(["--resume", "--out", "tuned", "--max_steps", "12"])  # its own adapter is replaced


def test_a_folder_for_the_adapter_that_cannot_be_made_is_refused_before_training(base, capsys):
    Path("taken").write_text("a file")
    tune("--out", "tuned", "--save_adapter", "taken", expect=2)
    assert "the folder taken for the adapter can't be made" in capsys.readouterr().err and not Path("tuned").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are started by fork")
def test_two_processes_adapt_as_one(base):
    """Under torchrun the batch is shared, and the result is that of one process, to rounding."""
    flags = [
        "--model",
        "scratch",
        "--data",
        "other.txt",
        *SHORT,
        "--dropout",
        "0",
        "--dtype",
        "float32",
        "--save_adapter",
        "adapter",
    ]
    finetune.main([*flags, "--out", "one"])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "finetune.py"),
    ]
    done = subprocess.run(
        [*torchrun, *flags, "--out", "two", "--overwrite"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("bits per byte before") == 1
    one, two = parameters_of("one"), parameters_of("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one)


def test_each_script_resumes_its_own_runs(base, capsys):
    tune("--out", "tuned")
    with pytest.raises(SystemExit) as end:
        gpt.main(["--resume", "--out", "tuned"])
    assert end.value.code == 2 and "tuned is a run of finetune.py" in capsys.readouterr().err
    gpt.main([*TINY, "--data", "prose.txt", "--out", "ordinary"])
    with pytest.raises(SystemExit) as end:
        finetune.main(["--resume", "--out", "ordinary"])
    assert end.value.code == 2 and "ordinary is a run of gpt.py" in capsys.readouterr().err


def test_training_ends_early_when_nothing_gets_better(base, capsys):
    tune(
        "--out",
        "tuned",
        "--lr",
        "9",
        "--grad_clip",
        0,
        "--max_steps",
        40,
        "--patience",
        2,
        "--eval_interval",
        1,
        "--warmup_steps",
        0,
    )
    run, _, best = gpt.load_run("tuned")
    assert run["step"] == best["step"] + 2 < 40
    before = parameters_of("tuned")
    finetune.main(["--resume", "--out", "tuned"])  # there is nothing left to do
    after = parameters_of("tuned")
    assert gpt.load_run("tuned")[0]["step"] == run["step"] and all(torch.equal(p, before[n]) for n, p in after.items())


def test_the_result_is_an_ordinary_checkpoint_with_a_name_of_its_own(base, capsys):
    tune("--also_eval", "prose.txt")
    out, err = capsys.readouterr()
    described = json.loads(Path("checkpoints/scratch-finetuned/config.json").read_text())
    assert described["training"]["model"] == "scratch" and described["training"]["method"] == "lora"
    fingerprints = gpt.load_run("checkpoints/scratch-finetuned")[0]["fingerprints"]
    assert (
        fingerprints["base"] == hashlib.sha256(Path("checkpoints/scratch/model.safetensors").read_bytes()).hexdigest()
    )
    assert "bits per byte before" in out and "prose.txt: " in out and " after" in out
    assert "1,536 of 14,240 parameters are trained, 10.787%" in err and "memory: weights" in err


def test_what_the_base_knew_is_measured_before_and_after(base, capsys):
    tune("--also_eval", "prose.txt", "--dtype", "float32", "--val_bytes", "300")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("prose.txt"))
    figures = [float(word) for word in line.split() if word[0].isdigit()]
    tokens = gpt.TokenDataset(gpt.load_data(["prose.txt"], gpt.Tokenizer.bytes(), val_bytes=300)[2], 16)
    for figure, name in zip(figures, ("checkpoints/scratch", "checkpoints/scratch-finetuned"), strict=True):
        model, tokenizer = gpt.load_checkpoint(name)
        assert gpt.evaluate(model, tokens, tokenizer)["bits_per_byte"] == pytest.approx(figure, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Documents.


def write_lines(path, *examples):
    Path(path).write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def test_only_the_completion_is_learned_and_padding_never_counts():
    tokenizer = gpt.Tokenizer.bytes()
    path = write_lines(
        "d.jsonl",
        {"prompt": "ab", "completion": "xyz"},
        {"prompt": "", "completion": "q"},
        {"prompt": "z", "completion": "w"},
    )
    train, val = finetune.documents([path], tokenizer, 16, 2**20)
    x, y = train.batch([0, 1])
    assert x.tolist() == [[97, 98, 120, 121, 122], [256, 113, 0, 0, 0]]
    assert y.tolist() == [[-1, 120, 121, 122, 256], [113, 256, -1, -1, -1]], "the end of text is learned"
    assert val.batch([0])[1].tolist() == [[119, 256]]


def test_a_text_is_learned_whole_however_long():
    tokenizer = gpt.Tokenizer.bytes()
    path = write_lines("d.jsonl", {"text": "abcdefghij"}, {"text": "k"})
    train, _ = finetune.documents([path], tokenizer, 4, 2**20)
    targets = [t for _, y in map(train.batch, [[i] for i in range(len(train))]) for t in y.flatten().tolist()]
    assert bytes(targets[:-1]) == b"abcdefghij" and targets[-1] == 256


def test_of_a_prompt_that_is_too_long_the_end_counts(capsys):
    path = write_lines("d.jsonl", {"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "a", "completion": "b"})
    train, _ = finetune.documents([path], gpt.Tokenizer.bytes(), 5, 2**20)
    assert train.examples == [([102, 103, 104, 120, 121, 256], 3)]
    assert "1 of 2 examples are longer than 5 tokens" in capsys.readouterr().err


def test_the_last_tenth_validates():
    path = write_lines("d.jsonl", *({"prompt": str(i), "completion": "x"} for i in range(50)))
    train, val = finetune.documents([path], gpt.Tokenizer.bytes(), 16, 2**20)
    assert (len(train), len(val)) == (45, 5)
    train, val = finetune.documents([path], gpt.Tokenizer.bytes(), 16, 2)
    assert (len(train), len(val)) == (48, 2), "at most val_bytes of it"


def test_padding_changes_no_loss(base):
    rows = [([97, 98, 120, 256], 2), ([1, 2, 3, 4, 5, 6, 7, 8, 9, 256], 4)]
    together = Documents(rows, 16).batch([0, 1])
    loss = base(*together)[1].item()
    alone = [base(*Documents([row], 16).batch([0]))[1].item() * (len(row[0]) - row[1]) for row in rows]
    assert loss == pytest.approx(sum(alone) / (2 + 6), rel=1e-5)


def test_documents_are_tuned_on_from_end_to_end(base, capsys):
    write_lines("d.jsonl", *({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(60)))
    tune("--method", "full", "--out", "tuned", "--max_steps", 40, "--patience", 0, "--lr", "0.01", data="d.jsonl")
    rows = gpt.load_run("tuned")[0]["rows"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1
    assert 40 * 4 * 3 < rows[-1]["tokens"] < 40 * 4 * 4, "completions of two to four tokens, not padded windows"


def test_documents_can_be_what_the_base_knew(base, capsys):
    write_lines("d.jsonl", *({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(60)))
    tune("--also_eval", "d.jsonl", "--dtype", "float32")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("d.jsonl"))
    _, val = finetune.documents(["d.jsonl"], gpt.Tokenizer.bytes(), 16, 2**20)
    figure = gpt.evaluate(gpt.load_checkpoint("checkpoints/scratch")[0], val, gpt.Tokenizer.bytes())["bits_per_byte"]
    assert f"d.jsonl: {figure:.4f} bits per byte before, " in line


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.

LINES = {
    '{"prompt": "a"}': re.escape("""expected {"text": ...}, or {"prompt": ..., "completion": ...}, found ['prompt']"""),
    '{"text": "a", "prompt": "b", "completion": "c"}': "found .'completion', 'prompt', 'text'.",
    '{"instruction": "a"}': "found .'instruction'.",
    '{"text": ""}': "the text to learn is empty",
    '{"prompt": "a", "completion": ""}': "the text to learn is empty",
    '{"text": 7}': "expected strings",
    '["text"]': "found list",
    "7": "found int",
    "{text}": "Expecting property name",
    '{"text": "a"': "Expecting ',' delimiter",
    '{"text": "\\ud800a"}': "surrogates not allowed",
    "[" * 100_000: "recursion",
}


@pytest.mark.parametrize(("line", "message"), LINES.items(), ids=range(len(LINES)))
def test_a_malformed_line_is_named_by_its_number(base, line, message, capsys):
    Path("d.jsonl").write_bytes(b'{"text": "sound"}\n\n' + line.encode(errors="surrogateescape") + b"\n")
    tune(data="d.jsonl", expect=2)
    error = capsys.readouterr().err
    assert error.startswith("error: d.jsonl, line 3: ") and error.count("\n") == 1 and re.search(message, error)


BAD = {
    "no base": (["--model", "gpt2"], "there is no checkpoint gpt2, in checkpoints/ there is scratch"),
    "no method": (["--method", "prayer"], "argument --method: invalid choice: 'prayer'"),
    "rank 0": (["--rank", "0"], "rank is 0"),
    "rank too large": (["--rank", "17"], "rank is 17, expected 1 to 16"),
    "alpha 0": (["--alpha", "0"], "alpha is 0"),
    "too many blocks": (["--method", "last", "--blocks", "4"], "--blocks 4: the model has only 3"),
    "no such target": (["--targets", "attn.c_attn", "q_proj"], "LoRA has no target 'q_proj'"),
    "the tied head": (["--targets", "lm_head"], "the head is tied"),
    "onto the base": (["--out", "checkpoints/scratch"], "is the base itself"),
    "onto the base, by another name": (
        ["--out", "./checkpoints/../checkpoints/scratch", "--overwrite"],
        "is the base itself",
    ),
    "no such text": (["--data", "nothing.txt"], "there is no text file nothing.txt"),
    "no such documents": (["--data", "nothing.jsonl"], "there is no text file nothing.jsonl"),
    "little known text": (["--also_eval", "little.txt"], "shorter than a window"),
    "two kinds": (["--data", "other.txt", "d.jsonl"], "mixes .jsonl with other texts"),
    "latin-1": (["--data", "latin.txt"], "latin.txt is not UTF-8 text"),
    "an adapter of no lora": (
        ["--method", "full", "--save_adapter", "x"],
        "--save_adapter goes with --method lora, not full",
    ),
    "a rank of no lora": (["--method", "last", "--rank", "4"], "--rank goes with --method lora, not last"),
    "an adapter as the base": (["--model", "adapter"], "there is no checkpoint adapter"),
    "json": (["--data", "d.json"], "d.json is JSON, not text: finetune.py learns from .jsonl"),
    "nothing to learn from": (["--data"], "expected at least one argument"),
    "another tokenizer": (["--tokenizer", "gpt2"], "argument --tokenizer: invalid choice: 'gpt2'"),
    "resume from nowhere": (["--resume"], "--resume needs --out"),
    "too little text": (["--data", "little.txt"], "shorter than a window"),
    "one document": (["--data", "one.jsonl"], "has too few examples (1)"),
    "an unknown flag": (["--method", "lora", "--ranks", "3"], "did you mean --rank?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(base, case, capsys):
    flags, message = BAD[case]
    Path("latin.txt").write_bytes("é".encode("latin-1") * 2000)
    Path("little.txt").write_text("too little text")
    write_lines("one.jsonl", {"text": "alone"})
    write_lines("d.jsonl", {"text": "a"}, {"text": "b"})
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    before = parameters_of("checkpoints/scratch")
    argv = ["--model", "scratch", "--data", "other.txt", *SHORT] if "--resume" not in flags else []
    with pytest.raises(SystemExit) as end:
        finetune.main([*argv, *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert all(torch.equal(p, before[name]) for name, p in parameters_of("checkpoints/scratch").items())
    assert os.listdir("checkpoints") == ["scratch"]


def test_a_checkpoint_is_not_overwritten_unasked(base, capsys):
    tune("--out", "tuned")
    tune("--out", "tuned", expect=2)
    assert "already holds a checkpoint" in capsys.readouterr().err
    tune("--out", "tuned", "--overwrite")


ADAPTERS = {
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), "there is no adapter in adapter"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is not a readable adapter"),
    "cut": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 100), "is not a readable adapter"),
    "other ranks": (lambda folder: change(folder, rank_pattern={"c_attn": 4}), "rank_pattern is {'c_attn': 4}"),
    "other scales": (lambda folder: change(folder, alpha_pattern={"c_attn": 4}), "alpha_pattern is {'c_attn': 4}"),
    "another base": (lambda folder: change(folder, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "infinite": (lambda folder: change(folder, lora_alpha=math.inf), "lora_alpha is inf"),
    "no number": (lambda folder: change(folder, lora_alpha="16"), "is not a readable adapter"),
    "the head": (
        lambda folder: rename(folder, "transformer.h.0.attn.c_attn", "lm_head"),
        "lm_head.lora_A is none of attn",
    ),
    "no block": (
        lambda folder: rename(folder, "h.2.", "h.7."),
        "transformer.h.2.attn.c_attn.lora_A does not fit the model",
    ),
    "no rank": (lambda folder: change(folder, r=None), "is not a readable adapter"),
    "another rank": (lambda folder: change(folder, r=3), "does not fit the model and the rank of 3"),
    "dora": (lambda folder: change(folder, use_dora=True), "it is not plain LoRA: use_dora is True"),
    "another kind": (lambda folder: change(folder, peft_type="IA3"), "it is not plain LoRA: peft_type is 'IA3'"),
}


def change(folder, **keys):
    path = folder / "adapter_config.json"
    described = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def rename(folder, old, new):
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def test_an_adapter_with_settings_that_say_nothing_is_read(base):
    lora.save_adapter(lora.adapt(base), Path("adapter"), "scratch")
    change(Path("adapter"), modules_to_save=[], rank_pattern={}, init_lora_weights=True)
    lora.load_adapter(gpt.load_checkpoint("checkpoints/scratch")[0], "adapter")


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path, case):
    spoil, message = ADAPTERS[case]
    lora.save_adapter(lora.adapt(base), tmp_path / "adapter", "scratch")
    spoil(tmp_path / "adapter")
    with pytest.raises(gpt.InputError, match=message):
        lora.load_adapter(gpt.load_checkpoint("checkpoints/scratch")[0], "adapter")
