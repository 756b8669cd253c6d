"""int8 weights for generating and scoring: a quarter of float32's bytes, and so up to four times the tokens.

A single token passes through every weight once, and waits for memory, not for arithmetic. So each matrix is stored as
int8, with one scale per output channel; activations stay in floating point. The product is computed in one of two ways.
PyTorch's kernel multiplies int8 with bfloat16. Where bfloat16 would be emulated, but there are instructions for int8
(VNNI), each token is rounded to int8, too, with a scale of its own, and integers are multiplied (vector-wise
quantization, Dettmers et al. 2022, "LLM.int8()", 3.1). The token embedding is the head, and shares its int8 matrix.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gpt import resolve_dtype


def to_int8(weight):
    """(out, in) -> int8 (out, in), and the scales (out,) to multiply its rows with; the largest of each row is 127."""
    scales = torch.linalg.vector_norm(weight, math.inf, 1).clamp_(min=1e-12).div_(127)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def multiplies_whole_numbers():
    """Without VNNI, products are added up in sixteen bits, which two large ones overflow: wrong sums, no error."""
    vnni = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_vnni", "avx_vnni"))
    return vnni and resolve_dtype("auto", torch.device("cpu")) != torch.bfloat16


class Int8Linear(nn.Module):
    """What nn.Linear computes, from eight bits a weight."""

    MOST_ROWS = 32  # with more of them, beside bfloat16, unpacking the weights for one large product is faster

    def __init__(self, weight, scales, bias):
        super().__init__()
        self.whole_numbers = multiplies_whole_numbers()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("ones", torch.ones(len(scales), dtype=torch.bfloat16, device=scales.device))
        self.bias = bias

    def forward(self, x):
        rows = x.flatten(0, -2)  # (B * T, in)
        if self.whole_numbers and x.device.type == "cpu" and rows.shape[1] > 1:  # of one column it makes nonsense
            tokens, steps = to_int8(rows)  # int8 (B * T, in), (B * T,)
            y = torch._int_mm(tokens, self.weight.T) * (steps[:, None] * self.scales)
            return (y if self.bias is None else y.add_(self.bias)).to(x.dtype).view(*x.shape[:-1], -1)
        odd = (
            rows.shape[1] % 32
        )  # PyTorch's kernel reads beyond such rows: wrong numbers, or a crash of the interpreter
        if len(rows) > self.MOST_ROWS or odd or x.device.type != "cpu":
            return F.linear(x, self.weight.to(x.dtype) * self.scales.to(x.dtype)[:, None], self.bias)
        y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.ones).to(
            x.dtype
        )  # scaled in x's precision
        y = torch.addcmul(self.bias, y, self.scales) if self.bias is not None else y * self.scales
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """Rows of an int8 matrix: (B, T) -> (B, T, C)."""

    def __init__(self, weight, scales):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, idx):
        return self.weight[idx] * self.scales[idx][..., None]


@torch.no_grad()
def quantize(model):
    """Put int8 matrices into a GPT, in place, with the head and embedding as one; all else stays float32."""
    for block in model.transformer.h:
        for parent in (block.attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, Int8Linear(*to_int8(layer.weight.float()), layer.bias))
    shared = to_int8(model.transformer.wte.weight.float())
    model.transformer.wte, model.lm_head = Int8Embedding(*shared), Int8Linear(*shared, None)
    return model
