"""Fills and packed masks on a real GPU, bit for bit against the CPU kernels: every kind, type and generator, odd lengths,
starts and alignments, and more than 2^31 elements."""

import itertools

import numpy as np
import pytest
import torch
from elements import STORAGE
from test_kernels import DTYPES, FILLS
from test_masked import POISON, RECORD, _back, _stream, _to_gpu

from everett_cuda import _C

_cuda = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

KINDS = [("words", "uint32"), *itertools.product(("uniform", "normal", "exponential", "gumbel", "bernoulli"), DTYPES)]
TYPES = {**DTYPES, "uint32": 4}
STORED = {**STORAGE, "uint32": np.uint32}
LENGTHS = [1, 255, 512, 513, 100_003, 1_000_000]
STARTS = [0, 64, 3, 2**35 - 100, 2**36 - 256, 2**41 + 7]


def _on_cpu(kind, generator, dtype, p, n, e0):
    out = np.empty(n, STORED[dtype])
    number, tag, _ = FILLS[kind]
    _C.fill(number, RECORD, generator, tag, TYPES[dtype], p.ctypes.data, out.ctypes.data, (n,), (1,), (1,), (1,), e0, 1, 2)
    return out


@pytest.mark.parametrize("generator", range(4))
@pytest.mark.parametrize("kind, dtype", KINDS)
def test_fills_match_the_cpu(kind, dtype, generator):
    number, tag, _ = FILLS[kind]
    rng = np.random.default_rng(generator)
    for i, (n, e0) in enumerate(itertools.product(LENGTHS, STARTS)):
        p = np.where(rng.random(n) < 0.1, rng.integers(0, 2, n), rng.random(n)) if kind == "bernoulli" else np.zeros(1)
        expected, gp = _on_cpu(kind, generator, dtype, p, n, e0), _to_gpu(p)
        shift = (i % 2) * expected.itemsize  # every other time misaligned
        out = _to_gpu(np.full(shift + expected.nbytes, POISON, np.uint8))
        at = (gp.data_ptr(), out.data_ptr() + shift)
        _cuda.fill(number, RECORD, generator, tag, TYPES[dtype], *at, n, e0, 1, 0, _stream())
        got, clean = _back(out, shift, expected)
        assert got.tobytes() == expected.tobytes(), (n, e0, shift)
        assert clean, "wrote beyond its output"


def test_square_roots_are_the_ieee_ones():
    # The root in the normals is made of the hardware's guess and three steps: 2^26 of them, and none may be off by a bit.
    n = 2**26
    expected, out = _on_cpu("normal", 0, "float32", np.zeros(1), n, 0), torch.empty(n, device="cuda")
    _cuda.fill(2, RECORD, 0, FILLS["normal"][1], 0, 0, out.data_ptr(), n, 0, 1, 0, _stream())
    assert out.cpu().numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("generator", range(4))
def test_packed_bits_match_the_cpu(generator):
    cases = itertools.product((0.0, 1e-6, 1 / 256, 0.1, 31 / 32, 1.0), (1, 1000, 100_003), (0, 33, 2**37 - 96, 2**45 - 21))
    for i, (p, n, e0) in enumerate(cases):
        expected, shift = np.empty((n + 7) // 8, np.uint8), i % 5
        _C.keep_bits(RECORD, generator, p, expected.ctypes.data, n, e0, 2, 2)
        out = _to_gpu(np.full(shift + expected.nbytes, POISON, np.uint8))
        _cuda.keep_bits(RECORD, generator, p, out.data_ptr() + shift, n, e0, 2, 0, _stream())
        got, clean = _back(out, shift, expected)
        assert np.array_equal(got, expected), (p, n, e0, shift)
        assert clean, "wrote beyond its output"


def test_more_elements_than_31_bits():
    n = 2**31 + 70_001
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * 2 * n:
        pytest.skip(f"needs {6 * n >> 30} GiB of free GPU memory, there are {free >> 30}")
    out = torch.empty(n, device="cuda", dtype=torch.bfloat16)
    tag = FILLS["normal"][1]
    _cuda.fill(2, RECORD, 0, tag, 2, 0, out.data_ptr(), n, 0, 1, 0, _stream())
    for begin in (0, 2**31 - 5000, n - 9001):
        expected = _on_cpu("normal", 0, "bfloat16", np.zeros(1), 9001, begin)
        assert np.array_equal(out[begin : begin + 9001].cpu().view(torch.int16).numpy().view(np.uint16), expected), begin
    piece = torch.empty(2**27, device="cuda", dtype=torch.bfloat16)
    for begin in range(0, n, 2**27):
        m = min(2**27, n - begin)
        _cuda.fill(2, RECORD, 0, tag, 2, 0, piece.data_ptr(), m, begin, 1, 0, _stream())
        assert torch.equal(piece[:m].view(torch.int16), out[begin : begin + m].view(torch.int16)), begin


def test_a_graph_replays_with_the_record_it_finds():
    record, out = torch.zeros(12, dtype=torch.int32, device="cuda"), torch.empty(10_001, device="cuda")
    tag = FILLS["uniform"][1]

    def step():
        _cuda.fill(1, record.data_ptr(), 0, tag, 0, 0, out.data_ptr(), out.numel(), 0, 1, 0, _stream())

    step()  # kernels are loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    record.copy_(torch.from_numpy(np.frombuffer(RECORD, np.int32).copy()))
    graph.replay()
    torch.cuda.synchronize()
    assert np.array_equal(out.cpu().numpy(), _on_cpu("uniform", 0, "float32", np.zeros(1), out.numel(), 0))
