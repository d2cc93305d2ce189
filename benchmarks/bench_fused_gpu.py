"""Fused dropout on a GPU against torch eager and torch.compile's own fusion."""

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.gpu_timing import cold
from benchmarks.harness import Case, check, rows

ROWS, COLUMNS = 8192, 8192
P = 0.1


def _check(x, bias, residual) -> None:
    for ours, steps in (
        (lambda: ev.dropout_add(x, residual, P), lambda: ev.dropout(x, P) + residual),
        (lambda: ev.bias_gelu_dropout(x, bias, P), lambda: ev.dropout(F.gelu(x + bias), P)),
    ):
        torch.cuda.manual_seed(1)
        a = ours()
        torch.cuda.manual_seed(1)
        check(torch.allclose(a, steps(), atol=1e-4), "the fused op is its steps")


def run(quick: bool = False) -> list[dict]:
    """All rows; quick: few repeats, nothing compiled."""
    repeats = 7 if quick else 60
    x, residual = (torch.randn(ROWS, COLUMNS, device="cuda") for _ in range(2))
    bias = torch.randn(COLUMNS, device="cuda")
    _check(x[:256], bias, residual[:256])
    x, residual, bias = (t.to(torch.bfloat16) for t in (x, residual, bias))
    size = x.numel() * 2
    steps = {
        "dropout+add": (lambda x, b, r: F.dropout(x, P) + r, lambda x, b, r: ev.dropout_add(x, r, P), 3),
        "bias+dropout+add": (lambda x, b, r: F.dropout(x + b, P) + r, lambda x, b, r: ev.bias_dropout_add(x, b, r, P), 3),
        "bias+GELU+dropout": (
            lambda x, b, r: F.dropout(F.gelu(x + b), P), lambda x, b, r: ev.bias_gelu_dropout(x, b, P), 2,
        ),
        "bias+GELU(tanh)+dropout": (
            lambda x, b, r: F.dropout(F.gelu(x + b, approximate="tanh"), P),
            lambda x, b, r: ev.bias_gelu_dropout(x, b, P, approximate="tanh"),
            2,
        ),
    }  # fmt: skip
    result = []
    for measure, (eager, ours, tensors) in steps.items():
        formula = "read x, r, write y" if tensors == 3 else "read x, write y"
        cases = [Case("x.clone()", x.clone, 2 * size, "read x, write y")]
        rivals = {"torch": eager} if quick else {"torch": eager, "torch.compile": torch.compile(eager, dynamic=False)}
        for name, f in {**rivals, "everett_cuda": ours}.items():
            cases.append(Case(name, lambda f=f: f(x, bias, residual), tensors * size, formula))
        group = {"measure": measure, "n": x.numel(), "dtype": "bfloat16", "p": P, "cache": "cold"}
        result += rows("fused", group, cases, repeats, "x.clone()", "torch", cold)
    return result
