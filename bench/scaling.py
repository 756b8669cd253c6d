"""What a training step costs: closed forms for parameters, operations and memory, and where its time goes.

The tests compare each form with what PyTorch counts and keeps, at small sizes, to the last byte.
C channels, L layers, H heads, T tokens in each of B windows, V tokens in the vocabulary.
"""

import re
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

import gpt


def parameters(config):
    """Weights and biases; the head is the token embedding, and counts once."""
    C, L, T, V = config.n_embd, config.n_layer, config.block_size, config.vocab_size
    return V * C + T * C + L * (12 * C**2 + 13 * C) + 2 * C


def flops(config, B, T):
    """Floating-point operations of a training step: an addition and a multiplication for each weight and token.

    The backward pass needs two products for each one of the forward pass. Attention is counted without its mask, which
    makes half of it superfluous (as in Narayanan et al. 2021, appendix).
    """
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    matrices = 2 * B * T * (12 * L * C**2 + V * C)
    attention = 2 * B * T * (2 * L * T * C)  # q kᵀ, and the weights times v
    return 3 * (matrices + attention)


def activations(config, B, T, bfloat16=False, fused=False):
    """Bytes that forward keeps for backward, without dropout.

    In each block: both inputs of the norms, C wide; their outputs, q, k, v and attention's output, C wide each; the
    MLP's inner layer before and after the GELU, 4 C wide; mean and standard deviation of two norms; attention's T
    weights for each head and token, of which the fused kernel keeps one sum; and the mask, once for all windows. In
    bfloat16, all but the residual stream, the norms' figures and the loss is half as large, but each matrix is copied.
    """
    C, L, H, V = config.n_embd, config.n_layer, config.n_head, config.vocab_size
    size = 2 if bfloat16 else 4
    stream = 4 * (2 * L + 1) * C + size * (14 * L + 1) * C
    weights = 4 * L * H if fused else size * L * H * T
    masks = 0 if fused else L * T**2
    copies = 2 * (12 * L * C**2 + V * C) if bfloat16 else 0
    return B * T * (stream + weights + 4 * 2 * (2 * L + 1) + 4 * V + 16) + masks + copies + 12


def memory(config, B, T, **options):
    """Bytes of training with AdamW, float32 weights: {what: bytes}."""
    N = parameters(config)
    kept = activations(config, B, T, **options)
    return {"weights": 4 * N, "gradients": 4 * N, "averages": 8 * N, "activations": kept}


def memory_in_use(key):
    """VmRSS, now, or VmHWM, at the peak: bytes of memory of this process, 0 if the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "RTX 4090": 165e12}  # FLOP/s in bfloat16, by the data sheets


def share_of_peak(shape, seconds, gpu):
    """A step of this shape and batch_size -> the share of the FLOP/s that the named GPU can do, or None if unknown."""
    speed = flops(gpt.from_flags(gpt.GPTConfig, shape), shape["batch_size"], shape["block_size"]) / seconds
    return next((speed / peak for name, peak in PEAKS.items() if name in gpu), None)


# ---- Where the time of a step goes: PyTorch's operations by kind ----

KINDS = {
    "matrix products": r"mm|addmm|matmul|linear",
    "attention": r"bmm|.*scaled_dot_product.*|masked_fill_?|_?softmax|_softmax_.*|div|ones|triu",
    "GELU": r"gelu.*",
    "LayerNorm": r"(native_)?layer_norm.*",
    "loss": r".*log_softmax.*|.*nll_loss.*|ne|clamp|item|_local_scalar_dense",
    "embeddings": r"embedding.*|index_.*",
    "dropout": r"random_|ge|mul",
    "optimizer and clipping": r"Optimizer.*|_fused_adamw_|_foreach.*|linalg_vector_norm|norm|mul_|reciprocal",
    "copies and conversions": r"copy_|_?to(_copy)?|clone|cat|stack|contiguous|lift_fresh",
    "sums: residuals, biases": r"add_?|sum",
    "zeros": r"fill_|zero_|zeros(_like)?|full|ones_like|new_zeros",
    "autograd and views": r"autograd::.*|.*Backward\d|.*AccumulateGrad|.*view.*|t|m?T|transpose|permute|expand|reshape|"
    r"flatten|(un)?squeeze|slice.*|select.*|split.*|unbind|narrow|as_strided.*|empty.*|resize_|detach_?|resolve_.*|result_type",
    "Python, data": "Python",
}


def kind_of(operation):
    name = operation.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), "other")


def operations(step, steps):
    """Run steps of training -> {name of an operation: its time}."""
    step(0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(1, steps + 1):
            with record_function("Python"):
                step(number)
    return {event.key: event.self_cpu_time_total for event in found.key_averages()}


def shares(times):
    """{name of an operation: its time} -> {kind of operation: share of the time}."""
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, time in times.items():
        kinds[kind_of(name)] += time
    return {kind: time / sum(kinds.values()) for kind, time in kinds.items()}
