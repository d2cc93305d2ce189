"""Categories: the twin of everett_cuda/categories.py, in Python's integers and fractions, one row at a time."""

import math
from fractions import Fraction

import numpy as np

from everett_cuda.reference import fill


def integer_weights(weights):
    """W of fp64 weights with one above 0: round(w * 2^S), halves to even.

    S in two steps. First one for which V equal weights, all as large as the largest could be, add up to 2^61. The sum that
    it gives, rounded to fp64, lies below some power of two, 2^k the smallest: 62 - k is added to S.
    """
    exact = [Fraction(float(w)) for w in weights]
    top = math.frexp(max(weights))[1]
    s = 61 - (len(weights) - 1).bit_length() - top
    rough = sum(_rounded(w, s) for w in exact)
    s += 62 - math.frexp(float(rough))[1]
    return [_rounded(w, s) for w in exact]


def _rounded(w, s):
    return round(w * Fraction(2) ** s)


def with_replacement(record, weights, n, first=0, generator="chacha8"):
    """Indices (n,): draws first ... first + n - 1."""
    w = integer_weights(weights)
    drawn = []
    for u in fill.integers(record, first + np.arange(n), sum(w), generator):
        rest, i = int(u), 0
        while rest >= w[i]:
            rest, i = rest - w[i], i + 1
        drawn.append(i)
    return np.array(drawn, np.int64)


def without_replacement(record, weights, n, first=0, generator="chacha8"):
    """Indices (n,) of the smallest E/w; E: fp64 exponentials first, first + 1, ... The weights are scaled so that the
    largest lies in [1/2, 1); a positive one that leaves no finite time comes before those of 0."""
    times = fill.exponential(record, first + np.arange(len(weights)), "float64", generator)
    scaled = np.ldexp(np.asarray(weights, np.float64), -math.frexp(max(weights))[1])
    with np.errstate(divide="ignore", over="ignore"):
        times = times / scaled
    times = np.where(np.asarray(weights) > 0, np.minimum(times, np.finfo(np.float64).max), np.inf)
    return np.argsort(times, kind="stable")[:n]
