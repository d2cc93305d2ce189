"""Writes noise_v1.json, the vectors that freeze integers, permutations and gamma variates of stream law 1, from the numpy
reference.

`python -m tests.vectors.make_noise_v1` must reproduce the committed file byte for byte (a test checks it). Records are those
of law_v1.json. A run is [e, n]: n values from logical index e on; its first four in full (integers in decimals, fp64 as
patterns), and the SHA-256 of all as little-endian 64-bit words. Parameters are repeated along a run.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from everett_cuda.reference import fill, gamma, stream

from .make_law_v1 import RECORDS

PATH = Path(__file__).with_name("noise_v1.json")
SPANS = [1, 2, 10, 2**32 + 1, 2**63, 2**64 - 1, 2**64]
SHAPES = [1e-3, 0.5, 1.0, 1.7, 1e3]
STARTS = [0, 2**35 - 100, 2**45 + 7]


def _row(kind, which, name, e, values):
    words = np.ascontiguousarray(values).view("<u8")
    shown = words[:4].tolist() if kind == "integers" else [f"{int(w):016x}" for w in words[:4]]
    return {"kind": kind, "record": which, "generator": name, "run": [e, len(words)], "first": shown,
            "sha256": hashlib.sha256(words.tobytes()).hexdigest()}  # fmt: skip


def rows():
    found = []
    for i, name in enumerate(stream.GENERATORS):
        which = i % len(RECORDS)
        for e in STARTS:
            index = np.uint64(e) + np.arange(420, dtype=np.uint64)
            spans = [SPANS[j % len(SPANS)] for j in range(420)]
            found.append(_row("integers", which, name, e, fill.integers(RECORDS[which], index, spans, name)))
            shapes = np.resize(SHAPES, 420)
            for kind, logarithm in (("gamma", False), ("log_gamma", True)):
                found.append(_row(kind, which, name, e, gamma.gamma(RECORDS[which], index, shapes, name, logarithm)))
        found.append({"kind": "permutation", "record": which, "generator": name,
                      "values": fill.permutation(RECORDS[which], 40, name).tolist()})  # fmt: skip
    return found


def build():
    """The file's text."""
    about = json.dumps(" ".join(__doc__.split()))
    body = ",\n".join("  " + json.dumps(row) for row in rows())
    return (
        f'{{\n "law": 1,\n "about": {about},\n "spans": {json.dumps(SPANS)},\n "shapes": {json.dumps(SHAPES)},\n'
        f' "rows": [\n{body}\n ]\n}}\n'
    )


if __name__ == "__main__":
    text = build()
    PATH.write_text(text)
    sys.stdout.write(f"{PATH}: {len(text)} bytes\n")
