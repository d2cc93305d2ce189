"""Dropout fused with bias, GELU and residual, additive noise, and stochastic rounding: one pass over memory each.

Plain eager tensors go to a kernel of their own, which computes in fp32 and rounds once. Where there is none (fp64,
functorch, tensor subclasses) the same decisions are applied step by step by `ops` and torch.
"""

import torch
import torch.nn.functional as F

from . import noise
from .errors import EverettError
from .kernels import of_tensor
from .nonce import in_plain_eager
from .ops import _check_stream, _check_tensor, _checked_mask, _is_eager, _masked, dropout, dropout_add

_BIAS_DROPOUT_ADD = 0
_GELU = {"none": 1, "tanh": 2}
_BACKWARD = 2  # from a GELU's number to that of its backward
_FP32_MATH = (torch.float32, torch.bfloat16, torch.float16)


def _column_sum(grad: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, bias.shape[0]).sum(0)


# Records are drawn before `apply`: inside it gradients are off, and a recomputation would pass for a hook's new draw.


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, record, mask):
        ctx.kept = record, mask, bias
        return of_tensor(x).fused(_BIAS_DROPOUT_ADD, record, mask, x, bias, residual)

    @staticmethod
    def backward(ctx, grad):
        record, mask, bias = ctx.kept
        grad_x = _masked(grad, record, mask) if any(ctx.needs_input_grad[:2]) else None
        grad_bias = _column_sum(grad_x, bias) if ctx.needs_input_grad[1] else None
        return grad_x if ctx.needs_input_grad[0] else None, grad_bias, grad, None, None


class _BiasGeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, record, mask, approximate):
        ctx.kept = record, mask, approximate
        ctx.save_for_backward(x, bias)
        return of_tensor(x).fused(_GELU[approximate], record, mask, x, bias, None)

    @staticmethod
    def backward(ctx, grad):
        record, mask, approximate = ctx.kept
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: by ops that can be differentiated again
            grad_x = _gelu_gradient(grad, record, mask, x if bias is None else x + bias, approximate)
        else:
            grad_x = of_tensor(x).fused(_GELU[approximate] + _BACKWARD, record, mask, x, bias, grad.contiguous())
        grad_bias = _column_sum(grad_x, bias) if ctx.needs_input_grad[1] else None
        return grad_x if ctx.needs_input_grad[0] else None, grad_bias, None, None, None


def _gelu_gradient(grad, record, mask, v, approximate):
    scaled = _masked(grad, record, mask)
    if not v.requires_grad:
        v = v.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(v, approximate=approximate).sum(), v, create_graph=True)
    return scaled * slope


def _fits(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or (_is_eager(t) and t.dtype in _FP32_MATH) for t in tensors)


def _check_bias(bias, x: torch.Tensor) -> None:
    if bias is None:
        return
    _check_tensor(bias, "bias")
    if x.dim() < 1 or bias.shape != x.shape[-1:] or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(
            f"bias: one value a column of x, {tuple(x.shape[-1:])}, {x.dtype}, {x.device}; got {tuple(bias.shape)}, "
            f"{bias.dtype}, {bias.device}"
        )


def bias_dropout_add(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    stream: str = "chacha8",
) -> torch.Tensor:
    """dropout(x + bias, p) + residual in one pass, rounded once. Equivalent to ev.dropout_add(x + bias, residual, p).

    x, residual: (..., N), equal in shape, dtype and device; bias: (N,) or None. float32, bfloat16, float16; float64 in
    two steps. The mask is the one that `dropout` would draw. Errors as `dropout`; ValueError where shapes differ.
    """
    mask = _checked_mask(p, stream)
    _check_tensor(x)
    _check_bias(bias, x)
    _check_tensor(residual, "residual")
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual: must match x ({tuple(x.shape)}, {x.dtype}, {x.device}), got {tuple(residual.shape)}, "
            f"{residual.dtype}, {residual.device}"
        )
    decides = training and mask is not None and 0 < p < 1 and x.numel()
    if not decides or not _fits(x, bias, residual):
        return dropout_add(x if bias is None else x + bias, residual, p, training, stream=stream)
    bias = None if bias is None else bias.contiguous()
    return _BiasDropoutAdd.apply(x.contiguous(), bias, residual.contiguous(), of_tensor(x).draw(), mask)


