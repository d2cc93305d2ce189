"""Categories: multinomial against the reference, its frequencies, categories that must never come, edges and misuse."""

import itertools

import numpy as np
import pytest
import torch
from noise_checks import ALPHA, chi_square_p, record_of_next_draw

import everett_cuda as ev
from everett_cuda.reference import categories


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=12")
    torch.manual_seed(4321)
    yield opened
    ev.close()


def _weights():
    rng = np.random.default_rng(3)
    peaked = np.exp(9 * rng.standard_normal(300))
    return {
        "two": [1.0, 3.0],
        "one": [0.25],
        "zeros": [0.0, 0.0, 0.3, 0.0, 0.7, 0.0],
        "peaked": peaked.tolist(),
        "subnormal": [5e-324, 1e-310, 0.0, 3e-320],
        "huge": [1.7e308, 1e308, 0.0, 1e-300, 1.7e308],
        "far apart": [1.0, 1e-15, 1e-19, 0.5],
        "equal": [1.0] * 257,
    }


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _weights())
@pytest.mark.parametrize("stream", ["chacha8", "philox"])
def test_multinomial_is_the_reference(name, stream):
    w = _weights()[name]
    t = torch.tensor(w, dtype=torch.float64)
    record = record_of_next_draw()
    assert (
        ev.multinomial(t, 200, True, stream=stream).tolist()
        == categories.with_replacement(record, w, 200, 0, stream).tolist()
    )
    above_zero = int((t > 0).sum())
    for n in {1, above_zero}:
        record = record_of_next_draw()
        method = categories.with_replacement if n == 1 else categories.without_replacement
        assert ev.multinomial(t, n, stream=stream).tolist() == method(record, w, n, 0, stream).tolist()


