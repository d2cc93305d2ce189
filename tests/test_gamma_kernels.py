"""Kernels of gamma variates, CPU and emulated GPU, against the reference, and the exponential that they are made with."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the kernels' threads run on
from elements import Guarded
from test_kernels import GENERATORS, _record, _strides
from vectors.make_law_v1 import RECORDS

from everett_cuda import _C
from everett_cuda.reference import gamma, layout, stream

KINDS = {"gamma": (7, False), "log_gamma": (8, True)}
TAG, FP64 = 9, 1
SHAPES = np.array([5e-324, 1e-8, 1e-3, 0.5, 1 - 2.0**-53, 1.0, 1.7, 9.0, 1e3, 1e12, 1e300])
STARTS = [0, 3, 2**35 - 100, 2**45 + 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GENERATORS)
def test_gammas_match_the_reference(emulated, kind, name):
    number, logarithm = KINDS[kind]
    for e0, n in itertools.product(STARTS, (1, 400)):
        a = np.resize(SHAPES, n)
        expected = gamma.gamma(RECORDS[1], np.uint64(e0) + np.arange(n, dtype=np.uint64), a, name, logarithm)
        out = Guarded(n, np.float64)
        _C.fill(
            number,
            _record(1),
            GENERATORS[name],
            TAG,
            FP64,
            a.ctypes.data,
            out.address,
            (n,),
            (1,),
            (1,),
            (1,),
            e0,
            0,
            1,
        )
        assert out.holds_only(expected), (e0, n)
        out = Guarded(n, np.float64)
        emulated.fill(number, _record(1), GENERATORS[name], TAG, FP64, a.ctypes.data, out.address, n, e0, 0, 0, 0)
        assert out.holds_only(expected), (e0, n)


def test_any_layout_and_threads():
    shape, e_strides, e0 = (5, 40), (1000, 1), 2**36 - 5
    a, whole = np.array([0.4]), np.zeros((5, 80))
    out = whole[:, ::2]
    expected = gamma.gamma(RECORDS[0], layout.logical_indices(shape, e0, e_strides).ravel(), 0.4).reshape(shape)
    for threads in (1, 2, 7):
        _C.fill(7, _record(0), 0, TAG, FP64, a.ctypes.data, out.ctypes.data, shape, (0, 0), _strides(out), e_strides, e0, 0,
                threads)  # fmt: skip
        assert np.array_equal(out, expected) and not whole[:, 1::2].any()


def test_shapes_that_are_none_give_nan(emulated):
    a = np.array([0.0, -0.0, -1.0, -0.3, np.nan, -np.inf, np.inf])
    for call in (
        lambda out: _C.fill(
            7, _record(0), 0, TAG, FP64, a.ctypes.data, out.ctypes.data, (7,), (1,), (1,), (1,), 0, 0, 1
        ),
        lambda out: emulated.fill(7, _record(0), 0, TAG, FP64, a.ctypes.data, out.ctypes.data, 7, 0, 0, 0, 0),
    ):
        out = np.zeros(7)
        call(out)
        assert np.isnan(out[:6]).all() and out[6] == np.inf


def test_rejections_go_on_in_further_draws():
    """At a = 1 one try in 20 fails: some of 4,000 elements need the second round's block, and none the sixteenth's."""
    n, a = 4000, np.ones(4000)
    whole = gamma.gamma(RECORDS[2], np.arange(n), a)
    rounds = gamma.ROUNDS
    try:
        gamma.ROUNDS = 1
        first = gamma.gamma(RECORDS[2], np.arange(n), a)
    finally:
        gamma.ROUNDS = rounds
    assert 0 < np.count_nonzero(whole != first) < 10
    assert (first[whole != first] == 1 - 1 / 3).all()


def test_every_element_has_blocks_of_its_own():
    """The words of rounds and elements: no two alike in 512 x 16."""
    words = np.concatenate(
        [stream.blocks(RECORDS[0], np.arange(512), TAG, s).view(np.uint64).ravel() for s in range(16)]
    )
    assert len(np.unique(words)) == words.size


def test_exp_minus_is_within_an_ulp():
    y = np.concatenate([np.linspace(0, 40, 400), np.geomspace(1e-300, 706.99, 400), [0.0, 707.0, 1e300, np.inf]])
    got = gamma.exp_minus(y)
    assert (got[-3:] == 0).all() and got[-4] == 1
    with mpmath.workdps(40):
        for v, g in zip(y[:800], got[:800], strict=True):
            exact = mpmath.exp(-mpmath.mpf(float(v)))
            assert abs(mpmath.mpf(float(g)) - exact) < 1.5 * math.ulp(float(exact)), v
