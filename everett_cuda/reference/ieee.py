"""IEEE arithmetic that numpy lacks: fused multiply-add for fp32 and fp64, and rounding of fp32 to bf16, fp16 and fp8."""

import functools

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


# Bits of mantissa and exponent, and whether the top exponent holds Inf and NaN (e5m2) or one NaN alone (e4m3).
_FP8 = {"float8_e4m3fn": (3, 4, False), "float8_e5m2": (2, 5, True)}


@functools.cache
def _fp8_values(dtype):
    """float64 values of the patterns 0 ... 127: finite ones in order, then Inf where there is one, then NaN."""
    mantissa, exponent, has_inf = _FP8[dtype]
    pattern = np.arange(128)
    e, m = pattern >> mantissa, pattern & ((1 << mantissa) - 1)
    bias = (1 << (exponent - 1)) - 1
    values = np.where(e > 0, m + (1 << mantissa), m) * 2.0 ** (np.maximum(e, 1) - bias - mantissa)
    top = (1 << exponent) - 1
    if has_inf:
        values[e == top] = np.where(m[e == top] == 0, np.inf, np.nan)
    else:
        values[127] = np.nan
    return values


def from_fp8(patterns, dtype):
    """float32 values of fp8 patterns (uint8)."""
    patterns = np.asarray(patterns, np.uint8)
    return np.copysign(_fp8_values(dtype)[patterns & 0x7F], np.where(patterns & 0x80, -1.0, 1.0)).astype(np.float32)


def fp8_of(x, dtype):
    """fp8 patterns (uint8) of float32 values, rounded to nearest even.

    Finite values beyond the largest become the largest; so does Inf in e4m3, which has none. Inf stays Inf in e5m2 and
    NaN stays NaN.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = np.asarray(x, np.float32).astype(np.float64)
    values = _fp8_values(dtype)
    finite = values[np.isfinite(values)]
    size = np.minimum(np.abs(np.where(np.isnan(x), 0, x)), finite[-1])
    low = np.searchsorted(finite, size, "right") - 1
    high = np.minimum(low + 1, len(finite) - 1)
    below, above = size - finite[low], finite[high] - size
    pattern = np.where((below > above) | ((below == above) & (low % 2 == 1)), high, low)
    if _FP8[dtype][2]:
        pattern = np.where(np.isinf(x), len(finite), pattern)
    pattern = np.where(np.isnan(x), 0x7F, pattern)
    return (pattern | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def round_to(x, dtype):
    """Stores fp32 results in a dtype, to nearest even: "float32", "bfloat16" (as uint16 patterns), "float16",
    "float8_e4m3fn" or "float8_e5m2" (as uint8 patterns)."""
    x = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        return bf16_of(x)
    if dtype in _FP8:
        return fp8_of(x, dtype)
    with np.errstate(over="ignore"):  # from 65520 on fp16 is Inf, as it is everywhere
        return x.astype({"float32": np.float32, "float16": np.float16}[dtype])
