"""torch.func over every op, in eager and in compiled code: derivatives by the mask used, randomness as torch's own ops."""

import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import everett_cuda as ev

OPS = {
    "dropout": lambda x: ev.dropout(x, 0.5),
    "dropout1d": lambda x: ev.dropout1d(x, 0.5),
    "drop_path": lambda x: ev.drop_path(x, 0.5),
    "alpha_dropout": lambda x: ev.alpha_dropout(x, 0.5),
    "dropout_add": lambda x: ev.dropout_add(x, 3 * x, 0.5),
    "bias_dropout_add": lambda x: ev.bias_dropout_add(x, x[0], 3 * x, 0.5),
    "bias_gelu_dropout": lambda x: ev.bias_gelu_dropout(x, x[0], 0.5),
    "add_noise": lambda x: ev.add_noise(x, 0.5),
}


@pytest.fixture(autouse=True)
def source():
    """Every test is one step, in which equal torch RNG states find equal keys."""
    ev.set_freshness("op")
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield opened
    ev.close()


def fixed(op):
    """op, or a transform of it, under the same mask at every call."""

    def call(*args):
        torch.manual_seed(77)
        return op(*args)

    return call


@pytest.fixture
def x():
    return torch.empty(4, 6, dtype=torch.float64).uniform_(0.2, 1.5).requires_grad_()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_gradcheck_and_gradgradcheck(op, x):
    assert gradcheck(fixed(op), x, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(fixed(op), x)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_func_derivatives_are_autograds(op, x):
    """All of them under one mask; autograd's, which gradcheck has tested, is the measure."""
    call, leaf = fixed(op), x.detach()
    wanted = torch.autograd.functional.jacobian(call, x)
    assert torch.allclose(fixed(torch.func.jacrev(op))(leaf), wanted)
    assert torch.allclose(fixed(torch.func.jacfwd(op, randomness="same"))(leaf), wanted)
    slope = torch.func.grad(lambda v: (op(v) ** 3).sum())
    (expected,) = torch.autograd.grad((call(x) ** 3).sum(), x)
    assert torch.allclose(fixed(slope)(leaf), expected)
    hessian = torch.func.jacfwd(torch.func.jacrev(lambda v: (op(v) ** 3).sum()), randomness="same")
    assert torch.allclose(fixed(hessian)(leaf), torch.autograd.functional.hessian(lambda v: (call(v) ** 3).sum(), x))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_vmap_randomness(op, x):
    batch = x.detach().expand(5, 4, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(op)(batch)
    same = torch.vmap(op, randomness="same")(batch)
    assert all(torch.equal(row, same[0]) for row in same)
    different = torch.vmap(op, randomness="different")(batch)
    assert len({tuple(row.flatten().tolist()) for row in different}) > 1
    assert same.shape == different.shape == batch.shape


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_stochastic_rounding_under_vmap_and_grad(randomness):
    x = torch.full((3, 4000), 1 + 2.0**-9)
    y = torch.vmap(lambda v: ev.stochastic_round(v, torch.bfloat16), randomness=randomness)(x)
    assert set(y.unique().tolist()) == {1.0, 1 + 2.0**-7} and torch.equal(y[0], y[1]) == (randomness == "same")
    slope = torch.func.grad(lambda v: ev.stochastic_round(v, torch.bfloat16).float().sum())(x)
    assert torch.equal(slope, torch.ones(3, 4000))
    value, tangent = torch.func.jvp(lambda v: ev.stochastic_round(v, torch.bfloat16), (x,), (x,))
    assert value.dtype == tangent.dtype == torch.bfloat16 and torch.equal(tangent, x.bfloat16())


# --- the same inside torch.compile ------------------------------------------------------------------------------------


def all_of(transform):
    """One compiled function of `transform` over every op, so that one compilation serves them all."""
    return torch.compile(lambda x: {name: transform(op)(x) for name, op in OPS.items()}, backend="eager", fullgraph=True)


def test_compiled_gradients():
    torch._dynamo.reset()
    x = torch.empty(4, 6).uniform_(0.2, 1.5)
    slopes = all_of(lambda op: torch.func.grad(lambda v: op(v).sum()))(x)
    for name, levels in (("dropout", (0.0, 2.0)), ("dropout1d", (0.0, 2.0)), ("drop_path", (0.0, 2.0)),
                         ("dropout_add", (3.0, 5.0)), ("add_noise", (1.0,))):  # fmt: skip
        assert set(slopes[name].unique().tolist()) <= set(levels), name
    assert len(slopes["dropout"].unique()) == 2


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_vmap_and_per_sample_gradients(randomness):
    torch._dynamo.reset()
    weight, x = torch.ones(200), torch.empty(5, 200).uniform_(0.2, 1.5)

    def loss(weight, sample):
        return ev.dropout(weight * sample, 0.5).sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness=randomness)
    slopes = torch.compile(per_sample, backend="aot_eager", fullgraph=True)(weight, x)
    masks = (slopes / x).round()
    assert torch.allclose(slopes, masks * x) and set(masks.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(m.tolist()) for m in masks}) == (1 if randomness == "same" else 5)


def test_compiled_vmap_asks_for_randomness():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="randomness error mode"):
        torch.compile(torch.vmap(OPS["dropout"]), backend="eager", fullgraph=True)(torch.ones(3, 5))


def test_compiled_hessian():
    torch._dynamo.reset()
    hessian = torch.func.jacfwd(torch.func.jacrev(lambda v: (ev.dropout(v, 0.5) ** 3).sum()), randomness="same")
    found = torch.compile(hessian, backend="eager", fullgraph=True)(torch.ones(40))
    diagonal = found.diagonal()
    assert torch.equal(found, torch.diag(diagonal)) and set(diagonal.tolist()) == {0.0, 48.0}
