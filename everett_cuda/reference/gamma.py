"""Gamma variates: the twin of csrc/law/gamma.h (Marsaglia and Tsang 2000), operation for operation."""

import math

import numpy as np

from everett_cuda.reference import convert, stream
from everett_cuda.reference.ieee import fma64

ROUNDS = 16


def exp_minus(y):
    """exp(-y) of fp64 y >= 0; 0 from 707 on."""
    y = np.asarray(y, np.float64)
    inside = np.where(y < 707, y, 0.0)
    k = np.rint(inside * float.fromhex("0x1.71547652b82fep+0"))
    ln2, rest = convert.COEFFICIENTS["ln2_f64"]
    r = fma64(k, rest, fma64(k, ln2, -inside))
    p = np.full_like(r, 1 / math.factorial(13))
    for n in range(12, -1, -1):
        p = fma64(p, r, 1 / math.factorial(n))
    return np.where(y < 707, np.ldexp(p, -k.astype(np.int64)), 0.0)


def gamma(record, e, shape, generator="chacha8", logarithm=False):
    """fp64 variates of the shapes at the logical indices e (arrays of one dimension)."""
    e = np.asarray(e, np.uint64)
    shape = np.broadcast_to(np.asarray(shape, np.float64), e.shape)
    raised = shape < 1
    d = np.where(raised, shape + 1, shape) - 1 / 3
    c = 1 / np.sqrt(9 * d)
    v, reduce = np.ones(e.shape), np.zeros(e.shape)
    taken = np.zeros(e.shape, bool)
    for round_ in range(ROUNDS):
        words = stream.blocks(record, e, stream.GAMMA, round_, generator).astype("<u4", copy=False)
        w = words.view("<u8").astype(np.uint64)
        if round_ == 0:
            reduce = np.where(raised, convert.exponential(w[:, 7], "float64") / shape, 0.0)
        normals = (*convert.normal(w[:, 0], w[:, 1], "float64"), convert.normal(w[:, 2], w[:, 3], "float64")[0])
        for i, x in enumerate(normals):
            t = fma64(c, x, 1.0)
            positive = np.where(t > 0, t, 1.0)
            cube = positive * positive * positive
            bound = fma64(d, (1 - cube) - 3 * convert.minus_ln(positive), 0.5 * x * x)
            now = ~taken & (t > 0) & (-convert.exponential(w[:, 4 + i], "float64") < bound)
            v, taken = np.where(now, cube, v), taken | now
        if taken.all():
            break
    return -convert.minus_ln(d * v) - reduce if logarithm else d * v * exp_minus(reduce)
