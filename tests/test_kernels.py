"""CPU kernels against the law's vectors and the numpy reference, bit for bit, in every instruction set of this CPU."""

import ctypes
import faulthandler
import functools
import hashlib
import itertools
import json
import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the kernels' threads run on
from elements import POISON, SPECIAL, STORAGE, Guarded, bits, from_hex, same, values
from processes import in_forked_child
from vectors.make_law_v1 import P_VALUES, RECORDS

from everett_cuda import _C
from everett_cuda.reference import fill, keepdrop, layout, stream

LAW = json.loads((Path(__file__).parent / "vectors" / "law_v1.json").read_text())
GENERATORS = {name: i for i, name in enumerate(stream.GENERATORS)}
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
DROPOUT, DROPOUT_ADD, AFFINE = 0, 1, 2
# kind: number in the kernel, purpose tag, reference
FILLS = {
    "words": (0, stream.INTEGER, fill.words),
    "uniform": (1, stream.UNIFORM, fill.uniform),
    "normal": (2, stream.NORMAL, fill.normal),
    "exponential": (3, stream.EXPONENTIAL, fill.exponential),
    "gumbel": (4, stream.EXPONENTIAL, fill.gumbel),
    "bernoulli": (5, stream.BERNOULLI, fill.bernoulli),
}
# A block holds 32, 16 or 8 draws, a vector 4, 8 or 16 elements, a group 128, 256 or 512 decisions (portable, AVX2,
# AVX-512) and 64 to 256 values of a fill.
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 191, 192, 193,
           255, 256, 257, 384, 511, 512, 513, 640, 767, 768, 769, 1023, 1024, 1025, 1279, 1537]  # fmt: skip
LONGEST = max(LENGTHS)
# Starts inside blocks and groups, and where the block number passes 2^32 (16-bit draws at e = 2^37, 32-bit draws at
# 2^36, 64-bit draws at 2^35) or the dither's step does.
STARTS = [0, 1, 33, 300, 511, 2**32 - 40, 2**35 - 100, 2**36 - 700, 2**37 - 513, 2**38 - 1, 2**41 + 7, 2**45 - 21]
@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    """Runs the test on one instruction set, and puts the default back."""
    if request.param not in _C.instruction_sets():
        pytest.skip(f"this CPU does not run {request.param}")
    default = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(default)


def _record(which):
    return RECORDS[which].astype("<u4").tobytes()


def _run(e, n):
    return np.arange(n, dtype=np.uint64) + np.uint64(e)


@functools.lru_cache(maxsize=4096)
def _keep(which, generator, p, e, n=LONGEST):
    return keepdrop.keep_mask(RECORDS[which], p, _run(e, n), generator)


