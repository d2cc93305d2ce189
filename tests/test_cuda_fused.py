"""The CUDA fused ops' very source, compiled for the CPU, bit for bit against the CPU kernels and the numpy reference."""

import itertools

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the CPU kernels' threads run on
from elements import STORAGE, Guarded, same, values
from test_kernels import GENERATORS, _record
from vectors.make_law_v1 import RECORDS

from everett_cuda import _C
from everett_cuda.reference import fused

TYPES = {"float32": 0, "bfloat16": 2, "float16": 3, "float8_e4m3fn": 5, "float8_e5m2": 6}
OPS = {"bias_dropout_add": 0, "gelu": 1, "gelu_tanh": 2, "gelu_backward": 3, "gelu_tanh_backward": 4}
# A tile is 1024 elements and the emulated device has 8 warps. Rows of whole vectors, of less than a vector and of none;
# one longer than a tile; one of which a warp's step is a multiple.
SHAPES = [(9, 1024), (40, 64), (7, 257), (5, 1600), (1, 1), (100, 3), (12_000, 1), (3, 4096), (2, 16), (30, 328)]
STARTS = [0, 96, 33, 2**37 - 1024, 2**45 + 3]
P_VALUES = [0.1, 0.5, 0.001, 0.0, 1.0]


def _inputs(dtype, rows, columns, number):
    n = rows * columns
    # Half the numbers of moderate size, for which GELU is neither 0 nor the identity.
    rng = np.random.default_rng(number)
    moderate = fused.round_to(rng.normal(size=n).astype(np.float32), dtype)
    x = np.where(rng.random(n) < 0.5, values(dtype, n), moderate).reshape(rows, columns)
    return x, values(dtype, columns, seed=1), values(dtype, n, seed=2).reshape(rows, columns)


def _address(a):
    return 0 if a is None else a.ctypes.data


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS)
def test_fused_ops_match_the_cpu(emulated, op, dtype):
    turn = itertools.count(OPS[op])
    for shape, generator in itertools.product(SHAPES, GENERATORS):
        i = next(turn)
        p, e0, which = P_VALUES[i % 5], STARTS[(i // 2) % 5], i % len(RECORDS)
        x, bias, extra = _inputs(dtype, *shape, i)
        bias, extra = (bias if i % 3 else None), (None if op in ("gelu", "gelu_tanh") else extra)
        expected = np.empty_like(x)
        common = (OPS[op], _record(which), GENERATORS[generator], p, TYPES[dtype], _address(x), _address(bias),
                  _address(extra))  # fmt: skip
        _C.fused_dropout(*common, _address(expected), x.size, shape[1], e0, 1)
        out = Guarded(x.size, STORAGE[dtype], shift=i % 4 // 3)
        emulated.fused_dropout(*common, out.address, x.size, shape[1], e0, 0, 0)
        assert same(out.values, expected.ravel(), dtype), (shape, generator, p, e0)
        out.values[:] = expected.ravel()
        assert out.holds_only(expected), "wrote beyond its output"


@pytest.mark.parametrize("op", OPS)
def test_fused_ops_match_the_reference(emulated, op):
    x, bias, extra = _inputs("bfloat16", 5, 800, 1)
    e0 = 2**37 - 1024
    common = (RECORDS[0], 0.3, np.arange(4000, dtype=np.uint64).reshape(5, 800) + np.uint64(e0), "bfloat16", "chacha8")
    approximate = "tanh" if "tanh" in op else "none"
    if op == "bias_dropout_add":
        expected = fused.bias_dropout_add(x, bias, extra, *common)
    elif "backward" in op:
        expected = fused.bias_gelu_dropout_backward(extra, x, bias, *common, approximate)
    else:
        expected, extra = fused.bias_gelu_dropout(x, bias, *common, approximate), None
    out = Guarded(4000, np.uint16)
    emulated.fused_dropout(OPS[op], _record(0), 0, 0.3, 2, _address(x), _address(bias), _address(extra), out.address, 4000,
                           800, e0, 0, 0)  # fmt: skip
    assert same(out.values, expected.ravel(), "bfloat16")


def test_an_op_may_write_over_its_input(emulated):
    x, bias, extra = _inputs("float32", 5, 1024, 1)
    expected, inside = np.empty_like(x), x.copy()
    common = (0, _record(0), 0, 0.1, 0)
    _C.fused_dropout(*common, _address(x), _address(bias), _address(extra), _address(expected), x.size, 1024, 0, 1)
    over = _address(inside)
    emulated.fused_dropout(*common, over, _address(bias), _address(extra), over, x.size, 1024, 0, 0, 0)
    assert same(inside, expected, "float32")


def test_wrong_arguments_are_refused(emulated):
    good = dict(op=0, record=_record(0), generator=0, p=0.1, type=0, x=16, bias=0, extra=16, out=16, n=0, columns=3, e0=0,
                device=0, stream=0)  # fmt: skip
    emulated.fused_dropout(**good)
    for wrong in (dict(op=5), dict(op=-1), dict(type=1, n=3), dict(type=4), dict(type=7), dict(n=4), dict(n=-3),
                  dict(columns=0), dict(extra=0), dict(op=1), dict(p=-0.1), dict(p=float("nan")), dict(generator=4),
                  dict(record=b""), dict(bias=16, columns=2**31)):  # fmt: skip
        with pytest.raises(ValueError):
            emulated.fused_dropout(**{**good, **wrong})
    emulated.control.emulation_fail_next_launch(719)
    with pytest.raises(RuntimeError, match="fused_kernel: unspecified launch failure"):
        emulated.fused_dropout(**{**good, "n": 3})
