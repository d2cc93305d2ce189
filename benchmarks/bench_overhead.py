"""What one call costs on 16 elements, where nothing but overhead is left: ours against F.dropout, one thread.

Likewise an unmodified nn.Dropout, outside and inside `ev.intercept()`.
"""

import contextlib
import time

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.harness import Case, rows

_INSIDE = "nn.Dropout in intercept()"


def _time_in_turns(cases: list[Case], repeats: int) -> dict[str, list[float]]:
    """As `harness.interleave`, each turn of the case `_INSIDE` within an intercept() that is entered before the clock."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(repeats + 2):
        for case in cases:
            with ev.intercept() if case.name == _INSIDE else contextlib.nullcontext():
                start = time.perf_counter()
                for _ in range(case.inner):
                    case.run()
                elapsed = time.perf_counter() - start
            if turn >= 2:  # the first two warm up
                times[case.name].append(elapsed / case.inner)
    return times


def run(quick: bool = False) -> list[dict]:
    """Rows: no gradient asked for, forward with gradient, forward and backward."""
    repeats, inner = (15, 100) if quick else (101, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x, with_grad = torch.randn(16), torch.randn(16, requires_grad=True)
    grad, module = torch.ones(16), torch.nn.Dropout(0.1)
    measures = {
        "no gradient": lambda f: lambda: f(x, 0.1),
        "forward with gradient": lambda f: lambda: f(with_grad, 0.1),
        "forward+backward": lambda f: lambda: f(with_grad, 0.1).backward(grad),
    }
    result = []
    for measure, call in measures.items():
        cases = [Case("F.dropout", call(F.dropout), inner=inner), Case("ev.dropout", call(ev.dropout), inner=inner)]
        group = {"measure": measure, "n": 16, "dtype": "float32", "threads": 1}
        result += rows("overhead", group, cases, repeats, rival="F.dropout")
        modules = [Case(name, call(lambda x, p: module(x)), inner=inner) for name in ("nn.Dropout", _INSIDE)]
        result += rows("overhead", group, modules, repeats, rival="nn.Dropout", timer=_time_in_turns)
    torch.set_num_threads(before)
    return result
