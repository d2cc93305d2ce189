"""IEEE arithmetic that numpy lacks: fused multiply-add for fp32 and fp64, and rounding of fp32 to bf16 and fp16."""

import numpy as np


def _odd(total, error):
    """total + error rounded to odd: where the sum was not exact, the neighbour with an odd last bit.

    A sum rounded to odd with two more bits than the target can be rounded again without harm (Boldo and Melquiond,
    "Emulation of a FMA and correctly rounded sums", IEEE Trans. Computers 57(4), 2008).
    """
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)  # toward the exact sum, in units of the last place
    return np.where((error != 0) & (bits & 1 == 0), bits + away, bits).view(np.float64)


def _two_sum(a, b):
    """s = a + b rounded and e = (a + b) - s exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a, b):
    """p = a * b rounded and e = a * b - p exactly (Dekker; no overflow, no underflow)."""
    def split(x):
        c = x * np.float64(134217729.0)  # 2^27 + 1
        high = c - (c - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma32(a, b, c):
    """float32 a*b + c with one rounding. Finite arguments; arrays or scalars, broadcast."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, np.float32).astype(np.float64) for x in (a, b, c)))
    return _odd(*_two_sum(a * b, c)).astype(np.float32)  # the product of two float32 is exact in float64


def fma64(a, b, c):
    """float64 a*b + c with one rounding. Finite arguments whose product neither overflows nor comes near underflow."""
    a, b, c = (np.array(x) for x in np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c))))
    high, low = _two_product(a, b)
    t_high, t_low = _two_sum(c, low)
    v_high, v_low = _two_sum(high, t_high)
    return v_high + _odd(*_two_sum(t_low, v_low))


def bf16_of(x):
    """bf16 patterns (uint16) of float32 values, rounded to nearest even. Inf passes, NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    quiet = (bits >> np.uint64(16)) | np.uint64(0x40)
    return np.where(np.isnan(np.asarray(x, np.float32)), quiet, rounded).astype(np.uint16)


def from_bf16(patterns):
    """float32 values of bf16 patterns (uint16)."""
    return (np.asarray(patterns, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to(x, dtype):
    """Stores fp32 results in a dtype: "float32", "bfloat16" (as uint16 patterns) or "float16", to nearest even."""
    x = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        return bf16_of(x)
    with np.errstate(over="ignore"):  # from 65520 on fp16 is Inf, as it is everywhere
        return x.astype({"float32": np.float32, "float16": np.float16}[dtype])
