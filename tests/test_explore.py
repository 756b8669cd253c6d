import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import parameters_of, run_main
from safetensors.torch import save_file

import explore
import gpt
from extras import export

run = functools.partial(run_main, explore.main, "--device", "cpu")


def test_what_is_seen_inside_is_what_transformers_sees(mine, capsys):
    transformers = pytest.importorskip("transformers")
    export.main(["mine", "--format", "hf", "--out", "theirs"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs", attn_implementation="eager").double().eval()
    found, attention = explore.inspect(mine, gpt.Tokenizer.bytes(), "to be or not")
    ids = list(b"to be or not")
    with torch.no_grad():
        seen = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        assert (attention - torch.cat(seen.attentions)).abs().max() < 1e-5
        logs = seen.logits[0].log_softmax(-1)
        for at, row in enumerate(found["tokens"][1:], 1):
            assert row["entropy"] == pytest.approx(
                torch.distributions.Categorical(logits=logs[at - 1]).entropy().item(), rel=1e-4
            )
            expected = [
                bytes([i]).decode(errors="replace") if i < 256 else gpt.EOT
                for i in logs[at - 1].argsort(descending=True)[:5]
            ]
            assert [one["token"] for one in row["expected"]] == expected
            assert row["expected"][0]["p"] == pytest.approx(logs[at - 1].max().exp().item(), rel=1e-4)
            if at < len(ids):
                assert row["log_probability"] == pytest.approx(logs[at - 1, ids[at]].item(), rel=1e-4, abs=1e-5)
                assert row["rank"] == logs[at - 1].argsort(descending=True).tolist().index(ids[at]) + 1
        added = {}
        for i, block in enumerate(theirs.transformer.h):
            block.attn.register_forward_hook(lambda _, __, out, i=i: added.update({("attention", i): out[0]}))
            block.mlp.register_forward_hook(lambda _, __, out, i=i: added.update({("mlp", i): out}))
        theirs(torch.tensor([ids]))
        for (part, i), out in added.items():
            assert found["stream"][i + 1][f"{part}_norm"] == pytest.approx(out[0].norm(dim=-1).mean().item(), rel=1e-4)
        for row, hidden in zip(found["stream"][:-1], seen.hidden_states[:-1], strict=True):
            assert row["norm"] == pytest.approx(hidden[0].norm(dim=-1).mean().item(), rel=1e-4)
            said = theirs.lm_head(theirs.transformer.ln_f(hidden[0, -1])).softmax(-1)
            assert row["says"][0]["p"] == pytest.approx(said.max().item(), rel=1e-4)
    last, model = (
        found["stream"][-1]["says"],
        found["tokens"][-1]["expected"],
    )  # after the last block, the lens is the model
    assert [one["token"] for one in last] == [one["token"] for one in model]
    assert [one["p"] for one in last] == pytest.approx([one["p"] for one in model], rel=1e-5)


def test_a_learner_sees_it_in_the_terminal_or_as_a_picture(mine, capsys):
    run("--model", "mine", "--prompt", "to be or not", "--text")
    out = capsys.readouterr().out
    assert "block 1" in out and "next token" in out and "'o'" in out
    run("--model", "mine", "--prompt", "x" * 100, "--json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "the text has 100 tokens, only the last 32" in err
    assert len(found["tokens"]) == 33 and np.array(found["attention"]).shape == (2, 2, 32), "the last 32 tokens count"
    assert not Path("attention.png").exists()
    run("--model", "mine", "--prompt", "to be or not")
    assert Path("attention.png").read_bytes().startswith(b"\x89PNG")
    run("--model", "mine", "--prompt", "to be or not", "--out", "other.png")
    assert Path("other.png").exists()


BAD = {
    "no such model": (["--model", "nobody", "--prompt", "a"], "there is no checkpoint nobody"),
    "nothing to inspect": (["--model", "mine", "--prompt", ""], "--prompt needs a text"),
    "no name": (["--model", "mine", "--prompt", "a", "--out", "."], "--out '.' names no file"),
    "no folder": (["--model", "mine", "--prompt", "a", "--out", "no/x.png"], "there is no folder no for --out"),
    "not a number": (
        ["--model", "poisoned", "--prompt", "a"],
        "transformer.wte.weight holds numbers that are not finite",
    ),
    "no prompt": ([], "the following arguments are required: --prompt"),
    "two forms": (["--prompt", "a", "--text", "--json"], "not allowed with argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(mine, case, capsys):
    argv, message = BAD[case]
    gpt.save_checkpoint("checkpoints/poisoned", mine, gpt.Tokenizer.bytes())
    weights = parameters_of("checkpoints/poisoned")
    weights["transformer.wte.weight"][0] = math.nan
    save_file(weights, "checkpoints/poisoned/model.safetensors")
    run(*argv, expect=2)
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and out == ""
