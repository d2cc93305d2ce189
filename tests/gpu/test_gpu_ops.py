"""Ops and noise on a real GPU at the level of users: equal to the CPU under the same record, gradients, checkpoints,
streams, devices, functorch; and what the host may and may not do."""

import itertools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import everett_cuda as ev
from everett_cuda import kernels, keys
from everett_cuda.kernels import Fill

pytest.importorskip("everett_cuda._cuda", reason="built without nvcc")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FP8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)]
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    yield opened
    ev.close()


def record_of_next_draw(seed=99):
    """The record that the next draw of this step will have: an equal RNG state finds the same key."""
    torch.cuda.manual_seed(seed)
    record = kernels.of_device(torch.device("cuda")).draw()
    torch.cuda.manual_seed(seed)
    return record


def on_the_cpu(record, op, *tensors):
    """The op on the CPU under a given record."""
    draw, draw_and_drop = kernels.CPU.draw, kernels.CPU.draw_and_drop
    kernels.CPU.draw = lambda: record
    kernels.CPU.draw_and_drop = lambda x, mask: (kernels.CPU.masked(x, None, record, mask), record)
    try:
        return op(*(t.detach().cpu().requires_grad_(t.requires_grad) for t in tensors))
    finally:
        kernels.CPU.draw, kernels.CPU.draw_and_drop = draw, draw_and_drop


def same_bits(a, b):
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


OPS = {
    "dropout": lambda x: ev.dropout(x, 0.3),
    "dropout, rare": lambda x: ev.dropout(x, 1e-3),
    "dropout philox": lambda x: ev.dropout(x, 0.3, stream="philox"),
    "dropout chacha12": lambda x: ev.dropout(x, 0.3, stream="chacha12"),
    "alpha_dropout": lambda x: ev.alpha_dropout(x, 0.3),
    "dropout2d": lambda x: ev.dropout2d(x, 0.3),
    "drop_path": lambda x: ev.drop_path(x, 0.3),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*DTYPES, *FP8])
