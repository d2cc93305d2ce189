"""Writes law_v1.json, the vectors that freeze stream law 1, from the numpy reference.

`python -m tests.vectors.make_law_v1` must reproduce the committed file byte for byte (a test checks it). A change of
any value is a change of the law. Numbers are hex patterns without a prefix: draws 4, 8 or 16 digits, fp32 8, fp64 16,
bf16 and fp16 4; a list of them is one string with spaces. A mask is a string of 1 (kept) and 0 (dropped). A run begins
with [e, n]: n consecutive logical indices from e on; a long run ends with the SHA-256 of its little-endian items (one
byte a decision), before which masks give the number kept.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from everett_cuda.reference import convert, fill, keepdrop, layout, stream

PATH = Path(__file__).with_name("law_v1.json")

KEYS = [
    (bytes(32), bytes(16)),
    (bytes(range(32)), bytes(range(64, 80))),
    (bytes([255] * 32), bytes([255] * 16)),
    (bytes(7 * i % 256 for i in range(32)), bytes([1] + [0] * 15)),
]
RECORDS = [stream.derive(key, nonce) for key, nonce in KEYS]

# Block edges, edges of groups of 4, 8 and 16 blocks for each width of draw, and where the block number or its upper
# word turns over: 16-bit draws reach block 2^32 at e = 2^37, 32-bit draws at 2^36, 64-bit draws at 2^35.
EDGES = [8, 16, 32, 64, 128, 256, 512, 1024, 4096, 2**31, 2**32, 2**35, 2**36, 2**37, 2**38, 2**41 + 2048, 2**45]
STARTS = [0, 2**32 - 40, 2**36 - 40, 2**37 - 40, 2**41 + 7]

STEP = 2.0**-47  # of p, in P = round(p * 2^47)
P_VALUES = {
    "0": 0.0,
    "2^-48, a tie that rounds to 0": STEP / 2,
    "2^-47": STEP,
    "1e-6": 1e-6,
    "one step below 1/256": 1 / 256 - STEP,
    "1/256": 1 / 256,
    "one step above 1/256": 1 / 256 + STEP,
    "0.1": 0.1,
    "1/3": 1 / 3,
    "0.5": 0.5,
    "one step below 31/32": 31 / 32 - STEP,
    "31/32": 31 / 32,
    "one step above 31/32": 31 / 32 + STEP,
    "0.999": 0.999,
    "1 - 2^-47": 1 - STEP,
    "1": 1.0,
}
# Zeros, ones, smallest and largest numbers, Inf and NaN, as patterns of each dtype.
INPUTS = {
    "float32": "00000000 80000000 3f800000 bf800000 3f8ccccd 00000001 807fffff 7f7fffff 7f800000 "
    "ff800000 7fc00000 33333333",
    "float64": "0000000000000000 8000000000000000 3ff0000000000000 bff0000000000000 3ff199999999999a 0000000000000001 "
    "800fffffffffffff 7fefffffffffffff 7ff0000000000000 fff0000000000000 7ff8000000000000 3333333333333333",
    "bfloat16": "0000 8000 3f80 bf80 3f8d 0001 807f 7f7f 7f80 ff80 7fc0 3333",
    "float16": "0000 8000 3c00 bc00 3c66 0001 83ff 7bff 7c00 fc00 7e00 3333",
}  # fmt: skip
STORAGE = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.float16}
# Words at which a conversion changes sides or exponents, or meets its limits.
EDGE_WORDS = np.array([0, 1, 255, 256, 0x1FFFFFFF, 0x20000000, 0x3FFFFFFF, 0x40000000, 0x55555555, 0x7FFFFFFF,
                       0x80000000, 0xAAAAAAAA, 0xC0000000, 0xFFFFFF00, 0xFFFFFFFE, 0xFFFFFFFF], np.uint64)  # fmt: skip


def patterns(values):
    """Little-endian unsigned integers with the bits of the values."""
    values = np.ascontiguousarray(values)
    return values.view(f"<u{values.itemsize}")


def as_hex(values):
    bits = patterns(values)
    return " ".join(f"{int(v):0{2 * bits.itemsize}x}" for v in bits.ravel())


def sha256(values):
    return hashlib.sha256(patterns(values).tobytes()).hexdigest()


def run(e, n):
    return np.arange(n, dtype=np.uint64) + np.uint64(e)


def records():
    return [
        {"key": key.hex(), "nonce": nonce.hex(), "record": as_hex(record)}
        for (key, nonce), record in zip(KEYS, RECORDS, strict=True)
    ]


def draws():
    rows = []
    for g, generator in enumerate(stream.GENERATORS):
        for width, tag, s in ((16, 1, 0), (16, 7, 0xFFFFFFFF), (32, 2, 0), (32, 3, 1), (64, 4, 0), (64, 6, 0x80000001)):
            which = (g + width // 16) % len(RECORDS)
            def take(e, n, which=which, width=width, tag=tag, s=s, generator=generator):
                return stream.draws(RECORDS[which], width, run(e, n), tag, s, generator).astype(f"<u{width // 8}")

            rows.append({
                "record": which, "generator": generator, "tag": tag, "s": s, "width": width,
                "runs": [[0, 4, as_hex(take(0, 4))]] + [[e - 2, 4, as_hex(take(e - 2, 4))] for e in EDGES],
                "long": [[e, 2051, sha256(take(e, 2051))] for e in STARTS],
            })  # fmt: skip
    return rows


def thresholds():
    rows = []
    for name, p in P_VALUES.items():
        h = keepdrop.threshold(p)
        rows.append({
            "name": name, "p": p.hex(), "P": h.p47, "wide": h.wide, "T": h.t, "F": h.f,
            "scale_f32": as_hex(np.float32(h.scale).reshape(1)), "scale_f64": as_hex(np.float64(h.scale).reshape(1)),
        })  # fmt: skip
    return rows


def masks():
    rows = []
    for g, generator in enumerate(stream.GENERATORS):
        for i, p in enumerate(P_VALUES.values()):
            which = (g + i) % len(RECORDS)
            row = {"record": which, "generator": generator, "p": p.hex(), "runs": [], "long": []}
            for e in STARTS:
                mask = keepdrop.keep_mask(RECORDS[which], p, run(e, 4099), generator)
                row["runs"].append([e, 72, "".join("01"[k] for k in mask[:72].astype(int))])
                row["long"].append([e, 4099, int(mask.sum()), sha256(mask)])
            rows.append(row)
    # What is rare at a tiny p: the indices of all drops in 2^21 elements.
    mask = keepdrop.keep_mask(RECORDS[1], 1e-5, run(2**32 - 2**20, 2**21))
    rare = np.flatnonzero(~mask)
    rows.append({"record": 1, "generator": "chacha8", "p": 1e-5.hex(), "e": 2**32 - 2**20, "n": 2**21,
                 "dropped": [int(2**32 - 2**20 + i) for i in rare]})  # fmt: skip
    return rows


def dropouts():
    rows = []
    for dtype, text in INPUTS.items():
        for p in (0.0, 1 / 3, 0.5, 0.999, 1.0):
            bits = np.array([int(t, 16) for t in text.split()], f"u{np.dtype(STORAGE[dtype]).itemsize}")
            x = np.tile(bits.view(STORAGE[dtype]), 6)
            y = keepdrop.dropout(x, RECORDS[2], p, run(2**32 - 30, len(x)), dtype)
            # A NaN is any NaN: payloads differ between machines.
            nan = y.astype(np.uint32) & 0x7FFF > 0x7F80 if dtype == "bfloat16" else np.isnan(y)
            out = ["nan" if bad else t for bad, t in zip(nan, as_hex(y).split(), strict=True)]
            rows.append({"record": 2, "generator": "chacha8", "dtype": dtype, "p": p.hex(), "e": 2**32 - 30,
                         "in": as_hex(x), "out": " ".join(out)})  # fmt: skip
    return rows


def dropout_adds():
    rows = []
    for dtype, text in INPUTS.items():
        bits = np.array([int(t, 16) for t in text.split()], f"u{np.dtype(STORAGE[dtype]).itemsize}")
        # Every input value beside every residual value.
        x, residual = (m.ravel().view(STORAGE[dtype]) for m in np.meshgrid(bits, bits, indexing="ij"))
        for p in (1e-6, 1 / 3, 0.999, 1.0):
            y = keepdrop.dropout_add(x, residual, RECORDS[2], p, run(2**32 - 30, len(x)), dtype)
            nan = y.astype(np.uint32) & 0x7FFF > 0x7F80 if dtype == "bfloat16" else np.isnan(y)
            out = ["nan" if bad else t for bad, t in zip(nan, as_hex(y).split(), strict=True)]
            rows.append({"record": 2, "generator": "chacha8", "dtype": dtype, "p": p.hex(), "e": 2**32 - 30,
                         "in": as_hex(x), "residual": as_hex(residual), "out": " ".join(out)})  # fmt: skip
    return rows


def fills():
    kinds = {
        "words": lambda r, e, _, g: fill.words(r, e, g),
        "uniform": fill.uniform,
        "uniform_open": lambda r, e, dtype, g: fill.uniform(r, e, dtype, g, closed_above=True),
        "normal": fill.normal,
        "exponential": fill.exponential,
        "gumbel": fill.gumbel,
    }
    rows = []
    for g, generator in enumerate(stream.GENERATORS):
        for kind, take in kinds.items():
            for dtype in ["uint32"] if kind == "words" else STORAGE:
                which = (g + len(kind)) % len(RECORDS)
                values = [take(RECORDS[which], run(e, 2051), dtype, generator) for e in STARTS]
                rows.append({
                    "record": which, "generator": generator, "kind": kind, "dtype": dtype,
                    "runs": [[e, 6, as_hex(v[:6])] for e, v in zip(STARTS, values, strict=True)],
                    "long": [[e, 2051, sha256(v)] for e, v in zip(STARTS, values, strict=True)],
                })  # fmt: skip
    p = np.array([0.0, 2.0**-64, 2.0**-65, 1e-3, 0.1, 0.25, 0.5, 0.9, 1 - 2.0**-53, 1.0])
    for generator in stream.GENERATORS:
        mask = fill.bernoulli(RECORDS[0], run(2**35 - 40, 2000), np.tile(p, 200), generator)
        rows.append({"record": 0, "generator": generator, "kind": "bernoulli", "p_repeated": [v.hex() for v in p],
                     "long": [[2**35 - 40, 2000, int(mask.sum()), sha256(mask)]]})  # fmt: skip
    return rows


def conversions():
    """Every pair (a, b) of EDGE_WORDS, as the draws of a normal pair and as low and high word of a 64-bit draw."""
    a, b = (m.ravel() for m in np.meshgrid(EDGE_WORDS, EDGE_WORDS, indexing="ij"))
    wide = a | (b << np.uint64(32))
    rows = []
    for dtype in STORAGE:
        first, second = (wide, np.roll(wide, 1)) if dtype == "float64" else (a, b)
        even, odd = convert.normal(first, second, dtype)
        rows += [
            {"kind": "normal_even", "dtype": dtype, "values": as_hex(even)},
            {"kind": "normal_odd", "dtype": dtype, "values": as_hex(odd)},
            {"kind": "exponential", "dtype": dtype, "values": as_hex(convert.exponential(wide, dtype))},
            {"kind": "gumbel", "dtype": dtype, "values": as_hex(convert.gumbel(wide, dtype))},
        ]
    return {
        "a": as_hex(a.astype(np.uint32)), "b": as_hex(b.astype(np.uint32)),
        "float64_normals": "first draw i = a[i] + 2^32 b[i], second draw i = first draw i-1 (cyclic)", "rows": rows,
    }  # fmt: skip


def shards():
    rows = []
    for shape, offset, strides, why in (
        ((3, 5, 7), *_shard((8, 16, 32), (2, 3, 9)), "a block of (8, 16, 32)"),
        ((4, 96), *_shard((4, 1000), (0, 520)), "columns 520..615 of rows of 1000"),
        ((2, 40), *_shard((2**33, 64), (2**32 - 1, 24)), "columns 24..63 of rows across e = 2^38"),
        ((33, 3), 0, (1, 33), "a transposed view: memory order is not logical order"),
        ((6, 4, 3), 0, (4, 1, 0), "one decision a channel, repeated along the last dimension"),
        ((3, 50), 0, (64, 1), "row operations of length 50: rows begin at multiples of 64"),
    ):
        e = layout.logical_indices(shape, offset, strides)
        mask = keepdrop.keep_mask(RECORDS[3], 0.25, e, "chacha8")
        rows.append({
            "record": 3, "generator": "chacha8", "p": (0.25).hex(), "what": why, "shape": shape, "offset": offset,
            "strides": strides, "e_sha256": sha256(e), "mask": "".join("01"[k] for k in mask.ravel().astype(int)),
        })  # fmt: skip
    return rows


def _shard(whole, starts):
    strides = layout.row_major(whole)
    return sum(a * b for a, b in zip(starts, strides, strict=True)), strides


def build():
    """The file's text."""
    parts = {"law": 1, "about": " ".join(__doc__.split()), "records": records(), "draws": draws(),
             "thresholds": thresholds(), "masks": masks(), "dropout": dropouts(), "fills": fills(),
             "conversions": conversions(), "shards": shards(), "dropout_add": dropout_adds()}  # fmt: skip
    lines = []
    for name, part in parts.items():
        if isinstance(part, list):
            body = "[\n" + ",\n".join("  " + json.dumps(row) for row in part) + "\n ]"
        else:
            body = json.dumps(part)
        lines.append(f' "{name}": {body}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    text = build()
    PATH.write_text(text)
    sys.stdout.write(f"{PATH}: {len(text)} bytes\n")
