"""Dropout on a GPU: forward and backward against clone, torch eager and a plain Triton kernel; small sizes; graphs."""

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.gpu_timing import cold, graph_of, in_a_row
from benchmarks.harness import Case, check, rows
from everett_cuda import kernels
from everett_cuda.kernels import Mask
from everett_cuda.ops import STREAMS

ROWS, COLUMNS = 8192, 8192
P = 0.1
LAYERS = 24


def _check(x: torch.Tensor) -> None:
    """The GPU's dropout is the CPU's under the same record."""
    gpu = kernels.of_tensor(x)
    record = gpu.draw()
    for stream in STREAMS.values():
        mask = Mask(P, stream, plain=True)
        part = x.reshape(-1)[:100_003].contiguous()
        ours, theirs = gpu.masked(part, None, record, mask).cpu(), kernels.CPU.masked(part.cpu(), None, record, mask)
        check(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), f"{x.dtype}, stream {stream}")


def _triton(x: torch.Tensor):
    from benchmarks.triton_dropout import seeded_dropout

    return lambda: seeded_dropout(x, P, 7)


def _large(quick: bool, repeats: int) -> list[dict]:
    result = []
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        x = torch.randn(ROWS, COLUMNS, device="cuda").to(dtype)
        _check(x)
        gpu, size = kernels.of_tensor(x), 2 * x.numel() * x.element_size()
        record, formula = gpu.draw(), "read x, write y"
        group = {"n": x.numel(), "dtype": str(dtype).removeprefix("torch."), "p": P, "cache": "cold"}
        clone = Case("x.clone()", lambda x=x: x.clone(), size, formula)
        cases = [clone, Case("F.dropout", lambda x=x: F.dropout(x, P), size, formula),
                 Case("triton", _triton(x), size, formula)]  # fmt: skip
        cases += [Case(f"ev.dropout {s}", lambda x=x, s=s: ev.dropout(x, P, stream=s), size, formula) for s in STREAMS]
        result += rows("dropout", {"measure": "forward", **group}, cases, repeats, "x.clone()", "F.dropout", cold)

        kept = torch.ones_like(x, dtype=torch.bool)
        cases = [clone, Case("torch backward", lambda x=x, k=kept: torch.ops.aten.native_dropout_backward(x, k, 1 / (1 - P)),
                             size, formula)]  # fmt: skip
        for name, stream in STREAMS.items():
            mask = Mask(P, stream, plain=True)
            run = lambda x=x, m=mask, g=gpu, r=record: g.masked(x, None, r, m)  # noqa: E731
            cases.append(Case(f"ev.dropout {name} backward", run, size, formula))
        result += rows("dropout", {"measure": "backward", **group}, cases, repeats, "x.clone()", "torch backward", cold)
    return result


def _small(repeats: int) -> list[dict]:
    result = []
    for megabytes in (1, 4, 16):
        n = (megabytes << 20) // 2
        x = torch.randn(n, device="cuda").to(torch.bfloat16)
        group = {"n": n, "dtype": "bfloat16", "p": P, "cache": f"L2, {megabytes} MB"}
        calls = {"x.clone()": x.clone, "F.dropout": lambda x=x: F.dropout(x, P), "ev.dropout": lambda x=x: ev.dropout(x, P)}
        cases = [Case(name, run, 4 * n, "read x, write y", inner=100) for name, run in calls.items()]
        result += rows("dropout", {"measure": "calls", **group}, cases, repeats, "x.clone()", "F.dropout", in_a_row)
        cases = [Case(name, graph_of(run, 50)) for name, run in calls.items()]
        result += rows("dropout", {"measure": "50 calls in a graph", **group}, cases, repeats, "", "F.dropout", in_a_row)
    return result


def _graphs(repeats: int) -> list[dict]:
    result = []
    for rows_ in (512, 8192):
        x = torch.randn(rows_, 1024, device="cuda").to(torch.bfloat16)

        def layers(drop, x=x):
            y = x
            for _ in range(LAYERS):
                y = drop(y, P)
            return y

        ours = graph_of(lambda layers=layers: layers(ev.dropout))

        def with_a_new_key(replay=ours):
            ev.step()
            replay()

        cases = [
            Case("F.dropout", graph_of(lambda layers=layers: layers(F.dropout)), inner=10),
            Case("ev.dropout", ours, inner=10),
            Case("ev.dropout, a new key each replay", with_a_new_key, inner=10),
        ]
        group = {"measure": f"graph of {LAYERS} layers", "n": x.numel(), "dtype": "bfloat16", "p": P}
        result += rows("dropout", group, cases, repeats, rival="F.dropout", timer=in_a_row)
    return result


def run(quick: bool = False) -> list[dict]:
    """All rows; quick: one dtype, few repeats."""
    repeats = 7 if quick else 60
    return _large(quick, repeats) + _small(repeats // 3) + _graphs(repeats // 3)
