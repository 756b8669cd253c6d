"""The diagrams of the notes. Their numbers are computed by gpt.py: of "the cat sat", and of GPT-2's shape."""

import math

import numpy as np
import torch

import gpt
from notes.svg import Picture

WORDS = ("the", "cat", "sat")  # the vocabulary: their ids are 0, 1 and 2
EMBEDDING = torch.tensor([[1, 0], [0, 1], [1, 1]])  # the token embedding, (V, C)
QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (T, D)
KEYS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
VALUES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])


def attend(q, k, v):
    """(T, D), (S, D), (S, D) -> masked scores (T, S), weights (T, S) and output (T, D)."""
    T, S = len(q), len(k)
    scores = q @ k.T / math.sqrt(q.shape[1])
    scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -math.inf)
    heads = [x[None, None] for x in (q, k)]
    weights = gpt.attention(*heads, torch.eye(S)[None, None], fused=False)[0, 0]  # the values tell which key was seen
    return scores, weights, gpt.attention(*heads, v[None, None])[0, 0]


def whole(matrix):
    """The numbers of a matrix as integers, if that is what they are."""
    return matrix.int().tolist() if torch.equal(matrix, matrix.round()) else matrix.tolist()


def gpt2_model():
    """GPT-2's shape without its weights."""
    with torch.device("meta"):
        return gpt.GPT(gpt.GPTConfig.preset("gpt2"))


def draw_model():
    title = "A GPT: text, tokens, embeddings, blocks on a residual stream, head, next token"
    story = (
        "Text becomes tokens and embeddings, passes through blocks of causal self-attention and MLP on a residual "
        "stream, and the head turns it into the probabilities of the next token."
    )
    picture = Picture("model", title, story, height=228, width=916)
    picture.text(12, 134, "“The import\nstatement”", anchor="start")
    picture.arrow((12, 160), (106, 160))
    picture.box(108, 114, 92, 72, "token\nembedding\n+ position", "teal")
    picture.line((200, 150), (415, 150), width=3)
    picture.box(226, 22, 404, 176, dashed=True, fill=0)
    picture.text(428, 214, "a block, repeated n_layer times")
    for x, words, hue in ((246, "causal self-\nattention", "blue"), (453, "MLP", "orange")):
        width = 86 if hue == "blue" else 60
        picture.arrow((x, 150), (x, 66), (x + 16, 66))
        picture.box(x + 16, 44, 44, 44, "norm", size=12)
        picture.arrow((x + 60, 66), (x + 72, 66))
        picture.box(x + 72, 40, width, 52, words, hue)
        picture.arrow((x + 72 + width, 66), (x + 92 + width, 66), (x + 92 + width, 140))
        picture.plus(x + 92 + width, 150)
    picture.line((433, 150), (597, 150), width=3)
    picture.arrow((615, 150), (656, 150))
    picture.text(345, 172, "residual stream: (B, T, C)", size=12)
    picture.box(656, 128, 44, 44, "norm", size=12)
    picture.arrow((700, 150), (714, 150))
    picture.box(714, 114, 80, 72, "head, tied\nto the\nembedding", "violet", size=12)
    picture.arrow((794, 150), (808, 150))
    for y, width, word in ((124, 34, "occurs"), (144, 22, "is"), (164, 12, "was")):
        picture.box(812, y, width, 12, hue="violet", fill=0.8, line=0, round=1)
        picture.text(812 + width + 6, y + 6, word, size=12, anchor="start")
    picture.text(812, 194, "the next token", anchor="start")
    return picture


