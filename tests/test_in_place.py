"""fill_: torch's in-place random methods with our bits."""

import pytest
import torch

import everett_cuda as ev
from everett_cuda import keys

CALLS = {
    "bernoulli": (0.3,), "cauchy": (1.0, 2.0), "exponential": (2.0,), "geometric": (0.2,), "log_normal": (0.0, 0.5),
    "normal": (1.0, 2.0), "random": (10,), "uniform": (-1.0, 1.0),
}  # fmt: skip
OURS = {
    "bernoulli": lambda size, p, **k: ev.bernoulli(p, size, **k), "cauchy": lambda size, *p, **k: ev.cauchy(*p, size, **k),
    "exponential": lambda size, r, **k: ev.exponential(size, rate=r, **k),
    "geometric": lambda size, p, **k: ev.geometric(p, size, **k),
    "log_normal": lambda size, *p, **k: ev.log_normal(*p, size, **k),
    "normal": lambda size, *p, **k: ev.normal(*p, size, **k), "random": lambda size, n, **k: ev.randint(n, size, **k),
    "uniform": lambda size, *p, **k: ev.uniform(*p, size, **k),
}  # fmt: skip


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=15")
    torch.manual_seed(4321)
    yield opened
    ev.close()


@pytest.mark.parametrize("kind", CALLS)
def test_values_are_those_of_our_functions_whatever_the_strides(kind):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        torch.manual_seed(8)
        expected = OURS[kind]((6, 5), *CALLS[kind], dtype=dtype)
        whole = torch.full((12, 10), 77.0, dtype=dtype)
        for x in (torch.empty(6, 5, dtype=dtype), torch.empty(5, 6, dtype=dtype).T, whole[::2, ::2]):
            torch.manual_seed(8)
            assert ev.fill_(x, kind, *CALLS[kind]) is x and torch.equal(x, expected)
        assert (whole[1::2] == 77).all() and (whole[:, 1::2] == 77).all()
        # torch's method takes the same arguments.
        assert getattr(torch.empty(6, 5, dtype=dtype), f"{kind}_")(*CALLS[kind]).isfinite().all()


def test_integer_tensors():
    for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool):
        x = torch.zeros(2000, dtype=dtype)
        assert set(ev.fill_(x, "bernoulli", 0.5).int().unique().tolist()) == {0, 1}
        ev.fill_(x, "random")
        assert len(x.unique()) >= 2 and (dtype == torch.bool or (x >= 0).all())
        if dtype != torch.bool:
            ev.fill_(x, "random", 5)
            assert set(x.unique().tolist()) == {0, 1, 2, 3, 4}
            assert ev.fill_(x, "geometric", 0.9).min() == 1
    x = ev.fill_(torch.zeros(5000, dtype=torch.int64), "random", -(2**63), None)
    assert (x < -(2**62)).any() and (x > 2**62).any()
    x = ev.fill_(torch.zeros(3000, dtype=torch.uint8), "random")
    assert x.min() == 0 and x.max() == 255
    assert ev.fill_(torch.zeros(3000), "random").max() <= 2**24


def test_tensors_of_probabilities():
    p = torch.tensor([0.0, 1.0, 0.0])
    x = ev.fill_(torch.full((40, 3), 7, dtype=torch.int32), "bernoulli", p)
    assert torch.equal(x, p.int().expand(40, 3))


def test_gradients_and_leaves():
    leaf = torch.zeros(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        ev.fill_(leaf, "normal")
    with torch.no_grad():
        assert ev.fill_(leaf, "normal").any()
    h = leaf * 1
    ev.fill_(h, "uniform")
    h.sum().backward()
    assert not leaf.grad.any()
    version = leaf._version
    with torch.no_grad():
        ev.fill_(leaf, "normal", 0.0, 0.02)
    assert leaf._version == version + 1


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ev.fill_(torch.zeros(3), "gauss"), ValueError, "kind: one of"),
        (lambda: ev.fill_(torch.zeros(3, dtype=torch.int64), "normal"), TypeError, "x: float32"),
        (lambda: ev.fill_(torch.zeros(3, dtype=torch.complex64), "random"), TypeError, "x: float32"),
        (lambda: ev.fill_(torch.zeros(3), "normal", 0.0, -1.0), ValueError, "std"),
        (lambda: ev.fill_(torch.zeros(3, dtype=torch.uint8), "random", 300), ValueError, "0 to 255"),
        (lambda: ev.fill_(torch.zeros(3), "random", 0), ValueError, "below the end"),
        (lambda: ev.fill_(torch.zeros(3), "bernoulli", 1.5), ValueError, "from 0 to 1"),
        (lambda: ev.fill_(torch.zeros(3), "normal", generator=torch.Generator()), TypeError, "pseudo-random"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert keys.counters()["draws"] == 0
