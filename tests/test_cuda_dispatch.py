"""Ops on a GPU, with the CUDA module emulated: nonces, keys, streams, devices, captured graphs, and errors without a GPU.

CPU tensors stand in for CUDA tensors: the table of kernels is told that the "device" of CPU tensors is an emulated GPU.
"""

import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from recompute import BOTH, ck, leaf

import everett_cuda as ev
from everett_cuda import _C, kernels, kernels_cuda, keys
from everett_cuda.errors import EverettError, HealthAlarm, ReplayMiss
from everett_cuda.kernels import Mask
from everett_cuda.reference import keepdrop

STREAM = 5  # the handle of torch's current stream
FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16",
          torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}  # fmt: skip


class Generator:
    """Stands in for torch's generator of a GPU: a seed, and an offset in steps of 4."""

    def __init__(self, seed=2**63 + 11):
        self.seed, self.offset = seed, 0

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset


class EmulatedGpu:
    def __init__(self, module, index=0):
        self.module, self.control, self.index, self.stream, self.kept = module, module.control, index, STREAM, []
        self.generator = Generator()
        self.kernels = kernels_cuda.Cuda(index, module, self.generator, lambda _: self.stream, torch.device("cpu"))

    def nonce(self, back=1):
        """The nonce of the last draw but `back - 1`."""
        return np.array([self.generator.seed, self.generator.offset - 4 * back], "<u8").tobytes()

    def captured(self, op):
        """(op's result, number of the graph). What is allocated meanwhile is kept, as the memory of a graph is."""
        empty, empty_like = torch.empty, kernels_cuda._empty_like

        def keep(allocate):
            return lambda *args, **kwargs: self.kept.append(allocate(*args, **kwargs)) or self.kept[-1]

        self.control.emulation_begin_capture(self.stream)
        try:
            torch.empty, kernels_cuda._empty_like = keep(empty), keep(empty_like)
            result = op()
        finally:
            torch.empty, kernels_cuda._empty_like = empty, empty_like
            graph = self.control.emulation_end_capture()
        return result, graph

    def replay(self, graph):
        self.control.emulation_replay(graph, self.stream)
        if error := self.control.emulation_error():
            raise RuntimeError(error.decode())


@pytest.fixture
def gpu(emulated, ring, monkeypatch):
    """An emulated GPU behind CPU tensors, with 4,000 numbered keys: the first one drawn goes to the GPU's graphs."""
    ring.put(numbered(4000))
    gpu = EmulatedGpu(emulated)
    monkeypatch.setitem(kernels._by_index, -1, gpu.kernels)
    monkeypatch.setattr(keys, "_followers", [gpu.kernels.graph_key, gpu.kernels.pool])
    return gpu


def numbered(n):
    return b"".join(i.to_bytes(32, "little") for i in range(1, n + 1))


def key(number):
    """The key of draw `number`, from 0: the first goes to the graphs."""
    return (number + 2).to_bytes(32, "little")


def record_words(key_bytes, nonce):
    return np.frombuffer(_C.derive_record(key_bytes, nonce), "<u4")


def as_numpy(t):
    t = t.detach().contiguous()
    if t.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        return t.view(torch.uint16 if t.dtype == torch.bfloat16 else torch.uint8).numpy()
    return t.numpy()


def same_bits(a, b):
    return a.dtype == b.dtype and as_numpy(a).tobytes() == as_numpy(b).tobytes()


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
    monkeypatch.setattr(gpu.kernels, "draw", lambda: records.append(drawn()) or records[-1])
    for dtype in list(FLOATS)[:4]:
        y = call(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.CPU, "draw", lambda: records[-1], raising=False)
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


# --- captured graphs ----------------------------------------------------------------------------------------------------


def warm(gpu):
    ev.dropout(torch.randn(4), 0.5)


def test_a_graphs_masks_follow_the_key_and_its_backward_the_forward(gpu):
    warm(gpu)
    x, ones = torch.randn(3000).requires_grad_(), torch.ones(3000)

    def step():  # of our ops only: the emulation captures no others
        y = ev.dropout(ev.dropout(x, 0.2), 0.5)
        return y, torch.autograd.grad(y, x, ones)[0]

    (y, grad), graph = gpu.captured(step)
    seen = []
    for _ in range(3):
        keys.step()
        gpu.replay(graph)
        assert torch.equal(y.detach(), x.detach() * grad) and set(grad.tolist()) == {0.0, 2.5}
        seen.append(tuple((grad != 0).tolist()))
    assert len(set(seen)) == 3  # a new key, and a new mask
    gpu.replay(graph)
    assert tuple((grad != 0).tolist()) == seen[-1]  # the emulation draws the nonces once only, at capture
    assert gpu.kernels.graph_key.refreshes == 4
    assert 0.35 < np.mean(seen) < 0.45


def test_a_graphs_records_are_derived_from_the_key_that_lies_on_the_gpu(gpu):
    warm(gpu)
    nonces = torch.randint(-(2**63), 2**63 - 1, (5, 2), dtype=torch.int64)
    records, graph = gpu.captured(lambda: gpu.kernels.graph_key.derive(nonces, STREAM))
    for number in (2, 3):  # key 0 came first, key 1 served the warm-up
        keys.step()
        gpu.replay(graph)
        for nonce, record in zip(nonces, records, strict=True):
            expected = _C.derive_record((number + 1).to_bytes(32, "little"), nonce.numpy().tobytes())
            assert record.numpy().tobytes() == expected


