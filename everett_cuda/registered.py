"""The ops as torch knows them by name (`torch.ops.everett_cuda`): what torch.compile, export, fake tensors, tensor
subclasses, dispatch modes and torch.jit.trace see and record. Plain eager tensors go past them (`ops`), which is faster.

A draw is two ops that a graph keeps apart: torch.randint gives the nonce (so vmap, checkpoints and partitioners treat it
as any random op), and `mix` turns it into the subkey record. The hidden key is read inside `mix`, on the host, at every
run: a graph holds no key and no mask. All that follows is a pure function of the record, so a backward, or a recomputation
of it, is right wherever the record or the nonce is the same.

    mix           nonce (int64, (2,)) -> record (int32, (12,)), on the nonce's device
    masked        the keep mask applied to x: dropout, dropout_add, channel dropout, alpha dropout
    masked_shard  the same on a shard of a larger tensor: exactly the slice of the unsharded result
    fill          noise
    and the fused ops, in `registered_fused`

Library.define/impl and not custom_op: 12 us a call against 18, measured without a gradient on 16 elements.
"""

import math

import torch

from . import kernels
from .errors import EverettError
from .kernels import Fill, Mask

_library = torch.library.Library("everett_cuda", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def register(schema: str, run, fake, backward=None, setup_context=None, vmap=None):
    """Defines an op of this namespace and gives its overload. run: real tensors; fake: shapes and dtypes alone."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"everett_cuda::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"everett_cuda::{name}", backward, setup_context=setup_context, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(f"everett_cuda::{name}", vmap, lib=_library)
    return getattr(torch.ops.everett_cuda, name).default


# --- records ----------------------------------------------------------------------------------------------------------


def _run_mix(nonce, grad_enabled, world):
    # What the graph's other ops read lies where they run; a GPU's record is made on the host outside captures.
    return kernels.of_tensor(nonce).mix(nonce, grad_enabled, world).to(nonce.device)


def _fake_mix(nonce, grad_enabled, world):
    return nonce.new_empty(12, dtype=torch.int32)


def _vmap_mix(info, in_dims, nonce, grad_enabled, world):
    nonces = nonce.movedim(in_dims[0], 0)
    return torch.stack([mix(n.contiguous(), grad_enabled, world) for n in nonces.unbind(0)]), 0


# grad_enabled: whether gradients were on where the draw was called; the op itself, below autograd, cannot see it. world:
# the draw's family (`keys.draw_record`).
mix = register("mix(Tensor nonce, bool grad_enabled, bool world) -> Tensor", _run_mix, _fake_mix, vmap=_vmap_mix)


# --- noise ------------------------------------------------------------------------------------------------------------


_BY_FP64 = ("bernoulli", "gamma", "log_gamma")  # kinds with fp64 parameters


def _run_fill(record, kind, size, dtype, stream, p):
    wanted = torch.int64 if kind == "integers" else torch.float64 if kind in _BY_FP64 else None
    if (p is None) != (wanted is None) or (p is not None and (p.dtype != wanted or p.numel() not in (1, math.prod(size)))):
        raise EverettError(
            f"fill: {kind} takes {f'p of {wanted}, one value or one an element' if wanted else 'no p'}, got "
            f"{'none' if p is None else f'{p.dtype}, {tuple(p.shape)}'}"
        )
    p = None if p is None else p.contiguous()
    return kernels.of_device(record.device).fill(record, Fill(kind, tuple(size), dtype, stream), p)


def _fake_fill(record, kind, size, dtype, stream, p):
    return record.new_empty(size, dtype=dtype)


def _vmap_fill(info, in_dims, record, kind, size, dtype, stream, p):
    record_dim, *_, p_dim = in_dims
    if record_dim is None and p_dim is None:
        return fill(record, kind, size, dtype, stream, p), None
    rows = [
        fill(
            record if record_dim is None else record.select(record_dim, i),
            kind,
            size,
            dtype,
            stream,
            p if p_dim is None else p.select(p_dim, i),
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(rows), 0


# kind: of kernels.KINDS. p: the parameters of a Bernoulli decision or a gamma variate (fp64), or an integer (int64), one or
# one an element.
# On the record's device.
fill = register(
    "fill(Tensor record, str kind, SymInt[] size, ScalarType dtype, int stream, Tensor? p) -> Tensor",
    _run_fill,
    _fake_fill,
    vmap=_vmap_fill,
)


# --- masked ops -------------------------------------------------------------------------------------------------------


def _mask(p, stream, affine, batch, mask_dims) -> Mask:
    plain = affine is None and batch == 0 and mask_dims is None
    return Mask(p, stream, None if affine is None else tuple(affine), batch, mask_dims, plain)


def _linear(affine):
    """The derivative's affine form: the same scale, nothing added."""
    return None if affine is None else [affine[0], 0.0, 0.0]


def _check_residual(x, residual) -> None:
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise EverettError(
            f"residual: must match x ({tuple(x.shape)}, {x.dtype}, {x.device}), got {tuple(residual.shape)}, "
            f"{residual.dtype}, {residual.device}"
        )


def _run_masked(x, residual, record, p, stream, affine, batch, mask_dims):
    _check_residual(x, residual)
    return kernels.of_tensor(x).masked(x, residual, record, _mask(p, stream, affine, batch, mask_dims))


def _fake_masked(x, residual, record, p, stream, affine, batch, mask_dims):
    return torch.empty_like(x)


def _set_up_masked(ctx, inputs, output):
    _, residual, record, p, stream, affine, batch, mask_dims = inputs
    ctx.save_for_backward(record)
    ctx.has_residual = residual is not None
    ctx.kept = p, stream, _linear(affine), batch, mask_dims


def _masked_backward(ctx, grad):
    (record,) = ctx.saved_tensors
    grad_x = masked(grad, None, record, *ctx.kept) if ctx.needs_input_grad[0] else None
    return grad_x, grad if ctx.has_residual else None, None, None, None, None, None, None


def _batched(t, dim, size):
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _vmap_masked(info, in_dims, x, residual, record, p, stream, affine, batch, mask_dims):
    size = info.batch_size
    x = _batched(x, in_dims[0], size)
    residual = None if residual is None else _batched(residual, in_dims[1], size)
    if in_dims[2] is None:
        return masked(x, residual, record, p, stream, affine, batch + 1, mask_dims), 0
    record = record.movedim(in_dims[2], 0)
    rows = [
        masked(x[i], None if residual is None else residual[i], record[i], p, stream, affine, batch, mask_dims)
        for i in range(size)
    ]
    return torch.stack(rows), 0


# y = keep ? x/(1-p) : 0, plus the residual if there is one; or the affine form (scale, shift, dropped). batch: leading
# dimensions that share one mask. mask_dims: how many of those that follow have decisions of their own, None: all.
masked = register(
    "masked(Tensor x, Tensor? residual, Tensor record, float p, int stream, float[]? affine, int batch, int? mask_dims)"
    " -> Tensor",
    _run_masked,
    _fake_masked,
    _masked_backward,
    _set_up_masked,
    _vmap_masked,
)


def _starts(x: torch.Tensor, index: list[torch.Tensor]) -> list[int]:
    """Where the shard begins in each dimension of the whole tensor, read off its index tensors."""
    if len(index) != x.dim():
        raise EverettError(f"masked_shard: one index tensor a dimension of x, {x.dim()}; got {len(index)}")
    starts = []
    for d, (i, n) in enumerate(zip(index, x.shape, strict=True)):
        if i.dtype != torch.int64 or i.shape != (n,):
            raise EverettError(f"masked_shard: index {d} must be int64, ({n},), got {i.dtype}, {tuple(i.shape)}")
        first, last = (int(i[0]), int(i[-1])) if n else (0, -1)
        if last - first != n - 1:
            raise EverettError(
                f"masked_shard: the shard's rows of dimension {d} must follow one another in the whole tensor; {n} of them "
                f"run from {first} to {last}. Redistribute it to a Shard or Replicate placement."
            )
        starts.append(first)
    return starts


def _run_masked_shard(x, residual, record, index, p, stream, affine, mask_dims, shape):
    _check_residual(x, residual)
    mask = _mask(p, stream, affine, 0, mask_dims)
    if not x.numel():
        return torch.empty_like(x)
    return kernels.of_tensor(x).masked_shard(x, residual, record, mask, tuple(shape), _starts(x, index))


def _fake_masked_shard(x, residual, record, index, p, stream, affine, mask_dims, shape):
    return torch.empty_like(x)


def _set_up_masked_shard(ctx, inputs, output):
    _, residual, record, index, p, stream, affine, mask_dims, shape = inputs
    ctx.save_for_backward(record, *index)
    ctx.has_residual = residual is not None
    ctx.kept = p, stream, _linear(affine), mask_dims, shape


def _masked_shard_backward(ctx, grad):
    record, *index = ctx.saved_tensors
    grad_x = masked_shard(grad, None, record, index, *ctx.kept) if ctx.needs_input_grad[0] else None
    return grad_x, grad if ctx.has_residual else None, None, [None] * len(index), None, None, None, None, None


# index: int64, for each dimension of x the places of its rows in the whole tensor, which has the sizes `shape`. A DTensor
# shards index d as dimension d of x, so that each rank reads the offset of its shard off its own part.
masked_shard = register(
    "masked_shard(Tensor x, Tensor? residual, Tensor record, Tensor[] index, float p, int stream, float[]? affine, "
    "int? mask_dims, SymInt[] shape) -> Tensor",
    _run_masked_shard,
    _fake_masked_shard,
    _masked_shard_backward,
    _set_up_masked_shard,
)
