"""Noise, distributions, categories and attention in compiled code: one graph, no break, fresh bits, right gradients."""

import math

import pytest
import torch

import everett_cuda as ev

WEIGHTS = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
CALLS = {
    "randint": lambda: ev.randint(-5, 10**12, (7, 13)),
    "randint_like": lambda: ev.randint_like(WEIGHTS, 100, dtype=torch.int64),
    "randperm": lambda: ev.randperm(50),
    "multinomial": lambda: ev.multinomial(WEIGHTS, 30, True),
    "multinomial without": lambda: ev.multinomial(WEIGHTS, 5),
    "rand_like": lambda: ev.rand_like(WEIGHTS),
    "normal": lambda: ev.normal(1.0, 2.0, 99),
    "uniform": lambda: ev.uniform(1.0, 2.0, 99),
    "uniform bf16": lambda: ev.uniform(1.0, 2.0, 99, dtype=torch.bfloat16),
    "log_normal": lambda: ev.log_normal(1.0, WEIGHTS),
    "exponential": lambda: ev.exponential(rate=WEIGHTS + 0.1),
    "cauchy": lambda: ev.cauchy(1.0, 2.0, 99),
    "geometric": lambda: ev.geometric(0.01, 99),
    "gamma": lambda: ev.gamma(WEIGHTS + 0.1, 2.0),
    "beta": lambda: ev.beta(WEIGHTS + 0.1, 2.0),
    "dirichlet": lambda: ev.dirichlet(WEIGHTS + 0.1),
    "fill_": lambda: ev.fill_(torch.zeros(40), "normal", 0.0, 1.0),
}


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=17")
    torch.manual_seed(4321)
    torch.compiler.reset()
    yield opened
    ev.close()


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph(name):
    f = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    a, b = f(), f()
    plain = CALLS[name]()
    assert not torch.equal(a, b) and a.shape == plain.shape and a.dtype == plain.dtype
    torch.manual_seed(1)
    assert torch.equal(f(), a), "the same RNG state in the same step"
    ev.step()
    torch.manual_seed(1)
    assert not torch.equal(f(), a), "another step"


def test_a_bad_row_of_weights_gives_no_category():
    bad = WEIGHTS.clone()
    bad[1, 2], bad[2] = math.nan, 0.0
    drawn = torch.compile(lambda w: ev.multinomial(w, 6, True), backend="aot_eager", fullgraph=True)(bad)
    assert (drawn[1:3] == -1).all() and (drawn[[0, 3]] >= 0).all()


def test_gradients_of_gamma_and_dirichlet():
    a = (WEIGHTS.double() + 0.1).requires_grad_()
    x = torch.compile(lambda a: ev.gamma(a), backend="aot_eager", fullgraph=True)(a)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), a)[0], torch._standard_gamma_grad(a.detach(), x.detach()))
    x = torch.compile(lambda a: ev.dirichlet(a), backend="aot_eager", fullgraph=True)(a)
    upstream = torch.rand_like(x)
    total = a.detach().sum(-1, True).expand_as(a).contiguous()
    slope = torch._dirichlet_grad(x.detach(), a.detach(), total)
    expected = slope * (upstream - (x.detach() * upstream).sum(-1, True))
    torch.testing.assert_close(torch.autograd.grad(x, a, upstream)[0], expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_attention_in_compiled_code(backend):
    """With values that are the identity the result is the dropped weights: the gradients follow from them."""
    g = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 3, 20, 8, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    v = torch.eye(20, dtype=torch.float64).expand(2, 3, 20, 20).clone().requires_grad_()
    f = torch.compile(
        lambda q, k, v: ev.scaled_dot_product_attention(q, k, v, dropout_p=0.4), backend=backend, fullgraph=True
    )
    y = f(q, k, v)
    weights = torch.softmax(q @ k.mT / math.sqrt(8), -1)
    multiplier = (y / weights).detach().round(decimals=6)
    assert set(multiplier.unique().tolist()) == {0.0, round(1 / 0.6, 6)}
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=g)
    got = torch.autograd.grad(y, (q, k, v), upstream)
    expected = torch.autograd.grad((weights * (multiplier != 0) / 0.6) @ v, (q, k, v), upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not torch.equal(f(q, k, v), y)
