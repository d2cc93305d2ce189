"""Ops at the level of users: values, gradients, functorch, forward-mode AD, checkpointing, compilation, edges."""

import copy
import itertools
import math
import warnings

import noise_checks
import numpy as np
import pytest
import torch
from noise_checks import as_numpy, same_bits
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import everett_cuda as ev
from everett_cuda import _C, keys
from everett_cuda.reference import keepdrop, layout

ALPHA_SIGMAS = 4.9  # two-sided alpha of 1e-6 for a statistic that is normal under the law
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@pytest.fixture(autouse=True)
def source():
    """A simulated source, open for one test; every test begins in a step of its own."""
    ev.set_freshness("op")
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    yield opened
    ev.close()


def record_of_next_draw():
    return noise_checks.record_of_next_draw(world=False)


# --- exactness: the op is the reference under the record of its draw --------------------------------------------------


def test_dropout_is_the_reference():
    for dtype, p, stream in itertools.product(DTYPES, (1e-3, 0.1, 0.5, 0.99), ("chacha8", "chacha12", "chacha20", "philox")):
        x = torch.randn(7, 33).to(dtype).requires_grad_()
        record = record_of_next_draw()
        y = ev.dropout(x, p, stream=stream)
        e = np.arange(x.numel()).reshape(x.shape)
        assert same_bits(y, keepdrop.dropout(as_numpy(x), record, p, e, NAMES[dtype], stream))
        grad = torch.randn(7, 33).to(dtype)
        y.backward(grad)
        assert same_bits(x.grad, keepdrop.dropout(as_numpy(grad), record, p, e, NAMES[dtype], stream))


def test_dropout_add_is_the_reference():
    for dtype, p in itertools.product(DTYPES, (1e-3, 0.1, 0.5)):
        x, residual = (torch.randn(5, 41).to(dtype).requires_grad_() for _ in range(2))
        record = record_of_next_draw()
        y = ev.dropout_add(x, residual, p)
        e = np.arange(x.numel()).reshape(x.shape)
        assert same_bits(y, keepdrop.dropout_add(as_numpy(x), as_numpy(residual), record, p, e, NAMES[dtype]))
        grad = torch.randn(5, 41).to(dtype)
        y.backward(grad)
        assert same_bits(x.grad, keepdrop.dropout(as_numpy(grad), record, p, e, NAMES[dtype]))
        assert torch.equal(residual.grad, grad)


def test_memory_layout_does_not_matter():
    base = torch.randn(4, 6, 10, 8)
    views = {
        "transposed": base.permute(3, 1, 0, 2),
        "stepped": base[:, ::2, 1:, ::3],
        "expanded": base[:, :1].expand(4, 6, 10, 8),
        "expanded scalar": torch.ones(()).expand(50, 7),
        "channels last": base.contiguous(memory_format=torch.channels_last),
    }
    for name, x in views.items():
        for residual in (None, torch.randn(x.shape), torch.randn(x.shape[::-1]).permute(*range(x.dim())[::-1])):
            record = record_of_next_draw()
            y = ev.dropout(x, 0.3) if residual is None else ev.dropout_add(x, residual, 0.3)
            e = layout.logical_indices(tuple(x.shape))
            if residual is None:
                expected = keepdrop.dropout(as_numpy(x), record, 0.3, e)
            else:
                expected = keepdrop.dropout_add(as_numpy(x), as_numpy(residual), record, 0.3, e)
            assert same_bits(y, expected), name
            assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("op,shape,decided", [
    (ev.dropout1d, (5, 8, 9), 2), (ev.dropout1d, (8, 9), 1), (ev.dropout2d, (5, 8, 3, 4), 2), (ev.dropout2d, (8, 3, 4), 1),
    (ev.dropout3d, (5, 8, 2, 3, 4), 2), (ev.dropout3d, (8, 2, 3, 4), 1), (ev.drop_path, (40, 3, 4), 1),
    (ev.drop_path, (40,), 1),
])  # fmt: skip
def test_one_decision_a_channel_or_sample(op, shape, decided):
    strides = layout.row_major(shape[:decided]) + (0,) * (len(shape) - decided)
    for x in (torch.randn(shape), torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])):
        x.requires_grad_()
        record = record_of_next_draw()
        y = op(x, 0.4)
        e = layout.logical_indices(shape, 0, strides)
        assert same_bits(y, keepdrop.dropout(as_numpy(x), record, 0.4, e))
        grad = torch.randn(shape)
        y.backward(grad)
        assert same_bits(x.grad, keepdrop.dropout(as_numpy(grad), record, 0.4, e))