def test_ops_and_gradients_are_the_cpus(op, dtype):
    base = torch.randn(12, 6, 35, 17, device="cuda").to(dtype)
    for x in (base, base.permute(3, 1, 0, 2), base[:, :, 3:, ::2], base[:1].expand(12, 6, 35, 17)):
        x = x.detach().requires_grad_()
        record = record_of_next_draw()
        y = OPS[op](x)
        expected = on_the_cpu(record, OPS[op], x)
        assert same_bits(y, expected) and y.device == x.device
        grad = torch.randn(y.shape).to(dtype)
        (ours,) = torch.autograd.grad(y, x, grad.cuda())
        assert same_bits(ours, on_the_cpu(record, lambda x, g=grad: torch.autograd.grad(OPS[op](x), x, g)[0], x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_add_is_the_cpus(dtype):
    x, r = (torch.randn(300, 77, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    record = record_of_next_draw()
    y = ev.dropout_add(x, r, 0.2)
    assert same_bits(y, on_the_cpu(record, lambda x, r: ev.dropout_add(x, r, 0.2), x, r))
    gx, gr = torch.autograd.grad(y, (x, r), torch.ones_like(y))
    assert torch.equal(gr, torch.ones_like(y))
    assert same_bits(gx, on_the_cpu(record, lambda x: ev.dropout(x, 0.2), torch.ones_like(x)))


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:])
@pytest.mark.parametrize("columns", [64, 77])
def test_fused_ops_are_the_cpus(dtype, columns):
    x, r = (torch.randn(100, columns, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    b = torch.randn(columns, device="cuda").to(dtype).requires_grad_()
    calls = [
        (lambda x, b, r: ev.bias_dropout_add(x, b, r, 0.2), (x, b, r)),
        (lambda x, b: ev.bias_gelu_dropout(x, b, 0.2), (x, b)),
        (lambda x, b: ev.bias_gelu_dropout(x, b, 0.2, approximate="tanh"), (x, b)),
        (lambda x: ev.add_noise(x, 0.7), (x,)),
    ]
    for op, tensors in calls:
        record = record_of_next_draw()
        y = op(*tensors)
        assert same_bits(y, on_the_cpu(record, op, *tensors))
        (gx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        expected = on_the_cpu(record, lambda *t, op=op: torch.autograd.grad(op(*t).sum(), t[0])[0], *tensors)
        assert same_bits(gx, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_cpus(dtype):
    x = torch.randn(70_001, device="cuda")
    record = record_of_next_draw()
    assert same_bits(ev.stochastic_round(x, dtype), on_the_cpu(record, lambda x: ev.stochastic_round(x, dtype), x))


@pytest.mark.parametrize("kind", ["words", "uniform", "normal", "exponential", "gumbel", "bernoulli"])
def test_noise_is_the_cpus(kind):
    for dtype in [torch.int32] if kind == "words" else DTYPES:
        for n in (1, 1023, 40_003):
            p = torch.rand(n, dtype=torch.float64) if kind == "bernoulli" else None
            record = record_of_next_draw()
            fill = Fill(kind, (n,), dtype, 0)
            gpu = kernels.of_device(torch.device("cuda")).fill(record, fill, None if p is None else p.cuda())
            assert same_bits(gpu, kernels.CPU.fill(record, fill, p)), (dtype, n)


def test_noise_functions_draw_from_the_gpus_generator():
    for call in (ev.rand, ev.randn, ev.exponential, ev.gumbel, ev.random_words):
        torch.cuda.manual_seed(3)
        before = torch.get_rng_state()
        a = call(4, 50, device="cuda")
        assert a.is_cuda and torch.equal(torch.get_rng_state(), before)
        assert torch.cuda.default_generators[0].get_offset() == 4
        b = call(4, 50, device="cuda")
        torch.cuda.manual_seed(3)
        assert torch.equal(call(4, 50, device="cuda"), a) and not torch.equal(a, b)
    p = torch.full((1000,), 0.25, device="cuda")
    assert 150 < ev.bernoulli(p).sum().item() < 350
    with pytest.raises(ValueError, match="from 0 to 1"):
        ev.bernoulli(p * 5)


def test_an_op_moves_torchs_generator_by_four_and_launches_no_random_kernel():
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    torch.cuda.manual_seed(5)
    x = torch.ones(100, device="cuda")
    ev.dropout(x, 0.5)
    ev.dropout(x, 0.5)
    assert (generator.initial_seed(), generator.get_offset()) == (5, 8)


@BOTH
@pytest.mark.parametrize("freshness", ["op", "step"])
def test_checkpoints_give_the_right_gradient(reentrant, freshness):
    """torch restores the CUDA RNG state for the recomputation, which so finds the key of its forward."""
    ev.set_freshness(freshness)

    def block(x):
        return torch.exp(ev.dropout(torch.sin(x), 0.5))

    for _ in range(3):
        x = (torch.rand(4096, device="cuda", dtype=torch.float64) + 0.5).requires_grad_()
        with set_checkpoint_early_stop(False):
            y = checkpoint(block, checkpoint(block, x, use_reentrant=reentrant), use_reentrant=reentrant)
        ev.step()
        ev.dropout(x.detach(), 0.5)
        y.sum().backward()
        # y = exp(m2 sin h), h = exp(m1 sin x), m1 and m2 from {0, 2}: y tells which they were
        z, y = x.detach(), y.detach()
        right = torch.zeros_like(z, dtype=torch.bool)
        for m1, m2 in itertools.product((0.0, 2.0), repeat=2):
            h = torch.exp(m1 * torch.sin(z))
            fits = torch.isclose(torch.log(y), m2 * torch.sin(h), atol=1e-12)
            grad = y * m2 * torch.cos(h) * h * m1 * torch.cos(z)
            right |= fits & torch.isclose(x.grad, grad, rtol=1e-9, atol=1e-9)
        assert right.all()
    assert keys.counters()["replayed"] >= 6


def test_backward_on_another_thread_and_stream():
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = ev.dropout(x, 0.5)
        grad = torch.ones_like(y)
    worker = threading.Thread(target=lambda: y.backward(grad))
    worker.start()
    worker.join()
    torch.cuda.synchronize()
    assert torch.equal(y.detach(), x.detach() * x.grad)


def test_streams_at_once():
    xs = [torch.full((3_000_001,), float(i + 1), device="cuda") for i in range(4)]
    streams = [torch.cuda.Stream() for _ in xs]
    results = []
    torch.cuda.synchronize()
    for x, s in zip(xs, streams, strict=True):
        with torch.cuda.stream(s):
            results.append(ev.dropout(x, 0.5))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert set(y.unique().tolist()) == {0.0, 2.0 * (i + 1)}
    masks = torch.stack([y != 0 for y in results])
    assert len({tuple(m.tolist()) for m in masks[:, :200]}) == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_keys_of_their_own():
    torch.manual_seed(0)
    a = ev.dropout(torch.ones(1000, device="cuda:0"), 0.5)
    b = ev.dropout(torch.ones(1000, device="cuda:1"), 0.5)
    assert b.device.index == 1 and not torch.equal(a.cpu(), b.cpu())
    with pytest.raises(ValueError, match="residual: must match x"):
        ev.dropout_add(a, b, 0.5)


def test_functorch_and_forward_mode():
    x = torch.randn(50, dtype=torch.float64, device="cuda")
    rows = torch.func.vmap(lambda v: ev.dropout(v, 0.5), randomness="different")(x.expand(4, 50))
    assert len({tuple(r.tolist()) for r in rows}) == 4
    rows = torch.func.vmap(lambda v: ev.dropout(v, 0.5), randomness="same")(x.expand(4, 50))
    assert len({tuple(r.tolist()) for r in rows}) == 1
    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(lambda v: ev.dropout(v, 0.5), randomness="error")(x.expand(4, 50))
    y, tangent = torch.func.jvp(lambda v: ev.dropout(v, 0.5), (x,), (torch.ones_like(x),))
    assert torch.equal(y, tangent * x)


def test_freshness_step_and_inference_mode():
    ev.set_freshness("step")
    x = torch.ones(5000, device="cuda")

    def mask():
        torch.cuda.manual_seed(1)
        return ev.dropout(x, 0.5)

    a = mask()
    assert torch.equal(mask(), a)
    ev.step()
    assert not torch.equal(mask(), a)
    with torch.inference_mode():
        assert not torch.equal(mask(), mask())


def test_cpu_and_gpu_tensors_side_by_side():
    x = torch.ones(2000)
    assert not torch.equal(ev.dropout(x, 0.5), ev.dropout(x.cuda(), 0.5).cpu())
    with pytest.raises(ValueError, match="residual: must match x"):
        ev.dropout_add(x, x.cuda(), 0.5)


def test_what_an_unsupported_dtype_says():
    with pytest.raises(TypeError, match="x: dropout needs float32.*got torch.int32"):
        ev.dropout(torch.ones(3, dtype=torch.int32, device="cuda"))
