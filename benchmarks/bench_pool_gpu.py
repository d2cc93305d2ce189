"""The pool of direct words: a slab's way from pinned memory to the GPU against a plain copy of pinned memory, and what an
op of direct words costs."""

import time

import torch

import everett_cuda as ev
from benchmarks.gpu_timing import in_a_row
from benchmarks.harness import Case, check, rows
from everett_cuda import _cuda
from everett_cuda.kernels import INT32

SLAB_WORDS = 8 << 20  # 64 MiB: the copy's rate, not its latency


def _seconds(run) -> float:
    """By the host's clock until the GPU is done: the side stream of a pool shows no event."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def run(quick: bool = False) -> list[dict]:
    """All rows."""
    pool = _cuda.Pool(torch.cuda.current_device(), SLAB_WORDS, 2)
    first = torch.zeros(2, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    pinned = torch.ones(SLAB_WORDS, dtype=torch.int64).pin_memory()
    there = torch.empty(SLAB_WORDS, dtype=torch.int64, device="cuda")

    def slab():
        pool.submit(SLAB_WORDS)
        pool.direct(first.device.index, 0, INT32, 0, first.data_ptr(), 2, 0, stream)

    def next_slab():
        pool.destroy()
        pool.open()[:16] = bytes(range(16))

    def timed(cases: list[Case], repeats: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {case.name: [] for case in cases}
        for _ in range(repeats):
            next_slab()
            for case in cases:
                times[case.name].append(_seconds(case.run))
        return times

    next_slab()
    slab()
    check(first.cpu().numpy().tobytes() == bytes(range(8)), "the first word of the slab")
    cases = [Case("pinned copy_", lambda: there.copy_(pinned, non_blocking=True), 8 * SLAB_WORDS, "host to device"),
             Case("slab", slab, 8 * SLAB_WORDS, "host to device")]  # fmt: skip
    group = {"measure": "slab copy", "n": SLAB_WORDS, "dtype": "uint64"}
    result = rows("pool", group, cases, 7 if quick else 30, "pinned copy_", timer=timed)

    calls = {"ev.rand, expanded": None, "ev.rand, direct": "direct"}
    cases = [Case(name, lambda f=f: ev.rand(64, device="cuda", freshness=f), inner=50) for name, f in calls.items()]
    group = {"measure": "a call of 64 uniforms", "n": 64, "dtype": "float32"}
    return result + rows("pool", group, cases, 7 if quick else 20, timer=in_a_row)
