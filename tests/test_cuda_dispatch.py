"""Ops on a GPU, with the CUDA module emulated: nonces, keys, streams, devices, and errors without a GPU.

CPU tensors stand in for CUDA tensors: the table of kernels is told that the "device" of CPU tensors is an emulated GPU.
"""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from emulated_gpu import EmulatedGpu, Generator, as_numpy, key, numbered, record_words, same_bits
from recompute import BOTH, ck, leaf

import everett_cuda as ev
from everett_cuda import _C, kernels, kernels_cuda, keys
from everett_cuda.errors import EverettError, ReplayMiss
from everett_cuda.kernels import Mask
from everett_cuda.reference import keepdrop

FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16",
          torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}  # fmt: skip


# --- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stream", ["chacha8", "philox"])
def test_dropout_is_the_reference_under_seed_and_offset(gpu, dtype, stream):
    x = torch.randn(33, 40).to(dtype).requires_grad_()
    e = np.arange(x.numel()).reshape(x.shape)
    for draw in range(3):
        y = ev.dropout(x, 0.3, stream=stream)
        grad = torch.randn(33, 40).to(dtype)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        record = record_words(key(draw), gpu.nonce())
        for got, of in ((y, x), (grad_x, grad)):
            expected = keepdrop.dropout(as_numpy(of), record, 0.3, e, FLOATS[dtype], stream)
            assert as_numpy(got).tobytes() == expected.tobytes()
    assert gpu.generator.offset == 12 and keys.counters()["fresh"] == 4


OPS = {
    "dropout": ev.dropout,
    "dropout_add": lambda x, p: ev.dropout_add(x, x.detach() + 1, p),
    "alpha_dropout": ev.alpha_dropout,
    "dropout2d": ev.dropout2d,
    "drop_path": ev.drop_path,
    "inplace": lambda x, p: ev.dropout(x + 0, p, inplace=True),
}


