"""Times on a GPU by its own events: cold calls one by one, or many calls in a row.

Cold: before each timing the L2 cache is overwritten and the GPU put to sleep for a moment, so that the host is ahead and
what is between the two events is GPU time alone. In a row: what a loop of calls takes, the host's part included.
"""

import torch

from benchmarks.harness import Case

_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
_SLEEP_CYCLES = 600_000  # some 0.3 ms, more than a backward takes to be queued


def _timed(run, inner: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / inner


def cold(cases: list[Case], repeats: int) -> dict[str, list[float]]:
    """Seconds of GPU time a call, with nothing in L2; the cases taking turns, as `harness.interleave`."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for case in cases:
        for _ in range(5):
            case.run()
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            flush.zero_()
            torch.cuda._sleep(_SLEEP_CYCLES)
            times[case.name].append(_timed(case.run, case.inner))
    return times


def in_a_row(cases: list[Case], repeats: int) -> dict[str, list[float]]:
    """Seconds a call in a loop of `inner` calls on the same tensors, which so stay in L2 if they fit."""
    for case in cases:
        for _ in range(5):
            case.run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            times[case.name].append(_timed(case.run, case.inner))
    return times


def graph_of(run, calls: int = 1):
    """A replay of `calls` calls of run() as one captured graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay
