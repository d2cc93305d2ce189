"""Fused ops on torch: masks, values and gradients against the unfused ops under the same torch RNG state."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import everett_cuda as ev
from everett_cuda import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def keys(freshness):
    """Every test runs under both freshnesses."""


def _tensors(dtype, *shapes):
    torch.manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _twice(seed, first, second):
    """Both under the same nonce, and so the same mask."""
    torch.manual_seed(seed)
    a = first()
    torch.manual_seed(seed)
    return a, second()


def _close(a, b, dtype):
    assert torch.allclose(a.double(), b.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]), (a - b).abs().max()


def _compare(dtype, inputs, fused, steps):
    a, b = _twice(5, lambda: fused(*inputs), lambda: steps(*inputs))
    _close(a, b, dtype)
    weight = torch.linspace(-1, 1, a.numel(), dtype=torch.float64).reshape(a.shape).to(dtype)
    for ours, theirs in zip(
        torch.autograd.grad((a * weight).sum(), inputs), torch.autograd.grad((b * weight).sum(), inputs), strict=True
    ):
        _close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_bias_dropout_add_is_dropout_add_of_the_sum(dtype, p):
    inputs = _tensors(dtype, (6, 5, 33), (33,), (6, 5, 33))
    _compare(
        dtype,
        inputs,
        lambda x, b, r: ev.bias_dropout_add(x, b, r, p),
        lambda x, b, r: ev.dropout_add((x.double() + b.double()).to(dtype), r, p),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_dropout_is_dropout_of_gelu(dtype, approximate):
    inputs = _tensors(dtype, (7, 65), (65,))
    _compare(
        dtype,
        inputs,
        lambda x, b: ev.bias_gelu_dropout(x, b, 0.25, approximate=approximate),
        lambda x, b: ev.dropout(F.gelu(x + b, approximate=approximate), 0.25),
    )


def test_without_a_bias_and_on_strided_input():
    x, r = (t.detach().T.requires_grad_() for t in _tensors(torch.float32, (40, 30), (40, 30)))
    _compare(
        torch.float32, (x, r), lambda x, r: ev.bias_dropout_add(x, None, r, 0.3), lambda x, r: ev.dropout_add(x, r, 0.3)
    )
    _compare(
        torch.float32, (x,), lambda x: ev.bias_gelu_dropout(x, p=0.3), lambda x: ev.dropout(F.gelu(x), 0.3)
    )


def test_evaluation_and_the_ends_of_p_need_no_draw():
    x, b, r = _tensors(torch.float32, (4, 8), (8,), (4, 8))
    before = ev.status().draws
    assert torch.equal(ev.bias_dropout_add(x, b, r, 0.5, training=False), x + b + r)
    assert torch.equal(ev.bias_gelu_dropout(x, b, 0.5, training=False), F.gelu(x + b))
    assert torch.equal(ev.bias_dropout_add(x, b, r, 0.0), x + b + r)
    assert torch.equal(ev.bias_gelu_dropout(x, b, 1.0), torch.zeros_like(x))
    assert ev.add_noise(torch.empty(0), 1.0).shape == ev.stochastic_round(torch.empty(0), torch.bfloat16).shape == (0,)
    assert ev.status().draws == before


def test_only_the_gradients_that_are_asked_for_are_made():
    x, b, r = _tensors(torch.float32, (4, 8), (8,), (4, 8))
    ev.bias_dropout_add(x.detach(), b, r.detach(), 0.5).sum().backward()
    assert x.grad is None and r.grad is None and b.grad is not None
    ev.bias_gelu_dropout(x, b.detach(), 0.5).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_those_of_the_forward(use_reentrant):
    x, b, r = _tensors(torch.float32, (16, 64), (64,), (16, 64))

    def block(x, b, r):
        return ev.bias_dropout_add(ev.bias_gelu_dropout(x, b, 0.2), b, r, 0.2)

    plain, checkpointed = _twice(
        9, lambda: block(x, b, r), lambda: checkpoint(block, x, b, r, use_reentrant=use_reentrant)
    )
    assert torch.equal(plain, checkpointed)
    for ours, theirs in zip(
        torch.autograd.grad(plain.sum(), (x, b, r)), _grads_by_backward(checkpointed, (x, b, r)), strict=True
    ):
        assert torch.equal(ours, theirs)


def _grads_by_backward(y, inputs):
    y.sum().backward()
    return [t.grad for t in inputs]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_second_derivatives_are_gelus(approximate):
    (x,) = _tensors(torch.float32, (5, 16))

    def slope(y):
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    ours, theirs = _twice(
        4,
        lambda: slope(ev.bias_gelu_dropout(x, None, 0.3, approximate=approximate)),
        lambda: slope(ev.dropout(F.gelu(x, approximate=approximate), 0.3)),
    )
    _close(ours, theirs, torch.float32)
    _close(*(torch.autograd.grad((s * s).sum(), x)[0] for s in (ours, theirs)), torch.float32)


def test_vmap_and_grad_go_step_by_step():
    x, b, r = (t.detach() for t in _tensors(torch.float32, (3, 6, 8), (8,), (3, 6, 8)))
    batched = torch.vmap(lambda x, r: ev.bias_dropout_add(x, b, r, 0.5), randomness="different")(x, r)
    assert batched.shape == x.shape and not torch.equal(batched[0] == r[0], batched[1] == r[1])
    slope = torch.func.grad(lambda x: ev.bias_gelu_dropout(x, b, 0.5).sum())(x)
    assert ((slope == 0).float().mean() - 0.5).abs() < 0.2


# --- noise and rounding ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise_adds_the_normals_of_randn(dtype):
    (x,) = _tensors(dtype, (20, 31))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    normals = kernels.Fill("normal", tuple(x.shape), work, 0)
    y, n = _twice(6, lambda: ev.add_noise(x, 0.25), lambda: kernels.CPU.fill(kernels.CPU.draw(), normals, None))
    wanted = (x.to(work) + 0.25 * n).to(dtype)
    assert torch.equal(y, wanted)
    (grad,) = torch.autograd.grad((y * 3).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_differentiable(dtype):
    x = torch.full((200_000,), 1.0 + 2.0**-12, requires_grad=True)
    y = ev.stochastic_round(x, dtype)
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    assert y.dtype == dtype and set(y.unique().tolist()) == {1.0, 1.0 + step}
    share = 2.0**-12 / step
    deviation = (share * (1 - share) / len(x)) ** 0.5
    assert abs((y > 1).double().mean().item() - share) < 6 * deviation
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_wrong_arguments_are_named():
    x, b, r = (t.detach() for t in _tensors(torch.float32, (4, 8), (8,), (4, 8)))
    for wrong in (b[:4], b.double(), b[None]):
        with pytest.raises(ValueError, match="bias: one value a column"):
            ev.bias_gelu_dropout(x, wrong)
    with pytest.raises(ValueError, match="residual: must match x"):
        ev.bias_dropout_add(x, b, r[:2])
    with pytest.raises(ValueError, match='approximate: "none" or "tanh"'):
        ev.bias_gelu_dropout(x, approximate="sigmoid")
    for sigma in (-1.0, float("nan"), float("inf"), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="sigma: a finite number"):
            ev.add_noise(x, sigma)
    with pytest.raises(TypeError, match="x: a float32 tensor"):
        ev.stochastic_round(x.double(), torch.bfloat16)
    with pytest.raises(TypeError, match="torch.bfloat16 or torch.float16"):
        ev.stochastic_round(x, torch.float32)
