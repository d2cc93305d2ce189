"""The CUDA noise and rounding kernels' very source, compiled for the CPU, bit for bit against the CPU kernels and numpy."""

import itertools

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the CPU kernels' threads run on
from elements import STORAGE, Guarded, same, values
from test_kernels import GENERATORS, _record
from vectors.make_law_v1 import RECORDS

from everett_cuda import _C
from everett_cuda.reference import fused

TYPES = {"float32": 0, "bfloat16": 2, "float16": 3}
# A stretch of a warp is 512 elements of noise or 1024 of rounding, four warps a block, two blocks at once.
LENGTHS = [1, 15, 512, 513, 1024, 1025, 5000, 9217]
STARTS = [0, 32, 5, 2**36 - 512, 2**37 - 1024, 2**45 + 3]


def _inputs(dtype, n, seed):
    # Half the numbers of moderate size, so that the noise counts and rounding meets subnormals of fp16.
    rng = np.random.default_rng(seed)
    moderate = fused.round_to((rng.normal(size=n) * 10.0 ** rng.integers(-8, 5, n)).astype(np.float32), dtype)
    return np.where(rng.random(n) < 0.5, values(dtype, n), moderate)


def _cases(offset=0):
    for i, (generator, e0) in enumerate(itertools.product(GENERATORS, STARTS), offset):
        yield generator, e0, LENGTHS[i % len(LENGTHS)], i % len(RECORDS), i % 3


@pytest.mark.parametrize("dtype", TYPES)
def test_noise_matches_the_cpu(emulated, dtype):
    for generator, e0, n, which, shift in _cases():
        x, expected = _inputs(dtype, n, n), np.empty(n, STORAGE[dtype])
        common = (_record(which), GENERATORS[generator], TYPES[dtype], 0.37, x.ctypes.data)
        _C.add_noise(*common, expected.ctypes.data, n, e0, 1)
        out = Guarded(n, STORAGE[dtype], shift=shift // 2)
        emulated.add_noise(*common, out.address, n, e0, 0, 0)
        assert same(out.values, expected, dtype), (generator, n, e0)
        out.values[:] = expected
        assert out.holds_only(expected), "wrote beyond its output"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_matches_the_cpu(emulated, dtype):
    for generator, e0, n, which, shift in _cases(3):
        x, expected = _inputs("float32", n, n), np.empty(n, np.uint16)
        common = (_record(which), GENERATORS[generator], TYPES[dtype], x.ctypes.data)
        _C.stochastic_round(*common, expected.ctypes.data, n, e0, 1)
        out = Guarded(n, np.uint16, shift=shift)
        emulated.stochastic_round(*common, out.address, n, e0, 0, 0)
        assert out.holds_only(expected), (generator, n, e0)


def test_both_match_the_reference(emulated):
    n, e0 = 3000, 2**37 - 1024
    e, x = np.arange(n, dtype=np.uint64) + np.uint64(e0), np.abs(_inputs("float32", n, 1))
    x = np.where(np.isfinite(x), x, np.float32(1))
    noise, rounded = Guarded(n, np.float32), Guarded(n, np.uint16)
    emulated.add_noise(_record(0), 0, 0, 0.5, x.ctypes.data, noise.address, n, e0, 0, 0)
    emulated.stochastic_round(_record(0), 0, 2, x.ctypes.data, rounded.address, n, e0, 0, 0)
    assert noise.holds_only(fused.add_noise(x, 0.5, RECORDS[0], e))
    assert rounded.holds_only(fused.stochastic_round(x, RECORDS[0], e, "bfloat16"))


def test_wrong_arguments_are_refused(emulated):
    round_ = dict(record=_record(0), generator=0, type=2, x=16, out=16, n=0, e0=0, device=0, stream=0)
    noise = {**round_, "sigma": 1.0}
    for call, good, wrong in ((emulated.stochastic_round, round_, dict(type=0)), (emulated.add_noise, noise, dict(type=5))):
        call(**good)
        for change in (wrong, dict(type=1), dict(type=7), dict(n=-1), dict(generator=-1), dict(record=0)):
            with pytest.raises(ValueError):
                call(**{**good, **change})
        emulated.control.emulation_fail_next_launch(719)
        with pytest.raises(RuntimeError, match="perturb_kernel: unspecified launch failure"):
            call(**{**good, "n": 1})
