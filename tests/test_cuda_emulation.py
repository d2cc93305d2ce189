"""The CUDA kernels' very source, compiled for the CPU, bit for bit against the numpy reference and the CPU kernels."""

import functools
import itertools

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the CPU kernels' threads run on
from elements import STORAGE, Guarded, is_nan, same, values
from vectors.make_law_v1 import KEYS, RECORDS

from everett_cuda import _C
from everett_cuda.reference import fill, keepdrop, layout, stream

TYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3, "float8_e4m3fn": 5, "float8_e5m2": 6}
GENERATORS = {name: i for i, name in enumerate(stream.GENERATORS)}
DROPOUT, DROPOUT_ADD, AFFINE = range(3)
ALPHA = (0.8791, 0.1518, -1.3936)  # scale, shift, dropped
# A block makes 32 decisions, a vector holds 2 to 16 elements, a warp's tile 1024, and the emulated device has 8 warps.
LENGTHS = [0, 1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 9217, 20011]
# With and without a phase in a block, and where block numbers pass 2^32 (16-bit draws at 2^37, 32-bit draws at 2^36).
STARTS = [0, 32, 5, 2**31 + 17, 2**36 - 704, 2**37 - 512, 2**37 - 513, 2**38 + 96, 2**45, 2**45 + 3]
# Both forms of the decision, their borders, the ends.
P_VALUES = [0.0, 1e-6, 1 / 256 - 2.0**-47, 1 / 256, 0.1, 0.5, 31 / 32, 31 / 32 + 2.0**-47, 0.999, 1.0]


def _record(which):
    return RECORDS[which].astype("<u4").tobytes()


@functools.lru_cache(maxsize=512)
def _keep(which, generator, p, e, n, s=0):
    return keepdrop.keep_mask(RECORDS[which], p, np.uint64(e) + np.arange(n, dtype=np.uint64), generator, s=s)


def _expected(op, x, residual, keep, p, dtype, affine=ALPHA):
    if op == DROPOUT:
        return keepdrop.masked(x, keep, p, dtype)
    if op == DROPOUT_ADD:
        return keepdrop.masked_add(x, residual, keep, p, dtype)
    return keepdrop.masked_affine(x, keep, affine, dtype)


def _masked(cuda, op, record, generator, p, dtype, x, residual, out, n, e0, s=0, device=0, stream=0):
    cuda.masked(op, record, GENERATORS[generator], p, TYPES[dtype], ALPHA, x, residual, out, n, e0, s, device, stream)


