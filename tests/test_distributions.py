"""Distributions with parameters: their definition on the stream's draws, their laws, tails, gradients, edges and misuse."""

import math

import numpy as np
import pytest
import torch
from noise_checks import ALPHA, chi_square_p, ks_p, record_of_next_draw
from torch.autograd import gradcheck

import everett_cuda as ev
from everett_cuda import keys
from everett_cuda.reference import fill, gamma

N = 20_000
F64 = torch.float64


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=14")
    torch.manual_seed(4321)
    yield opened
    ev.close()


def _normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


# --- by definition, on the reference's draws --------------------------------------------------------------------------


def test_values_are_functions_of_the_references_draws():
    n = np.arange(500)
    record = record_of_next_draw()
    z = torch.from_numpy(fill.normal(record, n, "float64"))
    assert torch.equal(ev.normal(3.0, 0.5, 500, dtype=F64), z * 0.5 + 3)
    record_of_next_draw()
    assert torch.equal(ev.log_normal(3.0, 0.5, 500, dtype=F64), (z * 0.5 + 3).exp())
    record = record_of_next_draw()
    u = torch.from_numpy(fill.uniform(record, n))
    assert torch.equal(ev.uniform(-2, 6, 500), u * 8 - 2)
    record = record_of_next_draw()
    e = torch.from_numpy(fill.exponential(record, n, "float64"))
    assert torch.equal(ev.geometric(0.25, (500,), dtype=F64), 1 + (e / -math.log1p(-0.25)).floor())
    record = record_of_next_draw()
    v = (fill.integers(record, n, 2**64).astype(np.float64) + 0.5) * 2.0**-64
    torch.testing.assert_close(
        ev.cauchy(0, 1, 500, dtype=F64), torch.from_numpy(1 / np.tan(np.pi * v)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("stream", ["chacha8", "chacha20", "philox"])
def test_gamma_is_the_reference(stream):
    a = torch.tensor([1e-3, 0.1, 0.999, 1.0, 1.5, 4.0, 300.0, 1e9], dtype=F64).repeat(50)
    record = record_of_next_draw()
    x = ev.gamma(a, stream=stream)
    expected = np.maximum(gamma.gamma(record, np.arange(400), a.numpy(), stream), np.finfo(float).tiny)
    assert x.numpy().tobytes() == expected.tobytes()
    record = record_of_next_draw()
    x = ev.dirichlet(a.view(100, 4), stream=stream)
    logarithms = torch.from_numpy(gamma.gamma(record, np.arange(400), a.numpy(), stream, logarithm=True)).view(100, 4)
    assert torch.equal(x, torch.softmax(logarithms, -1).clamp(min=torch.finfo(F64).tiny))


# --- laws: Kolmogorov and Pearson -------------------------------------------------------------------------------------

# name: (values, distribution function, the same a little off)
LAWS = {
    "normal": (lambda n: ev.normal(2.0, 3.0, n), lambda x: _normal_cdf((x - 2) / 3), lambda x: _normal_cdf((x - 2.2) / 3)),
    "log_normal": (lambda n: ev.log_normal(0.5, 0.7, n), lambda x: _normal_cdf((math.log(x) - 0.5) / 0.7),
                   lambda x: _normal_cdf((math.log(x) - 0.5) / 0.8)),
    "uniform": (lambda n: ev.uniform(-1.0, 3.0, n), lambda x: (x + 1) / 4, lambda x: min(1, max(0, (x + 1) / 4.2))),
    "exponential": (lambda n: ev.exponential(n, rate=torch.tensor(2.5)), lambda x: -math.expm1(-2.5 * x),
                    lambda x: -math.expm1(-2.8 * x)),
    "cauchy": (lambda n: ev.cauchy(1.0, 2.0, n), lambda x: 0.5 + math.atan((x - 1) / 2) / math.pi,
               lambda x: 0.5 + math.atan((x - 1) / 2.5) / math.pi),
    "gamma 0.5": (lambda n: ev.gamma(0.5, 1.0, n), lambda x: math.erf(math.sqrt(x)), lambda x: math.erf(math.sqrt(1.2 * x))),
    "gamma 1": (lambda n: ev.gamma(1.0, 2.0, n), lambda x: -math.expm1(-2 * x), lambda x: -math.expm1(-2.3 * x)),
    "gamma 3": (lambda n: ev.gamma(3.0, 1.0, n), lambda x: 1 - math.exp(-x) * (1 + x + x * x / 2),
                lambda x: 1 - math.exp(-1.1 * x) * (1 + 1.1 * x + (1.1 * x) ** 2 / 2)),
    "beta 2 1": (lambda n: ev.beta(2.0, 1.0, n), lambda x: x**2, lambda x: x**2.3),
    "beta 0.5 0.5": (lambda n: ev.beta(0.5, 0.5, n), lambda x: 2 / math.pi * math.asin(math.sqrt(x)),
                     lambda x: min(1, 2 / math.pi * math.asin(math.sqrt(x)) ** 1.2)),
    "dirichlet": (lambda n: ev.dirichlet(torch.ones(n, 3))[:, 1], lambda x: 1 - (1 - x) ** 2, lambda x: 1 - (1 - x) ** 2.3),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_laws(name):
    draw, cdf, off = LAWS[name]
    x = draw(N)
    assert ks_p(x.numpy(), cdf) > ALPHA
    assert ks_p(x.numpy(), off) < ALPHA, "the negative control must fail"


def test_geometric_law():
    for p in (0.3, torch.tensor(0.3, dtype=F64)):
        x = ev.geometric(p, N)
        counts = torch.bincount(x.to(torch.int64).clamp(max=16), minlength=17)[1:]
        law = [0.3 * 0.7 ** (k - 1) for k in range(1, 16)] + [0.7**15]
        assert chi_square_p(counts, law) > ALPHA
        off = [0.33 * 0.67 ** (k - 1) for k in range(1, 16)] + [0.67**15]
        assert chi_square_p(counts, off) < ALPHA
    assert (ev.geometric(1.0, 100) == 1).all() and ev.geometric(1e-9, 1000, dtype=F64).mean() > 5e8


def test_a_large_shape_is_nearly_normal():
    x = ev.gamma(1e8, 1.0, N, dtype=F64)
    assert ks_p(((x - 1e8) / 1e4).numpy(), _normal_cdf) > ALPHA


# --- tails and intervals ----------------------------------------------------------------------------------------------


def test_uniforms_stay_below_high():
    u = 1 - 2.0**-24
    for dtype in (torch.float32, torch.bfloat16, torch.float16, F64):
        for low, high in (
            (0.0, 1.0),
            (1.0, 1.001),
            (-3.0, -2.9),
            (-1.0, 0.0),
            (5.0, 5.0),
            (1e30, 2e30) if dtype != torch.float16 else (1, 2),
        ):
            x = ev.uniform(low, high, 3000, dtype=dtype)
            ends = torch.tensor([low, high]).to(dtype)
            assert (x >= ends[0]).all() and (x < ends[1]).all() | (ends[0] == ends[1])
    # The greatest uniform would be rounded to the end: 0.1 + 0.9 u in fp32.
    assert np.float32(0.1) + np.float32(0.9) * np.float32(u) == 1.0 or np.float32(1000) + np.float32(u) == 1001.0
    record_of_next_draw()
    narrow = ev.uniform(1.0, 1.001, 30_000, dtype=torch.bfloat16)
    assert (narrow == 1.0).all()  # bf16 has no other number in there


def test_cauchy_reaches_far_and_is_symmetric():
    x = ev.cauchy(size=(300_000,), dtype=F64)
    assert x.abs().max() > 3e4 and (x > 0).float().mean() == pytest.approx(0.5, abs=5 / math.sqrt(300_000))
    assert ev.cauchy(size=(1000,), dtype=F64).isfinite().all()


def test_gammas_are_never_zero():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, F64):
        x = ev.gamma(torch.full((2000,), 1e-3, dtype=dtype))
        assert (x >= torch.finfo(dtype).tiny).all() and x.isfinite().all()
        points = ev.dirichlet(torch.full((500, 5), 1e-4, dtype=dtype))
        assert (points > 0).all() and points.isfinite().all()
        torch.testing.assert_close(points.double().sum(-1), torch.ones(500, dtype=F64), rtol=0, atol=1e-2)
    # Every component wins alike where concentrations are so small that all gammas but one would underflow.
    wins = torch.bincount(ev.dirichlet(torch.full((5000, 5), 1e-5)).argmax(-1), minlength=5)
    assert chi_square_p(wins, [0.2] * 5) > ALPHA


# --- gradients --------------------------------------------------------------------------------------------------------


def _seeded(f):
    def run(*args):
        torch.manual_seed(3)
        return f(*args)

    return run


def _parameter(*values):
    return torch.tensor(values, dtype=F64, requires_grad=True)


@pytest.mark.parametrize(
    "f, parameters",
    [
        (lambda m, s: ev.log_normal(m, s), (_parameter(0.1, -2.0), _parameter(0.5, 1.5))),
        (lambda low, high: ev.uniform(low, high), (_parameter(0.0, -5.0), _parameter(1.0, 2.0))),
        (lambda m, s: ev.cauchy(m, s), (_parameter(0.0, 5.0), _parameter(1.0, 2.0))),
        (lambda rate: ev.exponential(3, 2, rate=rate), (_parameter(0.5, 4.0),)),
    ],
)
def test_gradients_of_location_and_scale(f, parameters):
    assert gradcheck(_seeded(f), parameters)


def test_gradient_of_gamma_is_torchs():
    a = torch.rand(200, dtype=F64).mul(5).add(0.05).requires_grad_()
    rate = torch.rand(200, dtype=F64).add(0.5).requires_grad_()
    x = ev.gamma(a, rate)
    got = torch.autograd.grad(x.sum(), (a, rate))
    slope = torch._standard_gamma_grad(a.detach(), (x * rate).detach())
    torch.testing.assert_close(got[0], slope / rate.detach())
    torch.testing.assert_close(got[1], (-x / rate).detach())


def test_gradients_of_means_are_right():
    """E[gamma] = a, E[x_i] = a_i / sum a, E[beta] = a / (a + b): their slopes, by averages over many draws."""
    a = torch.full((N,), 0.7, dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(ev.gamma(a).sum(), a)[0]
    assert slope.mean().item() == pytest.approx(1.0, abs=6 * slope.std().item() / math.sqrt(N))
    c = torch.tensor([0.5, 1.0, 2.5], dtype=F64).expand(N, 3).clone().requires_grad_()
    slopes = torch.autograd.grad(ev.dirichlet(c)[:, 0].sum(), c)[0]
    for i, exact in enumerate(((4 - 0.5) / 16, -0.5 / 16, -0.5 / 16)):
        assert slopes[:, i].mean().item() == pytest.approx(exact, abs=6 * slopes[:, i].std().item() / math.sqrt(N))
    a = torch.full((N,), 1.5, dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(ev.beta(a, 2.0).sum(), a)[0]
    assert slope.mean().item() == pytest.approx(2 / 3.5**2, abs=6 * slope.std().item() / math.sqrt(N))


def test_what_lets_no_gradient_through():
    p = _parameter(0.5, 0.2)
    assert not ev.normal(p, 1.0).requires_grad and not ev.geometric(p).requires_grad


# --- properties, edges, misuse ----------------------------------------------------------------------------------------

CALLS = {
    "normal": lambda **k: ev.normal(0.0, 1.0, (4, 3), **k),
    "uniform": lambda **k: ev.uniform(0.0, 2.0, (4, 3), **k),
    "log_normal": lambda **k: ev.log_normal(0.0, 1.0, (4, 3), **k),
    "cauchy": lambda **k: ev.cauchy(0.0, 1.0, (4, 3), **k),
    "geometric": lambda **k: ev.geometric(0.01, (4, 3), **k),
    "gamma": lambda **k: ev.gamma(2.0, 1.0, (4, 3), **k),
    "beta": lambda **k: ev.beta(2.0, 1.0, (4, 3), **k),
    "dirichlet": lambda **k: ev.dirichlet(torch.ones(4, 3), **k),
}


@pytest.mark.parametrize("name", CALLS)
def test_types_streams_and_freshness(name):
    for dtype in (torch.float32, F64, torch.bfloat16, torch.float16):
        x = CALLS[name](dtype=dtype, stream="philox")
        assert x.dtype == dtype and x.shape == (4, 3) and x.isfinite().all()
    torch.manual_seed(1)
    a = CALLS[name](dtype=F64)
    torch.manual_seed(1)
    assert torch.equal(CALLS[name](dtype=F64), a)
    ev.step()
    torch.manual_seed(1)
    assert not torch.equal(CALLS[name](dtype=F64), a)


@pytest.mark.parametrize("name", CALLS)
def test_vmap(name):
    for randomness, distinct in (("different", 5), ("same", 1)):
        rows = torch.vmap(lambda x: CALLS[name](dtype=F64) + x, randomness=randomness)(torch.zeros(5, dtype=F64))
        assert len({tuple(r.flatten().tolist()) for r in rows}) == distinct


def test_vmap_over_parameters():
    a = torch.tensor([0.5, 1.0, 50.0], dtype=F64)
    for f in (ev.gamma, lambda a: ev.beta(a, 1.0), lambda a: ev.normal(a, 1.0), lambda a: ev.uniform(0.0, a)):
        rows = torch.vmap(lambda v, f=f: f(v.expand(3000)), randomness="different")(a)
        assert rows.shape == (3, 3000) and (rows.mean(-1).diff() > 0).all()
    grads = torch.vmap(torch.func.grad(lambda v: ev.gamma(v.expand(100)).sum()), randomness="different")(a)
    assert grads.shape == (3,) and grads.isfinite().all()


def test_shapes_dtypes_and_broadcasting():
    mean, std = torch.zeros(3, 1), torch.ones(4, dtype=F64)
    assert ev.normal(mean, std).shape == (3, 4) and ev.normal(mean, std).dtype == F64
    assert ev.normal(mean, 2.0, (5, 3, 2)).shape == (5, 3, 2) and ev.normal(mean, 1).dtype == torch.float32
    assert ev.gamma(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ev.normal(0, 1, ()).shape == () and ev.gamma(1.0, 1.0, (0, 4)).shape == (0, 4)
    assert ev.normal(5.0, 0.0, 3).tolist() == [5.0] * 3


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ev.normal(0.0, -1.0, 3), ValueError, "std: must be finite and at least 0"),
        (lambda: ev.normal(0.0, torch.tensor([1.0, -1e-9])), ValueError, "std"),
        (lambda: ev.normal(math.nan, 1.0, 3), ValueError, "mean: must be finite"),
        (lambda: ev.normal(), TypeError, "size: is missing"),
        (lambda: ev.normal(torch.zeros(3), 1.0, (4,)), ValueError, "must broadcast"),
        (lambda: ev.normal(torch.zeros(3), torch.ones(4)), ValueError, "must broadcast to one shape"),
        (lambda: ev.normal(torch.zeros(3, dtype=torch.int64), 1.0), TypeError, "floating tensor"),
        (lambda: ev.normal("0", 1.0, 3), TypeError, "mean: a number"),
        (lambda: ev.normal(0.0, 1.0, 3, dtype=torch.int32), TypeError, "dtype"),
        (lambda: ev.normal(0.0, 1.0, -3), ValueError, "negative"),
        (lambda: ev.normal(0.0, 1.0, 3, generator=torch.Generator()), TypeError, "pseudo-random"),
        (lambda: ev.uniform(2.0, 1.0, 3), ValueError, "low: must not be above high"),
        (lambda: ev.uniform(0.0, math.inf, 3), ValueError, "infinitely far"),
        (lambda: ev.uniform(-3e38, 3e38, 3), ValueError, "infinitely far"),
        (lambda: ev.cauchy(0.0, 0.0, 3), ValueError, "sigma: must be positive"),
        (lambda: ev.geometric(0.0, 3), ValueError, "p: must be above 0"),
        (lambda: ev.geometric(torch.tensor([0.5, math.nan])), ValueError, "p: must be above 0"),
        (lambda: ev.gamma(0.0, 1.0, 3), ValueError, "concentration: must be positive"),
        (lambda: ev.gamma(torch.tensor([1.0, math.inf])), ValueError, "concentration"),
        (lambda: ev.gamma(1.0, -1.0, 3), ValueError, "rate: must be positive"),
        (lambda: ev.dirichlet(torch.tensor(1.0)), TypeError, "concentration"),
        (lambda: ev.dirichlet(torch.tensor([1.0, 0.0])), ValueError, "concentration"),
        (lambda: ev.beta(1.0, 0.0, 3), ValueError, "b: must be positive"),
        (lambda: ev.exponential(rate=torch.tensor([1.0, 0.0])), ValueError, "rate: must be positive"),
        (lambda: ev.exponential(3, rate="1"), TypeError, "rate: a positive number"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert keys.counters()["draws"] == 0
