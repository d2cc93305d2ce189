"""Integers and permutations: randint and randperm against the reference, their frequencies, edges and misuse."""

import itertools
import math

import numpy as np
import pytest
import torch
from noise_checks import ALPHA, as_numpy, chi_square_p, record_of_next_draw, same_bits

import everett_cuda as ev
from everett_cuda import keys
from everett_cuda.reference import fill, stream


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=11")
    torch.manual_seed(4321)
    yield opened
    ev.close()


# --- the reference ----------------------------------------------------------------------------------------------------

RANGES = [
    (0, 1),
    (0, 2),
    (0, 10),
    (-7, 6),
    (0, 2**31),
    (-5, 2**32 + 9),
    (0, 2**62 + 1),
    (-(2**63), 2**63 - 1),
    (-3, 2**63 - 3),
]


@pytest.mark.parametrize("name", stream.GENERATORS)
def test_randint_is_the_reference(name):
    for (low, high), n in itertools.product(RANGES, (1, 97)):
        record = record_of_next_draw()
        x = ev.randint(low, high, (n,), stream=name)
        expected = [low + int(v) for v in fill.integers(record, np.arange(n), high - low, name)]
        assert x.tolist() == expected and x.dtype == torch.int64


def test_all_64_bits():
    record = record_of_next_draw()
    x = ev.randint(0, 2**64, (40,), dtype=torch.uint64)
    assert as_numpy(x).tolist() == stream.draws(record, 64, np.arange(40), stream.INTEGER).tolist()


def test_dtypes_hold_what_int64_does():
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.bool,
    ):
        high = 2 if dtype == torch.bool else 100
        record = record_of_next_draw()
        x = ev.randint(high, (3, 50), dtype=dtype)
        assert x.dtype == dtype and x.shape == (3, 50)
        assert x.to(torch.int64).flatten().tolist() == fill.integers(record, np.arange(150), high).tolist()


@pytest.mark.parametrize("name", stream.GENERATORS)
def test_randperm_is_the_reference(name):
    for n in (1, 2, 9, 8000):
        record = record_of_next_draw()
        assert same_bits(ev.randperm(n, stream=name), fill.permutation(record, n, name))


def test_randperm_dtypes():
    for dtype in (torch.int32, torch.uint8, torch.float32):
        record = record_of_next_draw()
        x = ev.randperm(200, dtype=dtype)
        assert x.dtype == dtype and x.tolist() == fill.permutation(record, 200).tolist()


# --- properties -------------------------------------------------------------------------------------------------------


def test_called_as_torch_is():
    for call in (
        lambda f, **kw: f(9, (4, 3), **kw),
        lambda f, **kw: f(2, 9, (4, 3), **kw),
        lambda f, **kw: f(9, size=(4, 3), **kw),
        lambda f, **kw: f(high=9, size=[4, 3], **kw),
        lambda f, **kw: f(low=1, high=9, size=(4, 3), **kw),
        lambda f, **kw: f(9, torch.Size([2]), **kw),
        lambda f, **kw: f(5, (), **kw),
        lambda f, **kw: f(5, (0, 2), **kw),
    ):
        ours, theirs = call(ev.randint), call(torch.randint)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    x = torch.zeros(3, 5, dtype=torch.int16)
    assert ev.randint_like(x, 7).dtype == torch.int16 and ev.randint_like(x, 3, 7).shape == (3, 5)
    assert set(ev.randint_like(x.expand(40, 3, 5), 3, 5).unique().tolist()) == {3, 4}


def test_integers_are_uniform():
    x = ev.randint(-3, 14, (200_000,))
    counts = torch.bincount(x + 3, minlength=17)
    assert len(counts) == 17
    assert chi_square_p(counts, np.full(17, 1 / 17)) > ALPHA
    # Negative control: draws of 8 bits reduced modulo 17, where 0 has 16 of 256 and the others 15.
    biased = torch.bincount(ev.randint(256, (200_000,)) % 17, minlength=17)
    assert chi_square_p(biased, np.full(17, 1 / 17)) < ALPHA


