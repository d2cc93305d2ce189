"""What one call costs on 16 elements, where nothing but overhead is left: ours against F.dropout, one thread."""

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.harness import Case, rows


def run(quick: bool = False) -> list[dict]:
    """Rows: no gradient asked for, forward with gradient, forward and backward."""
    repeats, inner = (15, 100) if quick else (101, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x, with_grad = torch.randn(16), torch.randn(16, requires_grad=True)
    grad = torch.ones(16)
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
    torch.set_num_threads(before)
    return result
