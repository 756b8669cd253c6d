import json
import shlex
from pathlib import Path

import pytest
import torch
from conftest import PROSE, ROOT, TINY, enlarge, interrupt, parameters_of, run_main, script

import finetune
import gpt
import sample
from debug.activations import relative_error
from extras import export, lora
from finetune import METHODS, FinetuneConfig

OTHER = "Wherefore art thou, Romeo? Deny thy father and refuse thy name; or, be but sworn my love.\n" * 70
SHORT = "--data other.txt --max_steps 8 --eval_interval 4 --batch_size 4 --warmup_steps 2 --device cpu --block_size 16 "
BYTES = gpt.Tokenizer.bytes()
IDX = torch.arange(16)[None]


@pytest.fixture
def base(own_folder, monkeypatch):
    """A checkpoint whose weights are large enough that every change matters, and a text that it has not seen."""
    monkeypatch.setattr(gpt, "plot", lambda rows, path: None)
    model = enlarge(gpt.GPT(gpt.GPTConfig(block_size=16, vocab_size=257, n_layer=3, n_head=2, n_embd=16)))
    gpt.save_checkpoint("checkpoints/scratch", model, BYTES)
    Path("other.txt").write_text(OTHER)
    Path("prose.txt").write_text(PROSE)
    return model


def tune(flags, out="tuned"):
    finetune.main(f"{SHORT} --out {out} {flags}".split())


