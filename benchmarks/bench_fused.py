"""Fused ops on the CPU against the same steps by torch: bias, GELU, dropout and residual; additive noise; rounding."""

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.harness import Case, check, rows

ROWS, COLUMNS = 4096, 4096
P = 0.1


def _check(x, bias, residual) -> None:
    torch.manual_seed(0)
    fused = ev.bias_dropout_add(x, bias, residual, P)
    torch.manual_seed(0)
    check(torch.allclose(fused, ev.dropout(x + bias, P) + residual, atol=1e-5), "bias_dropout_add")
    torch.manual_seed(0)
    fused = ev.bias_gelu_dropout(x, bias, P)
    torch.manual_seed(0)
    check(torch.allclose(fused, ev.dropout(F.gelu(x + bias), P), atol=1e-5), "bias_gelu_dropout")
    check(abs((ev.add_noise(x, 0.5) - x).std().item() - 0.5) < 0.01, "add_noise")
    rounded = ev.stochastic_round(x, torch.bfloat16).float()
    check(abs((rounded - x).mean().item()) < 1e-4, "stochastic_round")


def run(quick: bool = False) -> list[dict]:
    """All rows; quick: one dtype, few repeats."""
    result = []
    repeats = 3 if quick else 9
    before = torch.get_num_threads()
    for threads in (before,) if quick else (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            x, residual = (torch.randn(ROWS, COLUMNS).to(dtype) for _ in range(2))
            bias = torch.randn(COLUMNS).to(dtype)
            _check(x[:256].float(), bias.float(), residual[:256].float())
            size = x.element_size()
            group = {"n": x.numel(), "dtype": str(dtype).removeprefix("torch."), "threads": threads, "p": P}
            copy = Case("x.clone()", lambda x=x: x.clone(), 2 * x.numel() * size, "read x, write y")
            two, three = 2 * x.numel() * size, 3 * x.numel() * size

            def group_of(measure, rival, ours, formula, bytes_, group=group, copy=copy):
                cases = [copy, Case("torch", rival), Case("everett_cuda", ours, bytes_, formula)]
                return rows("fused", {"measure": measure, **group}, cases, repeats, "x.clone()", "torch")

            result += group_of(
                "bias+dropout+add",
                lambda x=x, b=bias, r=residual: F.dropout(x + b, P) + r,
                lambda x=x, b=bias, r=residual: ev.bias_dropout_add(x, b, r, P),
                "read x, r, write y",
                three,
            )
            for approximate in ("none", "tanh"):
                result += group_of(
                    f"bias+GELU({approximate})+dropout",
                    lambda x=x, b=bias, a=approximate: F.dropout(F.gelu(x + b, approximate=a), P),
                    lambda x=x, b=bias, a=approximate: ev.bias_gelu_dropout(x, b, P, approximate=a),
                    "read x, write y",
                    two,
                )
            leaf = x.clone().requires_grad_()

            def both(f, leaf=leaf, grad=residual):
                leaf.grad = None
                f(leaf).backward(grad)

            result += group_of(
                "bias+GELU(none)+dropout, forward+backward",
                lambda both=both, b=bias: both(lambda t: F.dropout(F.gelu(t + b), P)),
                lambda both=both, b=bias: both(lambda t: ev.bias_gelu_dropout(t, b, P)),
                "",
                0,
            )
            result += group_of(
                "x + sigma*normal",
                lambda x=x: x + 0.1 * torch.randn_like(x),
                lambda x=x: ev.add_noise(x, 0.1),
                "read x, write y",
                two,
            )
        x = torch.randn(ROWS, COLUMNS)
        cases = [
            Case("x.to(bfloat16)", lambda x=x: x.to(torch.bfloat16), 6 * x.numel(), "read x, write y"),
            Case("torch", lambda x=x: _round_by_torch(x)),
            Case("everett_cuda", lambda x=x: ev.stochastic_round(x, torch.bfloat16), 6 * x.numel(), "read x, write y"),
        ]
        group = {"n": x.numel(), "dtype": "float32 to bfloat16", "threads": threads}
        result += rows("fused", {"measure": "stochastic rounding", **group}, cases, repeats, "x.to(bfloat16)", "torch")
    torch.set_num_threads(before)
    return result


def _round_by_torch(x: torch.Tensor) -> torch.Tensor:
    """The usual way: random low bits onto the pattern, then cut."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 0, 65536)) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
