"""Stochastic rounding of fp32 to bf16 and fp16: the numpy twin of csrc/law/rounding.h, from the neighbours' distances.

Written from the definition, not from the bit tricks of the header: the value lies a share of the way from its lower
neighbour (in magnitude) to its upper one, and goes up where that share exceeds what the draw leaves.
"""

import numpy as np

from everett_cuda.reference.ieee import bf16_of, from_bf16


def stochastic_round(values, draws, dtype):
    """float32 values to patterns (uint16) of dtype "bfloat16" or "float16". draws: 16-bit, one a value.

    Up iff share * 2^bits + (the draw's top `bits` bits) >= 2^bits, where bits is 16, or fewer where the share has fewer:
    exactly unbiased down to shares of 2^-16. Inf and NaN pass.
    """
    values = np.asarray(values, np.float32)
    draws = np.asarray(draws, np.uint32)
    sign = np.signbit(values).astype(np.uint16) << np.uint16(15)
    finite = np.isfinite(values)
    safe = np.abs(np.where(finite, values, np.float32(0))).astype(np.float64)
    if dtype == "bfloat16":
        lower = (np.abs(np.where(finite, values, np.float32(0))).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        below = from_bf16(lower).astype(np.float64)
        above = np.where(lower >= 0x7F7F, 2.0**128, from_bf16(lower + np.uint16(1)).astype(np.float64))
        passed = bf16_of(values)
    else:
        # Spacing 2^-24 below 2^-14, else 2^(e-10).
        exponent = np.maximum(np.frexp(np.where(safe > 0, safe, 1.0))[1] - 1, -14)
        step = 2.0 ** (exponent - 10)
        count = np.floor(safe / step)
        below, above = count * step, (count + 1) * step
        over = safe >= 65536
        below, above = np.where(over, 0.0, below), np.where(over, 0.0, above)
        with np.errstate(over="ignore"):
            lower = np.where(over, np.inf, below).astype(np.float16).view(np.uint16)
        # Not finite: Inf, or NaN with the top of its payload.
        payload = (values.view(np.uint32) >> np.uint32(13) & np.uint32(0x3FF)).astype(np.uint16)
        passed = sign | np.where(np.isnan(values), payload | np.uint16(0x7E00), np.uint16(0x7C00))
    gap = np.where(above > below, above - below, 1.0)
    share = np.where(above > below, (safe - below) / gap, 0.0)
    bits = _bits_of_share(values, dtype)
    drawn = np.floor(draws / 2.0 ** (16 - bits)) / 2.0**bits
    up = share + drawn >= 1.0
    return np.where(finite, (lower + up.astype(np.uint16)) | sign, passed).astype(np.uint16)


def _bits_of_share(values, dtype):
    """How many bits of the draw decide: as many as fp32 has below the last place that is kept, at most 16."""
    if dtype == "bfloat16":
        return np.full(np.shape(values), 16.0)
    magnitude = np.abs(np.where(np.isfinite(values), values, np.float32(1)))
    exponent = np.frexp(np.maximum(magnitude, np.float32(2.0**-126)).astype(np.float64))[1] - 1
    return np.minimum(16.0, np.maximum(13.0, 13.0 + (-14.0 - exponent)))
