"""Attention's keep/drop: the twin of csrc/law/attention.h, from the law's sentence about each weight (bh, q, k).

Philox: call (c0, c1) = ((k>>4)*32 + (q&7)*4 + ((k>>1)&3), q>>4), word ((q>>3)&1)*2 + ((k>>3)&1), half k&1.
ChaCha: block words 12 and 13 = ((k>>6)*32 + (q&7)*4 + ((k>>1)&3), q>>4), half-word ((q>>3)&1)*16 + ((k>>3)&7)*2 + (k&1).
Tag 5, s = bh. Keep iff the half-word's low 15 bits are at least T + [x < F],
x = (d + q*0x9E3779B9 + bh*0x85EBCA6B) mod 2^32.
"""

import numpy as np

from everett_cuda.reference import chacha, keepdrop, stream
from everett_cuda.reference.philox import philox4x32_10

_LOW = np.uint64(0xFFFFFFFF)


def half_words(record, bh, q, k, generator="philox"):
    """The 16-bit draws of weights: uint32, in the broadcast shape of the uint64 arrays q and k; bh is one number."""
    q, k = (np.asarray(i, np.uint64) for i in np.broadcast_arrays(q, k))
    lane = (q & np.uint64(7)) * np.uint64(4) + (k >> np.uint64(1) & np.uint64(3))
    column = np.uint64(4 if generator == "philox" else 6)
    number = (k >> column) * np.uint64(32) + lane
    place = np.stack([number.ravel(), (q >> np.uint64(4)).ravel()], 1)
    unit, which = np.unique(place, axis=0, return_inverse=True)
    row = np.empty((len(unit), 4), np.uint32)
    row[:, :2] = unit
    if generator == "philox":
        row[:, 2], row[:, 3] = int(record[2]) ^ stream.ATTENTION, int(record[3]) ^ bh
        words = philox4x32_10(row, record[:2])
        at = (q >> np.uint64(3) & np.uint64(1)) * np.uint64(4) + (k >> np.uint64(3) & np.uint64(1)) * np.uint64(2)
    else:
        row[:, 2], row[:, 3] = stream.ATTENTION, bh
        words = chacha.blocks(record[:8], row, int(generator.removeprefix("chacha")))
        at = (q >> np.uint64(3) & np.uint64(1)) * np.uint64(16) + (k >> np.uint64(3) & np.uint64(7)) * np.uint64(2)
    halves = words.astype("<u4", copy=False).view("<u2")
    return halves[which.ravel(), (at + (k & np.uint64(1))).ravel().astype(np.int64)].reshape(q.shape).astype(np.uint32)


def keep_mask(record, p, shape, generator="philox", bh0=0, q0=0, k0=0):
    """True where a weight is kept: (heads, queries, keys), the first of global index (bh0, q0, k0). p: 1/256 to 31/32."""
    h = keepdrop.threshold(p)
    if h.wide:
        raise ValueError(f"p is {p}; attention's must be from 1/256 to 31/32")
    heads, queries, keys = shape
    q = np.uint64(q0) + np.arange(queries, dtype=np.uint64)[:, None]
    k = np.uint64(k0) + np.arange(keys, dtype=np.uint64)[None, :]
    kept = np.empty(shape, bool)
    for head in range(heads):
        bh = bh0 + head
        x = (np.uint64(record[8]) + (q * np.uint64(0x9E3779B9) & _LOW) + np.uint64(bh * 0x85EBCA6B % 2**32)) & _LOW
        threshold = np.uint32(h.t) + (x < np.uint64(h.f)).astype(np.uint32)
        kept[head] = (half_words(record, bh, q, k, generator) & np.uint32(0x7FFF)) >= threshold
    return kept


def dropped(x, record, p, dtype="float32", generator="philox", bh0=0, q0=0, k0=0):
    """Weights (heads, queries, keys) after dropout: kept ones times 1/(1-p), rounded as `keepdrop.masked` does."""
    return keepdrop.masked(x, keep_mask(record, p, np.shape(x), generator, bh0, q0, k0), p, dtype)