def test_alpha_dropout_is_torchs_formula():
    for dtype, p in itertools.product(DTYPES, (0.05, 0.5, 0.9)):
        alpha = 1.7580993408473766
        a = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))  # as ATen's _alpha_dropout computes it
        shift = alpha * a * p
        affine = (a, shift, -alpha * a + shift)
        x = torch.randn(6, 70).to(dtype).requires_grad_()
        record = record_of_next_draw()
        y = ev.alpha_dropout(x, p)
        e = np.arange(x.numel()).reshape(x.shape)
        expected = keepdrop.affine_dropout(as_numpy(x), record, p, e, affine, NAMES[dtype])
        expected = torch.from_numpy(expected).view(torch.bfloat16) if dtype == torch.bfloat16 else torch.from_numpy(expected)
        # The three numbers may differ in the last bit of fp64, by the order of operations.
        tolerance = {torch.float32: 2e-7, torch.float64: 1e-15}.get(dtype, 0)
        assert torch.allclose(y.detach(), expected, rtol=tolerance, atol=tolerance)
        y.sum().backward()
        keep = torch.from_numpy(keepdrop.keep_mask(record, p, e))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = torch.where(keep, torch.tensor(a, dtype=wide), torch.tensor(0.0, dtype=wide)).to(dtype)
        assert torch.allclose(x.grad, scale, rtol=tolerance, atol=0)


def test_alpha_dropout_keeps_mean_and_variance():
    n = 1 << 18
    x = ev.randn(n, dtype=torch.float64)
    y = ev.alpha_dropout(x, 0.3)
    assert abs(y.mean()) < ALPHA_SIGMAS / n**0.5
    # Its fourth moment is below the normal's 3, so the normal's bound serves for the variance.
    assert abs(y.var() - 1) < ALPHA_SIGMAS * (2 / n) ** 0.5
    plain = ev.dropout(x, 0.3)
    assert abs(plain.var() - 1) > ALPHA_SIGMAS * (2 / n) ** 0.5, "negative control: dropout itself does not keep it"


def test_the_record_of_an_op_depends_on_nothing_but_key_and_rng_state():
    x = torch.randn(50_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record_of_next_draw()
        y = ev.dropout(x, 0.3)
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                torch.manual_seed(99)
                assert torch.equal(ev.dropout(x, 0.3), y)
            finally:
                torch.set_num_threads(before)
        for isa in _C.instruction_sets():
            default = _C.instruction_set()
            _C.use_instruction_set(isa)
            torch.manual_seed(99)
            again = ev.dropout(x, 0.3)
            _C.use_instruction_set(default)
            assert torch.equal(again, y), isa


# --- freshness and torch's generator ----------------------------------------------------------------------------------


def test_two_calls_differ_and_equal_states_repeat_within_a_step():
    x = torch.ones(4096)
    a, b = ev.dropout(x), ev.dropout(x)
    assert 1800 < (a != b).sum() < 2300
    state = torch.get_rng_state()
    c = ev.dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(ev.dropout(x), c)
    assert keys.counters()["reused"] == 1
    ev.step()
    torch.set_rng_state(state)
    assert not torch.equal(ev.dropout(x), c), "after a step the same state finds another key"


def test_inference_mode_is_always_fresh():
    x = torch.ones(4096)
    with torch.inference_mode():
        torch.manual_seed(5)
        a = ev.dropout(x)
        torch.manual_seed(5)
        b = ev.dropout(x)
        assert a.is_inference() and not torch.equal(a, b)
    inside = torch.inference_mode()(lambda: torch.ones(4096))()
    assert set(ev.dropout(inside).tolist()) == {0.0, 2.0}


def test_another_source_gives_other_masks():
    x = torch.ones(4096)
    torch.manual_seed(0)
    a = ev.dropout(x)
    ev.open("sim:seed=8")
    torch.manual_seed(0)
    b = ev.dropout(x)
    assert 1800 < (a != b).sum() < 2300


@pytest.mark.parametrize("call", [
    lambda: ev.dropout(torch.ones(100_000)),
    lambda: ev.dropout_add(torch.ones(3, 3), torch.ones(3, 3)),
    lambda: ev.dropout2d(torch.ones(2, 3, 4, 5)),
    lambda: ev.alpha_dropout(torch.ones(9)),
    lambda: ev.randn(1001),
    lambda: ev.bernoulli(torch.rand(7, generator=torch.Generator())),
    lambda: ev.dropout(torch.ones(5, requires_grad=True)).sum().backward(),
    lambda: torch.vmap(ev.dropout, randomness="same")(torch.ones(4, 5)),
])  # fmt: skip
def test_an_op_takes_one_nonce_from_torchs_generator(call):
    torch.manual_seed(3)
    torch.empty(2, dtype=torch.int64).random_(-(2**63), None)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    call()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("call", [
    lambda: ev.dropout(torch.ones(5), 0.0),
    lambda: ev.dropout(torch.ones(5), 1.0),
    lambda: ev.dropout(torch.ones(5), training=False),
    lambda: ev.dropout(torch.ones(0, 3)),
    lambda: ev.dropout(torch.ones(5, device="meta")),
    lambda: ev.rand(0),
    lambda: ev.rand(5, freshness="direct"),
])  # fmt: skip
def test_what_needs_no_draw_takes_none(call):
    state, draws = torch.get_rng_state(), keys.counters()["draws"]
    call()
    assert torch.equal(torch.get_rng_state(), state)
    assert keys.counters()["draws"] == draws


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1e-4, 1 / 256, 0.1, 0.5, 0.98])
def test_drop_rate(p):
    n = 1 << 20
    dropped = float((ev.dropout(torch.ones(n), p) == 0).sum())
    sigma = (n * p * (1 - p)) ** 0.5
    assert abs(dropped - n * p) < ALPHA_SIGMAS * sigma
    # Negative control: the same bound refuses a rate that is off by 10 sigma.
    assert abs(dropped - (n * p + 10 * sigma)) > ALPHA_SIGMAS * sigma


