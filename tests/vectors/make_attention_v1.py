"""Writes attention_v1.json, the vectors that freeze attention's part of stream law 1, from the numpy reference.

`python -m tests.vectors.make_attention_v1` must reproduce the committed file byte for byte (a test checks it). Records are
those of law_v1.json. A row's mask is that of weights (heads, queries, keys), the first of global index (bh0, q0, k0): how
many are kept, the SHA-256 of its bytes (1 kept, 0 dropped, row-major), and the first query's mask as a string of 1 and 0.
"""

import hashlib
import json
import sys
from pathlib import Path

from everett_cuda.reference import attention, stream

from .make_law_v1 import RECORDS

PATH = Path(__file__).with_name("attention_v1.json")
P_VALUES = [1 / 256, 0.1, 1 / 3, 0.5, 31 / 32]
# Whole tiles, parts of them, and where the numbers of tiles or of heads turn over.
PLACES = [
    ((2, 16, 64), (0, 0, 0)),
    ((3, 19, 77), (0, 0, 0)),
    ((2, 33, 130), (5, 7, 61)),
    ((1, 20, 40), (2**32 - 1, 2**32 - 9, 2**30 - 17)),
]


def rows():
    found = []
    for i, name in enumerate(stream.GENERATORS):
        for j, p in enumerate(P_VALUES):
            for shape, (bh0, q0, k0) in PLACES:
                which = (i + j) % len(RECORDS)
                mask = attention.keep_mask(RECORDS[which], p, shape, name, bh0, q0, k0)
                digest = hashlib.sha256(mask.tobytes()).hexdigest()
                found.append({
                    "record": which, "generator": name, "p": p.hex(), "shape": shape, "first": [bh0, q0, k0],
                    "kept": int(mask.sum()), "sha256": digest, "query": "".join("01"[b] for b in mask[0, 0].astype(int)),
                })  # fmt: skip
    return found


def build():
    """The file's text."""
    about = json.dumps(" ".join(__doc__.split()))
    body = ",\n".join("  " + json.dumps(row) for row in rows())
    return f'{{\n "law": 1,\n "about": {about},\n "masks": [\n{body}\n ]\n}}\n'


if __name__ == "__main__":
    text = build()
    PATH.write_text(text)
    sys.stdout.write(f"{PATH}: {len(text)} bytes\n")