def draw_windows():
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat"]
    data = gpt.TokenDataset(np.arange(len(words)), block_size=4, stride=2)  # a word's id is its position
    inputs, targets = data.batch(range(len(data)))
    story = (
        f"Ten words give {len(data)} windows of four tokens, two tokens apart. Under each input is its target, the "
        "word that follows; after the last word there is none, and -1 is ignored by the loss."
    )
    picture = Picture("windows", "Windows, stride and targets", story, height=462)
    left, cell = 92, 61
    picture.text(left - 8, 29, "text", anchor="end", bold=True)
    for i, word in enumerate(words):
        picture.box(left + i * cell, 14, cell, 30, word, round=0)
    for row in range(len(data)):
        y = 62 + 72 * row
        picture.text(left - 8, y + 13, "input", anchor="end")
        picture.text(left - 8, y + 39, "target", anchor="end")
        for i in range(data.block_size):
            x = left + (row * data.stride + i) * cell
            target = targets[row, i].item()
            picture.box(x, y, cell, 26, words[inputs[row, i]], "blue", round=0)
            if target >= 0:
                picture.box(x, y + 26, cell, 26, words[target], "orange", round=0)
            else:
                picture.box(x, y + 26, cell, 26, "−1", round=0)
    start = left + data.stride * cell
    picture.arrow((left, 160), (start, 160), hue="blue")
    picture.text((left + start) / 2, 148, "stride 2")
    picture.text(left + 4 * cell + 10, 88, "window 0: context 4 (block_size)", anchor="start")
    picture.text(left + 5.9 * cell, 317, "−1: no next token here, ignored by the loss", anchor="end")
    picture.text(left - 80, 376, "Window 0 is four examples, one for each position:", anchor="start", bold=True)
    x = left - 80
    for i in range(data.block_size):
        context = " ".join(words[j] for j in inputs[0, : i + 1])
        width = 7.5 * len(context) + 18
        picture.box(x, 400, width, 30, context, "blue")
        picture.arrow((x + width, 415), (x + width + 24, 415))
        picture.box(x + width + 24, 400, 44, 30, words[targets[0, i]], "orange")
        x += width + 90
    return picture


def draw_lookup():
    one_hot = torch.nn.functional.one_hot(torch.tensor([1]), len(WORDS))
    row = one_hot @ EMBEDDING
    V, C = gpt2_model().transformer.wte.weight.shape
    story = (
        "The one-hot row of cat, 0 1 0, times the embedding table with the rows 1 0, 0 1 and 1 1 gives the second row, "
        f"{row[0].tolist()}. Indexing reads the same row without a product."
    )
    picture = Picture("lookup", "An embedding reads one row of a table", story, height=210)
    picture.matrix(24, 82, one_hot.tolist(), "blue", columns=WORDS, title="one-hot “cat”, (1, V)",
                   strong=lambda i, j: j == 1)  # fmt: skip
    picture.text(180, 95, "×", size=16)
    picture.matrix(264, 56, EMBEDDING.tolist(), "teal", names=WORDS, title="token embedding, (V, C)",
                   strong=lambda i, j: i == 1)  # fmt: skip
    picture.text(382, 95, "=", size=16)
    picture.matrix(412, 82, row.tolist(), "teal", title="its row, (1, C)", strong=lambda i, j: True)
    picture.text(528, 95, "= wte.weight[1]", anchor="start", code=True)
    picture.text(528, 119, "indexing reads it directly", anchor="start", size=12)
    picture.text(360, 164, f"GPT-2's table has {V:,} rows of {C} numbers: for each token the product would take")
    picture.text(360, 184, f"{V * C:,} multiplications, the lookup takes none.")
    return picture