def test_rows_have_draws_of_their_own():
    w = torch.rand(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for replacement, n in ((True, 30), (False, 30), (False, 1)):
        record = record_of_next_draw()
        drawn = ev.multinomial(w, n, replacement)
        assert drawn.shape == (5, n) and drawn.dtype == torch.int64
        inverse = replacement or n == 1
        method = categories.with_replacement if inverse else categories.without_replacement
        for i, row in enumerate(drawn):
            assert row.tolist() == method(record, w[i].tolist(), n, i * (n if inverse else 40)).tolist()


def test_narrow_weights_are_taken_exactly():
    """bf16 and fp16 weights are what they are in fp64."""
    x = torch.rand(300, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        narrow = x.to(dtype)
        record_of_next_draw()
        a = ev.multinomial(narrow, 500, True)
        record_of_next_draw()
        assert torch.equal(a, ev.multinomial(narrow.double(), 500, True))


def test_integer_weights_are_close_to_the_weights():
    for name, w in _weights().items():
        integers = categories.integer_weights(w)
        total = sum(integers)
        assert 2**60 <= total < 2**63, name
        for exact, got in zip(w, integers, strict=True):
            assert abs(got / total - exact / np.sum(np.array(w) / max(w)) / max(w)) < 2.0**-50, name
            assert exact > 0 or got == 0


# --- properties -------------------------------------------------------------------------------------------------------


def test_frequencies_with_replacement():
    p = np.array([0.0, 0.05, 0.15, 0.3, 0.0, 0.5])
    drawn = ev.multinomial(torch.tensor(p), 100_000, True)
    counts = torch.bincount(drawn, minlength=6)
    assert chi_square_p(counts, p) > ALPHA
    # Negative control: fp32 uniforms against weights that are 1 % off.
    off = p * [1, 1.05, 1.05, 1.05, 1, 0.95]
    assert chi_square_p(torch.bincount(ev.multinomial(torch.tensor(off), 100_000, True), minlength=6), p) < ALPHA


def test_frequencies_without_replacement():
    """Ordered pairs: P(i, j) = p_i p_j / (1 - p_i)."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    pairs = ev.multinomial(torch.tensor(p).expand(40_000, 4), 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    law = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(4), 2)}
    counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16)
    assert chi_square_p([counts[4 * i + j] for i, j in law], list(law.values())) > ALPHA
    # Negative control: pairs drawn with replacement until they differ.
    with_repeats = ev.multinomial(torch.tensor(p).expand(60_000, 4), 2, True)
    differ = with_repeats[with_repeats[:, 0] != with_repeats[:, 1]]
    counts = torch.bincount(differ[:, 0] * 4 + differ[:, 1], minlength=16)
    assert chi_square_p([counts[4 * i + j] for i, j in law], list(law.values())) < ALPHA


def test_a_weight_of_zero_is_never_drawn():
    w = torch.zeros(50, 1000)
    w[:, ::10] = torch.rand(50, 100, generator=torch.Generator().manual_seed(3)) * 1e-30
    for replacement in (True, False):
        drawn = ev.multinomial(w, 100, replacement)
        assert (w.gather(1, drawn) > 0).all()
    # All that are above 0, even where the race leaves them no finite time.
    w = torch.tensor([1.0, 0.0, 1e-323, 0.0, 1e300], dtype=torch.float64)
    assert set(ev.multinomial(w, 3).tolist()) == {0, 2, 4}


def test_the_last_integer_still_has_a_category():
    """u at both ends of every category's interval, in the search that decides."""
    from everett_cuda.categories import _cumulated

    w = torch.tensor([[0.0, 0.25, 0.0, 0.5, 1e-30, 0.25, 0.0]], dtype=torch.float64)
    cumulated = _cumulated(w)
    integers = categories.integer_weights(w[0].tolist())
    assert cumulated[0].tolist() == np.cumsum(np.array(integers, object)).tolist()
    for i, weight in enumerate(integers):
        if weight:
            ends = torch.tensor([[cumulated[0, i] - weight, cumulated[0, i] - 1]])
            assert torch.searchsorted(cumulated, ends, right=True).tolist() == [[i, i]]


def test_vmap():
    w = torch.rand(5, 30, generator=torch.Generator().manual_seed(4))
    for replacement in (True, False):
        rows = torch.vmap(lambda v, r=replacement: ev.multinomial(v, 20, r), randomness="different")(
            w[:1].expand(5, 30)
        )
        assert rows.shape == (5, 20) and len({tuple(r.tolist()) for r in rows}) == 5
        rows = torch.vmap(lambda v, r=replacement: ev.multinomial(v, 20, r), randomness="same")(w[:1].expand(5, 30))
        assert len({tuple(r.tolist()) for r in rows}) == 1
    bad = w.clone()
    bad[1, 3], bad[2] = float("nan"), 0.0
    drawn = torch.vmap(lambda v: ev.multinomial(v, 20, True), randomness="different")(bad)
    assert (drawn[1:3] == -1).all() and (drawn[[0, 3, 4]] >= 0).all()


# --- edges and misuse -------------------------------------------------------------------------------------------------


def test_edges():
    assert ev.multinomial(torch.tensor([3.0]), 5, True).tolist() == [0] * 5
    assert ev.multinomial(torch.empty(0, 4), 2).shape == (0, 2)
    assert ev.multinomial(torch.ones(4, dtype=torch.float16), 4).sort().values.tolist() == [0, 1, 2, 3]
    w = torch.rand(4, 6, requires_grad=True)
    assert not ev.multinomial(w, 2).requires_grad


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-30])
def test_what_is_no_weight_is_refused(bad, replacement):
    w = torch.ones(3, 7)
    w[1, 4] = bad
    for error in (ev.NoDistribution, ValueError, RuntimeError):  # torch raises a RuntimeError
        with pytest.raises(error, match="finite and at least 0"):
            ev.multinomial(w, 2, replacement)
    with pytest.raises(RuntimeError):
        torch.multinomial(w, 2, replacement)


def test_too_few_weights_above_zero():
    with pytest.raises(ev.NoDistribution, match="must be above 0"):
        ev.multinomial(torch.zeros(3), 1)
    with pytest.raises(ev.NoDistribution, match="without replacement"):
        ev.multinomial(torch.tensor([0.0, 1.0, 2.0]), 3)
    assert set(ev.multinomial(torch.tensor([0.0, 1.0, 2.0]), 3, True).tolist()) <= {1, 2}


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ev.multinomial(torch.ones(3, dtype=torch.int64), 1), TypeError, "floating tensor"),
        (lambda: ev.multinomial([0.5, 0.5], 1), TypeError, "floating tensor"),
        (lambda: ev.multinomial(torch.ones(2, 2, 2), 1), ValueError, "categories"),
        (lambda: ev.multinomial(torch.ones(0), 1), ValueError, "categories"),
        (lambda: ev.multinomial(torch.ones(3), 0), ValueError, "at least 1"),
        (lambda: ev.multinomial(torch.ones(3), 1.0), TypeError, "an integer"),
        (lambda: ev.multinomial(torch.ones(3), 4), ValueError, "at most one a category"),
        (lambda: ev.multinomial(torch.ones(3), 1, generator=torch.Generator()), TypeError, "pseudo-random"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
