"""Fills: the value at each logical index e, from the record alone. stream.draws, then convert."""

import numpy as np

from everett_cuda.reference import convert, stream


def words(record, e, generator="chacha8", s=0):
    """uint32: the 32-bit draws e under the tag of integers."""
    return stream.draws(record, 32, e, stream.INTEGER, s, generator).astype(np.uint32)


def uniform(record, e, dtype="float32", generator="chacha8", s=0, closed_above=False):
    """Uniforms in [0,1), or in (0,1] with `closed_above`."""
    draws = stream.draws(record, convert.WIDTH[dtype], e, stream.UNIFORM, s, generator)
    return convert.uniform(draws, dtype, closed_above)


def normal(record, e, dtype="float32", generator="chacha8", s=0):
    """Standard normals. Elements 2j and 2j+1 share the draws 2j and 2j+1: even e is the cosine, odd e the sine."""
    e = np.asarray(e, np.uint64)
    first = e & ~np.uint64(1)
    width = convert.WIDTH[dtype]
    a = stream.draws(record, width, first, stream.NORMAL, s, generator)
    b = stream.draws(record, width, first + np.uint64(1), stream.NORMAL, s, generator)
    even, odd = convert.normal(a, b, dtype)
    return np.where(e & np.uint64(1) == 0, even, odd)


def exponential(record, e, dtype="float32", generator="chacha8", s=0):
    """Exponentials of rate 1."""
    return convert.exponential(stream.draws(record, 64, e, stream.EXPONENTIAL, s, generator), dtype)


def gumbel(record, e, dtype="float32", generator="chacha8", s=0):
    """Standard Gumbels: -ln of the exponential at the same index."""
    return convert.gumbel(stream.draws(record, 64, e, stream.EXPONENTIAL, s, generator), dtype)


def integers(record, e, span, generator="chacha8", s=0):
    """uint64 in [0, span): the high half of draw * span, exactly. span: Python integers from 1 to 2^64, one or in the shape
    of e."""
    draws = stream.draws(record, 64, e, stream.INTEGER, s, generator)
    spans = np.broadcast_to(np.asarray(span, object), draws.shape)
    products = [int(d) * int(n) >> 64 for d, n in zip(draws.ravel(), spans.ravel(), strict=True)]
    return np.array(products, np.uint64).reshape(draws.shape)


def permutation(record, n, generator="chacha8"):
    """int64 (n,): the order of the draws 0 ... n-1 of 64 bits; equal ones keep theirs."""
    draws = stream.draws(record, 64, np.arange(n), stream.INTEGER, 0, generator)
    return np.array(sorted(range(n), key=lambda i: (int(draws[i]), i)), np.int64)


def bernoulli(record, e, p, generator="chacha8", s=0):
    """True with probability p (float64 array that broadcasts to e), decided by the 64-bit draw e."""
    return convert.bernoulli(stream.draws(record, 64, e, stream.BERNOULLI, s, generator), p)
