"""Scaled dot-product attention whose dropout is drawn from quantum-keyed streams.

The mask of a weight depends on the record and on (batch * heads + head, query, key) alone, in the order in which fused
kernels hold weights (`csrc/law/attention.h`), so that a fused kernel may take this one's place without changing a bit. Here
the weights are made in full, as in torch's own attention with dropout on a CPU. The backward makes the mask again.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import registered_fused
from .kernels import NOISE_TYPES, of_device, of_tensor
from .nonce import can_go_direct, in_functorch, is_compiling, is_dynamo_compiling, is_legacy_batchedtensor
from .ops import _check_p, _check_stream, _is_eager, _refuse_strange, record_tensor

_LEAST, _MOST = 1 / 256, 31 / 32  # where decisions take 15 bits


class _DroppedWeights(torch.autograd.Function):
    """Weights (heads, queries, keys) after dropout; linear in them, so backward and forward-mode AD are itself."""

    @staticmethod
    def forward(x, record, p, stream):
        if can_go_direct(x):
            return of_tensor(x).attention_mask(record, stream, p, x.contiguous())
        return _by_name(x, record, p, stream)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.kept = inputs

    @staticmethod
    def backward(ctx, grad):
        return _dropped(grad, *ctx.kept), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _dropped(tangent, *ctx.kept)

    @staticmethod
    def vmap(info, in_dims, x, record, p, stream):
        x_dim, record_dim, _, _ = in_dims
        rows = [
            _DroppedWeights.apply(
                x if x_dim is None else x.select(x_dim, i),
                record if record_dim is None else record.select(record_dim, i),
                p,
                stream,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0


def _by_name(x, record, p, stream):
    """The op as torch knows it."""
    if type(record) is bytes:
        record = torch.frombuffer(bytearray(record), dtype=torch.int32).to(x.device)
    return registered_fused.attention_mask(x, record, p, stream)


def _by_torch(x, record, p, stream):
    """By torch's own ops around one mask, which needs no rule of ours: same values. For functorch in compiled code, and for
    autograd.grad(is_grads_batched=True), whose vmap is older than functorch."""
    ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    scaled = _by_name(ones, record, p, stream)
    return torch.where(scaled != 0, x * scaled, 0.0)


def _dropped(x, record, p, stream):
    """Dropout under a given record, by a way that is right for x and the modes in force."""
    if not is_dynamo_compiling():
        if is_legacy_batchedtensor(x):
            return _by_torch(x, record, p, stream)
        if type(record) in (bytes, torch.Tensor) and _is_eager(x):
            return _DroppedWeights.apply(x, record, p, stream)
    if is_compiling():
        return (_by_name if not in_functorch() else _by_torch)(x, record, p, stream)
    if not in_functorch() and forward_ad._current_level < 0:
        return _by_name(x, record, p, stream)
    return _DroppedWeights.apply(x, record, p, stream)


def _checked_p(dropout_p: float) -> float:
    p = _check_p(dropout_p)
    if 0 < p < _LEAST or _MOST < p < 1:
        raise ValueError(f"dropout_p: attention's law serves 0, 1/256 to 31/32, and 1; got {p}")
    return p


def _check_tensors(query, key, value, enable_gqa) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in NOISE_TYPES:
            raise TypeError(f"{name}: float32, float64, bfloat16 or float16, got {t.dtype}")
        if t.dtype != query.dtype or t.device != query.device:
            raise ValueError(f"{name}: must be as query ({query.dtype}, {query.device}), got {t.dtype}, {t.device}")
        if t.dim() < 2:
            raise ValueError(f"{name}: (..., length, features), got {tuple(t.shape)}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key: must have query's features and value's length; got query {tuple(query.shape)}, key {tuple(key.shape)}, "
            f"value {tuple(value.shape)}"
        )
    if enable_gqa and (
        min(query.dim(), key.dim(), value.dim()) < 3 or any(query.shape[-3] % t.shape[-3] for t in (key, value))
    ):
        raise ValueError(
            f"enable_gqa: query's heads must be a multiple of key's and value's; got query {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}"
        )


def _weights(query, key, attn_mask, is_causal, scale) -> torch.Tensor:
    """softmax(query key^T * scale + mask), in fp32 (fp64 for fp64). A query that may see no key has weights of 0."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return torch.softmax(scores, -1)
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    else:
        scores = scores + attn_mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    stream: str = "philox",
) -> torch.Tensor:
    """Like torch.nn.functional.scaled_dot_product_attention, with the dropout mask from a quantum-keyed stream.

    query: (..., heads, L, E); key: (..., heads, S, E); value: (..., heads, S, V); returns (..., heads, L, V). float32,
    float64, bfloat16 or float16 (the last two compute in fp32). attn_mask: bool (True: may be seen) or added to the scores;
    broadcasts to (..., heads, L, S). is_causal: query i sees the keys up to i; not together with a mask. enable_gqa: fewer
    key and value heads, each serving several of query's.
    dropout_p: 0, from 1/256 to 31/32, or 1. Each weight is dropped with probability exactly round(p * 2^47) / 2^47 (fused
    attentions elsewhere round p to 4 or 8 bits), else multiplied by 1/(1-p). At 0 this is torch's own function, fused where
    that is. With dropout all weights are made: memory goes with L * S. stream: "philox" (default; not cryptographic),
    "chacha8", "chacha12" or "chacha20".

    Raises TypeError or ValueError for bad arguments; the source's errors as `dropout`. Source of the method: Vaswani et al.
    2017; the stream law, csrc/law/attention.h.
    """
    p, generator = _checked_p(dropout_p), _check_stream(stream)
    if p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check_tensors(query, key, value, enable_gqa)
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal: makes a mask of its own; leave attn_mask out")
    if not query.is_meta:
        of_device(query.device)  # refuses what has no kernels
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(wide)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = _weights(query, key, attn_mask, is_causal, scale)
    if p == 1:
        weights = weights.masked_fill(torch.ones((), dtype=torch.bool, device=weights.device), 0.0)
    elif not weights.is_meta and (is_compiling() or weights.numel()):
        eager = _is_eager(query)
        if not eager:
            _refuse_strange(query, "query")
        record = of_tensor(query).draw() if eager else record_tensor(query.device)
        weights = _dropped(weights.reshape(-1, *weights.shape[-2:]), record, p, generator).view(weights.shape)
    return (weights @ value).to(dtype)
