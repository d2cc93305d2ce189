"""Fused dropout, additive noise and stochastic rounding on a real GPU, bit for bit against the CPU kernels."""

import itertools

import numpy as np
import pytest
import torch
from elements import STORAGE, same, values
from test_cuda_fused import OPS, TYPES, _inputs
from test_masked import POISON, RECORD, _back, _stream, _to_gpu

from everett_cuda import _C

_cuda = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

# Rows of whole vectors, of less than a vector and of none; one longer than a tile.
SHAPES = [(1, 1), (300, 1024), (1000, 257), (333, 1600), (100_003, 1), (30, 40_960), (12_345, 8)]
STARTS = [0, 96, 33, 2**37 - 1024, 2**45 + 3]
P_VALUES = [0.1, 0.5, 0.001, 0.0, 1.0]
LENGTHS = [1, 511, 1024, 1025, 100_003, 1_000_000]


def _empty_like(array, shift):
    return _to_gpu(np.full(shift + array.nbytes, POISON, np.uint8))


@pytest.mark.parametrize("generator", range(4))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_fused_ops_match_the_cpu(op, dtype, generator):
    for i, (shape, p) in enumerate(itertools.product(SHAPES, P_VALUES), generator):
        e0 = STARTS[(i // 2) % 5]
        x, bias, extra = _inputs(dtype, *shape, i)
        bias, extra = (bias if i % 3 else None), (None if op in ("gelu", "gelu_tanh") else extra)
        expected = np.empty_like(x)
        common = (OPS[op], RECORD, generator, p, TYPES[dtype])
        host = [0 if a is None else a.ctypes.data for a in (x, bias, extra)]
        _C.fused_dropout(*common, *host, expected.ctypes.data, x.size, shape[1], e0, 2)
        shift = (i % 4 == 3) * x.itemsize  # now and then misaligned
        device = [None if a is None else _to_gpu(a) for a in (x, bias, extra)]
        out = _empty_like(expected, shift)
        addresses = [0 if a is None else a.data_ptr() for a in device]
        _cuda.fused_dropout(*common, *addresses, out.data_ptr() + shift, x.size, shape[1], e0, 0, _stream())
        got, clean = _back(out, shift, expected)
        assert same(got.reshape(-1), expected.reshape(-1), dtype), (shape, p, e0, shift)
        assert clean, "wrote beyond its output"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_every_bf16_number(approximate):
    # p = 0 keeps everything, so this is the polynomial itself, and its slope times a gradient.
    x = np.arange(65536, dtype=np.uint16)
    ones = np.full(65536, 0x3F80, np.uint16)
    gx, gones = _to_gpu(x), _to_gpu(ones)
    for op, extra, gextra in ((1, 0, 0), (3, ones.ctypes.data, gones.data_ptr())):
        op += approximate == "tanh"
        expected, out = np.empty_like(x), _empty_like(x, 0)
        _C.fused_dropout(op, RECORD, 0, 0.0, 2, x.ctypes.data, 0, extra, expected.ctypes.data, 65536, 256, 0, 2)
        _cuda.fused_dropout(op, RECORD, 0, 0.0, 2, gx.data_ptr(), 0, gextra, out.data_ptr(), 65536, 256, 0, 0, _stream())
        assert same(_back(out, 0, x)[0], expected, "bfloat16"), op


@pytest.mark.parametrize("generator", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_noise_matches_the_cpu(dtype, generator):
    for i, (n, e0) in enumerate(itertools.product(LENGTHS, STARTS)):
        x, expected = values(dtype, n), np.empty(n, STORAGE[dtype])
        shift = (i % 2) * x.itemsize
        common = (RECORD, generator, TYPES[dtype], 0.37)
        _C.add_noise(*common, x.ctypes.data, expected.ctypes.data, n, e0, 2)
        gx, out = _to_gpu(x, shift), _empty_like(expected, shift)
        _cuda.add_noise(*common, gx.data_ptr() + shift, out.data_ptr() + shift, n, e0, 0, _stream())
        got, clean = _back(out, shift, expected)
        assert same(got, expected, dtype), (n, e0, shift)
        assert clean, "wrote beyond its output"


@pytest.mark.parametrize("generator", range(4))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_matches_the_cpu(dtype, generator):
    rng = np.random.default_rng(generator)
    for i, (n, e0) in enumerate(itertools.product(LENGTHS, STARTS)):
        moderate = (rng.normal(size=n) * 10.0 ** rng.integers(-8, 5, n)).astype(np.float32)
        x, expected = np.where(rng.random(n) < 0.5, values("float32", n), moderate), np.empty(n, np.uint16)
        shift = i % 3 * 2
        _C.stochastic_round(RECORD, generator, TYPES[dtype], x.ctypes.data, expected.ctypes.data, n, e0, 2)
        gx, out = _to_gpu(x), _empty_like(expected, shift)
        _cuda.stochastic_round(RECORD, generator, TYPES[dtype], gx.data_ptr(), out.data_ptr() + shift, n, e0, 0, _stream())
        got, clean = _back(out, shift, expected)
        assert np.array_equal(got, expected), (n, e0, shift)
        assert clean, "wrote beyond its output"


def test_more_elements_than_31_bits():
    rows, columns = 2**20 + 37, 2048
    n = rows * columns
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * 2 * n:
        pytest.skip(f"needs {6 * n >> 30} GiB of free GPU memory, there are {free >> 30}")
    x, bias = torch.randn(n, device="cuda", dtype=torch.bfloat16), torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    common = (1, RECORD, 0, 0.1, 2)
    _cuda.fused_dropout(*common, x.data_ptr(), bias.data_ptr(), 0, y.data_ptr(), n, columns, 0, 0, _stream())
    host_bias = bias.cpu().view(torch.int16).numpy()
    for begin in (0, 2**31 - 4 * columns, n - 8 * columns):
        m = 8 * columns
        window = x[begin : begin + m].cpu().view(torch.int16).numpy()
        expected = np.empty_like(window)
        _C.fused_dropout(*common, window.ctypes.data, host_bias.ctypes.data, 0, expected.ctypes.data, m, columns, begin, 2)
        assert np.array_equal(y[begin : begin + m].cpu().view(torch.int16).numpy(), expected), begin
