"""The fused ops as torch knows them by name; see `registered`. They differ from `fused` in where they run, not in what
they compute: the same kernels, the same decisions."""

import torch
import torch.nn.functional as F

from . import kernels, registered
from .errors import EverettError
from .kernels import Mask
from .registered import register

# Numbers of the fused ops in the kernels (csrc/types.h).
BIAS_DROPOUT_ADD = 0
GELU = {"none": 1, "tanh": 2}
GELU_BACKWARD = 2  # from a GELU's number to that of its backward


def column_sum(grad: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias (N,) that was added to rows (..., N)."""
    return grad.reshape(-1, bias.shape[0]).sum(0)


def _fused(op: int, record, p, stream, x, bias, extra) -> torch.Tensor:
    """The kernel on contiguous memory, which is checked here: what is called by name comes from anywhere."""
    for name, t, shape in (("bias", bias, x.shape[-1:]), ("residual or grad", extra, x.shape)):
        if t is not None and (t.shape != shape or t.dtype != x.dtype or t.device != x.device):
            raise EverettError(f"{name}: must be {tuple(shape)}, {x.dtype}, {x.device}; got {tuple(t.shape)}, {t.dtype}")
    x = x.contiguous()
    if not x.numel():
        return torch.empty_like(x)
    bias = None if bias is None else bias.contiguous()
    extra = None if extra is None else extra.contiguous()
    return kernels.of_tensor(x).fused(op, record, Mask(p, stream, plain=True), x, bias, extra)


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- bias_dropout_add -------------------------------------------------------------------------------------------------


def _run_bias_dropout_add(x, bias, residual, record, p, stream):
    return _fused(BIAS_DROPOUT_ADD, record, p, stream, x, bias, residual)


def _set_up_bias_dropout_add(ctx, inputs, output):
    _, bias, _, record, p, stream = inputs
    ctx.save_for_backward(record, bias)
    ctx.kept = p, stream


def _bias_dropout_add_backward(ctx, grad):
    record, bias = ctx.saved_tensors
    p, stream = ctx.kept
    grad_x = grad_bias = None
    if any(ctx.needs_input_grad[:2]):
        grad_x = registered.masked(grad, None, record, p, stream, None, 0, None)
    if ctx.needs_input_grad[1]:
        grad_bias = column_sum(grad_x, bias)
    return grad_x if ctx.needs_input_grad[0] else None, grad_bias, grad, None, None, None


bias_dropout_add = register(
    "bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor record, float p, int stream) -> Tensor",
    _run_bias_dropout_add,
    _like,
    _bias_dropout_add_backward,
    _set_up_bias_dropout_add,
)


# --- bias_gelu_dropout ------------------------------------------------------------------------------------------------


def _run_bias_gelu_dropout(x, bias, record, p, stream, approximate):
    return _fused(GELU[approximate], record, p, stream, x, bias, None)


def _run_bias_gelu_dropout_backward(x, bias, grad, record, p, stream, approximate):
    return _fused(GELU[approximate] + GELU_BACKWARD, record, p, stream, x, bias, grad)


bias_gelu_dropout_backward = register(
    "bias_gelu_dropout_backward(Tensor x, Tensor? bias, Tensor grad, Tensor record, float p, int stream, str approximate)"
    " -> Tensor",
    _run_bias_gelu_dropout_backward,
    _like,
)


def _set_up_bias_gelu_dropout(ctx, inputs, output):
    x, bias, record, p, stream, approximate = inputs
    ctx.save_for_backward(x, bias, record)
    ctx.kept = p, stream, approximate


def gelu_slope(x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """GELU's derivative at x + bias by ops that can be differentiated again."""
    v = x if bias is None else x + bias
    if not v.requires_grad:
        v = v.detach().requires_grad_()
    return torch.autograd.grad(F.gelu(v, approximate=approximate).sum(), v, create_graph=True)[0]


def _bias_gelu_dropout_backward(ctx, grad):
    x, bias, record = ctx.saved_tensors
    p, stream, approximate = ctx.kept
    if torch.is_grad_enabled():  # create_graph
        grad_x = registered.masked(grad, None, record, p, stream, None, 0, None) * gelu_slope(x, bias, approximate)
    else:
        grad_x = bias_gelu_dropout_backward(x, bias, grad, record, *ctx.kept)
    grad_bias = column_sum(grad_x, bias) if ctx.needs_input_grad[1] else None
    return grad_x if ctx.needs_input_grad[0] else None, grad_bias, None, None, None, None


bias_gelu_dropout = register(
    "bias_gelu_dropout(Tensor x, Tensor? bias, Tensor record, float p, int stream, str approximate) -> Tensor",
    _run_bias_gelu_dropout,
    _like,
    _bias_gelu_dropout_backward,
    _set_up_bias_gelu_dropout,
)


# --- attention ----------------------------------------------------------------------------------------------------------


def _run_attention_mask(x, record, p, stream):
    return kernels.of_tensor(x).attention_mask(record, stream, p, x.contiguous())


def _set_up_attention_mask(ctx, inputs, output):
    _, record, *ctx.kept = inputs
    ctx.save_for_backward(record)


def _attention_mask_backward(ctx, grad):
    return attention_mask(grad, *ctx.saved_tensors, *ctx.kept), None, None, None


def _vmap_attention_mask(info, in_dims, x, record, p, stream):
    x_dim, record_dim, *_ = in_dims
    rows = [
        attention_mask(
            x if x_dim is None else x.select(x_dim, i),
            record if record_dim is None else record.select(record_dim, i),
            p,
            stream,
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(rows), 0


# Weights (heads, queries, keys) after dropout by the attention law.
attention_mask = register(
    "attention_mask(Tensor x, Tensor record, float p, int stream) -> Tensor",
    _run_attention_mask,
    _like,
    _attention_mask_backward,
    _set_up_attention_mask,
    _vmap_attention_mask,
)


# --- noise and rounding -----------------------------------------------------------------------------------------------


def _run_add_noise(x, record, sigma, stream):
    return kernels.of_tensor(x).add_noise(record, stream, sigma, x.contiguous())


add_noise = register(
    "add_noise(Tensor x, Tensor record, float sigma, int stream) -> Tensor",
    _run_add_noise,
    _like,
    lambda ctx, grad: (grad, None, None, None),
)


def _run_stochastic_round(x, record, dtype, stream):
    return kernels.of_tensor(x).stochastic_round(record, stream, x.contiguous(), dtype)


def _fake_stochastic_round(x, record, dtype, stream):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


stochastic_round = register(
    "stochastic_round(Tensor x, Tensor record, ScalarType dtype, int stream) -> Tensor",
    _run_stochastic_round,
    _fake_stochastic_round,
    lambda ctx, grad: (grad.float(), None, None, None),
)
