"""Noise fills on the CPU, one thread, against torch and numpy's Philox."""

import numpy as np
import torch

import everett_cuda as ev
from benchmarks.harness import Case, check, rows
from everett_cuda import _C, keys
from everett_cuda.kernels import KINDS
from everett_cuda.ops import STREAMS

N = 1 << 24


def _fill(kind: str, record: bytes, out: torch.Tensor, stream: str):
    """The kernel alone, into memory that is there already, as torch's in-place fills have it."""
    number, tag = KINDS[kind]
    type_ = 4 if out.dtype == torch.int32 else 0
    one = (1,)
    return lambda: _C.fill(number, record, STREAMS[stream], tag, type_, 0, out.data_ptr(), (N,), one, one, one, 0, 0, 1)


def run(quick: bool = False) -> list[dict]:
    """All rows: words and values of each kind, every stream, with the best instruction set and with AVX2."""
    repeats = 5 if quick else 15
    before, best = torch.get_num_threads(), _C.instruction_set()
    torch.set_num_threads(1)
    record = keys.draw_record()
    words, values = torch.empty(N, dtype=torch.int32), torch.empty(N)
    philox = np.random.Generator(np.random.Philox(1))
    rivals = {
        "words": [("numpy Philox", lambda: philox.bit_generator.random_raw(N // 2)), ("tensor.random_", words.random_)],
        "uniform": [("numpy Philox", lambda: philox.random(N, dtype=np.float32)), ("tensor.uniform_", values.uniform_)],
        "normal": [("numpy Philox", lambda: philox.standard_normal(N, np.float32)), ("tensor.normal_", values.normal_)],
        "exponential": [("tensor.exponential_", values.exponential_)],
        "gumbel": [("-log(exponential_)", lambda: values.exponential_().log_().neg_())],
    }  # fmt: skip
    check(abs(ev.randn(1 << 20).std().item() - 1) < 0.01, "standard deviation of normals")
    result = []
    for kind in ("words",) if quick else rivals:
        out = words if kind == "words" else values
        cases = [Case("memset", lambda out=out: out.zero_(), 4 * N, "write y")]
        cases += [Case(name, f, 4 * N, "write y") for name, f in rivals[kind]]
        for isa in [s for s in _C.instruction_sets() if s != "portable"] or ["portable"]:
            for stream in STREAMS:
                fill = _fill(kind, record, out, stream)
                cases.append(Case(f"kernel {stream} {isa}", _with(isa, fill), 4 * N, "write y"))
        group = {"measure": kind, "n": N, "dtype": "uint32" if kind == "words" else "float32", "threads": 1}
        result += rows("noise", group, cases, repeats, copy="memset", rival=rivals[kind][0][0])
    _C.use_instruction_set(best)
    torch.set_num_threads(before)
    return result


def _with(isa: str, f):
    def run():
        _C.use_instruction_set(isa)
        f()

    return run
