"""Dropout on the CPU: forward and forward+backward against torch's, and against copying the tensor."""

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.harness import Case, check, rows
from everett_cuda import _C, keys
from everett_cuda.kernels import TYPES
from everett_cuda.ops import STREAMS
from everett_cuda.reference import keepdrop

N = 1 << 24
P = 0.1
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _check(x: torch.Tensor) -> None:
    y = ev.dropout(x, P)
    kept = (y != 0) | (x == 0)
    share = kept.double().mean().item()
    check(abs(share - (1 - P)) < 0.001, f"share kept {share}")
    scale = keepdrop.threshold(P).scale
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check(torch.equal(y[kept], (x[kept].to(wide) * torch.tensor(scale, dtype=wide)).to(x.dtype)), "kept values")


def _into(record: bytes, x: torch.Tensor, y: torch.Tensor, stream: str, threads: int):
    """The kernel alone, into memory that is there already, as y.copy_(x) has it."""
    type_, generator = TYPES[x.dtype], STREAMS[stream]
    return lambda: _C.dropout(record, generator, P, type_, x.data_ptr(), y.data_ptr(), x.numel(), 0, threads)


def run(quick: bool = False) -> list[dict]:
    """All rows; quick: one dtype, few repeats."""
    result = []
    repeats = 5 if quick else 11
    before = torch.get_num_threads()
    for threads in (before,) if quick else (1, 2):
        torch.set_num_threads(threads)
        for dtype in DTYPES[:1] if quick else DTYPES:
            x = torch.randn(N).to(dtype)
            y = torch.empty_like(x)
            _check(x[: 1 << 20])
            record = keys.draw_record()
            size = x.element_size()
            group = {"n": N, "dtype": str(dtype).removeprefix("torch."), "threads": threads, "p": P}
            two, formula = 2 * N * size, "read x, write y"
            cases = [
                Case("y.copy_(x)", lambda x=x, y=y: y.copy_(x), two, formula),
                Case("x.clone()", lambda x=x: x.clone(), two, formula),
                Case("F.dropout", lambda x=x: F.dropout(x, P), two, formula),
                Case("ev.dropout", lambda x=x: ev.dropout(x, P), two, formula),
            ]
            cases += [
                Case(f"kernel {stream}", _into(record, x, y, stream, threads), two, formula) for stream in STREAMS
            ]
            result += rows("dropout", {"measure": "forward", **group}, cases, repeats, "y.copy_(x)", "F.dropout")

            x.requires_grad_()
            grad = torch.randn(N).to(dtype)

            def both(f, x=x, grad=grad):
                x.grad = None
                f(x, P).backward(grad)

            kernel = _into(record, x, y, "chacha8", threads)
            kernel_of_grad = _into(record, grad, y, "chacha8", threads)

            def kernels(forward=kernel, backward=kernel_of_grad):
                forward()
                backward()

            cases = [Case(name, lambda f=f, both=both: both(f)) for name, f in
                     (("F.dropout", F.dropout), ("ev.dropout", ev.dropout))]  # fmt: skip
            cases.append(Case("kernels chacha8", kernels))
            result += rows("dropout", {"measure": "forward+backward", **group}, cases, repeats, rival="F.dropout")

            x = x.detach()
            residual = torch.randn(N).to(dtype)
            cases = [
                Case("F.dropout + residual", lambda x=x, r=residual: F.dropout(x, P) + r),
                Case("ev.dropout_add", lambda x=x, r=residual: ev.dropout_add(x, r, P), 3 * N * size, "read x, r, write y"),
            ]
            result += rows("dropout", {"measure": "dropout+add", **group}, cases, repeats, rival="F.dropout + residual")
    torch.set_num_threads(before)
    return result
