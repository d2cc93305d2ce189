"""Keep or drop: an exact drop probability from 15 or 32 random bits and a dithered threshold, and the ops with it.

P = round(p * 2^47), so decisions drop with probability exactly P/2^47 over the dither d (word 8 of the record):
    x_e = (d + (e>>5) * 0x9E3779B9) mod 2^32
    2^39 <= P <= 31*2^42 (p from 1/256 to 31/32): h = low 15 bits of the 16-bit draw e, T = P>>32, F = P mod 2^32
    otherwise:                                    h = the 32-bit draw e, T = P>>15, F = (P mod 2^15) << 17
    drop iff h < T + [x_e < F], compared without wrapping.
P = 0 keeps everything, P = 2^47 drops everything; no draw is looked at then.
"""

import math
from typing import NamedTuple

import numpy as np

from everett_cuda.reference import stream
from everett_cuda.reference.ieee import from_bf16, from_fp8, round_to

ONE = 2**47  # P of p = 1


class Threshold(NamedTuple):
    p47: int  # P
    wide: bool  # 32-bit draws
    t: int
    f: int
    scale: float  # 1/(1 - P/2^47) in fp64, 0 for P = 2^47; all types but fp64 use it rounded to fp32


def threshold(p):
    """P, the form, T, F and the scale of a drop probability p. Raises ValueError for NaN and outside [0,1]."""
    p = float(p)
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; a drop probability must be in [0, 1]")
    p47 = round(math.ldexp(p, 47))  # exact, then half to even
    scale = 0.0 if p47 == ONE else 1 / (1 - p47 / ONE)
    if 2**39 <= p47 <= 31 * 2**42:
        return Threshold(p47, False, p47 >> 32, p47 & 0xFFFFFFFF, scale)
    return Threshold(p47, True, p47 >> 15, (p47 & 0x7FFF) << 17, scale)


def dither(record, e):
    """x_e, uint64 below 2^32, in the shape of e."""
    steps = (np.asarray(e, np.uint64) >> np.uint64(5)) & np.uint64(0xFFFFFFFF)
    return (np.uint64(record[8]) + steps * np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF)  # the sum stays below 2^64


def keep_mask(record, p, e, generator="chacha8", tag=stream.KEEP, s=0):
    """True where logical index e is kept, in the shape of e."""
    h = threshold(p)
    e = np.asarray(e, np.uint64)
    if h.p47 in (0, ONE):
        return np.full(e.shape, h.p47 == 0)
    draw = stream.draws(record, 32 if h.wide else 16, e, tag, s, generator)
    if not h.wide:
        draw &= np.uint64(0x7FFF)
    return draw >= np.uint64(h.t) + (dither(record, e) < np.uint64(h.f)).astype(np.uint64)


def keep_bits(record, p, e0, n, generator="chacha8", s=0):
    """keep_mask of the logical indices e0 ... e0+n-1 as uint8 (ceil(n/8),): bit i%8 of byte i//8 is element i, 1 = kept.

    The bits of the last byte beyond n are 0.
    """
    e = np.uint64(e0) + np.arange(n, dtype=np.uint64)
    return np.packbits(keep_mask(record, p, e, generator, s=s), bitorder="little")


def dropout(x, record, p, e, dtype="float32", generator="chacha8", tag=stream.KEEP, s=0):
    """Dropout of x at the logical indices e (same shape): kept values times c, dropped values +0 (Inf and NaN too).

    c = float32(1/(1 - P/2^47)); x*c in fp32, then rounded to nearest even to the dtype. fp64: c and product in fp64.
    P = 0 copies x bit for bit. x and the result are uint16 patterns for dtype "bfloat16" and uint8 patterns for
    "float8_e4m3fn" and "float8_e5m2". The backward pass is the same function of the gradient.
    """
    return masked(x, keep_mask(record, p, e, generator, tag, s), p, dtype)


def dropout_add(x, residual, record, p, e, dtype="float32", generator="chacha8", tag=stream.KEEP, s=0):
    """dropout(x) + residual with one rounding at the end: x*c and the sum in fp32 (fp64: in fp64), then to the dtype.

    A dropped element is +0 + residual. x, residual, e and the result have one shape; patterns as in `dropout`.
    """
    return masked_add(x, residual, keep_mask(record, p, e, generator, tag, s), p, dtype)


def affine_dropout(x, record, p, e, affine, dtype="float32", generator="chacha8", tag=stream.KEEP, s=0):
    """Kept values x*scale + shift, dropped values `dropped`: affine = (scale, shift, dropped), as in alpha dropout.

    The three numbers are rounded to fp32 (fp64: taken as they are); multiply and add are two roundings, never fused.
    """
    return masked_affine(x, keep_mask(record, p, e, generator, tag, s), affine, dtype)


# The same three ops under a given mask (True: kept).


def masked(x, keep, p, dtype="float32"):
    h = threshold(p)
    if h.p47 == 0:
        return np.array(x)
    with _no_warnings():
        return _rounded(np.where(keep, _working(x, dtype) * _number(h.scale, dtype), _number(0, dtype)), dtype)


def masked_add(x, residual, keep, p, dtype="float32"):
    with _no_warnings():
        kept = np.where(keep, _working(x, dtype) * _number(threshold(p).scale, dtype), _number(0, dtype))
        return _rounded(kept + _working(residual, dtype), dtype)


def masked_affine(x, keep, affine, dtype="float32"):
    scale, shift, dropped = (_number(v, dtype) for v in affine)
    with _no_warnings():
        return _rounded(np.where(keep, _working(x, dtype) * scale + shift, dropped), dtype)


def _no_warnings():
    return np.errstate(over="ignore", invalid="ignore", under="ignore")


def _number(value, dtype):
    return np.float64(value) if dtype == "float64" else np.float32(value)


def _working(x, dtype):
    """x in the type that the arithmetic is done in: fp64 for fp64, fp32 for all others."""
    if dtype == "bfloat16":
        return from_bf16(x)
    if dtype.startswith("float8"):
        return from_fp8(x, dtype)
    kind = {"float32": np.float32, "float64": np.float64, "float16": np.float16}[dtype]
    return np.asarray(x, kind).astype(np.float64 if dtype == "float64" else np.float32)


def _rounded(values, dtype):
    return values if dtype == "float64" else round_to(values, dtype)
