"""Fused dropout, additive noise and stochastic rounding in numpy: what csrc/cpu/fused.h and perturb.h must equal.

Arrays are row-major; e is the logical index of each element, in its shape. bf16 values are uint16 patterns. fp64 is not
served: these ops compute in fp32 and round once.
"""

import numpy as np

from everett_cuda.reference import keepdrop, rounding, stream
from everett_cuda.reference.convert import normal
from everett_cuda.reference.gelu import gelu, gelu_slope
from everett_cuda.reference.ieee import round_to


def _biased(x, bias, dtype):
    v = keepdrop._working(x, dtype)
    return v if bias is None else v + keepdrop._working(bias, dtype)


def _scale(p):
    return np.float32(keepdrop.threshold(p).scale)


def bias_dropout_add(x, bias, residual, record, p, e, dtype="float32", generator="chacha8"):
    """(keep ? (x + bias) * c : +0) + residual."""
    keep = keepdrop.keep_mask(record, p, e, generator)
    with keepdrop._no_warnings():
        kept = np.where(keep, _biased(x, bias, dtype) * _scale(p), np.float32(0))
        return round_to(kept + keepdrop._working(residual, dtype), dtype)


def bias_gelu_dropout(x, bias, record, p, e, dtype="float32", generator="chacha8", approximate="none"):
    """keep ? gelu(x + bias) * c : +0."""
    keep = keepdrop.keep_mask(record, p, e, generator)
    with keepdrop._no_warnings():
        return round_to(np.where(keep, gelu(_biased(x, bias, dtype), approximate) * _scale(p), np.float32(0)), dtype)


def bias_gelu_dropout_backward(
    grad, x, bias, record, p, e, dtype="float32", generator="chacha8", approximate="none"
):
    """keep ? (grad * c) * gelu'(x + bias) : +0."""
    keep = keepdrop.keep_mask(record, p, e, generator)
    with keepdrop._no_warnings():
        slope = gelu_slope(_biased(x, bias, dtype), approximate)
        return round_to(np.where(keep, keepdrop._working(grad, dtype) * _scale(p) * slope, np.float32(0)), dtype)


def add_noise(x, sigma, record, e, dtype="float32", generator="chacha8"):
    """x + sigma * n, n the fp32 normal of element e: the product rounded, then the sum, then the dtype."""
    e = np.asarray(e, np.uint64)
    pair = e & ~np.uint64(1)
    even, odd = (stream.draws(record, 32, pair + np.uint64(k), stream.NORMAL, 0, generator) for k in (0, 1))
    n = np.where(e & np.uint64(1), normal(even, odd)[1], normal(even, odd)[0])
    with keepdrop._no_warnings():
        return round_to(keepdrop._working(x, dtype) + np.float32(sigma) * n, dtype)


def stochastic_round(x, record, e, dtype, generator="chacha8"):
    """float32 x to patterns (uint16) of "bfloat16" or "float16" by the 16-bit draw of element e."""
    return rounding.stochastic_round(x, stream.draws(record, 16, e, stream.ROUNDING, 0, generator), dtype)