def bias_gelu_dropout(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    approximate: str = "none",
    stream: str = "chacha8",
) -> torch.Tensor:
    """dropout(gelu(x + bias), p) in one pass, rounded once: the middle of a transformer's feed-forward block.

    x: (..., N); bias: (N,) or None. approximate: "none" (erf) or "tanh", as F.gelu. float32, bfloat16, float16; float64
    in steps. The backward recomputes the mask and GELU's slope from x, so nothing else is kept. The mask is the one that
    `dropout` would draw; GELU is csrc/law/gelu.h's, within 2.2e-7 |x| of exact and the same on every machine. Errors as
    `dropout`; ValueError for a bias of another shape or an unknown `approximate`.
    """
    if approximate not in _GELU:
        raise ValueError(f'approximate: "none" or "tanh", got {approximate!r}')
    mask = _checked_mask(p, stream)
    _check_tensor(x)
    _check_bias(bias, x)
    decides = training and mask is not None and 0 < p < 1 and x.numel()
    if not decides or not _fits(x, bias):
        return dropout(F.gelu(x if bias is None else x + bias, approximate=approximate), p, training, stream=stream)
    bias = None if bias is None else bias.contiguous()
    return _BiasGeluDropout.apply(x.contiguous(), bias, of_tensor(x).draw(), mask, approximate)


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, record, sigma, stream):
        return of_tensor(x).add_noise(record, stream, sigma, x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def add_noise(x: torch.Tensor, sigma: float, *, stream: str = "chacha8") -> torch.Tensor:
    """x + sigma * normal in one pass: element e takes the normal that `randn` would draw for it, unrounded.

    x: any shape; float32, bfloat16, float16 (rounded once), float64 in two steps. sigma: a finite number, at least 0.
    The gradient of x is the incoming one. Errors as `randn`, and ValueError for another sigma.
    """
    if isinstance(sigma, torch.Tensor) or not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma: a finite number, at least 0, got {sigma!r}")
    generator = _check_stream(stream)
    _check_tensor(x)
    if not x.numel():
        return x.clone()
    if not _fits(x):
        return x + sigma * noise.randn(x.shape, dtype=x.dtype, device=x.device, stream=stream)
    return _AddNoise.apply(x.contiguous(), of_tensor(x).draw(), float(sigma), generator)


class _StochasticRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, record, dtype, stream):
        return of_tensor(x).stochastic_round(record, stream, x, dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.float(), None, None, None


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, *, stream: str = "chacha8") -> torch.Tensor:
    """float32 x rounded to bfloat16 or float16, up or down with the probabilities that make the expectation x itself.

    x: float32, any shape. One 16-bit draw an element: exact for bfloat16, to 2^-16 of a step for float16's subnormals.
    Inf and NaN pass; above the greatest finite value "up" is Inf. The gradient is the incoming one, as that of
    x.to(dtype). Source of the method: csrc/law/rounding.h. TypeError for other dtypes; errors as `dropout`.
    """
    generator = _check_stream(stream)
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        raise TypeError(f"x: a float32 tensor, got {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: torch.bfloat16 or torch.float16, got {dtype}")
    _check_tensor(x)
    if not (in_plain_eager() and _is_eager(x)):
        raise EverettError("stochastic_round works on plain eager tensors, not under functorch, tracing or subclasses")
    if not x.numel():
        return x.to(dtype)
    return _StochasticRound.apply(x.contiguous(), of_tensor(x).draw(), dtype, generator)
