"""int8 weights for generating and scoring: a quarter of float32's bytes, and so up to four times the tokens.

A single token passes through every weight once, and waits for memory, not for arithmetic. So each matrix is stored as
int8, with one scale per output channel; activations stay in floating point. There are two ways to compute the product.
PyTorch's kernel multiplies int8 by bfloat16. Where bfloat16 would be emulated, but there are instructions for int8
(VNNI), each token is rounded to int8, too, with a scale of its own, and integers are multiplied (vector-wise
quantization, Dettmers et al. 2022, "LLM.int8()", 3.1). The token embedding is the head, and shares its int8 matrix.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpt import resolve_dtype


def to_int8(weight):
    """(out, in) -> int8 (out, in), and the scales (out,) of its rows; the largest of each row is 127."""
    scales = weight.abs().amax(1).clamp_(min=1e-12).div_(127)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def has_vnni():
    """Whether sums of int8 products are right: without VNNI they overflow sixteen bits, and no error is raised."""
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_vnni", "avx_vnni"))


def native_bfloat16():
    return resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16


class Int8Linear(nn.Module):
    """The product of nn.Linear, with eight bits a weight."""

    MOST_ROWS = 32  # of more, with bfloat16, unpacking the weights for one large product is faster

    def __init__(self, weight, scales, bias):
        super().__init__()
        self.integers = has_vnni() and not native_bfloat16()
        self.register_buffer("weight", weight)  # int8 (out, in)
        self.register_buffer("scales", scales)  # (out,)
        self.register_buffer("sums", weight.sum(1, dtype=torch.int32))  # (out,), for native.c
        self.register_buffer("ones", torch.ones(len(scales), dtype=torch.bfloat16, device=scales.device))
        self.bias = bias

    def forward(self, x):
        rows = x.flatten(0, -2)  # (B * T, in)
        if self.integers and x.device.type == "cpu" and rows.shape[1] > 1:  # with one column its results are wrong
            tokens, steps = to_int8(rows)  # int8 (B * T, in), (B * T,)
            y = torch._int_mm(tokens, self.weight.T).float().mul_(steps[:, None] * self.scales)
            y = y if self.bias is None else y.add_(self.bias)
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        odd = rows.shape[1] % 32  # PyTorch's kernel reads past the end of such rows: wrong numbers, or a crash
        if len(rows) > self.MOST_ROWS or odd or x.device.type != "cpu":
            if x.dtype != torch.float32 or x.device.type != "cpu" or not native_bfloat16():
                return F.linear(x, self.weight.to(x.dtype) * self.scales.to(x.dtype)[:, None], self.bias)
            y = F.linear(rows.bfloat16(), self.weight.bfloat16()).float()
        else:
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.ones).to(x.dtype)
        y = y * self.scales if self.bias is None else torch.addcmul(self.bias, y, self.scales)  # in x's precision
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
    """Put int8 matrices into a GPT, in place, one for head and embedding; everything else stays float32."""
    for block in model.transformer.h:
        for parent in (block.attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, Int8Linear(*to_int8(layer.weight.float()), layer.bias))
    shared = to_int8(model.transformer.wte.weight.float())
    model.transformer.wte, model.lm_head = Int8Embedding(*shared), Int8Linear(*shared, None)
    return model