def draw_qkv():
    scores, weights, output = attend(QUERIES, KEYS, VALUES)
    w, v = weights[2].tolist(), whole(VALUES)
    total = " + ".join(f"{weight:.2f} · {row}" for weight, row in zip(w, v, strict=True))
    result = f"[{output[2, 0]:.2f}, {output[2, 1]:.2f}]"
    story = (
        "Queries times transposed keys, divided by the root of D = 2, give scores; the causal mask hides the future; "
        f"softmax makes each row sum to 1; times the values: the output. For sat: {total} = {result}."
    )
    picture = Picture("qkv", "Scaled dot-product attention of “the cat sat”", story, height=330)

    def last(i, j):
        return i == 2

    picture.matrix(54, 60, whole(QUERIES), "blue", names=WORDS, title="queries Q, (T, D)", strong=last)
    picture.text(166, 99, "×", size=16)
    picture.matrix(190, 73, whole(KEYS.T), "teal", columns=WORDS, title="keys Kᵀ, (D, T)")
    picture.text(358, 99, "/ √2  =", size=14)
    picture.matrix(440, 60, scores.tolist(), names=WORDS, columns=WORDS, title="scores, masked, (T, T)",
                   hue=lambda i, j: "gray" if j > i else "blue", strong=last)  # fmt: skip
    picture.arrow((588, 99), (690, 99), (690, 158), (120, 158), (120, 188))
    picture.text(642, 84, "softmax of\neach row", size=12)
    picture.matrix(54, 216, weights.tolist(), names=WORDS, title="weights, (T, T)", strong=last,
                   hue=lambda i, j: "gray" if j > i else "blue")  # fmt: skip
    picture.text(210, 255, "×", size=16)
    picture.matrix(268, 216, v, "orange", names=WORDS, title="values V, (T, D)")
    picture.text(378, 255, "=", size=16)
    picture.matrix(440, 216, output.tolist(), "violet", names=WORDS, title="output, (T, D)", strong=last)
    picture.text(360, 314, f"sat:  {total} = {result}", code=True, size=12)
    return picture


def draw_mask():
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the"]
    story = (
        "Left: eight queries and eight keys, a lower triangle of zeros, minus infinity above it. Right: with five "
        "tokens in a cache, each of three new queries sees all cached keys, itself, and the new ones before it."
    )
    picture = Picture("mask", "The causal mask, with and without a cache", story, height=330)
    S = len(words)
    for x, T, title in ((46, 8, "8 queries, 8 keys"), (422, 3, "3 queries, 5 of 8 keys from the cache")):
        past = S - T
        scores, _, _ = attend(torch.zeros(T, 1), torch.zeros(S, 1), torch.zeros(S, 1))

        def hue(i, j, past=past):
            return "gray" if j > i + past else "teal" if j < past else "blue"

        def visible(i, j, past=past):
            return j <= i + past

        rows = [["−∞" if score < 0 else 0 for score in row] for row in scores.tolist()]
        picture.matrix(x, 76, rows, hue, names=words[past:], columns=words, title=title, cell=(35, 29), strong=visible)
    picture.text(186, 24, "the whole window at once (training)")
    picture.text(562, 24, "continuing with a cache (generation)")
    picture.line((424, 170), (424, 176), (595, 176), (595, 170), hue="teal")
    picture.text(510, 190, "from the cache")
    picture.line((599, 170), (599, 176), (700, 176), (700, 170), hue="blue")
    picture.text(650, 190, "new")
    picture.text(422, 240, "rows: queries;  columns: keys", anchor="start")
    picture.text(422, 264, "0: visible, the score stays as it is", anchor="start")
    picture.text(422, 288, "−∞: a later token, its weight is 0", anchor="start")
    return picture