def _strides(a):
    return tuple(s // a.itemsize for s in a.strides)


def _masked_strided(op, which, generator, p, dtype, x, residual, out, e_strides, e0, affine=(0.0, 0.0, 0.0), s=0, threads=1):
    _C.masked_strided(
        op, _record(which), GENERATORS[generator], p, DTYPES[dtype], affine, x.ctypes.data,
        0 if residual is None else residual.ctypes.data, out.ctypes.data, x.shape, _strides(x),
        (0,) * x.ndim if residual is None else _strides(residual), _strides(out), e_strides, e0, s, threads,
    )  # fmt: skip


# --- the law's vectors ------------------------------------------------------------------------------------------------


def _read_mask(which, generator, p, e, n, threads=1):
    """The kernel's decisions, by dropout of ones."""
    x, y = np.ones(n, np.float32), np.full(n, np.nan, np.float32)
    _C.dropout(_record(which), GENERATORS[generator], p, 0, x.ctypes.data, y.ctypes.data, n, e, threads)
    assert not np.isnan(y).any()
    return y != 0


def _sha256(values):
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def test_masks_of_the_law(isa):
    for row in LAW["masks"]:
        p, where = float.fromhex(row["p"]) if isinstance(row["p"], str) else row["p"], (row["record"], row["generator"])
        if "dropped" in row:
            mask = _read_mask(*where, p, row["e"], row["n"])
            assert (np.flatnonzero(~mask) + row["e"]).tolist() == row["dropped"]
            continue
        for e, n, text in row["runs"]:
            assert "".join("01"[k] for k in _read_mask(*where, p, e, n).astype(int)) == text, (where, p, e)
        for e, n, kept, digest in row["long"]:
            mask = _read_mask(*where, p, e, n)
            assert (int(mask.sum()), _sha256(mask)) == (kept, digest), (where, p, e)


def _matches(values, texts):
    """Bit patterns against hexadecimal ones, where "nan" is any NaN."""
    digits = 2 * values.itemsize
    nan = np.isnan(values) if values.dtype.kind == "f" else values & 0x7FFF > 0x7F80
    got = ["nan" if bad else f"{int(v):0{digits}x}" for v, bad in zip(bits(values), nan, strict=True)]
    return got == texts


@pytest.mark.parametrize("op", ["dropout", "dropout_add"])
def test_values_of_the_law(isa, op):
    rows = LAW[op]
    assert len(rows) >= 16
    for row in rows:
        dtype, p = row["dtype"], float.fromhex(row["p"])
        x = from_hex(row["in"], dtype)
        y = np.empty_like(x)
        common = (_record(row["record"]), GENERATORS[row["generator"]], p, DTYPES[dtype], x.ctypes.data)
        if op == "dropout":
            _C.dropout(*common, y.ctypes.data, len(x), row["e"], 1)
        else:
            residual = from_hex(row["residual"], dtype)
            _C.dropout_add(*common, residual.ctypes.data, y.ctypes.data, len(x), row["e"], 1)
        assert _matches(y, row["out"].split()), (dtype, p)


def test_fills_of_the_law(isa):
    seen = 0
    for row in LAW["fills"]:
        if row["kind"] == "uniform_open":  # a conversion that no CPU fill uses
            continue
        number, tag, _ = FILLS[row["kind"]]
        for e, n, *kept, digest in row["long"]:
            if row["kind"] == "bernoulli":
                p = np.tile([float.fromhex(v) for v in row["p_repeated"]], n // len(row["p_repeated"]))
                out, type_ = np.full(n, np.nan, np.float32), 0
            else:
                p, type_ = np.zeros(1), 4 if row["kind"] == "words" else DTYPES[row["dtype"]]
                out = np.empty(n, np.uint32 if row["kind"] == "words" else STORAGE[row["dtype"]])
            _C.fill(number, _record(row["record"]), GENERATORS[row["generator"]], tag, type_, p.ctypes.data,
                    out.ctypes.data, (n,), (1,), (1,), (1,), e, 0, 1)  # fmt: skip
            if row["kind"] == "bernoulli":
                assert set(out.tolist()) == {0.0, 1.0}
                assert int(out.sum()) == kept[0]
                out = out == 1
            assert _sha256(out) == digest, (row["kind"], row["generator"], e)
            seen += 1
    assert seen > 300


def test_shards_of_the_law(isa):
    for row in LAW["shards"]:
        x = np.ones(row["shape"], np.float32)
        y = np.full_like(x, np.nan)
        _masked_strided(DROPOUT, row["record"], row["generator"], float.fromhex(row["p"]), "float32", x, None, y,
                        tuple(row["strides"]), row["offset"])  # fmt: skip
        assert "".join("01"[k] for k in (y != 0).ravel().astype(int)) == row["mask"], row["what"]
        assert not np.isnan(y).any()


# --- against the reference: contiguous --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", P_VALUES.values(), ids=P_VALUES)
def test_dropout_matches_reference(isa, p):
    turn = itertools.count()
    for generator, e in itertools.product(GENERATORS, STARTS):
        keep = _keep(1, generator, p, e)
        for dtype in DTYPES:
            x = values(dtype, LONGEST)
            expected = keepdrop.masked(x, keep, p, dtype)
            # All lengths in one dtype, some in the others: the product would take minutes.
            i = next(turn)
            lengths = LENGTHS if i % 17 == 0 else [LENGTHS[i % len(LENGTHS)], LONGEST]
            for n in lengths:
                out = Guarded(n, STORAGE[dtype], shift=i % 3)
                _C.dropout(_record(1), GENERATORS[generator], p, DTYPES[dtype], x.ctypes.data, out.address, n, e, 1)
                assert out.holds_only(expected[:n]), (generator, dtype, e, n)


@pytest.mark.parametrize("p", P_VALUES.values(), ids=P_VALUES)
def test_dropout_add_matches_reference(isa, p):
    turn = itertools.count(3)
    for generator, e in itertools.product(GENERATORS, STARTS[::2]):
        keep = _keep(1, generator, p, e)
        for dtype in DTYPES:
            x, residual = values(dtype, LONGEST), values(dtype, LONGEST, seed=1)
            expected = keepdrop.masked_add(x, residual, keep, p, dtype)
            i = next(turn)
            for n in LENGTHS if i % 17 == 0 else [LENGTHS[i % len(LENGTHS)], LONGEST]:
                out = Guarded(n, STORAGE[dtype], shift=i % 3)
                _C.dropout_add(_record(1), GENERATORS[generator], p, DTYPES[dtype], x.ctypes.data, residual.ctypes.data,
                               out.address, n, e, 1)  # fmt: skip
                assert same(out.values, expected[:n], dtype), (generator, dtype, e, n)
                out.values[:] = expected[:n]
                assert out.holds_only(expected[:n])


# (scale, shift, dropped): alpha dropout's at p = 0.1, and numbers whose fused and unfused results differ
AFFINES = [(0.8791, 0.1518, -1.3936), (1 / 3, -1 / 3, float("inf")), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("affine", AFFINES)
def test_affine_matches_reference(isa, affine):
    rounded_apart = 0
    for (i, generator), p, dtype in itertools.product(enumerate(GENERATORS), (0.0, 1e-6, 0.1, 0.5, 1.0), DTYPES):
        e = STARTS[(3 * i + 5) % len(STARTS)]
        x, n = values(dtype, LONGEST), LENGTHS[-1 - i]
        keep = _keep(2, generator, p, e)
        expected = keepdrop.masked_affine(x, keep, affine, dtype)[:n]
        out = Guarded(n, STORAGE[dtype], shift=1)
        _masked_strided(AFFINE, 2, generator, p, dtype, x[:n], None, out.values, (1,), e, affine)
        assert same(out.values, expected, dtype), (generator, p, dtype)
        out.values[:] = expected
        assert out.holds_only(expected)
        if dtype == "float32" and affine[0]:
            with np.errstate(over="ignore", invalid="ignore"):
                fused = (x[:n].astype(np.float64) * np.float32(affine[0]) + np.float32(affine[1])).astype(np.float32)
            rounded_apart += np.count_nonzero(keep[:n] & ~np.isnan(expected) & (fused != expected))
    assert affine[0] == 0 or rounded_apart > 20  # a kernel that fuses would not pass


def test_dropped_values_are_plus_zero_whatever_they_were(isa):
    for dtype in DTYPES:
        nan = {"float32": np.nan, "float64": np.nan, "bfloat16": 0x7FC0, "float16": np.nan}[dtype]
        minus_nan = {"bfloat16": 0xFFC0}.get(dtype, -np.nan)
        special = np.concatenate([from_hex(SPECIAL[dtype], dtype), np.array([nan, minus_nan], STORAGE[dtype])])
        x = np.resize(special, 996)
        for p in (1e-6, 0.5, 0.999, 1.0):
            y = np.empty_like(x)
            _C.dropout(_record(3), 0, p, DTYPES[dtype], x.ctypes.data, y.ctypes.data, len(x), 77, 1)
            keep = keepdrop.keep_mask(RECORDS[3], p, _run(77, len(x)))
            assert not bits(y)[~keep].any()
            assert same(y, keepdrop.masked(x, keep, p, dtype), dtype)
            if p == 0.5:
                assert 400 < keep.sum() < 600


def test_results_beyond_the_largest_number_are_infinite(isa):
    largest = {"float32": "7f7fffff", "float64": "7fefffffffffffff", "bfloat16": "7f7f", "float16": "7bff"}
    infinite = {"float32": "7f800000", "float64": "7ff0000000000000", "bfloat16": "7f80", "float16": "7c00"}
    for dtype in DTYPES:
        x = np.resize(from_hex(largest[dtype], dtype), 600)
        y = np.empty_like(x)
        _C.dropout(_record(3), 0, 0.5, DTYPES[dtype], x.ctypes.data, y.ctypes.data, len(x), 0, 1)
        assert set(bits(y).tolist()) == {0, int(infinite[dtype], 16)}


def test_p_zero_copies(isa):
    for dtype in DTYPES:
        x = values(dtype, LONGEST)
        for p in (0.0, 2.0**-48):
            out = Guarded(len(x), STORAGE[dtype])
            _C.dropout(_record(0), 0, p, DTYPES[dtype], x.ctypes.data, out.address, len(x), 5, 1)
            assert out.holds_only(x), (dtype, p)


def test_in_place(isa):
    for dtype, op in itertools.product(DTYPES, ("dropout", "dropout_add")):
        x, residual = values(dtype, LONGEST), values(dtype, LONGEST, seed=1)
        keep = _keep(1, "chacha8", 0.1, 0)
        buffer = x.copy()
        common = (_record(1), 0, 0.1, DTYPES[dtype], buffer.ctypes.data)
        if op == "dropout":
            _C.dropout(*common, buffer.ctypes.data, len(x), 0, 1)
            assert same(buffer, keepdrop.masked(x, keep, 0.1, dtype), dtype)
        else:
            _C.dropout_add(*common, residual.ctypes.data, buffer.ctypes.data, len(x), 0, 1)
            assert same(buffer, keepdrop.masked_add(x, residual, keep, 0.1, dtype), dtype)


def _page_end(n, itemsize):
    """Memory of n items that ends where an unreadable page begins. Keep the returned object alive."""
    page = mmap.PAGESIZE
    size = -(-max(n * itemsize, 1) // page) * page
    area = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    return area, start + size - n * itemsize


def test_nothing_is_read_or_written_beyond_the_end(isa):
    # In a child: a touch of the page behind the end is a SIGSEGV, and the answer empty.
    def run_at_page_ends():
        for dtype, n in itertools.product(DTYPES, LENGTHS):
            size = np.dtype(STORAGE[dtype]).itemsize
            areas, (x, r, y) = zip(*(_page_end(n, size) for _ in range(3)), strict=True)
            ctypes.memmove(x, values(dtype, LONGEST).ctypes.data, n * size)
            ctypes.memmove(r, values(dtype, LONGEST, seed=1).ctypes.data, n * size)
            for p in (0.1, 1e-3):
                _C.dropout(_record(1), 0, p, DTYPES[dtype], x, y, n, 40, 1)
                _C.dropout_add(_record(1), 3, p, DTYPES[dtype], x, r, y, n, 40, 1)
            for kind in range(1, 5):
                _C.fill(kind, _record(1), 0, 2, DTYPES[dtype], 0, y, (n,), (1,), (1,), (1,), 40, 0, 1)
            if size == 4:
                _C.fill(0, _record(1), 0, 8, 4, 0, y, (n,), (1,), (1,), (1,), 40, 0, 1)
            del areas
        return "done"

    assert in_forked_child(run_at_page_ends) == "done"

    def run_beyond():
        faulthandler.disable()  # the crash is meant
        area, x = _page_end(100, 4)
        y = np.empty(101, np.float32)
        _C.dropout(_record(1), 0, 0.1, 0, x, y.ctypes.data, 101, 0, 1)
        return f"read beyond {area}"

    assert in_forked_child(run_beyond) == "", "negative control: one element more must be caught"


# --- against the reference: strided, shards, threads ------------------------------------------------------------------


def _layouts():
    """Name: a function of a contiguous array of 3 * 8 * 10 * 12 values that gives a view of it."""
    shape = (3, 8, 10, 12)
    return {
        "transposed": lambda a: a.reshape(24, 120).T,
        "step 2 inside": lambda a: a.reshape(24, 120)[:, ::2],
        "step 3 outside": lambda a: a.reshape(24, 120)[::3],
        "rows of a wider tensor": lambda a: a.reshape(24, 120)[:, 5:38],
        "channels last": lambda a: a.reshape(3, 10, 12, 8).transpose(0, 3, 1, 2),
        "permuted": lambda a: a.reshape(shape).transpose(2, 0, 3, 1),
        "expanded columns": lambda a: np.broadcast_to(a.reshape(-1)[:40, None], (40, 33)),
        "expanded rows": lambda a: np.broadcast_to(a.reshape(-1)[None, :300], (5, 300)),
        "expanded scalar": lambda a: np.broadcast_to(a.reshape(-1)[:1], (700,)),
        "size-1 dimensions": lambda a: a.reshape(1, 24, 1, 120, 1)[:, :, :, ::-1][:, :, :, ::-1],
        "one dimension, step 7": lambda a: a.reshape(-1)[::7],
        "16 dimensions": lambda a: a.reshape(-1)[: 2**9 * 3].reshape((1, 2) * 7 + (2, 6))[..., ::2],
        "empty": lambda a: a.reshape(24, 120)[:, :0],
    }


@pytest.mark.parametrize("view", _layouts(), ids=lambda v: v)
def test_strided_input_matches_reference(isa, view):
    for (i, generator), dtype, op in itertools.product(enumerate(GENERATORS), DTYPES, (DROPOUT, DROPOUT_ADD, AFFINE)):
        take, p, e0 = _layouts()[view], (0.1, 1e-3, 0.5, 0.97)[i], STARTS[2 * i + 1]
        x, residual = take(values(dtype, 2880)), take(values(dtype, 2880, seed=1)[::-1].copy())
        e = layout.logical_indices(x.shape, e0)
        keep = keepdrop.keep_mask(RECORDS[2], p, e, generator)
        affine = AFFINES[0]
        if op == DROPOUT:
            expected = keepdrop.masked(x, keep, p, dtype)
        elif op == DROPOUT_ADD:
            expected = keepdrop.masked_add(x, residual, keep, p, dtype)
        else:
            expected = keepdrop.masked_affine(x, keep, affine, dtype)
        expected = np.ascontiguousarray(expected)
        # Into contiguous memory, and into every other column of a poisoned tensor.
        for gap in (1, 2):
            whole = Guarded(x.size * gap, STORAGE[dtype])
            before = whole.values.copy()
            out = whole.values.reshape(*x.shape[:-1], x.shape[-1] * gap)[..., ::gap]
            _masked_strided(op, 2, generator, p, dtype, x, residual if op == DROPOUT_ADD else None, out,
                            layout.row_major(x.shape), e0, affine)  # fmt: skip
            assert same(np.ascontiguousarray(out).ravel(), expected.ravel(), dtype), (generator, dtype, op, gap)
            out[...] = before.reshape(*x.shape[:-1], x.shape[-1] * gap)[..., ::gap]
            assert whole.holds_only(before), "wrote between or around its elements"


@pytest.mark.parametrize("p", [0.1, 1e-3])
def test_shards_together_are_the_whole(isa, p):
    whole_shape = (9, 10, 77)
    x = values("float32", 9 * 10 * 77, seed=2).reshape(whole_shape)
    expected = keepdrop.dropout(x, RECORDS[1], p, layout.logical_indices(whole_shape), "float32", "chacha8")
    cuts = {
        "rows": [(slice(0, 4),), (slice(4, 9),)],
        "columns": [(slice(None), slice(None), slice(a, b)) for a, b in ((0, 31), (31, 32), (32, 77))],
        "uneven blocks": [(slice(a, b), slice(c, d)) for a, b in ((0, 1), (1, 9)) for c, d in ((0, 7), (7, 10))],
        "every third column": [(slice(None), slice(None), slice(k, None, 3)) for k in range(3)],
    }
    for name, shards in cuts.items():
        y = np.full_like(x, np.nan)
        for shard in shards:
            local = np.ascontiguousarray(x[shard])
            out = np.empty_like(local)
            # Where the shard's first element lies, and how e moves along its dimensions.
            index = np.arange(x.size).reshape(whole_shape)[shard]
            _masked_strided(DROPOUT, 1, "chacha8", p, "float32", local, None, out, _strides(index), int(index.flat[0]))
            y[shard] = out
        assert y.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("generator", GENERATORS)
def test_shards_of_huge_tensors_match_reference(isa, generator):
    for whole, starts, shape in (
        ((2**33, 64), (2**32 - 1, 24), (3, 40)),
        ((2**20, 2**20), (2**17 - 2, 2**20 - 100), (5, 100)),
        ((2**40, 40), (2**39, 7), (2, 33)),
    ):
        strides = layout.row_major(whole)
        offset = sum(a * b for a, b in zip(starts, strides, strict=True))
        e = layout.shard_indices(whole, starts, shape)
        for p in (0.1, 1e-3):
            x, out = np.ones(shape, np.float32), np.full(shape, np.nan, np.float32)
            _masked_strided(DROPOUT, 3, generator, p, "float32", x, None, out, strides, offset)
            assert out.tobytes() == keepdrop.dropout(x, RECORDS[3], p, e, "float32", generator).tobytes()


def test_one_decision_for_many_elements(isa):
    # e strides of 0: channel dropout (N, C, H, W), one decision a channel, and one for all.
    x = np.ones((5, 40, 7, 9), np.float32)
    for p, strides in itertools.product((0.3, 1e-3), ((40, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))):
        out = np.full_like(x, np.nan)
        _masked_strided(DROPOUT, 1, "chacha8", p, "float32", x, None, out, strides, 11)
        e = layout.logical_indices(x.shape, 11, strides)
        assert out.tobytes() == keepdrop.dropout(x, RECORDS[1], p, e).tobytes(), (p, strides)


@pytest.mark.parametrize("generator", GENERATORS)
def test_stream_id_picks_the_stream(isa, generator):
    x = np.ones((2, 300), np.float32)
    for s in (1, 7, 0x80000001, 0xFFFFFFFF):
        out = np.full_like(x, np.nan)
        _masked_strided(DROPOUT, 1, generator, 0.5, "float32", x, None, out, (300, 1), 3, s=s)
        e = layout.logical_indices(x.shape, 3)
        assert out.tobytes() == keepdrop.dropout(x, RECORDS[1], 0.5, e, "float32", generator, s=s).tobytes()


@pytest.mark.parametrize("p", [0.1, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_changebits(isa, dtype, p):
    n, e = 3 * 16384 + 777, 2**37 - 20000
    x, residual = values(dtype, n, seed=3), values(dtype, n, seed=1)
    keep = _keep(1, "chacha8", p, e, n)
    rows = x[: 64 * 768].reshape(64, 768)[:, :765]
    row_keep = keepdrop.keep_mask(RECORDS[1], p, layout.logical_indices(rows.shape, e))
    for threads in (1, 2, 3, 7):
        out = Guarded(n, STORAGE[dtype])
        _C.dropout(_record(1), 0, p, DTYPES[dtype], x.ctypes.data, out.address, n, e, threads)
        assert out.holds_only(keepdrop.masked(x, keep, p, dtype)), threads
        _C.dropout_add(_record(1), 0, p, DTYPES[dtype], x.ctypes.data, residual.ctypes.data, out.address, n, e, threads)
        assert same(out.values, keepdrop.masked_add(x, residual, keep, p, dtype), dtype), threads
        y = np.empty(rows.shape, rows.dtype)
        _masked_strided(DROPOUT, 1, "chacha8", p, dtype, rows, None, y, (765, 1), e, threads=threads)
        assert y.tobytes() == keepdrop.masked(rows, row_keep, p, dtype).tobytes(), threads


# --- fills ------------------------------------------------------------------------------------------------------------

P_OF_BERNOULLI = np.array([0.0, 2.0**-64, 2.0**-65, 1e-3, 0.1, 0.25, 0.5, 0.9, 1 - 2.0**-53, 1.0, 0.3])


@functools.cache
def _fill_expected(kind, dtype, generator, e, n):
    if kind == "bernoulli":
        keep = fill.bernoulli(RECORDS[2], _run(e, n), np.resize(P_OF_BERNOULLI, n), generator)
        one = {"bfloat16": 0x3F80}.get(dtype, 1)
        return np.where(keep, one, 0).astype(STORAGE[dtype])
    if kind == "words":
        return fill.words(RECORDS[2], _run(e, n), generator)
    return FILLS[kind][2](RECORDS[2], _run(e, n), dtype, generator)


def _fill(kind, dtype, generator, e, n, out_address, p=None, threads=1):
    number, tag, _ = FILLS[kind]
    _C.fill(number, _record(2), GENERATORS[generator], tag, 4 if kind == "words" else DTYPES[dtype],
            0 if p is None else p.ctypes.data, out_address, (n,), (1,), (1,), (1,), e, 0, threads)  # fmt: skip


@pytest.mark.parametrize("kind", FILLS)
def test_fill_matches_reference(isa, kind):
    turn = itertools.count()
    p = np.resize(P_OF_BERNOULLI, LONGEST) if kind == "bernoulli" else None
    for generator, e in itertools.product(GENERATORS, STARTS[1::2]):
        for dtype in ["uint32"] if kind == "words" else DTYPES:
            expected = _fill_expected(kind, dtype, generator, e, LONGEST)
            i = next(turn)
            for n in LENGTHS if i % 7 == 0 else [LENGTHS[i % len(LENGTHS)], LONGEST]:
                out = Guarded(n, expected.dtype, shift=i % 3)
                _fill(kind, dtype, generator, e, n, out.address, p)
                assert out.holds_only(expected[:n]), (generator, dtype, e, n)


@pytest.mark.parametrize("kind", FILLS)
def test_strided_fill_matches_reference(isa, kind):
    shape, e0 = (6, 5, 37), 2**36 - 300
    e_strides = (1000, 37, 1)
    e = layout.logical_indices(shape, e0, e_strides)
    number, tag, reference = FILLS[kind]
    p = np.resize(P_OF_BERNOULLI, shape)
    for generator, dtype in itertools.product(("chacha8", "philox"), ["uint32"] if kind == "words" else DTYPES):
        if kind == "words":
            expected = reference(RECORDS[2], e, generator)
        elif kind == "bernoulli":
            keep = reference(RECORDS[2], e, p, generator)
            expected = np.where(keep, {"bfloat16": 0x3F80}.get(dtype, 1), 0).astype(STORAGE[dtype])
        else:
            expected = reference(RECORDS[2], e, dtype, generator)
        p_transposed = np.ascontiguousarray(p.T)
        whole = Guarded(6 * 5 * 37 * 2, expected.dtype)
        before = whole.values.copy()
        # Contiguous rows in a wider tensor, every other element, and transposed.
        for out in (whole.values.reshape(6, 5, 74)[:, :, 3:40], whole.values.reshape(6, 5, 74)[:, :, ::2],
                    whole.values.reshape(37, 5, 12)[:, :, :6].transpose(2, 1, 0)):  # fmt: skip
            _C.fill(number, _record(2), GENERATORS[generator], tag, 4 if kind == "words" else DTYPES[dtype],
                    p_transposed.ctypes.data, out.ctypes.data, shape, _strides(p_transposed.T), _strides(out), e_strides,
                    e0, 0, 1)  # fmt: skip
            assert np.ascontiguousarray(out).tobytes() == expected.tobytes(), (generator, dtype, out.strides)
            out[...] = np.frombuffer(bytes([POISON]) * out.itemsize, out.dtype)[0]
            assert whole.holds_only(before), "wrote between or around its elements"


@pytest.mark.parametrize("kind", FILLS)
def test_threads_do_not_change_fills(isa, kind):
    n, e = 40_001, 2**35 - 20_000
    p = np.resize(P_OF_BERNOULLI, n) if kind == "bernoulli" else None
    for dtype in ["uint32"] if kind == "words" else DTYPES:
        expected = _fill_expected(kind, dtype, "chacha8", e, n)
        for threads in (1, 2, 3, 7):
            out = Guarded(n, expected.dtype)
            _fill(kind, dtype, "chacha8", e, n, out.address, p, threads)
            assert out.holds_only(expected), (dtype, threads)


# --- records, misuse --------------------------------------------------------------------------------------------------


def test_derived_records_are_the_references():
    for row in LAW["records"]:
        record = _C.derive_record(bytes.fromhex(row["key"]), bytes.fromhex(row["nonce"]))
        assert record == struct.pack("<12I", *(int(w, 16) for w in row["record"].split()))


def test_rejects_what_is_no_job():
    x = np.ones(4, np.float32)
    at = x.ctypes.data
    with pytest.raises(ValueError, match="48 bytes"):
        _C.dropout(bytes(47), 0, 0.5, 0, at, at, 4, 0, 1)
    for generator in (-1, 4):
        with pytest.raises(ValueError, match="ChaCha8"):
            _C.dropout(bytes(48), generator, 0.5, 0, at, at, 4, 0, 1)
    with pytest.raises(ValueError, match="op is 0"):
        _C.masked_strided(3, bytes(48), 0, 0.5, 0, (0.0, 0.0, 0.0), at, 0, at, (4,), (1,), (0,), (1,), (1,), 0, 0, 1)
    with pytest.raises(ValueError, match="out must have one number a dimension"):
        _C.masked_strided(0, bytes(48), 0, 0.5, 0, (0.0, 0.0, 0.0), at, 0, at, (4,), (1,), (0,), (1, 1), (1,), 0, 0, 1)
    with pytest.raises(ValueError, match="1 to 16 dimensions"):
        _C.fill(0, bytes(48), 0, 8, 4, 0, at, (1,) * 17, (1,) * 17, (1,) * 17, (1,) * 17, 0, 0, 1)
    with pytest.raises(ValueError, match="unknown kind"):
        _C.fill(9, bytes(48), 0, 8, 4, 0, at, (4,), (1,), (1,), (1,), 0, 0, 1)
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _C.use_instruction_set("sse9")
    with pytest.raises(ValueError, match="32 bytes"):
        _C.derive_record(bytes(31), bytes(16))
    assert x.tolist() == [1, 1, 1, 1]


def test_every_bf16_pattern_rounds_alike_in_every_instruction_set():
    """Subnormals and NaNs take a way of their own where the CPU rounds to bf16 in one instruction."""
    patterns = np.random.default_rng(1).permutation(65536).astype(np.uint16)
    for p in (1 / 256, 0.1, 0.3, 0.5, 0.77, 0.999):
        results = []
        for isa in _C.instruction_sets():
            _C.use_instruction_set(isa)
            out = np.empty_like(patterns)
            _C.dropout(_record(0), 0, p, DTYPES["bfloat16"], patterns.ctypes.data, out.ctypes.data, len(patterns), 0, 1)
            results.append(out)
        _C.use_instruction_set(_C.instruction_sets()[0])
        expected = keepdrop.dropout(patterns, np.frombuffer(_record(0), np.uint32), p, np.arange(65536), "bfloat16")
        nan = (patterns & 0x7FFF) > 0x7F80
        assert np.array_equal(results[0][~nan], expected[~nan])
        assert all(np.array_equal(results[0], r) for r in results[1:])