@pytest.mark.parametrize("op", OPS)
def test_ops_are_the_cpus(gpu, monkeypatch, op):
    """Any layout: the same keys and nonces through the CPU's kernels."""
    base = torch.randn(4, 6, 10, 8)
    for x in (base, base.permute(3, 1, 0, 2), base[:, ::2, 1:, ::3], base[:, :1].expand(4, 6, 10, 8)):
        x = x.detach().requires_grad_()
        y = OPS[op](x, 0.4)
        (grad,) = torch.autograd.grad(y.sum(), x)
        nonce = gpu.nonce()
        record = _C.derive_record(key(gpu.generator.offset // 4 - 1), nonce)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.CPU, "draw", lambda r=record: r, raising=False)
            patch.setattr(kernels.CPU, "draw_and_drop", lambda x, m, r=record: (kernels.CPU.masked(x, None, r, m), r))
            patch.setitem(kernels._by_index, -1, kernels.CPU)
            expected = OPS[op](x, 0.4)
            (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        assert same_bits(y, expected) and same_bits(grad, expected_grad)
        assert y.stride() == expected.stride()


FUSED = {
    "bias_dropout_add": lambda x, b: ev.bias_dropout_add(x, b, x.detach() * 2, 0.3),
    "bias_gelu_dropout": lambda x, b: ev.bias_gelu_dropout(x, b, 0.3),
    "bias_gelu_dropout tanh": lambda x, b: ev.bias_gelu_dropout(x, b, 0.3, approximate="tanh", stream="philox"),
    "add_noise": lambda x, b: ev.add_noise(x, 0.5) + b,
    "stochastic_round": lambda x, b: ev.stochastic_round(x, torch.bfloat16) + b,
}


@pytest.mark.parametrize("op", FUSED)
def test_fused_ops_are_the_cpus(gpu, monkeypatch, op):
    x, b = torch.randn(31, 40).requires_grad_(), torch.randn(40).requires_grad_()
    y = FUSED[op](x, b)
    grads = torch.autograd.grad(y.sum(), (x, b))
    record = _C.derive_record(key(0), gpu.nonce())
    monkeypatch.setattr(kernels.CPU, "draw", lambda: record, raising=False)
    monkeypatch.setitem(kernels._by_index, -1, kernels.CPU)
    expected = FUSED[op](x, b)
    assert same_bits(y, expected)
    assert all(map(same_bits, grads, torch.autograd.grad(expected.sum(), (x, b))))


NOISE = {
    "rand": ev.rand, "randn": ev.randn, "exponential": ev.exponential, "gumbel": ev.gumbel,
    "bernoulli": lambda *size, **kw: ev.bernoulli(0.3, *size, **kw),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("direct", [False, True])
def test_noise_is_the_cpus(gpu, ring, monkeypatch, kind, direct):
    source = ev.open("sim:seed=7")
    words = np.random.default_rng(1).integers(0, 2**64, 4000, dtype=np.uint64)

    def call(dtype):
        if not direct:
            return NOISE[kind](7, 133, dtype=dtype)
        fresh = _C.Ring(1 << 20)
        fresh.put(words.view(np.uint8))
        monkeypatch.setattr(source, "ring", fresh)
        return NOISE[kind](7, 133, dtype=dtype, freshness="direct")

    drawn = gpu.kernels.draw
    records = []
    monkeypatch.setattr(gpu.kernels, "draw", lambda world: records.append(drawn(world)) or records[-1])
    for dtype in list(FLOATS)[:4]:
        y = call(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.CPU, "draw", lambda world: records[-1], raising=False)
            patch.setitem(kernels._by_index, -1, kernels.CPU)
            expected = call(dtype)
        assert same_bits(y, expected) and y.shape == (7, 133)
    assert len(records) == (0 if direct else 4)
    monkeypatch.undo()
    ev.close()


def test_words_and_vmapped_noise(gpu):
    assert ev.random_words(300).unique().numel() == 300
    rows = torch.func.vmap(lambda _: ev.randn(50), randomness="different")(torch.zeros(4))
    assert len({tuple(r.tolist()) for r in rows}) == 4


def test_what_needs_no_draw_takes_none(gpu):
    x = torch.randn(8)
    assert ev.dropout(x, 0.0) is x and not ev.dropout(x, 1.0).any() and ev.dropout(torch.empty(0), 0.5).shape == (0,)
    assert gpu.generator.offset == 0 and keys.counters()["draws"] == 0


def test_double_backward_functorch_and_forward_mode(gpu):
    """Records as tensors (from nonces as tensors) reach the kernels too."""
    x = torch.randn(50, dtype=torch.float64)
    y, jvp = torch.func.jvp(lambda v: ev.dropout(v, 0.5), (x,), (torch.ones_like(x),))
    assert torch.equal(y, jvp * x) and set(jvp.tolist()) == {0.0, 2.0}
    slope = torch.func.grad(lambda v: ev.dropout(v * v, 0.5).sum())(x)
    assert torch.equal(slope, (slope / x / 2).round() * 2 * x)
    rows = torch.func.vmap(lambda v: ev.dropout(v, 0.5), randomness="different")(x.expand(4, 50))
    assert len({tuple(r.tolist()) for r in rows}) == 4
    x.requires_grad_()
    (first,) = torch.autograd.grad((ev.dropout(x, 0.5) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second * x, first)


# --- device and stream --------------------------------------------------------------------------------------------------


def test_launches_go_to_the_tensors_device_and_the_current_stream(emulated, gpu):
    second = EmulatedGpu(emulated, index=1)
    second.stream = 77
    x = torch.randn(40)
    second.kernels.masked(x, None, bytes(48), Mask(0.5, 0, plain=True))
    assert (emulated.control.emulation_last_launch_device(), emulated.control.emulation_last_launch_stream()) == (1, 77)
    assert emulated.control.emulation_current_device() == 0
    gpu.stream = 78
    ev.dropout(x.view(8, 5).T, 0.5)
    assert (emulated.control.emulation_last_launch_device(), emulated.control.emulation_last_launch_stream()) == (0, 78)


def test_a_failed_launch_raises_with_the_kernels_name(gpu):
    gpu.kernels.draw()  # the graphs' key is there already
    gpu.control.emulation_fail_next_launch(719)
    with pytest.raises(RuntimeError, match="masked_kernel.*unspecified launch failure"):
        ev.dropout(torch.randn(40), 0.5)


def test_equal_states_on_two_gpus_are_two_draws_with_two_keys(emulated, gpu):
    second = EmulatedGpu(emulated, index=1)
    a, b = gpu.kernels.draw(), second.kernels.draw()
    assert a == _C.derive_record(key(0), gpu.nonce())
    assert b == _C.derive_record(key(2), gpu.nonce())  # the key between went to the second GPU's graphs
    second.generator.offset = gpu.generator.offset = 0
    assert (gpu.kernels.draw(), second.kernels.draw()) == (a, b)  # the same states again, in the same step
    assert keys.counters()["reused"] == 2


def test_the_devices_number_does_not_enter_the_record(emulated, ring):
    """Ranks of a tensor-parallel group sit on different indices, and must find equal masks under equal keys."""
    records = []
    for index in (0, 1):
        ring.put(numbered(2))
        keys.step()
        records.append(EmulatedGpu(emulated, index).kernels.draw())
    assert records[0] == records[1]


def test_freshness_step_keeps_a_key_for_each_gpu(emulated, gpu):
    keys.set_freshness("step")
    second = EmulatedGpu(emulated, index=1)
    draws = [g.kernels.draw() for g in (gpu, second, gpu, second)]
    at = [gpu.nonce(2), second.nonce(2), gpu.nonce(), second.nonce()]
    assert draws == [_C.derive_record(key(k), n) for k, n in zip((0, 2, 0, 2), at, strict=True)]


def test_threads_never_read_one_offset():
    """Autograd threads on one generator, and other threads get their turn just after the offset was read."""

    class Yielding(Generator):
        def get_offset(self):
            offset = super().get_offset()
            time.sleep(1e-5)
            return offset

    generator, nonce, seen = Yielding(), keys._cuda_nonce, []

    def draws():
        for _ in range(50):
            nonce.fill(generator)
            seen.append(tuple(nonce._words))

    threads = [threading.Thread(target=draws) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(seen)) == len(seen) == 200 and generator.offset == 800


# --- recomputation ------------------------------------------------------------------------------------------------------


def keeping_state(generator, f):
    """f as torch's checkpoint calls it on a GPU: the recomputation runs from the forward's RNG state, which is then put
    back."""
    state = []

    def wrapped(x):
        if not state:
            state.append(generator.offset)
            return f(x)
        now, generator.offset = generator.offset, state[0]
        try:
            return f(x)
        finally:
            generator.offset = now

    return wrapped


@BOTH
@pytest.mark.parametrize("steps", [0, 1])
def test_a_recomputation_finds_the_key_of_its_forward(gpu, reentrant, steps):
    """Also when a step ended between, and under both freshnesses."""
    for freshness in ("op", "step"):
        keys.set_freshness(freshness)
        x = leaf()
        masks = []

        def block(x, masks=masks):
            y = ev.dropout(torch.sin(x), 0.5)
            masks.append((y / torch.sin(x)).detach().round())
            return torch.exp(y)

        y = ck(keeping_state(gpu.generator, block), x, reentrant)
        ev.dropout(x.detach(), 0.5)
        for _ in range(steps):
            keys.step()
        y.sum().backward()
        assert len(masks) == 2 and torch.equal(*masks)
        assert torch.allclose(x.grad, y.detach() * masks[0] * torch.cos(x.detach()))


@BOTH
def test_a_recomputation_from_another_state_raises(gpu, reentrant):
    """preserve_rng_state=False, which torch leaves silently wrong."""
    x = leaf()
    y = ck(lambda x: torch.exp(ev.dropout(torch.sin(x), 0.5)), x, reentrant)
    with pytest.raises(ReplayMiss, match="preserve_rng_state"):
        y.sum().backward()


# --- errors without a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA here")
def test_a_cpu_build_of_torch_says_so():
    ev.open("sim:seed=7")
    with pytest.raises(EverettError, match=r"device: cuda needs a torch that is built for CUDA, and torch .* is not"):
        ev.rand(3, device="cuda")
    ev.close()


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.device_count() > 0, reason="needs a CUDA torch without GPU")
def test_no_gpu_says_so():
    with pytest.raises(EverettError, match="torch finds no NVIDIA GPU.*nvidia-smi"):
        kernels.of_device(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_driver_that_is_missing_or_too_old_says_so():
    module = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc, so there is no CUDA module")
    with pytest.raises(EverettError, match="driver cannot run the CUDA kernels of this build.*Update the driver"):
        kernels_cuda.check_driver(module)


def test_no_gpu_in_the_runtime_says_so(emulated):
    emulated.control.emulation_set_devices(0)
    try:
        with pytest.raises(EverettError, match="finds no GPU"):
            kernels_cuda.check_driver(emulated)
    finally:
        emulated.control.emulation_set_devices(2)
    kernels_cuda.check_driver(emulated)


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_an_old_gpu_says_so(capability):
    major, minor = capability
    with pytest.raises(EverettError, match=f"Tesla has compute capability {major}.{minor}.*8.0 .A100. or newer.*cpu"):
        kernels_cuda.check_capability("Tesla", capability)
    for new in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        kernels_cuda.check_capability("a newer one", new)


def test_an_installation_without_the_cuda_module_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "everett_cuda._cuda", None)  # what an import that fails leaves behind
    monkeypatch.delattr("everett_cuda._cuda", raising=False)
    with pytest.raises(EverettError, match="no CUDA kernels .*nvcc.*install again.*CPU tensors work"):
        kernels_cuda._load_module()


def test_cpu_programs_never_import_the_cuda_side():
    code = (
        "import sys, torch, everett_cuda as ev; ev.open('sim:seed=7'); ev.dropout(torch.ones(3), 0.5);"
        "ev.randn(3, freshness='direct'); ev.step(); ev.close();"
        "print([m for m in sys.modules if m in ('everett_cuda._cuda', 'everett_cuda.kernels_cuda', 'everett_cuda.pool')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_tensors_on_two_devices_are_refused():
    ev.open("sim:seed=7")
    with pytest.raises(ValueError, match="residual: must match x .*cpu.*meta"):
        ev.dropout_add(torch.ones(3), torch.ones(3, device="meta"), 0.5)
    with pytest.raises(EverettError, match="p: is on cpu, and cuda:1 was asked for"):
        ev.bernoulli(torch.full((3,), 0.5), device="cuda:1")
    ev.close()