def test_permutations_are_uniform():
    def counts(perms):
        numbers = [sum(d * 5**i for i, d in enumerate(p)) for p in perms]
        return np.unique(numbers, return_counts=True)[1]

    perms = [tuple(ev.randperm(5).tolist()) for _ in range(6000)]
    assert len(set(perms)) == math.factorial(5)
    assert chi_square_p(counts(perms), np.full(120, 1 / 120)) > ALPHA

    # Negative control: the usual mistake in Fisher and Yates's shuffle, each element with any other.
    def wrong():
        p = list(range(5))
        for i, j in enumerate(ev.randint(5, (5,)).tolist()):
            p[i], p[j] = p[j], p[i]
        return tuple(p)

    assert chi_square_p(counts([wrong() for _ in range(6000)]), np.full(120, 1 / 120)) < ALPHA


def test_draws_are_named_by_torchs_generator_and_fresh_each_step():
    torch.manual_seed(5)
    a, b = ev.randperm(50), ev.randint(9, (50,))
    torch.manual_seed(5)
    assert torch.equal(ev.randperm(50), a) and torch.equal(ev.randint(9, (50,)), b)
    ev.step()
    torch.manual_seed(5)
    assert not torch.equal(ev.randperm(50), a) and not torch.equal(ev.randint(9, (50,)), b)


@pytest.mark.parametrize("f", [lambda: ev.randperm(30), lambda: ev.randint(2**40, (30,))])
def test_vmap(f):
    rows = torch.vmap(lambda _: f(), randomness="different")(torch.zeros(6))
    assert len({tuple(r.tolist()) for r in rows}) == 6
    rows = torch.vmap(lambda v: f() + v, randomness="same")(torch.zeros(6, dtype=torch.int64))
    assert len({tuple(r.tolist()) for r in rows}) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda _: f())(torch.zeros(6))


# --- edges and misuse -------------------------------------------------------------------------------------------------


def test_edges():
    assert ev.randperm(0).tolist() == [] and ev.randperm(1).tolist() == [0]
    assert ev.randint(1, (5,)).tolist() == [0] * 5 and ev.randint(-4, -3, (2,)).tolist() == [-4, -4]
    wide = ev.randint(-(2**63), 2**63 - 1, (2000,))
    assert (wide < 0).sum() > 900 and (wide > 0).sum() > 900
    assert set(ev.randint(2**63 - 3, 2**63 - 1, (100,)).tolist()) == {2**63 - 3, 2**63 - 2}
    assert ev.randperm(256, dtype=torch.uint8).unique().numel() == 256


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ev.randint(5, 5, (2,)), ValueError, "low: must be below high"),
        (lambda: ev.randint(0, (2,)), ValueError, "low: must be below high"),
        (lambda: ev.randint(2.5, (2,)), TypeError, "high: an integer"),
        (lambda: ev.randint(5), TypeError, "size: is missing"),
        (lambda: ev.randint(5, (-1,)), ValueError, "size: must not be negative"),
        (lambda: ev.randint(0, 2**63 + 1, (2,)), ValueError, "holds the integers from"),
        (lambda: ev.randint(0, 257, (2,), dtype=torch.uint8), ValueError, "from 0 to 255"),
        (lambda: ev.randint(-1, 2, (2,), dtype=torch.bool), ValueError, "from 0 to 1"),
        (lambda: ev.randint(0, 2**24 + 2, (2,), dtype=torch.float32), ValueError, "16777216"),
        (lambda: ev.randint(0, 10, (2,), dtype=torch.complex64), TypeError, "dtype"),
        (lambda: ev.randint(5, (2,), stream="mt19937"), ValueError, "stream"),
        (lambda: ev.randint(5, (2,), generator=torch.Generator()), TypeError, "pseudo-random"),
        (lambda: ev.randperm(-1), ValueError, "must not be negative"),
        (lambda: ev.randperm(2.0), TypeError, "n: an integer"),
        (lambda: ev.randperm(300, dtype=torch.uint8), ValueError, "0 to 255"),
        (lambda: ev.randperm(5, generator=7), TypeError, "ev.Generator or None"),
    ],
)
def test_misuse(call, error, words):
    before = keys.counters()["draws"]
    with pytest.raises(error, match=words):
        call()
    assert keys.counters()["draws"] == before


def test_without_a_source():
    ev.close()
    for call in (lambda: ev.randint(5, (2,)), lambda: ev.randperm(3)):
        with pytest.raises(ev.SourceNotOpen):
            call()
