"""The C++ conversions (csrc/law/convert.h) against the numpy reference, bit for bit, through `_C.law_convert`."""

import json

import numpy as np
import pytest
from vectors import make_law_v1

from everett_cuda import _C
from everett_cuda.reference import convert

STORAGE = make_law_v1.STORAGE
KINDS = ("uniform", "uniform_open", "normal", "exponential", "gumbel")
N = 60_000


def _poisoned(n, dtype):
    """An output that shows what was never written: every byte 0xA5."""
    return np.full(n * np.dtype(STORAGE[dtype]).itemsize, 0xA5, np.uint8).view(STORAGE[dtype])


def _reference(kind, dtype, words, n):
    wide = dtype == "float64" or kind in ("exponential", "gumbel")
    draws = words.view("<u8") if wide else words.astype(np.uint64)
    if kind == "normal":
        pairs = draws[: n + n % 2]
        return np.stack(convert.normal(pairs[0::2], pairs[1::2], dtype), 1).ravel()[:n]
    if kind in ("uniform", "uniform_open"):
        return convert.uniform(draws[:n], dtype, kind == "uniform_open")
    return getattr(convert, kind)(draws[:n], dtype)


def _bits(x):
    return x.view(f"<u{x.itemsize}")


@pytest.fixture(scope="module")
def words():
    """Every quadruple of edge words (normal pairs of 64-bit draws take four), then random ones."""
    edges = make_law_v1.EDGE_WORDS[::2].astype(np.uint32)
    grid = np.stack([m.ravel() for m in np.meshgrid(*[edges] * 4)], 1).ravel()
    rest = np.random.default_rng(2).integers(0, 2**32, 4 * N - len(grid), dtype=np.uint32)
    return np.concatenate([grid, rest])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_matches_reference(kind, dtype, words):
    out = _poisoned(N, dtype)
    _C.law_convert(kind, dtype, words, out)
    expected = _reference(kind, dtype, words, N)
    different = np.flatnonzero(_bits(out) != _bits(expected))
    assert len(different) == 0, (different[:5], out[different[:5]], expected[different[:5]])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_takes_the_stated_words_and_writes_only_its_values(kind, dtype, n, words):
    need = _C.law_words(kind, dtype, n)
    store = _poisoned(n + 2, dtype)
    _C.law_convert(kind, dtype, words[:need].copy(), store[1 : n + 1])
    assert np.array_equal(_bits(store[1 : n + 1]), _bits(_reference(kind, dtype, words, n)))
    assert np.array_equal(_bits(store[[0, -1]]), _bits(_poisoned(2, dtype)))
    if n:
        with pytest.raises(ValueError, match="law_words"):
            _C.law_convert(kind, dtype, words[: need - 1].copy(), _poisoned(n, dtype))


def test_law_vectors():
    law = json.loads(make_law_v1.PATH.read_text())["conversions"]
    a, b = (np.array([int(w, 16) for w in law[k].split()], np.uint32) for k in "ab")
    wide = np.stack([a, b], 1).ravel()
    for row in law["rows"]:
        dtype, n = row["dtype"], len(a)
        if row["kind"].startswith("normal"):
            out = _poisoned(2 * n, dtype)
            draws = np.stack([wide.view("<u8"), np.roll(wide.view("<u8"), 1)], 1).ravel().view(np.uint32)
            _C.law_convert("normal", dtype, draws if dtype == "float64" else wide, out)
            out = out[0 if row["kind"].endswith("even") else 1 :: 2]
        else:
            out = _poisoned(n, dtype)
            _C.law_convert(row["kind"], dtype, wide, out)
        assert make_law_v1.as_hex(out) == row["values"], (row["kind"], dtype)


def test_bernoulli_matches_reference(words):
    p = np.concatenate([[0.0, 1.0, 0.5, 2.0**-64, 2.0**-65, 1.5 * 2.0**-64, 1 - 2.0**-53, 5e-324, -0.0],
                        0.5 + np.random.default_rng(4).random(2000) / 2,
                        np.random.default_rng(4).random(N - 2009) ** 8])  # fmt: skip
    out = np.full(N, 0xA5, np.uint8)
    draws = words[: 2 * N].copy()
    # The next draws sit on their own thresholds: exactly there is "no", one below is "yes".
    edge = np.rint(p[9:2009] * 2.0**64).astype(np.uint64)
    draws.view("<u8")[9:2009] = edge - (np.arange(2000) % 2).astype(np.uint64)
    _C.law_bernoulli(draws, p, out)
    assert np.array_equal(out, convert.bernoulli(draws.view("<u8"), p))
    assert out[9:2009].tolist() == [0, 1] * 1000


@pytest.mark.parametrize("bad", [float("nan"), -1e-300, 1 + 2**-52, float("inf")])
def test_bernoulli_rejects_p_and_writes_nothing(bad):
    out = np.full(3, 0xA5, np.uint8)
    with pytest.raises(ValueError, match=r"p\[2\].*\[0, 1\]"):
        _C.law_bernoulli(np.zeros(6, np.uint32), np.array([0.5, 1.0, bad]), out)
    assert out.tolist() == [0xA5] * 3


def test_rejects_misuse():
    w, out = np.zeros(8, np.uint32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="one of uniform, uniform_open, normal"):
        _C.law_convert("cauchy", "float32", w, out)
    with pytest.raises(ValueError, match="one of float32, float64"):
        _C.law_convert("uniform", "float8", w, out)
    with pytest.raises(ValueError, match="4 bytes; this needs 8"):
        _C.law_convert("uniform", "float64", w, out)
    with pytest.raises(ValueError, match="contiguous"):
        _C.law_convert("uniform", "float32", w, np.zeros(8, np.float32)[::2])
    with pytest.raises(ValueError, match="one-dimensional"):
        _C.law_convert("uniform", "float32", w, np.zeros((2, 2), np.float32))
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _C.law_convert("uniform", "float32", w, frozen)
    with pytest.raises(ValueError, match="float64"):
        _C.law_bernoulli(w, np.zeros(4, np.int64), np.zeros(4, np.uint8))
