"""fp8 elements in the CPU kernels: torch's numbers, the reference's rounding, and what happens beyond the largest number."""

import itertools

import numpy as np
import pytest
import torch
from elements import same

from everett_cuda import _C
from everett_cuda.reference import ieee, keepdrop, stream

DTYPES = {"float8_e4m3fn": (5, torch.float8_e4m3fn, 448.0), "float8_e5m2": (6, torch.float8_e5m2, 57344.0)}
RECORD = stream.derive(bytes(range(32)), bytes(range(16)))


@pytest.fixture(params=_C.instruction_sets())
def isa(request):
    default = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(default)


def _run(op, x, extra, p, type_, e0=0, generator=0, affine=(0.0, 0.0, 0.0)):
    out = np.full_like(x, 0xA5)
    extra = x if extra is None else extra
    _C.masked_strided(op, RECORD.astype("<u4").tobytes(), generator, p, type_, affine, x.ctypes.data, extra.ctypes.data,
                      out.ctypes.data, (len(x),), (1,), (1,), (1,), (1,), e0, 0, 1)  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees_with_torch(dtype):
    _, torch_dtype, largest = DTYPES[dtype]
    patterns = np.arange(256, dtype=np.uint8)
    values = ieee.from_fp8(patterns, dtype)
    assert np.array_equal(values, torch.from_numpy(patterns).view(torch_dtype).float().numpy(), equal_nan=True)
    finite = np.sort(np.unique(values[np.isfinite(values)]))
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)  # exact: every tie
    x = np.concatenate([finite, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf), [np.nan]])
    x = x.astype(np.float32)
    assert same(ieee.fp8_of(x, dtype), torch.from_numpy(x).to(torch_dtype).view(torch.uint8).numpy(), dtype)
    assert values.max(initial=0, where=np.isfinite(values)) == largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_ops_match_reference(isa, dtype):
    type_ = DTYPES[dtype][0]
    rng = np.random.default_rng(1)
    for n, e0, generator, p in itertools.product((1, 15, 33, 4099), (0, 77), (0, 3), (1e-3, 0.1, 0.9)):
        x, r = rng.integers(0, 256, n, dtype=np.uint8), rng.integers(0, 256, n, dtype=np.uint8)
        keep = keepdrop.keep_mask(RECORD, p, np.arange(n, dtype=np.uint64) + np.uint64(e0), stream.GENERATORS[generator])
        affine = (0.8791, 0.1518, -1.3936)
        got = [_run(op, x, r, p, type_, e0, generator, affine) for op in range(3)]
        assert same(got[0], keepdrop.masked(x, keep, p, dtype), dtype)
        assert same(got[1], keepdrop.masked_add(x, r, keep, p, dtype), dtype)
        assert same(got[2], keepdrop.masked_affine(x, keep, affine, dtype), dtype)
        assert not got[0][~keep].any(), "a dropped element is +0, NaN or not"


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_number(isa, dtype):
    type_, _, largest = DTYPES[dtype]
    x = ieee.fp8_of(np.resize(np.float32([largest, -largest]), 600), dtype)
    y = ieee.from_fp8(_run(0, x, None, 0.5, type_), dtype)
    assert set(y.tolist()) == {0.0, largest, -largest}, "finite numbers saturate"
    if dtype == "float8_e5m2":
        infinite = ieee.fp8_of(np.resize(np.float32([np.inf, -np.inf]), 600), dtype)
        assert set(ieee.from_fp8(_run(0, infinite, None, 0.5, type_), dtype).tolist()) == {0.0, np.inf, -np.inf}
