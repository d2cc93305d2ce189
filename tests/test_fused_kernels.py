"""CPU kernels of fused dropout, additive noise and stochastic rounding against numpy, bit for bit; GELU's accuracy."""

import numpy as np
import pytest
import torch  # brings the OpenMP runtime that the kernels' threads run on
from test_kernels import DTYPES as TYPES
from test_kernels import GENERATORS, _record, isa  # noqa: F401  isa is a fixture
from vectors.make_law_v1 import RECORDS

from everett_cuda import _C
from everett_cuda.reference import fused, gelu, ieee, rounding

DTYPES = {**TYPES, "float8_e4m3fn": 5, "float8_e5m2": 6}
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
FP8 = {"float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}
# Around the ends of vectors, groups of decisions (128, 256, 512) and rows.
SHAPES = [(1, 1), (3, 5), (2, 16), (5, 33), (4, 64), (3, 257), (2, 513)]


def _values(rng, shape, dtype, scale=2.0):
    x = (rng.normal(size=shape) * scale).astype(np.float32)
    flat = x.reshape(-1)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 3e38, -3e38, 13.99, -14.0, 11.0], np.float32)
    flat[: min(len(flat), len(special))] = special[: len(flat)]
    if dtype == "bfloat16" or dtype in FP8:
        return fused.round_to(x, dtype)
    with np.errstate(over="ignore"):
        return x.astype(STORAGE[dtype])


def _same(got, wanted, dtype):
    """Equal bits, NaNs of any payload."""
    def wide(v):
        return ieee.from_fp8(v, dtype) if dtype in FP8 else ieee.from_bf16(v) if dtype == "bfloat16" else v

    nan = np.isnan(wide(got)) & np.isnan(wide(wanted))
    return bool(((got.view(f"u{got.itemsize}") == wanted.view(f"u{wanted.itemsize}")) | nan).all())


def _address(a):
    return 0 if a is None else a.ctypes.data


@pytest.mark.parametrize("dtype", {**STORAGE, **FP8})
@pytest.mark.parametrize("op", [0, 1, 2, 3, 4])
def test_fused_dropout_equals_the_reference(isa, dtype, op):  # noqa: F811
    rng = np.random.default_rng(op)
    for number, shape in enumerate(SHAPES):
        generator = list(GENERATORS)[number % 4]
        p, e0 = [0.1, 0.5, 0.001, 0.0, 1.0][number % 5], [0, 33, 2**37 - 40][number % 3]
        x, extra = _values(rng, shape, dtype), _values(rng, shape, dtype)[::-1].copy()
        bias = _values(rng, shape[1], dtype, 0.5) if number % 2 else None
        which = number % len(RECORDS)
        e = np.arange(x.size, dtype=np.uint64).reshape(shape) + np.uint64(e0)
        approximate = "tanh" if op in (2, 4) else "none"
        common = (RECORDS[which], p, e, dtype, generator)
        if op == 0:
            wanted = fused.bias_dropout_add(x, bias, extra, *common)
        elif op in (1, 2):
            wanted, extra = fused.bias_gelu_dropout(x, bias, *common, approximate), None
        else:
            wanted = fused.bias_gelu_dropout_backward(extra, x, bias, *common, approximate)
        got = np.full_like(x, 77)
        _C.fused_dropout(
            op, _record(which), GENERATORS[generator], p, DTYPES[dtype], _address(x), _address(bias), _address(extra),
            _address(got), x.size, shape[1], e0, 1,
        )  # fmt: skip
        assert _same(got, wanted, dtype), (shape, p, e0, generator)