def draw_heads():
    qkv = torch.stack([QUERIES, KEYS, VALUES])  # (3, T, C)
    heads = qkv.view(3, 3, 2, 1).permute(2, 0, 1, 3)  # (H, 3, T, D): D = 1
    found = [attend(*head) for head in heads]
    y = torch.cat([output for _, _, output in found], dim=1)  # (T, C)
    story = (
        "Queries, keys and values of two channels are split into two heads of one channel. Each head computes its own "
        "weights and its own output; side by side the outputs are two channels again."
    )
    picture = Picture("heads", "Two heads, each with half of the channels", story, height=340)
    hues = ("blue", "orange")
    flat = qkv.transpose(0, 1).reshape(3, 6)  # (T, 3C), as c_attn makes it
    picture.text(129, 76, "c_attn(x), (T, 3C)", bold=True)
    picture.matrix(48, 124, whole(flat), cell=(27, 26), names=WORDS, hue=lambda i, j: hues[j % 2])
    for i, name in enumerate(("q", "k", "v")):
        picture.text(75 + 54 * i, 108, name, bold=True)
        if i:
            picture.line((48 + 54 * i, 100), (48 + 54 * i, 206), width=2)
    picture.text(129, 224, "n_head = 2, D = C / 2 = 1", size=12)
    for h, (_, weights, _) in enumerate(found):
        top, hue = 56 + 170 * h, hues[h]
        middle = top + 39
        picture.arrow((214, 150 + 26 * h), (232, 150 + 26 * h), (232, middle), (258, middle), hue=hue)
        picture.matrix(262, top, whole(heads[h, :, :, 0].T), hue, cell=(30, 26), columns=("q", "k", "v"),
                       title=f"head {h}, each (T, D)")  # fmt: skip
        picture.arrow((352, middle), (426, middle), hue=hue)
        picture.text(389, middle - 14, "softmax of", size=12)
        picture.text(389, middle + 14, "q kᵀ / √D", size=12)
        picture.matrix(430, top, weights.tolist(), hue=lambda i, j, hue=hue: "gray" if j > i else hue,
                       cell=(40, 26), columns=WORDS, title="weights, (T, T)")  # fmt: skip
        picture.text(568, middle, "× v", size=14)
        x = 624 + 44 * h
        end = 190 if h else 112
        picture.arrow((584, middle), (x, middle), (x, end + 8 * h), hue=hue)
    picture.matrix(602, 116, y.tolist(), hue=lambda i, j: hues[j])
    picture.text(634, 96, "y, (T, C)", anchor="start", bold=True)
    picture.text(660, 286, "the heads\nside by side", size=12)
    return picture


def draw_block():
    config = gpt.GPTConfig.preset("gpt2")
    C = config.n_embd
    size = sum(p.numel() for p in gpt2_model().transformer.h[0].parameters())
    story = (
        "The residual stream runs straight down. Attention, then the MLP, each reads a LayerNorm of it and adds its "
        f"result. A block has 12 C² + 13 C parameters, at C = {C}: {size:,}."
    )
    picture = Picture("block", "A block: two branches that read the residual stream and add to it", story, height=400)
    attention = [
        ("LayerNorm", "2 C"),
        ("c_attn\nC → 3C", "3 C² + 3 C"),
        ("attention\nH heads", "0"),
        ("c_proj\nC → C", "C² + C"),
    ]
    mlp = [
        ("LayerNorm", "2 C"),
        ("c_fc\nC → 4C", "4 C² + 4 C"),
        ("GELU", "0"),
        ("c_proj\n4C → C", "4 C² + C"),
    ]
    branches = [
        ("x = x + self.attn(self.ln_1(x))", "blue", attention),
        ("x = x + self.mlp(self.ln_2(x))", "orange", mlp),
    ]
    stream = 70
    picture.text(stream, 18, "x, (B, T, C)", bold=True)
    picture.line((stream, 32), (stream, 151), width=3)
    for row, (code, hue, boxes) in enumerate(branches):
        top = 56 + 160 * row
        picture.text(190, top - 18, code, anchor="start", code=True)
        picture.arrow((stream, top + 27), (190, top + 27))
        picture.text(182, top + 68, "parameters", size=12, anchor="end")
        for i, (words, parameters) in enumerate(boxes):
            x = 190 + 128 * i
            picture.box(x, top, 104, 54, words, "gray" if i == 0 else hue)
            picture.text(x + 52, top + 68, parameters, size=12)
            if i:
                picture.arrow((x - 24, top + 27), (x, top + 27))
        picture.arrow((678, top + 27), (702, top + 27), (702, top + 104), (stream + 10, top + 104))
        picture.plus(stream, top + 104)
        if row == 0:
            picture.line((stream, top + 113), (stream, top + 255), width=3)
    picture.arrow((stream, 329), (stream, 358))
    picture.text(stream, 372, "x, (B, T, C)", bold=True)
    picture.text(702, 372, f"12 C² + 13 C parameters in all; in GPT-2, C = {C}: {size:,}", anchor="end")
    return picture


