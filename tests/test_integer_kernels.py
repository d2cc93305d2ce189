"""Kernels of integers, CPU and emulated GPU, against the reference: every instruction set, layouts, indices beyond 2^35."""

import itertools

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the kernels' threads run on
from elements import Guarded
from test_kernels import GENERATORS, _record, _strides, isa  # noqa: F401  (isa: a fixture)
from vectors.make_law_v1 import RECORDS

from everett_cuda import _C
from everett_cuda.reference import fill, layout

INTEGERS, TAG, INT64 = 6, 8, 7
SPANS = [1, 2, 3, 255, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
STARTS = [0, 5, 2**31 - 3, 2**35 - 100, 2**45 + 7]


def _spans(n):
    """n spans as Python integers, and as the kernels take them (0 for 2^64)."""
    spans = [SPANS[i % len(SPANS)] for i in range(n)]
    return spans, np.array([s % 2**64 for s in spans], np.uint64)


def test_integers_match_the_reference(isa):  # noqa: F811
    for (name, number), e0, n in itertools.product(GENERATORS.items(), STARTS, (1, 7, 130, 1025)):
        spans, p = _spans(n)
        e = np.arange(n, dtype=np.uint64) + np.uint64(e0)
        out = Guarded(n, np.uint64)
        _C.fill(INTEGERS, _record(2), number, TAG, INT64, p.ctypes.data, out.address, (n,), (1,), (1,), (1,), e0, 0, 1)
        assert out.holds_only(fill.integers(RECORDS[2], e, spans, name)), (name, e0, n)


def test_one_span_for_all_and_strided_output(isa):  # noqa: F811
    shape, e_strides, e0 = (4, 33), (1000, 1), 2**36 - 5
    p, whole = np.array([2**40 + 1], np.uint64), np.zeros((4, 66), np.uint64)
    out = whole[:, ::2]
    _C.fill(INTEGERS, _record(1), 0, TAG, INT64, p.ctypes.data, out.ctypes.data, shape, (0, 0), _strides(out), e_strides, e0,
            3, 1)  # fmt: skip
    assert np.array_equal(out, fill.integers(RECORDS[1], layout.logical_indices(shape, e0, e_strides), 2**40 + 1, s=3))
    assert not whole[:, 1::2].any()


def test_threads_do_not_change_integers():
    n = 70_001
    p, out = np.array([10**18], np.uint64), [np.empty(n, np.uint64) for _ in range(3)]
    for threads, x in zip((1, 2, 7), out, strict=True):
        _C.fill(
            INTEGERS, _record(0), 0, TAG, INT64, p.ctypes.data, x.ctypes.data, (n,), (0,), (1,), (1,), 9, 0, threads
        )
    assert np.array_equal(out[0], out[1]) and np.array_equal(out[0], out[2])
    assert np.array_equal(out[0][-300:], fill.integers(RECORDS[0], np.arange(n - 300, n) + 9, 10**18))


@pytest.mark.parametrize("name", GENERATORS)
def test_the_gpu_matches_the_reference(emulated, name):
    for e0, n in itertools.product(STARTS, (1, 9, 257, 2100)):
        e = np.arange(n, dtype=np.uint64) + np.uint64(e0)
        spans, p = _spans(n)
        out = Guarded(n, np.uint64)
        emulated.fill(INTEGERS, _record(3), GENERATORS[name], TAG, INT64, p.ctypes.data, out.address, n, e0, 0, 0, 0)
        assert out.holds_only(fill.integers(RECORDS[3], e, spans, name)), (e0, n)
        out = Guarded(n, np.uint64)
        emulated.fill(INTEGERS, _record(3), GENERATORS[name], TAG, INT64, p[4:].ctypes.data if n > 4 else p.ctypes.data,
                      out.address, n, e0, 0, 0, 0, one_p=True)  # fmt: skip
        assert out.holds_only(fill.integers(RECORDS[3], e, spans[4 if n > 4 else 0], name)), (e0, n)


def test_wrong_types_are_refused(emulated):
    p, out = np.ones(1, np.uint64), np.zeros(4, np.uint64)
    for type_ in (0, 1, 4):
        with pytest.raises(ValueError, match="int64"):
            _C.fill(
                INTEGERS, _record(0), 0, TAG, type_, p.ctypes.data, out.ctypes.data, (4,), (0,), (1,), (1,), 0, 0, 1
            )
        with pytest.raises(ValueError, match="int64"):
            emulated.fill(
                INTEGERS, _record(0), 0, TAG, type_, p.ctypes.data, out.ctypes.data, 4, 0, 0, 0, 0, one_p=True
            )
    with pytest.raises(ValueError, match="parameters"):
        _C.fill(INTEGERS, _record(0), 0, TAG, INT64, 0, out.ctypes.data, (4,), (0,), (1,), (1,), 0, 0, 1)
    assert not out.any()