# --- contiguous memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", [DROPOUT, DROPOUT_ADD, AFFINE], ids=["dropout", "dropout_add", "affine"])
def test_masked_ops_match_reference(emulated, op, dtype):
    turn = itertools.count(TYPES[dtype])
    for generator, p, which in itertools.product(GENERATORS, P_VALUES, range(2)):
        i = next(turn)
        e, n, shift = STARTS[(3 * i + which) % len(STARTS)], LENGTHS[(i + i // 13) % len(LENGTHS)], (i % 3) * (i % 2)
        x, residual = values(dtype, n), values(dtype, n, seed=1)
        expected = _expected(op, x, residual, _keep(which, generator, p, e, n), p, dtype)
        out = Guarded(n, STORAGE[dtype], shift)
        _masked(emulated, op, _record(which), generator, p, dtype, x.ctypes.data, residual.ctypes.data, out.address, n, e)
        assert same(out.values, expected, dtype), (generator, p, e, n, shift)
        out.values[:] = expected
        assert out.holds_only(expected), "wrote beyond its output"


@pytest.mark.parametrize("dtype", TYPES)
def test_every_length_and_start(emulated, dtype):
    for n, e in itertools.product(LENGTHS, STARTS):
        x = values(dtype, n)
        out = Guarded(n, STORAGE[dtype])
        _masked(emulated, DROPOUT, _record(1), "chacha8", 0.1, dtype, x.ctypes.data, 0, out.address, n, e)
        assert out.holds_only(keepdrop.masked(x, _keep(1, "chacha8", 0.1, e, n), 0.1, dtype)), (n, e)


@pytest.mark.parametrize("dtype", TYPES)
def test_any_alignment(emulated, dtype):
    n = 3100
    size = np.dtype(STORAGE[dtype]).itemsize
    x, residual = values(dtype, n), values(dtype, n, seed=1)
    expected = _expected(DROPOUT_ADD, x, residual, _keep(1, "chacha8", 0.1, 0, n), 0.1, dtype)
    for shifts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (15, 7, 3)):
        memory = [Guarded(n + 16 // size, STORAGE[dtype], shift) for shift in shifts]
        # From a multiple of 16, so that shift 0 is the aligned case.
        skip = [-(m.address - shift * size) % 16 // size for m, shift in zip(memory, shifts, strict=True)]
        memory[0].values[skip[0] :][:n], memory[1].values[skip[1] :][:n] = x, residual
        addresses = [m.address + k * size for m, k in zip(memory, skip, strict=True)]
        _masked(emulated, DROPOUT_ADD, _record(1), "chacha8", 0.1, dtype, *addresses, n, 0)
        assert same(memory[2].values[skip[2] :][:n], expected, dtype), shifts


def test_in_place(emulated):
    for dtype, op, n in itertools.product(TYPES, (DROPOUT, DROPOUT_ADD), (4096, 5001)):
        x, residual = values(dtype, n), values(dtype, n, seed=1)
        buffer = x.copy()
        at = buffer.ctypes.data
        _masked(emulated, op, _record(1), "chacha8", 0.1, dtype, at, residual.ctypes.data, at, n, 0)
        expected = _expected(op, x, residual, _keep(1, "chacha8", 0.1, 0, n), 0.1, dtype)
        assert same(buffer, expected, dtype), (dtype, op)


@pytest.mark.parametrize("dtype", TYPES)
def test_dropped_values_are_plus_zero_whatever_they_were(emulated, dtype):
    size = np.dtype(STORAGE[dtype]).itemsize
    x = np.resize(np.full(size, 0xFF, np.uint8).view(STORAGE[dtype]), 2100).copy()  # all ones: -NaN
    x[::3] = values(dtype, 700)
    for p in (1e-3, 0.5, 1.0):
        y = np.empty_like(x)
        _masked(emulated, DROPOUT, _record(3), "chacha8", p, dtype, x.ctypes.data, 0, y.ctypes.data, len(x), 64)
        keep = _keep(3, "chacha8", p, 64, len(x))
        assert not y.view(f"<u{size}")[~keep].any()
        assert same(y, keepdrop.masked(x, keep, p, dtype), dtype)
        assert is_nan(y, dtype).sum() == keep.reshape(-1)[np.flatnonzero(is_nan(x, dtype))].sum()


def test_every_narrow_pattern_is_rounded_as_on_the_cpu(emulated):
    # The hardware's conversions (here by the PTX manual) against the law's integer arithmetic, for every input there is.
    for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
        size = np.dtype(STORAGE[dtype]).itemsize
        x = np.random.default_rng(1).permutation(np.arange(65536, dtype=np.uint16)).view(f"<u{size}").view(STORAGE[dtype])
        for p, op in itertools.product((1 / 256, 0.3, 0.999), (DROPOUT, DROPOUT_ADD, AFFINE)):
            a, b, r = np.empty_like(x), np.empty_like(x), x[::-1].copy()
            at = (x.ctypes.data, r.ctypes.data)
            _masked(emulated, op, _record(0), "philox", p, dtype, *at, a.ctypes.data, len(x), 0)
            one = (1,)
            _C.masked_strided(op, _record(0), 3, p, TYPES[dtype], ALPHA, *at, b.ctypes.data, (len(x),), one, one, one, one,
                              0, 0, 1)  # fmt: skip
            assert same(a, b, dtype), (dtype, p, op)


def test_fused_arithmetic_would_be_noticed(emulated):
    # One rounding instead of two gives other values; the kernels must not.
    x, n = values("float32", 20011), 20011
    out = np.empty_like(x)
    _masked(emulated, AFFINE, _record(1), "chacha8", 1e-6, "float32", x.ctypes.data, 0, out.ctypes.data, n, 0)
    scale, shift = np.float32(ALPHA[0]), np.float32(ALPHA[1])
    with np.errstate(over="ignore"):
        fused = (x.astype(np.float64) * scale + shift).astype(np.float32)
    assert np.count_nonzero(fused != out) > 100


def test_stream_id_picks_the_stream(emulated):
    x = np.ones(300, np.float32)
    for generator, s, p in itertools.product(GENERATORS, (1, 0x80000001, 0xFFFFFFFF), (0.5, 1e-3)):
        out = np.empty_like(x)
        _masked(emulated, DROPOUT, _record(1), generator, p, "float32", x.ctypes.data, 0, out.ctypes.data, 300, 3, s)
        assert np.array_equal(out != 0, _keep(1, generator, p, 3, 300, s))


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", GENERATORS)
def test_record_in_device_memory(emulated, generator):
    record = RECORDS[2].astype("<u4").copy()
    for dtype, p in itertools.product(("float32", "bfloat16"), (0.1, 1e-3)):
        x, n, out = values(dtype, 5000), 5000, Guarded(5000, STORAGE[dtype])
        _masked(emulated, DROPOUT, record.ctypes.data, generator, p, dtype, x.ctypes.data, 0, out.address, n, 7)
        assert out.holds_only(keepdrop.masked(x, _keep(2, generator, p, 7, n), p, dtype))


def test_derived_records_are_the_references(emulated):
    key = np.frombuffer(bytes(range(100, 132)), np.uint8).copy()
    for n in (0, 1, 2, 33, 70):
        nonces = np.random.default_rng(n).integers(0, 256, (n, 16), dtype=np.uint8)
        out = Guarded(n * 12, np.uint32)
        emulated.subkeys(key.ctypes.data, nonces.ctypes.data, out.address, n, 0, 0)
        expected = [stream.derive(key.tobytes(), nonce.tobytes()).astype("<u4") for nonce in nonces]
        assert out.holds_only(np.concatenate([np.zeros(0, np.uint32), *expected]))


def test_a_derived_record_serves_a_kernel(emulated):
    key, nonce = (np.frombuffer(b, np.uint8).copy() for b in KEYS[1])
    record = np.zeros(12, np.uint32)
    emulated.subkeys(key.ctypes.data, nonce.ctypes.data, record.ctypes.data, 1, 0, 0)
    x = values("bfloat16", 3000)
    out = np.empty_like(x)
    _masked(emulated, DROPOUT, record.ctypes.data, "chacha8", 0.1, "bfloat16", x.ctypes.data, 0, out.ctypes.data, 3000, 0)
    assert out.tobytes() == keepdrop.masked(x, _keep(1, "chacha8", 0.1, 0, 3000), 0.1, "bfloat16").tobytes()


# --- any layout -------------------------------------------------------------------------------------------------------


def _layouts():
    """Name: a function of a contiguous array of 3 * 8 * 10 * 12 values that gives a view of it."""
    return {
        "contiguous": lambda a: a,
        "transposed": lambda a: a.reshape(24, 120).T,
        "every other column": lambda a: a.reshape(24, 120)[:, ::2],
        "rows of a wider tensor": lambda a: a.reshape(24, 120)[:, 5:38],
        "channels last": lambda a: a.reshape(3, 10, 12, 8).transpose(0, 3, 1, 2),
        "permuted": lambda a: a.reshape(3, 8, 10, 12).transpose(2, 0, 3, 1),
        "expanded columns": lambda a: np.broadcast_to(a.reshape(-1)[:40, None], (40, 33)),
        "reversed": lambda a: a.reshape(24, 120)[::-1, ::-1],
        "16 dimensions": lambda a: a.reshape(-1)[: 2**9 * 3].reshape((1, 2) * 7 + (2, 6))[..., ::2],
        "one element": lambda a: a.reshape(-1)[7:8],
        "empty": lambda a: a.reshape(24, 120)[:, :0],
    }


def _strides(a):
    return tuple(s // a.itemsize for s in a.strides)


def _masked_strided(cuda, op, which, generator, p, dtype, x, residual, out, e_strides, e0, s=0):
    cuda.masked_strided(
        op, _record(which), GENERATORS[generator], p, TYPES[dtype], ALPHA, x.ctypes.data, residual.ctypes.data,
        out.ctypes.data, x.shape, _strides(x), _strides(residual), _strides(out), e_strides, e0, s, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("view", _layouts(), ids=lambda v: v)
def test_strided_memory_matches_reference(emulated, view):
    turn = itertools.count()
    take = _layouts()[view]
    for dtype, op in itertools.product(TYPES, (DROPOUT, DROPOUT_ADD, AFFINE)):
        i = next(turn)
        generator, p, e0 = stream.GENERATORS[i % 4], (0.1, 1e-3, 0.5, 0.97, 1.0)[i % 5], STARTS[i % len(STARTS)]
        x, residual = take(values(dtype, 2880)), take(values(dtype, 2880, seed=1)[::-1].copy())
        keep = keepdrop.keep_mask(RECORDS[2], p, layout.logical_indices(x.shape, e0), generator)
        expected = np.ascontiguousarray(_expected(op, x, residual, keep, p, dtype))
        # Into contiguous memory, and into every other column of a poisoned tensor.
        for gap in (1, 2):
            whole = Guarded(x.size * gap, STORAGE[dtype])
            before = whole.values.copy()
            out = whole.values.reshape(*x.shape[:-1], x.shape[-1] * gap)[..., ::gap]
            _masked_strided(emulated, op, 2, generator, p, dtype, x, residual, out, layout.row_major(x.shape), e0)
            assert same(np.ascontiguousarray(out).ravel(), expected.ravel(), dtype), (generator, dtype, op, gap)
            out[...] = before.reshape(*x.shape[:-1], x.shape[-1] * gap)[..., ::gap]
            assert whole.holds_only(before), "wrote between or around its elements"


@pytest.mark.parametrize("p", [0.3, 1e-3])
@pytest.mark.parametrize("generator", GENERATORS)
def test_shards_and_repeated_decisions(emulated, generator, p):
    shapes = {
        # e strides of shards: rows and columns of a wider tensor, every third column, far apart; and of one decision for
        # many elements (channels, samples, all).
        "rows": ((7, 300), (300, 1)), "columns": ((40, 45), (1000, 1)), "steps": ((9, 200), (600, 3)),
        "far": ((5, 70), (2**33, 1)), "transposed": ((60, 50), (1, 60)), "backwards": ((4, 500), (500, -1)),
        "channels": ((5, 6, 7, 9), (6, 1, 0, 0)), "samples": ((11, 200), (1, 0)), "one": ((3, 500), (0, 0)),
    }  # fmt: skip
    for name, (shape, e_strides) in shapes.items():
        x = np.ones(shape, np.float32)
        out = np.full_like(x, np.nan)
        _masked_strided(emulated, DROPOUT, 3, generator, p, "float32", x, x, out, e_strides, 2**37 - 77)
        e = layout.logical_indices(shape, 2**37 - 77, e_strides)
        assert out.tobytes() == keepdrop.dropout(x, RECORDS[3], p, e, "float32", generator).tobytes(), name


# --- the law's headers, launches, misuse ------------------------------------------------------------------------------


def test_law_headers(emulated):
    # What `law` evaluates on each new card, here on the CPU.
    first, blocks = 2**32 - 3, 40
    numbers = np.uint64(first) + np.arange(blocks, dtype=np.uint64)
    for generator in GENERATORS:
        got = emulated.law(GENERATORS[generator], _record(1), 8, 3, 0.5, 0, first, blocks)
        assert got == stream.blocks(RECORDS[1], numbers, 8, 3, generator).astype("<u4").tobytes()
    kinds = {1: (None, 32), 2: (fill.uniform, 16), 3: (fill.normal, 16), 4: (fill.exponential, 8), 5: (fill.gumbel, 8)}
    for what, (reference, per_block) in kinds.items():
        tag = {1: stream.KEEP, 2: stream.UNIFORM, 3: stream.NORMAL}.get(what, stream.EXPONENTIAL)
        e = np.uint64(first * per_block) + np.arange(blocks * per_block, dtype=np.uint64)
        if reference is None:
            expected = keepdrop.keep_mask(RECORDS[1], 0.1, e, "chacha8", tag, 3).astype("<u4")
        else:
            expected = reference(RECORDS[1], e, s=3).view("<u4")
        assert emulated.law(0, _record(1), tag, 3, 0.1, what, first, blocks) == expected.tobytes(), what


@pytest.fixture
def small(emulated):
    """A function that launches a small dropout; keyword arguments replace those of `masked`."""
    x, out = np.ones(100, np.float32), np.zeros(100, np.float32)
    good = dict(op=0, record=_record(0), generator=0, p=0.1, type=0, affine=(0.0, 0.0, 0.0), x=x.ctypes.data, extra=0,
                out=out.ctypes.data, n=100, e0=0, s=0, device=0, stream=0)  # fmt: skip

    def launch(**changes):
        assert x.all()  # keeps the arrays alive
        emulated.masked(**{**good, **changes})
        return out

    return launch


def test_device_and_stream_of_a_launch(emulated, small):
    control = emulated.control
    before = control.emulation_current_device()
    for device, handle in ((0, 0), (1, 0xABC), (0, 2**63)):
        small(device=device, stream=handle)
        assert control.emulation_last_launch_device() == device
        assert control.emulation_last_launch_stream() == handle
        assert control.emulation_current_device() == before


def test_nothing_is_launched_for_no_elements(emulated, small):
    launches = emulated.control.emulation_launches()
    small(n=0)
    assert emulated.control.emulation_launches() == launches
    small(n=1)
    assert emulated.control.emulation_launches() == launches + 1


def test_launch_errors_name_the_kernel(emulated, small):
    before = emulated.control.emulation_current_device()
    for code, words in ((719, "unspecified launch failure"), (2, "out of memory")):
        emulated.control.emulation_fail_next_launch(code)
        with pytest.raises(RuntimeError, match=f"masked_kernel: {words}"):
            small(device=1)
        assert emulated.control.emulation_current_device() == before, "the device must be put back"
    small()
    emulated.control.emulation_fail_next_launch(719)
    with pytest.raises(RuntimeError, match="subkey_kernel: unspecified launch failure"):
        memory = np.zeros(64, np.uint8)
        emulated.subkeys(memory.ctypes.data, memory.ctypes.data, memory.ctypes.data, 1, 0, 0)
    x = np.ones((4, 3), np.float32)
    emulated.control.emulation_fail_next_launch(719)
    with pytest.raises(RuntimeError, match="masked_strided_kernel: unspecified launch failure"):
        _masked_strided(emulated, DROPOUT, 0, "chacha8", 0.1, "float32", x.T, x.T, np.empty((3, 4), np.float32), (4, 1), 0)


def test_no_such_device(emulated, small):
    with pytest.raises(RuntimeError, match="choosing the device: invalid device ordinal"):
        small(device=7)
    emulated.control.emulation_set_devices(0)
    try:
        assert emulated.device_count() == 0
        with pytest.raises(RuntimeError, match="no CUDA-capable device"):
            small()
    finally:
        emulated.control.emulation_set_devices(2)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"op": 3}, "op is 0"), ({"op": -1}, "op is 0"), ({"generator": 4}, "ChaCha8"), ({"type": 4}, "type is 0"),
        ({"type": 7}, "type is 0"), ({"p": float("nan")}, "p must be"), ({"p": 1.1}, "p must be"), ({"p": -1}, "p must be"),
        ({"record": bytes(47)}, "48 bytes"), ({"record": 0}, "device address"), ({"record": 6}, "device address"),
        ({"n": -1}, "negative"), ({"op": 2, "affine": (1.0, 2.0)}, "scale, shift, dropped"),
    ],
)  # fmt: skip
def test_rejects_what_is_no_job(small, bad, words):
    with pytest.raises(ValueError, match=words):
        small(**bad)


def test_rejects_bad_layouts_and_subkeys(emulated):
    x = np.ones(4, np.float32)
    at = x.ctypes.data
    with pytest.raises(ValueError, match="1 to 16 dimensions"):
        emulated.masked_strided(0, bytes(48), 0, 0.5, 0, ALPHA, at, 0, at, (), (), (), (), (), 0, 0, 0, 0)
    with pytest.raises(ValueError, match="out must have one number a dimension"):
        emulated.masked_strided(0, bytes(48), 0, 0.5, 0, ALPHA, at, 0, at, (4,), (1,), (0,), (1, 1), (1,), 0, 0, 0, 0)
    with pytest.raises(ValueError, match="device addresses"):
        emulated.subkeys(0, at, at, 1, 0, 0)
    with pytest.raises(ValueError, match="multiples of 4"):
        emulated.subkeys(at + 2, at, at, 1, 0, 0)
    assert x.tolist() == [1, 1, 1, 1]