def draw_gpt2():
    model = gpt2_model()
    parts = model.transformer
    V, C, T, L = (getattr(model.config, name) for name in ("vocab_size", "n_embd", "block_size", "n_layer"))

    def size(module):
        return sum(p.numel() for p in module.parameters())

    total = size(model)
    story = (
        f"From token ids to logits, each part with its shape and parameters: token embedding {size(parts.wte):,}, "
        f"position embedding {size(parts.wpe):,}, {L} blocks of {size(parts.h[0]):,}, final LayerNorm "
        f"{size(parts.ln_f):,}, and a head that is the token embedding again. Together {total:,}."
    )
    picture = Picture("gpt2", "GPT-2 with its parameter counts", story, height=568)
    for x, words in ((110, "module"), (290, "shape"), (470, "parameters"), (600, "share of all")):
        picture.text(x, 20, words, bold=True, size=12)
    picture.box(20, 42, 180, 30, "token ids, (B, T)", fill=0)

    def row(y, name, shape, module, hue, share=True):
        picture.box(20, y, 180, 30, name, hue)
        picture.text(290, y + 15, shape)
        picture.text(510, y + 15, f"{size(module):,}", anchor="end")
        if share:
            bar(y, size(module), hue)

    def bar(y, count, hue):
        width = 110 * count / size(parts.h)
        picture.box(540, y + 8, width, 14, hue=hue, fill=0.8, line=0, round=0)
        picture.text(546 + width, y + 15, f"{count / total:.1%}", size=12, anchor="start")

    row(92, "wte: token embedding", f"({V:,}, {C})", parts.wte, "teal")
    row(128, "wpe: + position", f"({T:,}, {C})", parts.wpe, "teal")
    picture.box(10, 174, 506, 262, fill=0, dashed=True)
    block = parts.h[0]
    rows = [("ln_1", f"2 × {C}", block.ln_1, "gray"),
            ("attn.c_attn", f"({3 * C:,}, {C}) + {3 * C:,}", block.attn.c_attn, "blue"),
            ("attn.c_proj", f"({C}, {C}) + {C}", block.attn.c_proj, "blue"),
            ("ln_2", f"2 × {C}", block.ln_2, "gray"),
            ("mlp.c_fc", f"({4 * C:,}, {C}) + {4 * C:,}", block.mlp.c_fc, "orange"),
            ("mlp.c_proj", f"({C}, {4 * C:,}) + {C}", block.mlp.c_proj, "orange")]  # fmt: skip
    for i, (name, shape, module, hue) in enumerate(rows):
        row(184 + 36 * i, name, shape, module, hue, share=False)
    picture.text(290, 417, f"h: {L} blocks of {size(block):,}", bold=True)
    picture.text(510, 417, f"{size(parts.h):,}", anchor="end", bold=True)
    bar(402, size(parts.h), "blue")
    row(450, "ln_f", f"2 × {C}", parts.ln_f, "gray", share=False)
    picture.box(20, 486, 180, 30, "lm_head", "violet")
    picture.text(290, 501, "= wte, tied")
    picture.text(510, 501, "0 more", anchor="end")
    picture.box(20, 530, 180, 30, f"logits, (B, T, {V:,})", fill=0)
    picture.text(510, 545, f"{total:,}", anchor="end", bold=True)
    picture.text(290, 545, "all parameters", bold=True)
    for start, end in ((72, 92), (158, 184), (400, 450), (516, 530)):
        picture.arrow((110, start), (110, end))
    return picture
