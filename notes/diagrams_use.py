"""Diagrams of a model's weights in use: tied, with a cache, loaded from the published ones, adapted with LoRA."""

import torch

import gpt
from extras import lora
from notes.diagrams import EMBEDDING, KEYS, QUERIES, VALUES, WORDS, attend, gpt2_model, whole
from notes.svg import Picture, number


def draw_tying():
    residual = EMBEDDING[2:] + attend(QUERIES, KEYS, VALUES)[2][2:]  # (1, C): sat, and what attention adds to it
    hidden = torch.layer_norm(residual, (2,)).round(decimals=2)
    logits = hidden @ EMBEDDING.T.float()  # (1, V)
    probs = gpt.next_token_probs(logits)
    h = ", ".join(number(x) for x in hidden[0].tolist())
    story = (
        "One matrix with a row for each word. On the way in, an id reads its row. On the way out, the hidden state is "
        "multiplied with every row, which gives a logit for each word, and softmax turns them into probabilities."
    )
    picture = Picture("tying", "Weight tying: one matrix, used twice", story, height=226)
    picture.text(110, 22, "on the way in: a lookup", bold=True)
    picture.box(14, 113, 62, 30, "id 1", fill=0)
    picture.arrow((76, 128), (104, 128))
    picture.matrix(108, 115, EMBEDDING[1:2].tolist(), "teal", cell=(36, 26), strong=lambda i, j: True)
    picture.text(144, 156, "x, (1, C)", size=12)
    picture.arrow((258, 128), (186, 128), hue="teal")
    picture.text(322, 22, "one matrix, (V, C)", bold=True)
    picture.matrix(300, 68, EMBEDDING.tolist(), "teal", cell=(36, 40), names=WORDS, strong=lambda i, j: i == 1)
    picture.text(560, 22, "on the way out: every row · h", bold=True)
    picture.text(452, 52, f"hidden state h = [{h}]", size=12)
    for i, row in enumerate(EMBEDDING.tolist()):
        y = 88 + 40 * i
        picture.arrow((376, y), (400, y), hue="teal")
        picture.text(408, y, f"{row} · h =", anchor="start", code=True)
        picture.arrow((588, y), (624, y))
    picture.text(606, 52, "softmax", size=12)
    picture.matrix(526, 68, logits.T.tolist(), "violet", cell=(60, 40))
    picture.matrix(628, 68, probs.T.tolist(), "violet", cell=(60, 40), strong=lambda i, j: i == probs.argmax().item())
    picture.text(556, 202, "logits, (1, V)", size=12)
    picture.text(658, 202, "probabilities", size=12)
    return picture


def draw_cache():
    story = (
        "Three steps of generation. Without a cache each step computes keys and values of all tokens anew: 1 + 2 + 3 "
        "rows. With a cache each step computes those of the new token only, whose one query meets all keys so far."
    )
    picture = Picture("cache", "The KV cache: keys and values are computed once", story, height=384)
    cache = gpt.KVCache(len(WORDS))
    for step, word in enumerate(WORDS):
        x = 124 + 206 * step
        start = cache.length
        k, v = (t[None, None, start : step + 1] for t in (KEYS, VALUES))
        k, v = (whole(t[0, 0]) for t in cache.append(k, v))
        picture.text(x + 84, 20, f"step {step}: “{word}” goes in", bold=True)
        for top, known in ((68, 0), (236, start)):
            n_new = cache.length - known
            for left, rows, title in ((x, k, "keys"), (x + 84, v, "values")):
                picture.matrix(left, top, rows, names=WORDS[: step + 1] if left == x else (), cell=(36, 24),
                               hue=lambda i, j, known=known: "gray" if i < known else "orange",
                               strong=lambda i, j, known=known: i >= known)  # fmt: skip
                picture.text(left + 36, top - 12, title, size=12)
            picture.text(
                x + 84, top + 96, f"{n_new} {'row' if n_new == 1 else 'rows'} computed,\n{n_new} × {len(k)} scores"
            )
    picture.text(12, 104, "without\na cache", anchor="start", bold=True)
    picture.text(12, 272, "with\na cache", anchor="start", bold=True)
    picture.line((12, 194), (708, 194), width=1, opacity=0.3)
    picture.box(130, 362, 16, 14, hue="orange", fill=0.32, line=1, round=0)
    picture.text(154, 369, "computed in this step", anchor="start", size=12)
    picture.box(330, 362, 16, 14, fill=0.1, line=1, round=0)
    picture.text(354, 369, "read from the cache", anchor="start", size=12)
    return picture


