"""What tests of compiled code share: every op in one function, so that it is compiled once, and each op's derivative by
the mask that its result shows."""

import torch
import torch.nn.functional as F

import everett_cuda as ev

P = 0.5
SCALE = 2.0


def every_op(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Results of each op at x, (batch, channels, width) without zeros: one draw each, and one that nobody reads."""
    bias, residual = 0.25 * x[0, 0], 3.0 * x
    ev.dropout(x, P)  # what nobody reads
    return {
        "dropout": ev.dropout(x, P),
        "dropout again": ev.dropout(x, P),
        "in place": ev.dropout(x * 1.0, P, inplace=True),
        "philox": ev.dropout(x, P, stream="philox"),
        "dropout1d": ev.dropout1d(x, P),
        "drop_path": ev.drop_path(x, P),
        "alpha_dropout": ev.alpha_dropout(x, P),
        "dropout_add": ev.dropout_add(x, residual, P),
        "bias_dropout_add": ev.bias_dropout_add(x, bias, residual, P),
        "bias_gelu_dropout": ev.bias_gelu_dropout(x, bias, P),
        "tanh gelu": ev.bias_gelu_dropout(x, None, P, approximate="tanh"),
        "add_noise": ev.add_noise(x, 0.5),
        "stochastic_round": ev.stochastic_round(x, torch.bfloat16),
        "randn": x + ev.randn(x.shape, device=x.device),
        "rand": x + ev.rand(x.shape[0], 1, 1, dtype=x.dtype),
        "bernoulli": x * ev.bernoulli(x.sigmoid()),
        "randint": x + ev.randint(1, 1000, (4,)).sum() / 1000,
    }


def few_ops(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `every_op`, for a compiler that takes a second an op."""
    ev.dropout(x, P)
    return {
        "dropout": ev.dropout(x, P),
        "dropout again": ev.dropout(x, P),
        "bias_gelu_dropout": ev.bias_gelu_dropout(x, 0.25 * x[0, 0], P),
        "randn": x + ev.randn(x.shape, device=x.device),
    }


def expected(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What op `name` makes of x under the mask (or noise) that its result y shows; a function of x that autograd takes."""
    bias, residual = 0.25 * x[0, 0], 3.0 * x
    y = y.detach()
    if name in ("dropout", "dropout again", "in place", "philox", "dropout1d", "drop_path"):
        return torch.where(y != 0, SCALE * x, 0.0)
    if name == "alpha_dropout":
        dropped = -1.7580993408473766
        scale = 1 / ((1 - P) * (1 + P * dropped**2)) ** 0.5
        level = scale * dropped * (1 - P)
        return torch.where((y - level).abs() < 1e-6, level, scale * x - scale * P * dropped)
    if name in ("dropout_add", "bias_dropout_add"):
        inner = x if name == "dropout_add" else x + bias
        return torch.where((y - residual.detach()).abs() < 1e-6, 0.0, SCALE * inner) + residual
    if name in ("bias_gelu_dropout", "tanh gelu"):
        inner = F.gelu(x + bias) if name == "bias_gelu_dropout" else F.gelu(x, approximate="tanh")
        return torch.where(y != 0, SCALE * inner, 0.0)
    if name == "bernoulli":
        return torch.where(y != 0, x, 0.0)
    return x + (y.to(x.dtype) - x).detach()  # what is added is free


def inputs(seed: int = 1, batch: int = 6) -> torch.Tensor:
    """(batch, 5, 40), nothing near 0."""
    x = torch.empty(batch, 5, 40).uniform_(0.2, 1.5, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def check_gradients(results: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Values and gradients of each op are those of the mask that its result shows."""
    weight = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    for name, y in results.items():
        wanted = expected(name, x, y)
        assert torch.allclose(y.to(x.dtype), wanted, atol=2e-5), name
        ours, theirs = (
            torch.autograd.grad((t.to(x.dtype) * weight).sum(), x, retain_graph=True)[0] for t in (y, wanted)
        )
        assert torch.allclose(ours, theirs, atol=3e-2 if name == "stochastic_round" else 2e-5), name
