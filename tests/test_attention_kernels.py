"""Attention's mask: the committed vectors; CPU kernels, in every instruction set, and the emulated GPU as the reference."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch  # noqa: F401  brings the OpenMP runtime that the kernels' threads run on
from elements import STORAGE, Guarded, same, values
from test_kernels import DTYPES, GENERATORS, _record, isa  # noqa: F401  (isa: a fixture)
from vectors import make_attention_v1
from vectors.make_law_v1 import RECORDS

from everett_cuda import _C
from everett_cuda.reference import attention, keepdrop, stream

LAW = json.loads(make_attention_v1.PATH.read_text())
# (heads, queries, keys), global index of the first: a weight, parts of tiles, several chunks of keys, far away.
PLACES = [
    ((1, 1, 1), (0, 0, 0)), ((2, 5, 7), (0, 0, 0)), ((3, 33, 300), (7, 5, 70)), ((2, 40, 517), (1, 15, 63)),
    ((1, 16, 64), (2**32 - 1, 2**35 + 16, 2**20 + 3)), ((1, 2, 1030), (0, 31, 255)), ((5, 1, 3), (9, 8, 2**31 - 16)),
]  # fmt: skip


def _cpu(which, generator, p, dtype, x, out_address, first, threads=1):
    _C.attention_mask(_record(which), GENERATORS[generator], p, DTYPES[dtype], x.ctypes.data, out_address, *x.shape, *first,
                      threads)  # fmt: skip


def test_vectors_are_the_references():
    assert make_attention_v1.build() == make_attention_v1.PATH.read_text(), "the law is frozen: a change is law 2"


def test_masks_of_the_law(isa):  # noqa: F811
    for row in LAW["masks"]:
        x = np.ones(row["shape"], np.float32)
        y = np.full_like(x, np.nan)
        _cpu(row["record"], row["generator"], float.fromhex(row["p"]), "float32", x, y.ctypes.data, row["first"])
        mask = y != 0
        assert (int(mask.sum()), hashlib.sha256(mask.tobytes()).hexdigest()) == (row["kept"], row["sha256"])
        assert "".join("01"[b] for b in mask[0, 0].astype(int)) == row["query"]


def test_reference_is_the_law_word_for_word():
    """The sentence of the law, for single weights, through one call or block each."""
    from everett_cuda.reference import chacha
    from everett_cuda.reference.philox import philox4x32_10

    record = RECORDS[2]
    for bh, q, k in ((0, 0, 0), (3, 21, 1000), (2**32 - 1, 2**20 + 9, 77), (1, 15, 16), (6, 8, 63)):
        row = np.array(
            [[(k >> 4) * 32 + (q & 7) * 4 + (k >> 1 & 3), q >> 4, int(record[2]) ^ 5, int(record[3]) ^ bh]], np.uint32
        )
        word = philox4x32_10(row, record[:2])[0][(q >> 3 & 1) * 2 + (k >> 3 & 1)]
        assert attention.half_words(record, bh, q, k, "philox") == int(word) >> 16 * (k & 1) & 0xFFFF
        row = np.array([[(k >> 6) * 32 + (q & 7) * 4 + (k >> 1 & 3), q >> 4, 5, bh]], np.uint32)
        halves = chacha.blocks(record[:8], row, 12)[0].astype("<u4").view("<u2")
        assert (
            attention.half_words(record, bh, q, k, "chacha12") == halves[(q >> 3 & 1) * 16 + (k >> 3 & 7) * 2 + (k & 1)]
        )


def test_no_two_weights_share_a_draw():
    """Each half-word of each unit decides one weight: in two heads of 48 x 192 weights all (unit, half-word) differ."""
    for words in (4, 16):
        places = set()
        for q, k in itertools.product(range(48), range(192)):
            unit = ((k // (4 * words)) * 32 + (q & 7) * 4 + (k >> 1 & 3), q >> 4)
            column = k >> 3 & (1 if words == 4 else 7)
            places.add((unit, (q >> 3 & 1) * words // 2 + column, k & 1))
        assert len(places) == 48 * 192


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_match_the_reference(isa, dtype):  # noqa: F811
    turn = itertools.count()
    for generator, (shape, first) in itertools.product(GENERATORS, PLACES):
        i = next(turn)
        p, which = (0.1, 1 / 256, 0.5, 31 / 32, 0.3)[i % 5], i % len(RECORDS)
        x = values(dtype, int(np.prod(shape)), seed=i).reshape(shape)
        out = Guarded(x.size, STORAGE[dtype], shift=i % 3)
        _cpu(which, generator, p, dtype, x, out.address, first)
        expected = attention.dropped(x, RECORDS[which], p, dtype, generator, *first)
        assert same(out.values, np.ascontiguousarray(expected).ravel(), dtype), (generator, shape)


def test_threads_and_slices_change_nothing():
    x = np.ones((3, 70, 700), np.float32)
    whole = np.empty_like(x)
    _cpu(1, "philox", 0.2, "float32", x, whole.ctypes.data, (0, 0, 0))
    for threads in (2, 5):
        y = np.empty_like(x)
        _cpu(1, "philox", 0.2, "float32", x, y.ctypes.data, (0, 0, 0), threads)
        assert np.array_equal(y, whole)
    for heads, queries, keys in (
        (slice(1, 3), slice(13, 60), slice(100, 333)),
        (slice(2, 3), slice(0, 70), slice(17, 18)),
    ):
        part = np.ascontiguousarray(x[heads, queries, keys])
        y = np.empty_like(part)
        _cpu(1, "philox", 0.2, "float32", part, y.ctypes.data, (heads.start, queries.start, keys.start))
        assert np.array_equal(y, whole[heads, queries, keys])


def test_dropped_fraction_is_exact():
    """Over the dithers every weight is dropped with probability P/2^47: thresholds of one query over all of d."""
    p = 0.1
    h = keepdrop.threshold(p)
    records = np.tile(RECORDS[0], (4096, 1))
    records[:, 8] = np.arange(4096, dtype=np.uint64) * 2**20 + 12345
    kept = [attention.keep_mask(r, p, (1, 1, 64), "philox") for r in records[:: 4096 // 64]]
    assert len({k.tobytes() for k in kept}) <= 2  # T or T + 1, nothing else
    x = (records[:, 8].astype(np.uint64) + np.uint64(5 * 0x9E3779B9)) % 2**32
    assert abs((x < h.f).mean() - h.f / 2**32) < 1 / 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_matches_the_reference(emulated, dtype):
    turn = itertools.count()
    for generator, (shape, first) in itertools.product(GENERATORS, PLACES):
        i = next(turn)
        p, which = (0.1, 1 / 256, 0.5, 31 / 32, 0.3)[i % 5], i % len(RECORDS)
        x = values(dtype, int(np.prod(shape)), seed=i).reshape(shape)
        out = Guarded(x.size, STORAGE[dtype], shift=i % 3)
        emulated.attention_mask(_record(which), GENERATORS[generator], p, DTYPES[dtype], x.ctypes.data, out.address, *shape,
                                *first, 0, 0)  # fmt: skip
        expected = attention.dropped(x, RECORDS[which], p, dtype, generator, *first)
        assert same(out.values, np.ascontiguousarray(expected).ravel(), dtype), (generator, shape)
    record = RECORDS[1].astype("<u4").copy()  # in device memory
    emulated.attention_mask(record.ctypes.data, 3, 0.5, DTYPES[dtype], x.ctypes.data, out.address, *shape, *first, 0, 0)
    expected = attention.dropped(x, RECORDS[1], 0.5, dtype, stream.GENERATORS[3], *first)
    assert same(out.values, np.ascontiguousarray(expected).ravel(), dtype)


def test_misuse(emulated):
    x = np.ones(8, np.float32)
    good = dict(record=_record(0), generator=3, p=0.5, type=0, x=x.ctypes.data, out=x.ctypes.data, heads=0, queries=2,
                keys=4, bh0=0, q0=0, k0=0)  # fmt: skip
    for call, more in ((_C.attention_mask, dict(threads=1)), (emulated.attention_mask, dict(device=0, stream=0))):
        call(**good, **more)
        for wrong in (dict(p=0.0), dict(p=1.0), dict(p=1 / 300), dict(p=0.98), dict(p=float("nan")), dict(type=4),
                      dict(generator=4, heads=1), dict(keys=-1), dict(record=b"")):  # fmt: skip
            if "record" in wrong:
                wrong["heads"] = 1
            with pytest.raises(ValueError):
                call(**{**good, **more, **wrong})
    emulated.control.emulation_fail_next_launch(719)
    with pytest.raises(RuntimeError, match="attention_mask_kernel: unspecified launch failure"):
        emulated.attention_mask(**{**good, "heads": 1}, device=0, stream=0)
    assert x.tolist() == [1.0] * 8
