"""The committed vectors of integers, permutations and gamma variates, through the CPU's kernels in every instruction set."""

import hashlib
import json

import numpy as np
import torch  # noqa: F401  brings the OpenMP runtime that the kernels' threads run on
from test_kernels import GENERATORS, _record, isa  # noqa: F401  (isa: a fixture)
from vectors import make_noise_v1

from everett_cuda import _C
from everett_cuda.kernels import KINDS

LAW = json.loads(make_noise_v1.PATH.read_text())


def _filled(kind, row, p):
    (number, tag), (e, n) = KINDS[kind], row["run"]
    out = np.empty(n, np.uint64)
    _C.fill(number, _record(row["record"]), GENERATORS[row["generator"]], tag, 7 if kind == "integers" else 1, p.ctypes.data,
            out.ctypes.data, (n,), (1,), (1,), (1,), e, 0, 1)  # fmt: skip
    return out


def test_vectors_are_the_references():
    assert make_noise_v1.build() == make_noise_v1.PATH.read_text(), "the law is frozen: a change is law 2, not new vectors"


def test_kernels_give_the_vectors(isa):  # noqa: F811
    seen = 0
    for row in LAW["rows"]:
        if row["kind"] == "permutation":
            n = len(row["values"])
            draws = _filled("integers", {**row, "run": [0, n]}, np.zeros(n, np.uint64))
            assert np.argsort(draws, kind="stable").tolist() == row["values"]
            continue
        n = row["run"][1]
        if row["kind"] == "integers":
            p = np.array([LAW["spans"][i % len(LAW["spans"])] % 2**64 for i in range(n)], np.uint64)
        else:
            p = np.resize(np.array(LAW["shapes"]), n)
        words = _filled(row["kind"], row, p)
        shown = words[:4].tolist() if row["kind"] == "integers" else [f"{int(w):016x}" for w in words[:4]]
        assert shown == row["first"], row
        assert hashlib.sha256(words.astype("<u8").tobytes()).hexdigest() == row["sha256"], row
        seen += 1
    assert seen == 36
