"""Dropout and noise for PyTorch, drawn from quantum-keyed streams.

An op is a pure function of its inputs and a 48-byte subkey record (`keys.draw_record`), so the backward recomputes the
mask and nothing else is kept. Plain eager tensors go straight to the kernel of their device (`kernels`; through an
autograd.Function where a gradient is asked for); everything else (torch.compile, export, functorch, fake tensors,
subclasses) draws its record as a tensor, by torch.randint and the ops of `registered`, so that torch's own rules for
random ops hold. `csrc/law/` states which bits decide what.
"""

import functools
import math

import torch
from torch.autograd import forward_ad

from . import kernels, registered
from .kernels import TYPES, Mask
from .nonce import (
    can_go_direct,
    graph_task_id,
    in_functorch,
    is_compiling,
    is_dynamo_compiling,
    is_legacy_batchedtensor,
    nonce_tensor,
)

STREAMS = {"chacha8": 0, "chacha12": 1, "chacha20": 2, "philox": 3}
_COPY_BELOW = 4096  # elements of a strided gradient (an expanded sum); describing its strides to C++ costs 10 us
_of_tensor = kernels.of_tensor


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_p(p: float) -> float:
    if not isinstance(p, (int, float)):
        raise TypeError(f"p: a number from 0 to 1, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:  # NaN fails this too
        raise ValueError(f"p: the probability of dropping must be from 0 to 1, got {p}")
    return float(p)


def _check_stream(stream: str) -> int:
    try:
        return STREAMS[stream]
    except KeyError:
        raise ValueError(f"stream: one of {', '.join(STREAMS)}; got {stream!r}") from None


def _check_tensor(x: torch.Tensor, name: str = "x") -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: a torch.Tensor, got {type(x).__name__}")
    if not (x.is_cpu or x.is_cuda or x.is_meta):
        kernels.of_device(x.device)  # says what it takes instead
    if x.dtype not in TYPES:
        known = [str(t).removeprefix("torch.") for t in TYPES]
        raise TypeError(
            f"{name}: dropout needs {', '.join(known[:-1])} or {known[-1]}, got {x.dtype}. Convert it first, e.g. "
            f"{name}.float()."
        )


def _new_mask(p: float, stream: str, affine=None, mask_dims=None) -> Mask | None:
    generator, p = _check_stream(stream), _check_p(p)
    return None if p < 2.0**-48 else Mask(p, generator, affine, 0, mask_dims, affine is None and mask_dims is None)


_cached_mask = functools.lru_cache(maxsize=1024)(_new_mask)  # a model asks for few


def _checked_mask(p: float, stream: str, affine=None, mask_dims=None) -> Mask | None:
    """The mask of checked arguments; None where p is so small that nothing is dropped."""
    if is_dynamo_compiling():  # which warns of an lru_cache, and goes past it
        return _new_mask(p, stream, affine, mask_dims)
    return _cached_mask(p, stream, affine, mask_dims)


# --- the kernel call --------------------------------------------------------------------------------------------------


def record_tensor(device: torch.device, world: bool = False) -> torch.Tensor:
    """The record (twelve int32) of a new draw as a tensor on `device`, for whatever is not plain eager code."""
    return registered.mix(nonce_tensor(device), torch.is_grad_enabled(), world)


def _by_name(x, record, mask, residual=None):
    """The masked op as torch knows it."""
    if type(record) is bytes:
        record = torch.frombuffer(bytearray(record), dtype=torch.int32).to(x.device)
    return registered.masked(x, residual, record, mask.p, mask.stream, mask.affine, mask.batch, mask.mask_dims)


def _linear(mask: Mask) -> Mask:
    """The derivative's mask: the same decisions and scale, nothing added."""
    return mask if mask.affine is None else mask._replace(affine=(mask.affine[0], 0.0, 0.0))


class _Masked(torch.autograd.Function):
    """y = keep ? x*scale : 0, plus the residual if there is one; or the affine form. `record` is 48 bytes, or a tensor
    of twelve int32 where functorch may have batched it. For functorch and forward-mode AD, which the gradient of a
    registered op does not serve."""

    @staticmethod
    def forward(x, record, mask, residual):
        if can_go_direct(x) and (residual is None or can_go_direct(residual)):
            return _of_tensor(x).masked(x, residual, record, mask)
        return _by_name(x, record, mask, residual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.record, mask, residual = inputs
        ctx.mask, ctx.has_residual = _linear(mask), residual is not None

    @staticmethod
    def backward(ctx, grad):
        grad_x = _masked(grad, ctx.record, ctx.mask) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad if ctx.has_residual else None

    @staticmethod
    def jvp(ctx, x_tangent, _record, _mask, residual_tangent):
        tangent = _masked(x_tangent, ctx.record, ctx.mask)
        return tangent + residual_tangent if ctx.has_residual else tangent

    @staticmethod
    def vmap(info, in_dims, x, record, mask, residual):
        x_dim, record_dim, _, residual_dim = in_dims
        size = info.batch_size

        def batched(t, dim):
            return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)

        x = batched(x, x_dim)
        residual = None if residual is None else batched(residual, residual_dim)
        if record_dim is None:
            return _Masked.apply(x, record, mask._replace(batch=mask.batch + 1, plain=False), residual), 0
        record = record.movedim(record_dim, 0)
        rows = [_Masked.apply(x[i], record[i], mask, None if residual is None else residual[i]) for i in range(size)]
        return torch.stack(rows), 0


class _EagerMasked(torch.autograd.Function):
    """_Masked without what functorch asks for (setup_context costs 1.6 us a call, vmap and jvp rule it out of dynamo):
    serves plain eager tensors, where a call must cost no more than F.dropout."""

    @staticmethod
    def forward(ctx, x, mask, record=None, residual=None):
        if record is None:
            y, record = _of_tensor(x).draw_and_drop(x, mask)
        else:
            y = _of_tensor(x).masked(x, residual, record, mask)
        ctx.kept = record, mask, residual is not None
        return y

    @staticmethod
    def backward(ctx, grad):
        record, mask, has_residual = ctx.kept
        if mask.affine is not None:
            mask = _linear(mask)
        if grad.numel() <= _COPY_BELOW and not grad.is_contiguous():
            grad = grad.contiguous()
        if not has_residual:
            return _masked(grad, record, mask), None, None
        return _masked(grad, record, mask) if ctx.needs_input_grad[0] else None, None, None, grad


# Function.apply in Python rebinds its arguments by signature at each call where setup_context is given, and asks for
# functorch; the C function under it does neither, and `_is_eager` has asked already.
_eager_masked = super(torch.autograd.Function, _EagerMasked).apply


def _is_eager(x: torch.Tensor) -> bool:
    return can_go_direct(x) and forward_ad._current_level < 0


def _eager(x, record, mask, residual):
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return _eager_masked(x, mask, record) if residual is None else _eager_masked(x, mask, record, residual)
    return _of_tensor(x).masked(x, residual, record, mask)


def _masked_by_torch(x, record, mask, residual=None):
    """The masked op by torch's own ops around one mask, which needs no rule of ours to be differentiated or batched.

    Same decisions, same values (the affine form to the last bit or so). For autograd.grad(is_grads_batched=True), whose
    vmap is older than functorch and calls no rule of a Function, and for functorch inside torch.compile, where dynamo
    refuses a Function with rules and a registered op has no gradient.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    draw = _by_name if is_compiling() else _masked
    scaled = draw(torch.ones(x.shape, dtype=wide, device=x.device), record, _linear(mask))
    y = torch.where(scaled != 0, x.to(wide) * scaled, 0.0)
    if mask.affine is not None:
        y = y + draw(torch.zeros(x.shape, dtype=wide, device=x.device), record, mask)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


# A record is bytes, or a tensor: on the GPU in a captured graph. `_is_eager` tells whether functorch may have batched it.
_PLAIN_RECORDS = (bytes, torch.Tensor)


def _masked(x, record, mask, residual=None):
    """The masked op under a given record, by the cheapest way that is right for x and the modes in force."""
    if not is_dynamo_compiling():
        if is_legacy_batchedtensor(x):
            return _masked_by_torch(x, record, mask)
        if type(record) in _PLAIN_RECORDS and _is_eager(x) and (residual is None or _is_eager(residual)):
            return _eager(x, record, mask, residual)
    if is_compiling():
        return (_by_name if not in_functorch() else _masked_by_torch)(x, record, mask, residual)
    if not in_functorch() and forward_ad._current_level < 0:
        return _by_name(x, record, mask, residual)
    return _Masked.apply(x, record, mask, residual)


def _refuse_strange(t: torch.Tensor, name: str) -> None:
    if t.layout is not torch.strided or t.is_nested:
        raise TypeError(
            f"{name}: must be a dense strided tensor, got {'a nested one' if t.is_nested else t.layout}. Sparse: take "
            f"{name}.to_dense(), or use its values; nested: use its values()."
        )


def _draw_on_shards(x, mask, residual):
    from . import dtensor

    dtensor.check_mesh(x.device_mesh)
    record = record_tensor(x.device) if mask.p < 1.0 else torch.zeros(12, dtype=torch.int32, device=x.device)
    return dtensor.masked(x, residual, record, mask)


def _masked_draw(x, mask, residual=None):
    """The masked op under a record of its own."""
    if x.is_meta:
        return x.clone() if residual is None else x + residual
    if type(x).__name__ == "DTensor":  # by name: only who uses it has its module
        return _draw_on_shards(x, mask, residual)
    eager = _is_eager(x) and (residual is None or _is_eager(residual))
    if not eager:
        _refuse_strange(x, "x")
        if residual is not None:
            _refuse_strange(residual, "residual")
    if mask.p == 1.0 or (not is_compiling() and x.numel() == 0):  # p = 1 decides without a draw
        record = bytes(48) if eager else torch.zeros(12, dtype=torch.int32, device=x.device)
    else:
        record = _of_tensor(x).draw() if eager else record_tensor(x.device)
    return _masked(x, record, mask, residual)


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout(
    x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, stream: str = "chacha8"
) -> torch.Tensor:
    """Like torch.nn.functional.dropout, with the mask drawn from a quantum-keyed stream.

    x: any shape and strides; float32, float64, bfloat16 or float16. Each element is dropped with probability exactly
    round(p * 2^47) / 2^47, else multiplied by 1/(1-p) in fp32 and rounded to nearest even; a dropped element is +0 even
    where x is Inf or NaN. The mask depends on the key, the nonce and the element's row-major index, never on threads,
    strides or instruction set. stream: "chacha8" (default), "chacha12", "chacha20" or "philox" (not cryptographic).

    Raises TypeError or ValueError for bad arguments; SourceNotOpen, Starved, HealthAlarm, SourceExhausted or ForkedError
    when there is no key. Source of the method: the stream law, csrc/law/keepdrop.h.
    """
    if (
        # The common case, told in the fewest questions: a plain contiguous tensor that a kernel can take at once.
        training
        and not inplace
        and can_go_direct(x)
        and p != 1
        and (mask := _cached_mask(p, stream)) is not None
        and x.is_contiguous()
        and graph_task_id() == -1
        and forward_ad._current_level < 0
        and x.numel()
        and x.dtype in (device := _of_tensor(x)).types
    ):
        if x.requires_grad and torch.is_grad_enabled():
            return _eager_masked(x, mask)
        return device.draw_and_drop(x, mask)[0]
    mask = _checked_mask(p, stream)
    _check_tensor(x)
    if not training or mask is None:
        return x
    y = _masked_draw(x, mask)
    return x.copy_(y) if inplace else y


def dropout_add(
    x: torch.Tensor, residual: torch.Tensor, p: float = 0.5, training: bool = True, *, stream: str = "chacha8"
) -> torch.Tensor:
    """dropout(x, p) + residual in one pass: one read of each, one rounding at the end.

    x and residual: equal shape, dtype and device. Gradients: of x as dropout's, of residual the incoming one. Errors as
    `dropout`, and ValueError where shapes differ (no broadcasting).
    """
    mask = _checked_mask(p, stream)
    _check_tensor(x)
    _check_tensor(residual, "residual")
    if x.shape != residual.shape or x.dtype != residual.dtype or x.device != residual.device:
        raise ValueError(
            f"residual: must match x ({tuple(x.shape)}, {x.dtype}, {x.device}), got {tuple(residual.shape)}, "
            f"{residual.dtype}, {residual.device}"
        )
    if not training or mask is None:
        return x + residual
    return _masked_draw(x, mask, residual)


def _feature_dropout(x, p, training, inplace, mask_dims, stream):
    mask = _checked_mask(p, stream, mask_dims=mask_dims)
    _check_tensor(x)
    if not training or mask is None:
        return x
    y = _masked_draw(x, mask)
    return x.copy_(y) if inplace else y


def _channel_dropout(x, p, training, inplace, spatial, stream):
    _check_tensor(x)
    if x.dim() not in (spatial + 1, spatial + 2):
        raise ValueError(
            f"x: dropout{spatial}d takes (N, C, ...) with {spatial + 2} dimensions or (C, ...) with {spatial + 1}, got "
            f"{tuple(x.shape)}"
        )
    return _feature_dropout(x, p, training, inplace, x.dim() - spatial, stream)


def dropout1d(x, p=0.5, training=True, inplace=False, *, stream="chacha8"):
    """Drops whole channels of (N, C, L) or (C, L), one decision a channel; else as `dropout`."""
    return _channel_dropout(x, p, training, inplace, 1, stream)


def dropout2d(x, p=0.5, training=True, inplace=False, *, stream="chacha8"):
    """Drops whole channels of (N, C, H, W) or (C, H, W), one decision a channel; else as `dropout`."""
    return _channel_dropout(x, p, training, inplace, 2, stream)


def dropout3d(x, p=0.5, training=True, inplace=False, *, stream="chacha8"):
    """Drops whole channels of (N, C, D, H, W) or (C, D, H, W), one decision a channel; else as `dropout`."""
    return _channel_dropout(x, p, training, inplace, 3, stream)


def drop_path(x, p=0.5, training=True, *, stream="chacha8"):
    """Stochastic depth (Huang et al. 2016): drops whole samples of a batch (N, ...), kept ones scaled by 1/(1-p)."""
    _check_tensor(x)
    if x.dim() < 1:
        raise ValueError("x: drop_path needs a batch dimension, got a scalar")
    return _feature_dropout(x, p, training, False, 1, stream)


def _alpha_affine(p: float) -> tuple[float, float, float]:
    """(scale, shift, dropped) that keep mean 0 and variance 1; at p = 1 everything becomes 0, as in torch."""
    if p == 1.0:
        return 0.0, 0.0, 0.0
    if is_compiling():
        # A p that varies is a symbol to dynamo, and torch 2.13 fails on formulas of one; this makes it a number again.
        numerator, denominator = p.as_integer_ratio()
        p = numerator / denominator
    dropped = -1.7580993408473766  # -scale * alpha of SELU: its value at minus infinity. A global's value may vary to dynamo
    scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * dropped**2))
    shift = -scale * p * dropped
    return scale, shift, scale * dropped + shift


def alpha_dropout(
    x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, stream: str = "chacha8"
) -> torch.Tensor:
    """Alpha dropout (Klambauer et al. 2017, "Self-Normalizing Neural Networks"): dropped elements take SELU's negative
    limit, and an affine map keeps mean 0 and variance 1. Arguments and errors as `dropout`; at p = 1 the result is 0,
    as torch's."""
    mask = _checked_mask(p, stream, affine=_alpha_affine(_check_p(p)))
    _check_tensor(x)
    if not training or mask is None:
        return x
    y = _masked_draw(x, mask)
    return x.copy_(y) if inplace else y