def test_captured_noise_and_fused_ops_follow_the_key(gpu):
    warm(gpu)
    x, b = torch.randn(30, 40), torch.randn(40)

    def step():
        return [ev.randn(500), ev.rand(500), ev.bias_gelu_dropout(x, b, 0.5), ev.bias_dropout_add(x, b, x, 0.5)]

    outs, graph = gpu.captured(step)
    seen = []
    for _ in range(2):
        keys.step()
        gpu.replay(graph)
        seen.append([o.clone() for o in outs])
    assert all(not torch.equal(a, c) and torch.isfinite(a).all() for a, c in zip(*seen, strict=True))


def test_each_captured_op_has_a_record_of_its_own(gpu):
    warm(gpu)
    x = torch.ones(400)
    outs, graph = gpu.captured(lambda: [ev.dropout(x, 0.5) for _ in range(150)])
    gpu.replay(graph)
    assert len({tuple(y.tolist()) for y in outs}) == 150
    again, graph = gpu.captured(lambda: ev.dropout(x, 0.5))
    gpu.replay(graph)
    assert tuple(again.tolist()) not in {tuple(y.tolist()) for y in outs}


def test_a_capture_draws_nothing_from_the_source_nor_the_generators_offset(gpu):
    warm(gpu)
    before = keys.counters(), gpu.generator.offset
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    assert (keys.counters(), gpu.generator.offset) == before


def test_capturing_before_a_key_is_there_raises_before_anything_is_captured(gpu):
    gpu.control.emulation_begin_capture(STREAM)
    launches = gpu.control.emulation_launches()
    with pytest.raises(EverettError, match="captured on cuda:0 before its key is there.*run the model once"):
        ev.dropout(torch.ones(40), 0.5)
    gpu.control.emulation_end_capture()
    assert gpu.control.emulation_launches() == launches


def test_steps_refresh_only_keys_that_a_graph_reads(gpu):
    warm(gpu)
    for _ in range(3):
        keys.step()
    assert gpu.kernels.graph_key.refreshes == 1 and keys.counters()["fresh"] == 2
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    for _ in range(3):
        keys.step()
    assert gpu.kernels.graph_key.refreshes == 4


def test_the_status_tells_the_age_of_the_key_that_graphs_read(gpu):
    warm(gpu)
    assert keys.followers_status() == ()
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    (line,) = keys.followers_status()
    assert re.fullmatch(r"graphs: +cuda:0 reads its key number 1, \d+\.\d s old", line)
    assert str(ev.status()).endswith("none open")
    keys.detach()
    assert "no key" in keys.followers_status()[0]


def test_no_key_changes_during_a_capture_or_inside_a_backward(gpu):
    warm(gpu)
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    gpu.captured(keys.step)
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda _: keys.step())
    x.sum().backward()
    assert gpu.kernels.graph_key.refreshes == 1 and keys.counters()["boundaries_ignored"] == 1


def test_the_optimizers_hook_refreshes_unless_a_captured_backward_recomputes(gpu):
    warm(gpu)
    graph_key = gpu.kernels.graph_key
    nonces = torch.zeros(1, 2, dtype=torch.int64)
    gpu.captured(lambda: graph_key.derive(nonces, STREAM))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.step()
    assert graph_key.refreshes == 2
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda _: gpu.kept.append(graph_key.derive(nonces, STREAM)))
    gpu.captured(x.sum().backward)
    optimizer.step()
    assert graph_key.refreshes == 2
    keys.step()
    assert graph_key.refreshes == 3


@BOTH
def test_a_recomputation_inside_a_capture_raises(gpu, reentrant):
    """torch cannot restore the RNG state there (here nobody does), so the mask would be another one."""
    warm(gpu)
    x = leaf()
    with pytest.raises(ReplayMiss, match="captured graph"):
        gpu.captured(lambda: ck(lambda x: torch.exp(ev.dropout(x, 0.5)), x, reentrant).sum().backward())


def test_a_key_in_flight_is_read_by_later_replays_only_and_wiped_when_it_arrived(gpu):
    warm(gpu)
    slot = gpu.kernels.graph_key._slot
    x = torch.ones(500)
    y, graph = gpu.captured(lambda: ev.dropout(x, 0.5))
    gpu.control.emulation_defer(1)
    seen = []
    for _ in range(6):  # more steps than the slot has staging for
        gpu.replay(graph)
        keys.step()
        gpu.control.emulation_run(0, 1)
    assert not slot.staging_all_zero
    gpu.control.emulation_defer(0)
    slot.reap()
    assert slot.staging_all_zero
    last = _C.derive_record((8).to_bytes(32, "little"), bytes(16))  # keys 1 (graphs), 2 (warm-up), 3 to 8
    nonces = torch.zeros(1, 2, dtype=torch.int64)
    records, graph = gpu.captured(lambda: gpu.kernels.graph_key.derive(nonces, STREAM))
    gpu.replay(graph)
    assert records[0].numpy().tobytes() == last and not seen


def test_an_alarm_stops_the_next_step(gpu, ring):
    warm(gpu)
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    ring.destroy_unread()
    ring.end(_C.Take.alarm)
    with pytest.raises(HealthAlarm):
        keys.step()
    assert gpu.kernels.graph_key._slot.staging_all_zero


def test_after_closing_replays_stop_and_opening_again_brings_a_key(gpu, ring):
    warm(gpu)
    x, ones = torch.ones(2000).requires_grad_(), torch.ones(2000)

    def step():
        y = ev.dropout(x, 0.5)
        return y, torch.autograd.grad(y, x, ones)[0]

    (y, grad), graph = gpu.captured(step)
    gpu.replay(graph)
    keys.detach()
    with pytest.raises(RuntimeError, match="replayed without a key: open a source"):
        gpu.replay(graph)
    keys.attach(ring)
    keys.step()
    gpu.replay(graph)
    assert set(y.tolist()) == {0.0, 2.0} and torch.equal(y, grad)


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