# --- gradients --------------------------------------------------------------------------------------------------------


class _Fixed:
    """An op that gives the same mask at every call: the RNG state of its first call, in one step."""

    def __init__(self, op):
        self.op = op
        self.state = torch.get_rng_state()

    def __call__(self, *args):
        torch.set_rng_state(self.state)
        return self.op(*args)


OPS = {
    "dropout": lambda x: ev.dropout(x, 0.4),
    "dropout, philox": lambda x: ev.dropout(x, 0.4, stream="philox"),
    "alpha_dropout": lambda x: ev.alpha_dropout(x, 0.4),
    "dropout1d": lambda x: ev.dropout1d(x, 0.4),
    "drop_path": lambda x: ev.drop_path(x, 0.4),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_gradcheck(op):
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    transposed = torch.randn(2, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    for t in (x, transposed):
        assert gradcheck(_Fixed(op), (t,), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(_Fixed(lambda v: op(v) ** 2), (t,))
    # Negative control: with a fresh mask at each call the numeric gradient is that of noise.
    with pytest.raises(Exception, match="not reentrant|Jacobian mismatch"):
        gradcheck(op, (x,))


def test_gradcheck_of_dropout_add():
    x, residual = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    op = _Fixed(lambda a, b: ev.dropout_add(a, b, 0.4))
    assert gradcheck(op, (x, residual), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(_Fixed(lambda a, b: ev.dropout_add(a, b, 0.4) ** 3), (x, residual))


@pytest.mark.parametrize("x_asks,residual_asks", itertools.product((False, True), repeat=2))
def test_dropout_add_gives_the_gradients_that_are_asked_for(x_asks, residual_asks):
    x = torch.randn(50, requires_grad=x_asks)
    residual = torch.randn(50, requires_grad=residual_asks)
    y = ev.dropout_add(x, residual, 0.5)
    assert y.requires_grad == (x_asks or residual_asks)
    if not y.requires_grad:
        return
    grad = torch.randn(50)
    y.backward(grad)
    kept = (y - residual).detach().abs() > 0
    assert (x.grad is None) == (not x_asks) and (residual.grad is None) == (not residual_asks)
    if x_asks:
        assert torch.equal(x.grad, torch.where(kept, grad * 2, 0.0))
    if residual_asks:
        assert torch.equal(residual.grad, grad)


def test_one_tensor_as_x_and_residual():
    x = torch.randn(1000, requires_grad=True)
    y = ev.dropout_add(x, x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y.detach() == x.detach(), 1.0, 3.0))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_mask_in_backward_is_the_mask_in_forward(op):
    x = torch.randn(40, 6, 50, requires_grad=True)
    y = op(x)
    for make in (torch.ones_like, torch.randn_like):
        grad = make(x)
        (g,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        slope = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
        assert torch.equal(slope != 0, g != 0)
        assert torch.allclose(g, slope * grad)
        # Every stride of the incoming gradient.
        strided = grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        assert torch.equal(torch.autograd.grad(y, x, strided, retain_graph=True)[0], g)
    expanded = torch.autograd.grad(y, x, torch.ones(()).expand(y.shape), retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0])
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], expanded)


def test_gradients_of_strided_and_expanded_input():
    base = torch.randn(1, 70, requires_grad=True)
    y = ev.dropout(base.expand(60, 70), 0.5)
    y.sum().backward()
    assert torch.equal(base.grad, 2 * (y != 0).float().sum(0, keepdim=True))
    wide = torch.randn(60, 70, requires_grad=True)
    y = ev.dropout(wide.t()[::3, 5:], 0.5)
    y.sum().backward()
    expected = torch.zeros(60, 70)
    expected.t()[::3, 5:] = 2 * (y != 0).float()
    assert torch.equal(wide.grad, expected)


def test_double_backward():
    x = torch.randn(200, requires_grad=True)
    y = ev.dropout(x, 0.5)
    mask = (y != 0).float() * 2
    (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    assert torch.allclose(g, 3 * mask * (mask * x) ** 2)
    g.sum().backward()
    assert torch.allclose(x.grad, 6 * mask**2 * (mask * x).detach())


def test_backward_twice_and_hooks():
    x = torch.randn(100, requires_grad=True)
    y = ev.dropout(x)
    seen = []
    y.register_hook(lambda g: seen.append(g.clone()))
    a = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    b = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(a, b) and len(seen) == 2


# --- functorch and forward-mode AD ------------------------------------------------------------------------------------


def _kept(y):
    return y != 0


def test_vmap_randomness():
    x = torch.ones(6, 500)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(ev.dropout)(x)
    same = torch.vmap(ev.dropout, randomness="same")(x)
    assert all(torch.equal(row, same[0]) for row in same) and set(same.unique().tolist()) == {0.0, 2.0}
    different = torch.vmap(ev.dropout, randomness="different")(x)
    for a, b in itertools.combinations(different, 2):
        assert 150 < (a != b).sum() < 350
    assert set(different.unique().tolist()) == {0.0, 2.0}


def test_vmap_same_is_the_mask_of_one_row():
    x = torch.randn(3, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = record_of_next_draw()
        y = torch.vmap(lambda row: ev.dropout(row, 0.3), randomness="same")(x)
    assert same_bits(y, keepdrop.dropout(as_numpy(x), record, 0.3, np.tile(np.arange(70), (3, 1))))


def test_vmap_in_dims():
    x = torch.randn(50, 4, 30)
    for dim, randomness in itertools.product(range(3), ("same", "different")):
        y = torch.vmap(lambda row: ev.dropout(row, 0.5), in_dims=dim, out_dims=dim, randomness=randomness)(x)
        assert torch.equal(y, torch.where(_kept(y), 2 * x, 0.0))
        rows = _kept(y).unbind(dim)
        assert all(torch.equal(r, rows[0]) for r in rows) == (randomness == "same")
    # An input that is not batched, beside one that is.
    residual = torch.randn(8)
    y = torch.vmap(lambda r: ev.dropout_add(torch.ones(8), r, 0.5), randomness="different")(residual.expand(100, 8))
    assert set((y - residual).round().unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in y}) > 50
    y = torch.vmap(lambda v: ev.dropout_add(v, residual, 0.5), randomness="same")(torch.ones(5, 8))
    assert all(torch.equal(row, y[0]) for row in y)


@pytest.mark.parametrize("inner,outer", itertools.product(("same", "different"), repeat=2))
def test_nested_vmap(inner, outer):
    x = torch.ones(4, 5, 300)
    y = torch.vmap(torch.vmap(ev.dropout, randomness=inner), randomness=outer)(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    rows = {(i, j): y[i, j] for i in range(4) for j in range(5)}
    for (a, row_a), (b, row_b) in itertools.combinations(rows.items(), 2):
        # torch's own random ops: randomness of a level says whether masks repeat along it.
        repeats = (a[0] == b[0] or outer == "same") and (a[1] == b[1] or inner == "same")
        assert torch.equal(row_a, row_b) == repeats, (a, b)


def test_vmap_of_channel_dropout():
    x = torch.ones(5, 6, 40, 3, 3)
    for randomness in ("same", "different"):
        y = torch.vmap(ev.dropout2d, randomness=randomness)(x)
        assert torch.equal(y, y[..., :1, :1].expand_as(y)), "one decision a channel"
        assert (len({tuple(s.flatten().tolist()) for s in y}) == 1) == (randomness == "same")


def test_functorch_derivatives():
    x = torch.randn(30)
    state = torch.get_rng_state()

    def f(v):
        return ev.dropout(v, 0.5)

    def at_state(transform, *args):
        torch.set_rng_state(state)
        return transform(*args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = 2.0 * _kept(at_state(f, x))
        assert torch.equal(at_state(torch.func.grad(lambda v: f(v).sum()), x), mask)
        assert torch.equal(at_state(torch.func.jacrev(f), x), torch.diag(mask))
        assert torch.equal(at_state(torch.func.jacfwd(f, randomness="same"), x), torch.diag(mask))
        value, tangent = at_state(lambda: torch.func.jvp(f, (x,), (x + 1,)))
        assert torch.equal(value, mask * x) and torch.equal(tangent, mask * (x + 1))
        value, pull = at_state(lambda: torch.func.vjp(f, x))
        assert torch.equal(value, mask * x) and torch.equal(pull(x)[0], mask * x)
        cube = torch.func.jacfwd(torch.func.jacrev(lambda v: (f(v) ** 3).sum()), randomness="same")
        assert torch.allclose(at_state(cube, x), torch.diag(6 * mask**3 * x))
        assert torch.allclose(at_state(torch.func.grad(torch.func.grad(lambda v: (f(v) ** 3).sum())), x[:1]),
                              6 * mask[:1] ** 3 * x[:1]) if mask[0] else True  # fmt: skip


def test_hessian_asks_for_randomness_as_torchs_dropout_does():
    for dropout in (ev.dropout, torch.nn.functional.dropout):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.hessian(lambda v, dropout=dropout: (dropout(v) ** 2).sum())(torch.ones(4))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_per_sample_gradients(randomness):
    w = torch.randn(40)
    x = torch.randn(8, 40)

    def loss(weight, sample):
        return (ev.dropout(weight * sample, 0.5)).sum()

    grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness=randomness)(w, x)
    masks = grads / (2 * x)
    assert torch.allclose(masks, masks.round()) and set(masks.round().unique().tolist()) == {0.0, 1.0}
    assert (len({tuple(m.round().tolist()) for m in masks}) == 1) == (randomness == "same")


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradient_through_vmap(randomness):
    x = torch.randn(5, 60, requires_grad=True)
    residual = torch.randn(60, requires_grad=True)
    y = torch.vmap(lambda v: ev.dropout_add(v, residual, 0.5), randomness=randomness)(x)
    grad = torch.randn(5, 60)
    y.backward(grad)
    mask = 2.0 * _kept((y - residual).detach().abs() > 1e-6)
    assert torch.allclose(x.grad, mask * grad) and torch.allclose(residual.grad, grad.sum(0))


def test_forward_mode():
    x, residual, t, u = (torch.randn(300) for _ in range(4))
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(ev.dropout(forward_ad.make_dual(x, t), 0.5))
        assert torch.equal(dy, torch.where(_kept(y), 2 * t, 0.0))
        y, dy = forward_ad.unpack_dual(ev.alpha_dropout(forward_ad.make_dual(x, t), 0.5))
        assert len((dy / t).unique().round(decimals=3).unique()) == 2
        for a, b in itertools.product((x, forward_ad.make_dual(x, t)), (residual, forward_ad.make_dual(residual, u))):
            y, dy = forward_ad.unpack_dual(ev.dropout_add(a, b, 0.5))
            mask = 2.0 * ((y - residual).abs() > 1e-6)
            expected = (mask * t if a is not x else 0) + (u if b is not residual else 0)
            if a is x and b is residual:
                assert dy is None
            else:
                assert torch.allclose(dy, expected, atol=1e-6)


def test_forward_over_reverse():
    x, v = torch.randn(50, requires_grad=True), torch.randn(50)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        y = ev.dropout(dual, 0.5)
        (g,) = torch.autograd.grad((y**3).sum(), dual, create_graph=True)
        g, dg = forward_ad.unpack_dual(g)
    mask = 2.0 * _kept(y)
    assert torch.allclose(g, 3 * mask**3 * x**2) and torch.allclose(dg, 6 * mask**3 * x * v)


# --- checkpointing, autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    x = torch.randn(30, 40, requires_grad=True)
    w = torch.randn(40, 40, requires_grad=True)
    masks = []

    def block(v):
        y = ev.dropout(v @ w, 0.5)
        masks.append(_kept(y).detach())
        return ev.dropout_add(y, v, 0.3)

    # Left alone, a non-reentrant recomputation would end at the product: our ops save no tensor that it must make again.
    with set_checkpoint_early_stop(False):
        out = checkpoint(block, x, use_reentrant=reentrant)
    ev.dropout(torch.ones(5))  # draws in between do not matter
    out.pow(2).sum().backward()
    assert len(masks) == 2 and torch.equal(*masks), "the recomputation saw the mask of its forward"
    assert keys.counters()["replayed"] + keys.counters()["reused"] >= 2
    got = x.grad, w.grad
    # The same function with both masks read off the forward.
    outer = (out - x).detach() != 0
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = (x2 @ w2) * masks[0] * 2
    same = torch.where(outer, y / 0.7, 0.0) + x2
    same.pow(2).sum().backward()
    assert torch.allclose(same, out, rtol=1e-4, atol=1e-4)
    assert torch.allclose(got[0], x2.grad, rtol=1e-3, atol=1e-2) and torch.allclose(got[1], w2.grad, rtol=1e-3, atol=1e-2)


def test_autocast():
    x = torch.randn(20, 30, requires_grad=True)
    w = torch.randn(30, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = x @ w
        y = ev.dropout(h, 0.5)
        z = ev.dropout(x, 0.5)
    assert y.dtype == torch.bfloat16 and z.dtype == torch.float32
    y.float().sum().backward()
    assert torch.allclose(x.grad, 2 * _kept(y).float() @ w.t(), rtol=0.02, atol=0.1)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_p_zero_and_not_training_return_x():
    x = torch.randn(5, requires_grad=True)
    assert ev.dropout(x, 0.0) is x and ev.dropout(x, 2.0**-49) is x
    assert ev.dropout(x, 0.5, training=False) is x and ev.dropout(x, 0.5, False, True) is x
    assert ev.alpha_dropout(x, 0.0) is x and ev.drop_path(x, 0.0) is x
    r = torch.randn(5)
    assert torch.equal(ev.dropout_add(x, r, 0.0), x + r) and torch.equal(ev.dropout_add(x, r, 0.5, False), x + r)


@pytest.mark.parametrize("p", [1.0, 1 - 2.0**-53])
def test_p_one_gives_plus_zero_and_zero_gradients(p):
    special = torch.tensor([1.0, -1.0, -0.0, math.inf, -math.inf, math.nan] * 20)
    for dtype in DTYPES:
        x = special.to(dtype).requires_grad_()
        for op in (ev.dropout, ev.drop_path) if p < 1 else (ev.dropout, ev.drop_path, ev.alpha_dropout):
            y = op(x, p)
            assert as_numpy(y).tobytes() == bytes(y.numel() * y.element_size())
            (g,) = torch.autograd.grad(y, x, special.to(dtype))
            assert as_numpy(g).tobytes() == bytes(g.numel() * g.element_size())
    residual = torch.randn(120)
    assert torch.equal(ev.dropout_add(special, residual, p), residual)


def test_dropped_inf_and_nan_are_plus_zero():
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0] * 100, requires_grad=True)
    y = ev.dropout(x, 0.5)
    dropped = torch.autograd.grad(y, x, torch.ones(400), retain_graph=True)[0] == 0
    assert 100 < dropped.sum() < 300
    assert as_numpy(y)[dropped.numpy()].tobytes() == bytes(4 * int(dropped.sum()))
    (g,) = torch.autograd.grad(y, x, torch.full((400,), math.nan))
    assert torch.equal(g.isnan(), ~dropped)


def test_inplace():
    x = torch.randn(1000)
    before, pointer, version = x.clone(), x.data_ptr(), x._version
    y = ev.dropout(x, 0.5, inplace=True)
    assert y is x and x.data_ptr() == pointer and x._version == version + 1
    assert torch.equal(x, torch.where(_kept(x), 2 * before, 0.0)) and 400 < _kept(x).sum() < 600
    # In the graph.
    leaf = torch.randn(1000, requires_grad=True)
    h = leaf * 3
    ev.dropout(h, 0.5, inplace=True)
    h.sum().backward()
    assert torch.equal(leaf.grad, 6.0 * _kept(h.detach()))


def test_inplace_on_a_view_and_strided():
    x = torch.randn(40, 30)
    before = x.clone()
    ev.dropout(x[::2, 3:9], 0.5, inplace=True)
    touched = torch.zeros(40, 30, dtype=torch.bool)
    touched[::2, 3:9] = True
    assert torch.equal(x[~touched], before[~touched])
    assert set((x[touched] / before[touched]).round(decimals=3).unique().tolist()) == {0.0, 2.0}
    base = torch.randn(6, 50, requires_grad=True)
    h = base * 1
    ev.dropout(h[2], 0.5, inplace=True)
    h.sum().backward()
    assert torch.equal(base.grad[2], 2.0 * _kept(h[2].detach())) and torch.equal(base.grad[3], torch.ones(50))


def test_inplace_of_a_leaf_is_refused_and_changes_nothing():
    leaf = torch.randn(100, requires_grad=True)
    before, version = leaf.detach().clone(), leaf._version
    for op in (ev.dropout, ev.alpha_dropout):
        with pytest.raises(RuntimeError, match="leaf"):
            op(leaf, 0.5, inplace=True)
    assert torch.equal(leaf.detach(), before) and leaf._version == version


def test_inplace_on_what_a_backward_needs_is_noticed():
    x = torch.randn(100, requires_grad=True)
    h = x.exp()  # exp's backward needs its result
    ev.dropout(h, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_meta_tensors():
    x = torch.ones(3, 4, 5, 6, device="meta", requires_grad=True)
    for y in (ev.dropout(x), ev.dropout2d(x), ev.alpha_dropout(x), ev.drop_path(x), ev.dropout_add(x, x)):
        assert y.is_meta and y.shape == x.shape and y.dtype == x.dtype and y.requires_grad
    assert ev.dropout(torch.ones(3, 4, 5, 6, device="meta").permute(3, 1, 2, 0)).stride() == (1, 30, 6, 120)


def test_shapes_without_elements_or_dimensions():
    assert ev.dropout(torch.ones(0, 3, requires_grad=True)).shape == (0, 3)
    values = {ev.dropout(torch.tensor(3.0)).item() for _ in range(60)}
    assert values == {0.0, 6.0}
    x = torch.tensor(3.0, requires_grad=True)
    y = ev.dropout(x)
    y.backward()
    assert x.grad.item() == y.item() / 3
    assert ev.dropout_add(torch.ones(()), torch.ones(()), 0.5).item() in (1.0, 3.0)


def test_lazily_negated_views():
    z = torch.complex(torch.zeros(500), torch.ones(500))
    negated = z.conj().imag
    assert negated.is_neg()
    assert set(ev.dropout(negated).unique().tolist()) == {0.0, -2.0}
    assert set(ev.dropout_add(torch.zeros(500), negated).unique().tolist()) == {-1.0}
    x = torch.randn(500, requires_grad=True)
    y = ev.dropout(x)
    y.backward(negated)
    assert torch.equal(x.grad, -2.0 * _kept(y.detach()))


def test_subclasses_and_parameters():
    class Tagged(torch.Tensor):
        pass

    y = ev.dropout(torch.ones(500).as_subclass(Tagged))
    assert set(torch.Tensor(y).unique().tolist()) == {0.0, 2.0} and type(y) is Tagged
    p = torch.nn.Parameter(torch.ones(500))
    ev.dropout(p).sum().backward()
    assert set(p.grad.unique().tolist()) == {0.0, 2.0}


def test_threads_draw_side_by_side():
    import threading

    masks, errors = [], []

    def work():
        try:
            x = torch.ones(40_000, requires_grad=True)
            for _ in range(10):
                y = ev.dropout(x)
                (g,) = torch.autograd.grad(y.sum(), x)
                assert torch.equal(g, y.detach())
                masks.append(tuple(y[:200].tolist()))
        except BaseException as error:
            errors.append(error)

    team = [threading.Thread(target=work) for _ in range(4)]
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert not errors and len(set(masks)) == 40


def test_results_do_not_alias_and_can_be_copied():
    x = torch.randn(10)
    y = ev.dropout(x)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(copy.deepcopy(y), y)
