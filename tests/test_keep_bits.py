"""Keep masks as packed bits on the CPU: the reference's decisions, in every instruction set and at every phase."""

import itertools

import numpy as np
import torch  # noqa: F401  brings the OpenMP runtime that the kernels' threads run on
from elements import Guarded
from test_kernels import GENERATORS, LENGTHS, STARTS, _record, isa  # noqa: F401  isa is a fixture
from vectors.make_law_v1 import P_VALUES, RECORDS

from everett_cuda import _C
from everett_cuda.reference import keepdrop


def _keep_bits(which, generator, p, out, n, e0, threads=1):
    _C.keep_bits(_record(which), GENERATORS[generator], p, out.address, n, e0, 0, threads)


def test_the_order_of_bits():
    mask, out = np.empty(20, np.float32), Guarded(3, np.uint8)
    ones = np.ones_like(mask)
    _C.dropout(_record(0), 0, 0.5, 0, ones.ctypes.data, mask.ctypes.data, 20, 7, 1)
    _keep_bits(0, "chacha8", 0.5, out, 20, 7)
    assert [bool(out.values[i // 8] >> i % 8 & 1) for i in range(20)] == (mask != 0).tolist()
    assert out.values[2] >> 4 == 0


def test_bits_match_the_reference(isa):  # noqa: F811
    turn = itertools.count()
    for p, generator in itertools.product(P_VALUES.values(), GENERATORS):
        i = next(turn)
        e0, which = STARTS[i % len(STARTS)], i % len(RECORDS)
        for n in (*LENGTHS[i % 7 :: 7], 5000):
            expected = keepdrop.keep_bits(RECORDS[which], p, e0, n, generator)
            out = Guarded(len(expected), np.uint8, shift=i % 5)
            _keep_bits(which, generator, p, out, n, e0)
            assert out.holds_only(expected), (p, generator, e0, n)


def test_bits_do_not_depend_on_the_threads():
    n = 8 * 50_000 + 3
    one, many = Guarded(50_001, np.uint8), Guarded(50_001, np.uint8)
    _keep_bits(0, "chacha8", 0.1, one, n, 5)
    _keep_bits(0, "chacha8", 0.1, many, n, 5, threads=3)
    assert many.holds_only(one.values)