def refused(capsys, flags, main=finetune.main):
    """The error line of a command that exits with status 2."""
    run_main(main, *flags.split(), expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


# ---- Trainable parameters ----
def trainable(model, method, **fields):
    finetune.choose(model, FinetuneConfig(data=["x"], method=method, **fields))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_only_the_trainable_parameters_change_and_have_optimizer_state(base, method):
    tune(f"--method {method} --lr 0.01 --max_steps 2")
    expected = set(trainable(base, method))
    tensors = gpt.load_run("tuned")[1]
    assert {name for name in tensors if ":" not in name} == {name.split(":")[0] for name in tensors} == expected
    before, after = parameters_of("checkpoints/scratch"), parameters_of("tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.replace("lora_A", "weight").replace("lora_B", "weight") for name in expected}


# ---- LoRA ----
@torch.no_grad()
def test_peft_reads_our_adapters(base):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    export.main(["scratch", "--format", "hf", "--out", "hf"])
    lora.adapt(base, ["attn.c_attn", "mlp.c_proj"], rank=3, alpha=12).eval()
    for name, p in base.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.3)
    lora.save_adapter(base, "ours", "scratch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf")
    theirs = peft.PeftModel.from_pretrained(theirs, "ours").eval().double()
    assert relative_error(base(IDX)[0], theirs(IDX).logits) < 1e-5


def test_patience_ends_training_and_adapter_and_merged_model_are_those_of_the_best_validation(base, capsys):
    lora_flags = f"--method lora --save_adapter adapter --targets {' '.join(lora.TARGETS)}"
    rates = "--lr 1 --grad_clip 0 --warmup_steps 0 --dtype float32 --val_bytes 300"
    tune(f"{lora_flags} {rates} --max_steps 40 --patience 2 --eval_interval 1")
    run, _, best = gpt.load_run("tuned")
    assert 0 < best["step"] == run["step"] - 2 < 38
    ours, _ = sample.open_model("scratch", adapter="adapter")
    assert relative_error(ours(IDX)[0], gpt.load_checkpoint("tuned")[0](IDX)[0]) < 1e-5
    lora.load_adapter(gpt.load_checkpoint("tuned")[0], "adapter", "tuned")
    assert "the adapter in adapter was made for checkpoints/scratch, not for tuned" in capsys.readouterr().err


# ---- The run ----
def test_by_default_the_last_blocks_of_scratch_are_trained_into_a_checkpoint_of_its_own(base, capsys):
    finetune.main(SHORT.split())
    config = json.loads(Path("checkpoints/scratch-finetuned/config.json").read_text())["training"]
    assert (config["model"], config["method"]) == ("scratch", "last")
    out, err = capsys.readouterr()
    assert "saved in checkpoints/scratch-finetuned" in out and "6,592 of 14,240 parameters are trained" in err


def test_bits_per_byte_are_measured_before_and_after_on_the_new_text_and_on_the_old(base, capsys):
    """That of LoRA begins as the base."""
    tune("--method lora --lora_dropout 0.5 --also_eval prose.txt --dtype float32 --val_bytes 300")
    title, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert title == ["bits", "per", "byte", "before", "after"]
    for name, *figures in rows:
        _, data = finetune.load_data([name], BYTES, 16, FinetuneConfig(data=["x"], val_bytes=300))
        for figure, folder in zip(figures, ("scratch", "tuned"), strict=True):
            exact = gpt.evaluate(gpt.load_checkpoint(folder)[0], data, BYTES)["bits_per_byte"]
            assert float(figure) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("method", ["lora --lora_dropout 0.1", "last"])
def test_resuming_is_the_same_as_never_stopping(base, method, monkeypatch):
    tune(f"--method {method}", out="whole")
    with interrupt(monkeypatch, step=5), pytest.raises(SystemExit):
        tune(f"--method {method}", out="parts")
    torch.manual_seed(99)
    finetune.main(["--resume", "--out", "parts"])
    whole, parts = (gpt.load_run(folder)[1] | parameters_of(folder) for folder in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_goes_on_with_another_schedule_but_not_with_another_method_text_or_base(base, capsys):
    tune("--method lora")
    finetune.main(["--resume", "--out", "tuned", "--max_steps", "12", "--rank", "8"])
    assert gpt.load_run("tuned")[0]["step"] == 12
    assert "tuned is a run of finetune.py" in refused(capsys, "--resume --out tuned", main=gpt.main)
    before = Path("tuned/model.safetensors").read_bytes()
    for flag in ("--method full", "--rank 4"):
        assert f"--resume can't change {flag[2:].split()[0]}" in refused(capsys, f"--resume --out tuned {flag}")
    gpt.save_checkpoint("another", enlarge(base, seed=5), BYTES)
    assert "the data or the base model changed" in refused(capsys, "--resume --out tuned --model another")
    Path("other.txt").write_text(OTHER[1:])
    assert "the data or the base model changed" in refused(capsys, "--resume --out tuned --max_steps 16")
    assert Path("tuned/model.safetensors").read_bytes() == before


def test_a_run_goes_on_when_told_where_its_base_and_its_text_have_moved(base, capsys):
    tune("--method lora")
    Path("checkpoints/scratch").rename("moved")
    Path("other.txt").rename("new.txt")
    assert "there is no checkpoint scratch" in refused(capsys, "--resume --out tuned --max_steps 12")
    assert "there is no text file other.txt" in refused(capsys, "--resume --out tuned --max_steps 12 --model moved")
    finetune.main(["--resume", "--out", "tuned", "--max_steps", "12", "--model", "moved", "--data", "new.txt"])
    run = gpt.load_run("tuned")[0]
    assert run["step"] == 12 and run["config"]["model"] == "moved" and run["config"]["data"] == ["new.txt"]
    gpt.main([*TINY, "--data", "prose.txt", "--out", "new", "--max_steps", "4"])
    Path("prose.txt").rename("moved.txt")
    gpt.main(["--resume", "--out", "new", "--data", "moved.txt", "--max_steps", "8"])
    assert gpt.load_run("new")[0]["step"] == 8


def test_the_suggested_command_runs_as_printed(base, capsys):
    write_lines("d.jsonl", *({"prompt": f"{i}'s next\n", "completion": str(i + 1)} for i in range(20)))
    for data, prompt in (("d.jsonl", "18's next\n"), ("other.txt", OTHER[-len(OTHER) // 10 :].strip()[:7])):
        finetune.main([*SHORT.split(), "--data", data, "--out", f"my {data}"])
        python, name, *flags = shlex.split(capsys.readouterr().err.rpartition("try: ")[2])
        assert (python, name, flags[-1]) == ("python", "sample.py", prompt)
        sample.main([*flags, "--max_new_tokens", "3"])
        assert prompt.strip() in capsys.readouterr().out


def test_neither_a_checkpoint_nor_an_adapter_is_overwritten_unasked(base, capsys):
    flags = "--max_steps 1 --method lora --save_adapter"
    tune(f"{flags} adapter")
    assert "tuned already holds a checkpoint: add --overwrite" in refused(capsys, f"{SHORT} --out tuned {flags} new")
    assert "adapter already holds an adapter: add --overwrite" in refused(capsys, f"{SHORT} --out new {flags} adapter")
    finetune.main(["--resume", "--out", "tuned", "--max_steps", "2"])  # replaces its own adapter
    assert not Path("new").exists()


@pytest.mark.slow
def test_two_processes_adapt_as_one(base):
    flags = f"{SHORT} --method lora --dropout 0 --dtype float32 --save_adapter adapter".split()
    finetune.main([*flags, "--out", "one"])
    torchrun = ["--standalone", "--nproc_per_node=2", ROOT / "finetune.py"]
    done = script("torch.distributed.run", *torchrun, *flags, "--out", "two", "--overwrite")
    assert done.returncode == 0 and done.stdout.count("saved in two") == 1, done.stderr[-2000:]
    one, two = parameters_of("one"), parameters_of("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one)


# ---- Prompts and completions ----
def write_lines(path, *examples):
    Path(path).write_text("".join(json.dumps(example) + "\n" for example in examples))


def documents(*examples, block_size=16, val_bytes=2**20):
    write_lines("d.jsonl", *examples)
    return finetune.documents(["d.jsonl"], BYTES, block_size, val_bytes)


def test_only_the_completion_is_learned_and_padding_never_counts():
    pairs = [("ab", "xyz"), ("", "q"), ("z", "w")]
    train, val = documents(*({"prompt": prompt, "completion": completion} for prompt, completion in pairs))
    x, y = train.batch([0, 1])
    assert x.tolist() == [[97, 98, 120, 121, 122], [256, 113, 0, 0, 0]]
    assert y.tolist() == [[-1, 120, 121, 122, 256], [113, 256, -1, -1, -1]], "the end of text is learned"
    assert val.batch([0])[1].tolist() == [[119, 256]]


def test_a_long_text_is_learned_whole_and_a_long_prompt_loses_its_beginning(capsys):
    train, _ = documents({"text": "abcdefghij"}, {"text": "k"}, block_size=4)
    targets = [t for i in range(len(train)) for t in train.batch([i])[1].flatten().tolist()]
    assert bytes(targets[:-1]) == b"abcdefghij" and targets[-1] == 256
    train, _ = documents({"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "a", "completion": "b"}, block_size=5)
    assert train.examples == [([102, 103, 104, 120, 121, 256], 3)]
    assert "1 of 2 examples are longer than 5 tokens" in capsys.readouterr().err


def test_the_last_tenth_validates():
    examples = [{"prompt": str(i), "completion": "x"} for i in range(50)]
    assert [len(data) for data in documents(*examples)] == [45, 5]
    assert [len(data) for data in documents(*examples, val_bytes=2)] == [48, 2]


MALFORMED = [
    ("d.jsonl", '{"prompt": "a"}'),
    ("D.JSONL", '{"text": 7}'),
    ("d.ndjson", '["text"]'),
    ("d.jsonl", '{"text": "\\ud800a"}'),
]


@pytest.mark.parametrize(("name", "line"), MALFORMED)
def test_a_malformed_line_is_named_by_its_number(base, name, line, capsys):
    Path(name).write_text('{"text": "sound"}\n' + line + "\n")
    error = refused(capsys, f"--data {name}")
    assert f"{name}, line 2: expected" in error and '{"text": ...} or {"prompt": ..., "completion": ...}' in error


# ---- Bad input ----
BAD = {
    "the tied head": ("--method lora --targets lm_head", "the head is tied"),
    "rank without lora": ("--rank 4", "--rank goes with --method lora"),
    "onto the base": ("--out ./checkpoints/../checkpoints/scratch --overwrite", "is the base itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(base, case, capsys):
    flags, message = BAD[case]
    before = Path("checkpoints/scratch/model.safetensors").read_bytes()
    assert message in refused(capsys, SHORT + flags)
    assert list(Path("checkpoints").iterdir()) == [Path("checkpoints/scratch")]
    assert Path("checkpoints/scratch/model.safetensors").read_bytes() == before