@pytest.mark.parametrize("dtype", STORAGE)
def test_additive_noise_equals_the_reference(isa, dtype):  # noqa: F811
    rng = np.random.default_rng(1)
    for n in (1, 15, 64, 65, 257, 700):
        for e0 in (0, 1, 333, 2**36 - 5):
            x, got = _values(rng, n, dtype), np.full(n, 77, STORAGE[dtype])
            wanted = fused.add_noise(x, 0.37, RECORDS[1], np.arange(n, dtype=np.uint64) + np.uint64(e0), dtype)
            _C.add_noise(_record(1), 0, DTYPES[dtype], 0.37, _address(x), _address(got), n, e0, 1)
            assert _same(got, wanted, dtype), (n, e0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_equals_the_reference(isa, dtype):  # noqa: F811
    rng = np.random.default_rng(2)
    for n in (1, 15, 33, 256, 513, 1200):
        for e0 in (0, 5, 2**37 - 7):
            x, got = _values(rng, n, "float32", 1e-6 if n % 2 else 100.0), np.full(n, 77, np.uint16)
            wanted = fused.stochastic_round(x, RECORDS[0], np.arange(n, dtype=np.uint64) + np.uint64(e0), dtype)
            _C.stochastic_round(_record(0), 0, DTYPES[dtype], _address(x), _address(got), n, e0, 1)
            assert np.array_equal(got, wanted), (n, e0)


def test_results_do_not_depend_on_the_threads():
    rng = np.random.default_rng(3)
    x, bias = rng.normal(size=(70, 1000)).astype(np.float32), rng.normal(size=1000).astype(np.float32)
    out = [np.empty_like(x) for _ in range(3)]
    for threads, y in zip((1, 2, 5), out, strict=True):
        _C.fused_dropout(1, _record(0), 0, 0.1, 0, _address(x), _address(bias), 0, _address(y), x.size, 1000, 0, threads)
    assert np.array_equal(out[0], out[1]) and np.array_equal(out[0], out[2])


def test_wrong_arguments_are_refused():
    def call(op=0, type_=0, extra=1, n=6, columns=3):
        _C.fused_dropout(op, _record(0), 0, 0.1, type_, 1, 0, extra, 1, n, columns, 0, 1)

    for wrong in (dict(op=5), dict(op=-1), dict(type_=1), dict(columns=4), dict(columns=0), dict(extra=0), dict(op=1)):
        with pytest.raises(ValueError):
            call(**wrong)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        _C.stochastic_round(_record(0), 0, 0, 1, 1, 1, 0, 1)


# --- GELU ---


@pytest.mark.parametrize("approximate, worst, worst_slope", [("none", 2.2e-7, 2.2e-7), ("tanh", 1.6e-7, 2.1e-7)])
def test_gelu_is_as_accurate_as_the_law_says(approximate, worst, worst_slope):
    rng = np.random.default_rng(4)
    x = np.concatenate([np.linspace(-12, 12, 100_001), rng.normal(size=100_000)]).astype(np.float32)
    exact = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    assert np.all(np.abs(gelu.gelu(x, approximate) - y.detach().numpy()) <= worst * np.abs(x) + 4e-38)
    assert np.max(np.abs(gelu.gelu_slope(x, approximate) - slope.numpy())) <= worst_slope


# --- rounding ---


@pytest.mark.parametrize("dtype, torch_dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_rounding_over_all_draws_is_unbiased_and_takes_neighbours_only(dtype, torch_dtype):
    draws = np.arange(65536, dtype=np.uint32)
    for value in (1.0, 1.001, -3.14159, 0.3, 6.1e-5, 5.0e-6, 1.0e-7, 65505.0, 1e-30, 0.0):
        value = np.float32(value)
        patterns = rounding.stochastic_round(np.full(65536, value), draws, dtype)
        values = torch.from_numpy(patterns.view(np.int16)).view(torch_dtype).double()
        nearest = torch.tensor(value).to(torch_dtype).double()
        assert len(values.unique()) <= 2
        if torch.isfinite(values).all():
            step = float(values.max() - values.min()) or (2.0**-24 if dtype == "float16" else 0.0)
            assert abs(float(values.mean()) - float(value)) <= step * 2.0**-16
            assert float(nearest) in values.unique().tolist()
