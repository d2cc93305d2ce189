"""Dropout fused with bias, GELU and residual, additive noise, and stochastic rounding: one pass over memory each.

Plain eager tensors go to a kernel of their own, which computes in fp32 and rounds once; compiled code goes there by the
ops of `registered_fused`. Where there is none (fp64, functorch, tensor subclasses) the same decisions are applied step by
step by `ops` and torch.
"""

import torch
import torch.nn.functional as F

from . import registered, registered_fused
from .kernels import NOISE_TYPES, of_tensor
from .nonce import in_functorch, is_compiling
from .ops import _check_stream, _check_tensor, _checked_mask, _is_eager, _masked, dropout, dropout_add, record_tensor
from .registered_fused import BIAS_DROPOUT_ADD, GELU, GELU_BACKWARD, column_sum, gelu_slope

_FP32_MATH = (torch.float32, torch.bfloat16, torch.float16)


# Records are drawn before `apply`: inside it gradients are off, and a recomputation would pass for a hook's new draw.


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, record, mask):
        ctx.kept = record, mask, bias
        return of_tensor(x).fused(BIAS_DROPOUT_ADD, record, mask, x, bias, residual)

    @staticmethod
    def backward(ctx, grad):
        record, mask, bias = ctx.kept
        grad_x = _masked(grad, record, mask) if any(ctx.needs_input_grad[:2]) else None
        grad_bias = column_sum(grad_x, bias) if ctx.needs_input_grad[1] else None
        return grad_x if ctx.needs_input_grad[0] else None, grad_bias, grad, None, None


class _BiasGeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, record, mask, approximate):
        ctx.kept = record, mask, approximate
        ctx.save_for_backward(x, bias)
        return of_tensor(x).fused(GELU[approximate], record, mask, x, bias, None)

    @staticmethod
    def backward(ctx, grad):
        record, mask, approximate = ctx.kept
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: by ops that can be differentiated again
            grad_x = _masked(grad, record, mask) * gelu_slope(x, bias, approximate)
        else:
            grad_x = of_tensor(x).fused(GELU[approximate] + GELU_BACKWARD, record, mask, x, bias, grad.contiguous())
        grad_bias = column_sum(grad_x, bias) if ctx.needs_input_grad[1] else None
        return grad_x if ctx.needs_input_grad[0] else None, grad_bias, None, None, None


def _is_compiled(*tensors: torch.Tensor | None) -> bool:
    """Whether the ops of `registered_fused` take these: in compiled code, but not where functorch transforms it."""
    return (
        is_compiling()
        and not in_functorch()
        and all(t is None or (t.dtype in _FP32_MATH and not t.is_meta) for t in tensors)
    )


def _fits(*tensors: torch.Tensor | None) -> bool:
    return not is_compiling() and all(t is None or (_is_eager(t) and t.dtype in _FP32_MATH) for t in tensors)


def _draws(mask, training: bool, x: torch.Tensor) -> bool:
    """Whether there is anything to decide. A compiled graph is not specialized to tensors with elements for this."""
    return training and mask is not None and 0 < mask.p < 1 and (is_compiling() or x.numel() > 0)


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
    draws = _draws(mask, training, x)
    if draws and _is_compiled(x, bias, residual):
        return registered_fused.bias_dropout_add(x, bias, residual, record_tensor(x.device), mask.p, mask.stream)
    if not draws or not _fits(x, bias, residual):
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
    if approximate not in GELU:
        raise ValueError(f'approximate: "none" or "tanh", got {approximate!r}')
    mask = _checked_mask(p, stream)
    _check_tensor(x)
    _check_bias(bias, x)
    draws = _draws(mask, training, x)
    if draws and _is_compiled(x, bias):
        return registered_fused.bias_gelu_dropout(x, bias, record_tensor(x.device), mask.p, mask.stream, approximate)
    if not draws or not _fits(x, bias):
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
    """x + sigma * normal in one pass: element e takes the normal that `randn` draws for it under one record, unrounded.

    x: any shape; float32, bfloat16, float16 (rounded once), float64 in two steps. sigma: a finite number, at least 0.
    The gradient of x is the incoming one. Errors as `randn`, and ValueError for another sigma.
    """
    if isinstance(sigma, torch.Tensor) or not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma: a finite number, at least 0, got {sigma!r}")
    generator = _check_stream(stream)
    _check_tensor(x)
    if _is_compiled(x):
        return registered_fused.add_noise(x, record_tensor(x.device), float(sigma), generator)
    if x.dtype not in NOISE_TYPES:
        raise TypeError(f"x: add_noise needs float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.is_meta or not x.numel():
        return x.clone()
    if not _fits(x):
        return x + sigma * registered.fill(record_tensor(x.device), "normal", x.shape, x.dtype, generator, None)
    return _AddNoise.apply(x.contiguous(), of_tensor(x).draw(), float(sigma), generator)


class _StochasticRound(torch.autograd.Function):
    """record: 48 bytes, or a tensor where functorch may have batched it."""

    @staticmethod
    def forward(x, record, dtype, stream):
        if type(record) is bytes:
            return of_tensor(x).stochastic_round(record, stream, x.contiguous(), dtype)
        return registered_fused.stochastic_round(x, record, dtype, stream)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[2]

    @staticmethod
    def backward(ctx, grad):
        return grad.float(), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.to(ctx.dtype)

    @staticmethod
    def vmap(info, in_dims, x, record, dtype, stream):
        rows = [
            _StochasticRound.apply(
                x if in_dims[0] is None else x.select(in_dims[0], i),
                record if in_dims[1] is None else record.select(in_dims[1], i),
                dtype,
                stream,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0


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
    if is_compiling() and not in_functorch():
        return registered_fused.stochastic_round(x, record_tensor(x.device), dtype, generator)
    if x.is_meta or not x.numel():
        return x.to(dtype)
    return _StochasticRound.apply(x, of_tensor(x).draw() if _fits(x) else record_tensor(x.device), dtype, generator)