def draw_transpose():
    x, published = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    ours = published.T
    story = (
        "The published weight has a row for each input and is multiplied as x W. nn.Linear keeps a row for each output "
        "and multiplies with the transpose. The same numbers, the same result; a square weight hides a mistake."
    )
    picture = Picture("transpose", "Conv1D and Linear keep transposed weights", story, height=350)
    hues = ("blue", "orange", "teal")
    picture.text(175, 20, "published: Conv1D, W is (in, out)", bold=True)
    picture.text(175, 44, "x @ W + b", code=True)
    picture.text(540, 20, "nn.Linear: W is (out, in)", bold=True)
    picture.text(540, 44, "x @ W.T + b", code=True)
    for left in (12, 382):
        picture.matrix(left, 96, x.tolist(), cell=(36, 26))
        picture.text(left + 90, 109, "×", size=16)
    picture.matrix(116, 83, published.tolist(), hue=lambda i, j: hues[j], cell=(36, 26))
    picture.matrix(486, 70, ours.tolist(), hue=lambda i, j: hues[i], cell=(36, 26))
    picture.text(566, 72, "T", size=12)
    for left, y in ((224, x @ published), (566, x @ ours.T)):
        picture.text(left + 18, 109, "=", size=16)
        picture.matrix(left + 36, 96, y.tolist(), hue=lambda i, j: hues[j], cell=(30, 26))
    for column, words in ((150, "weight of GPT-2"), (330, "published"), (480, "ours"), (630, "if forgotten")):
        picture.text(column, 190, words, bold=True, size=12)
    linears = [(name, m) for name, m in gpt2_model().transformer.h[0].named_modules() if isinstance(m, torch.nn.Linear)]
    for i, (name, module) in enumerate(linears):
        y = 216 + 32 * i
        out, inside = module.weight.shape
        square = out == inside
        picture.box(
            60, y - 13, 180, 26, f"h.*.{name}.weight", "blue" if "attn" in name else "orange", code=True, size=12
        )
        picture.text(330, y, f"({inside:,}, {out:,})")
        picture.arrow((388, y), (422, y))
        picture.text(480, y, f"({out:,}, {inside:,})")
        picture.text(630, y, "no error: wrong text" if square else "the shapes do not fit", bold=square, size=12)
    return picture


def draw_lora():
    model = gpt2_model()
    lora.adapt(model)
    layer = model.transformer.h[0].attn.c_attn
    out, inside = layer.weight.shape
    rank = len(layer.lora_A)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = layer.lora_A.numel() + layer.lora_B.numel()
    story = (
        f"The input goes through the frozen weight of {layer.weight.numel():,} numbers and, next to it, through A and "
        f"B of rank {rank}, {small:,} numbers, scaled by alpha / r = {layer.scaling:g}; the results are added."
    )
    picture = Picture("lora", "LoRA: a frozen weight and a low-rank update", story, height=316)
    picture.text(60, 102, f"x\n({inside})", bold=True)
    picture.arrow((90, 102), (240, 102))
    picture.arrow((130, 102), (130, 226), (170, 226))
    picture.box(
        244, 30, 190, 144, f"W, frozen\n({out:,}, {inside})\n{layer.weight.numel():,} numbers", "gray", dashed=True
    )
    picture.arrow((434, 102), (593, 102))
    picture.box(174, 206, 130, 40, f"A ({rank}, {inside})", "orange")
    picture.text(239, 262, f"{layer.lora_A.numel():,}, random", size=12)
    picture.arrow((304, 226), (372, 226))
    picture.text(338, 212, f"({rank})", size=12)
    picture.box(376, 206, 130, 40, f"B ({out:,}, {rank})", "orange")
    picture.text(441, 262, f"{layer.lora_B.numel():,}, from zero", size=12)
    picture.arrow((506, 226), (602, 226), (602, 112))
    picture.text(558, 212, f"× α / r = {layer.scaling:g}", size=12)
    picture.plus(602, 102)
    picture.arrow((611, 102), (650, 102))
    picture.text(682, 102, f"y\n({out:,})", bold=True)
    n_layer = len(model.transformer.h)
    picture.text(360, 298, f"trained: {small:,} numbers in each c_attn of GPT-2, {added:,} in its {n_layer} blocks")
    return picture
