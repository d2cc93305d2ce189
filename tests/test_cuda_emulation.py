"""The CUDA kernels' very source, compiled for the CPU, bit for bit against the CPU kernels and the numpy reference."""

import itertools

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the CPU kernels' threads run on

from everett_cuda import _C
from everett_cuda.reference import stream

RECORD = stream.derive(bytes(range(32)), bytes(range(16))).astype("<u4").tobytes()
STORAGE = {0: np.float32, 1: np.float64, 2: np.uint16, 3: np.float16}


def _values(type_, n):
    size = np.dtype(STORAGE[type_]).itemsize
    return np.random.default_rng(type_).integers(0, 256, n * size, dtype=np.uint8).view(STORAGE[type_])


@pytest.mark.parametrize("p", [1 / 256, 0.1, 31 / 32, 1e-3, 0.0, 1.0])
def test_dropout_matches_the_cpu(emulated, p):
    for generator, type_, (n, e0) in itertools.product(range(4), STORAGE, ((20011, 0), (1024, 32), (1025, 5), (31, 2**45 + 3))):
        x = np.nan_to_num(_values(type_, n)) if type_ != 2 else _values(type_, n) & 0x7F7F
        a, b = np.zeros_like(x), np.ones_like(x)
        _C.dropout(RECORD, generator, p, type_, x.ctypes.data, a.ctypes.data, n, e0, 1)
        emulated.masked(0, RECORD, generator, p, type_, (0, 0, 0), x.ctypes.data, 0, b.ctypes.data, n, e0, 0, 0, 0)
        assert a.tobytes() == b.tobytes(), (generator, type_, n, e0)
