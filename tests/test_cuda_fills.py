"""The CUDA fills' very source, compiled for the CPU, bit for bit against the CPU kernels and the numpy reference."""

import itertools

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the CPU kernels' threads run on
from elements import STORAGE, Guarded
from test_kernels import DTYPES, FILLS, GENERATORS, _record
from vectors.make_law_v1 import P_VALUES, RECORDS

from everett_cuda import _C
from everett_cuda.reference import fill, keepdrop

# A warp fills 256 or 512 elements at a time, four warps a block; two or three blocks run at once.
LENGTHS = [1, 7, 8, 17, 255, 256, 511, 513, 2049, 5000]
# Inside a block of draws, and where the block number passes 2^32.
STARTS = [0, 64, 3, 2**35 - 100, 2**36 - 256, 2**41 + 7]
KINDS = [("words", "uint32"), *itertools.product(("uniform", "normal", "exponential", "gumbel", "bernoulli"), DTYPES)]
TYPES = {**DTYPES, "uint32": 4}
STORED = {**STORAGE, "uint32": np.uint32}


def _probabilities(n):
    p = np.random.default_rng(n).random(n)
    p[::7], p[3::7], p[5::11] = 0.0, 1.0, 2.0**-70
    return p


def _on_cpu(kind, which, generator, dtype, p, n, e0, s):
    out = np.empty(n, STORED[dtype])
    number, tag, _ = FILLS[kind]
    _C.fill(number, _record(which), GENERATORS[generator], tag, TYPES[dtype], p.ctypes.data, out.ctypes.data, (n,), (1,),
            (1,), (1,), e0, s, 1)  # fmt: skip
    return out


def _emulated(emulated, kind, which, generator, dtype, p, out, n, e0, s=0):
    number, tag, _ = FILLS[kind]
    emulated.fill(number, _record(which), GENERATORS[generator], tag, TYPES[dtype], p.ctypes.data, out.address, n, e0, s,
                  0, 0)  # fmt: skip


@pytest.mark.parametrize("kind, dtype", KINDS)
def test_fills_match_the_cpu(emulated, kind, dtype):
    for turn, (generator, e0) in enumerate(itertools.product(GENERATORS, STARTS)):
        n, s, which = LENGTHS[turn % len(LENGTHS)], turn % 3, turn % len(RECORDS)
        p = _probabilities(n)
        # Every third output lies at no multiple of 16 bytes.
        out = Guarded(n, STORED[dtype], shift=turn % 3 if turn % 3 != 1 else 16)
        _emulated(emulated, kind, which, generator, dtype, p, out, n, e0, s)
        assert out.holds_only(_on_cpu(kind, which, generator, dtype, p, n, e0, s)), (generator, n, e0, s)


@pytest.mark.parametrize("kind", FILLS)
def test_fills_match_the_reference(emulated, kind):
    n, e0 = 1200, 2**36 - 333
    e = np.arange(n, dtype=np.uint64) + np.uint64(e0)
    p, out = _probabilities(n), Guarded(n, np.uint32 if kind == "words" else np.float32)
    _emulated(emulated, kind, 1, "chacha8", "uint32" if kind == "words" else "float32", p, out, n, e0)
    if kind == "bernoulli":
        expected = fill.bernoulli(RECORDS[1], e, p).astype(np.float32)
    else:
        expected = FILLS[kind][2](RECORDS[1], e)
    assert out.holds_only(expected)


def test_a_stretch_of_a_fill_does_not_depend_on_where_it_begins(emulated):
    whole, part = Guarded(4000, np.float32), Guarded(1777, np.float32)
    p = np.zeros(1)
    _emulated(emulated, "normal", 0, "philox", "float32", p, whole, 4000, 32)
    _emulated(emulated, "normal", 0, "philox", "float32", p, part, 1777, 32 + 1001)
    assert part.holds_only(whole.values[1001 : 1001 + 1777])


def test_packed_bits_match_the_cpu(emulated):
    for turn, (p, generator) in enumerate(itertools.product(P_VALUES.values(), GENERATORS)):
        n, e0 = [1, 31, 1024, 1025, 4099, 20_000][turn % 6], [0, 33, 2**37 - 96, 2**45 - 21][turn % 4]
        which = turn % len(RECORDS)
        expected = np.full((n + 7) // 8, 77, np.uint8)
        _C.keep_bits(_record(which), GENERATORS[generator], p, expected.ctypes.data, n, e0, 2, 1)
        out = Guarded(len(expected), np.uint8, shift=turn % 5)
        emulated.keep_bits(_record(which), GENERATORS[generator], p, out.address, n, e0, 2, 0, 0)
        assert out.holds_only(expected), (p, generator, n, e0)


def test_packed_bits_match_the_reference(emulated):
    out = Guarded(377, np.uint8)
    emulated.keep_bits(_record(0), 0, 0.3, out.address, 3011, 2**37 - 1000, 0, 0, 0)
    assert out.holds_only(keepdrop.keep_bits(RECORDS[0], 0.3, 2**37 - 1000, 3011))


def test_the_record_may_lie_in_device_memory(emulated):
    record, values, addressed = RECORDS[1].astype("<u4"), Guarded(100, np.float32), Guarded(100, np.float32)
    _emulated(emulated, "uniform", 1, "chacha8", "float32", np.zeros(1), values, 100, 0)
    emulated.fill(1, record.ctypes.data, 0, 2, 0, 0, addressed.address, 100, 0, 0, 0, 0)
    assert addressed.holds_only(values.values)


def test_wrong_arguments_are_refused(emulated):
    good = dict(kind=1, record=_record(0), generator=0, tag=2, type=0, p=0, out=16, n=0, e0=0, s=0, device=0, stream=0)
    emulated.fill(**good)
    wrong = [dict(kind=9), dict(kind=6), dict(kind=0), dict(type=4, n=4), dict(type=5, n=4), dict(type=7, n=4), dict(type=8),
             dict(n=-1), dict(generator=4),
             dict(record=b""), dict(out=2), dict(kind=5, n=4), dict(kind=5, n=4, p=12)]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError):
            emulated.fill(**{**good, **change})
    good = dict(record=_record(0), generator=0, p=0.5, out=0, n=0, e0=0, s=0, device=0, stream=0)
    emulated.keep_bits(**good)
    for change in (dict(p=1.5), dict(p=float("nan")), dict(n=-1)):
        with pytest.raises(ValueError):
            emulated.keep_bits(**{**good, **change})


def test_a_failed_launch_names_its_kernel(emulated):
    out = Guarded(4, np.float32)
    for call, name in ((lambda: emulated.fill(1, _record(0), 0, 2, 0, 0, out.address, 4, 0, 0, 0, 0), "fill_kernel"),
                       (lambda: emulated.keep_bits(_record(0), 0, 0.5, out.address, 4, 0, 0, 0, 0), "keep_bits_kernel")):
        emulated.control.emulation_fail_next_launch(719)
        with pytest.raises(RuntimeError, match=f"{name}: unspecified launch failure"):
            call()
    assert out.holds_only(np.full(4, 0xA5A5A5A5, np.uint32).view(np.float32))
