"""Noise: uniforms, normals, exponentials, Gumbels, Bernoulli decisions and raw words, by quantum-keyed streams.

Values are a function of the subkey record and the element's logical index alone (`csrc/law/convert.h` states the
formulas), so they agree bit for bit between instruction sets and thread counts. With freshness="direct" nothing is
expanded: conditioned bits of the source go through the same formulas.
"""

import math
import operator
from typing import NamedTuple

import numpy as np
import torch

from . import _C, keys
from .errors import EverettError
from .nonce import in_plain_eager, nonce_tensor
from .ops import _TYPES, _check_stream, _Mix, _record_bytes, _refuse_strange, _refuse_tracing, _threads

_DTYPES = {**_TYPES, torch.int32: 4}
# kind: (number in the kernel, purpose tag)
_KINDS = {"words": (0, 8), "uniform": (1, 2), "normal": (2, 3), "exponential": (3, 4), "gumbel": (4, 4), "bernoulli": (5, 6)}
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16, torch.float16: np.float16}


class _Fill(NamedTuple):
    kind: str
    shape: tuple
    dtype: torch.dtype
    stream: int


def _run(record: bytes, fill: _Fill, p: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(fill.shape, dtype=fill.dtype)
    n = out.numel()
    if n == 0:
        return out
    kind, tag = _KINDS[fill.kind]
    # Contiguous all through: one dimension, logical index = position.
    size, one = (n,), (1,)
    address = 0 if p is None else p.data_ptr()
    _C.fill(
        kind, record, fill.stream, tag, _DTYPES[fill.dtype], address, out.data_ptr(), size, one, one, one, 0, 0, _threads(n)
    )
    return out


class _FillRecord(torch.autograd.Function):
    """A fill whose record is a tensor, so that functorch can batch it: each batch element then has its own noise."""

    @staticmethod
    def forward(record, p, fill):
        return _run(_record_bytes(record), fill, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, grad):
        return None, None, None

    @staticmethod
    def vmap(info, in_dims, record, p, fill):
        record_dim, p_dim, _ = in_dims
        rows = [
            _FillRecord.apply(
                record if record_dim is None else record.select(record_dim, i),
                p if p is None or p_dim is None else p.select(p_dim, i).contiguous(),
                fill,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0


def _shape(size) -> tuple:
    if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)):
        size = size[0]
    if any(isinstance(n, bool) or not hasattr(n, "__index__") for n in size):
        raise TypeError(f"size: integers, got {tuple(size)}")
    size = tuple(operator.index(n) for n in size)
    if any(n < 0 for n in size):
        raise ValueError(f"size: must not be negative, got {size}")
    return size


def _refuse_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise EverettError(f"device: noise kernels of this build run on the CPU, got {device}. Draw there and move it.")


def _make(kind, size, dtype, device, stream, freshness, p=None) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in _NUMPY and not (kind == "words" and dtype == torch.int32):
        raise TypeError(f"dtype: float32, float64, bfloat16 or float16, got {dtype}")
    _refuse_device(torch.device(device) if device is not None else torch.get_default_device())
    fill = _Fill(kind, size, dtype, _check_stream(stream))
    if freshness == "direct":
        if not in_plain_eager():
            raise EverettError('freshness="direct" works in plain eager code only, not under functorch or compilation')
        return _direct(fill, p)
    if freshness is not None:
        raise ValueError(f'freshness: None (the setting of ev.set_freshness) or "direct", got {freshness!r}')
    if not math.prod(size):
        return torch.empty(size, dtype=dtype)
    if in_plain_eager():
        return _run(keys.draw_record(), fill, p)
    _refuse_tracing()
    return _FillRecord.apply(_Mix.apply(nonce_tensor("cpu"), torch.is_grad_enabled()), p, fill)


def _direct(fill: _Fill, p: torch.Tensor | None) -> torch.Tensor:
    from .session import current_source  # here, because session needs keys and the package needs noise

    source, n = current_source(), math.prod(fill.shape)
    if fill.kind == "bernoulli":
        out = np.empty(n, np.uint8)
        if n:
            _C.law_bernoulli(source.direct_words(n).view(np.uint32), p.reshape(-1).numpy(), out)
        return torch.from_numpy(out).to(fill.dtype).reshape(fill.shape)
    if fill.kind == "words":
        words = source.direct_words((n + 1) // 2).view(np.int32)[:n].copy()
        return torch.from_numpy(words).reshape(fill.shape)
    name = str(fill.dtype).removeprefix("torch.")
    out = np.empty(n, _NUMPY[fill.dtype])
    if n:
        words = source.direct_words((_C.law_words(fill.kind, name, n) + 1) // 2).view(np.uint32)
        _C.law_convert(fill.kind, name, words, out)
    tensor = torch.from_numpy(out.view(np.int16) if fill.dtype == torch.bfloat16 else out)
    return (tensor.view(torch.bfloat16) if fill.dtype == torch.bfloat16 else tensor).reshape(fill.shape)


def rand(*size, dtype=None, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """Uniforms in [0, 1): multiples of 2^-24 (fp32), 2^-53 (fp64), 2^-11 (fp16) or 2^-8 (bf16). Like torch.rand.

    size: integers or one tuple. dtype: default torch's. stream: see `dropout`. freshness: None expands a key by the
    process's setting; "direct" uses conditioned bits of the source themselves (32 or 64 a value).
    Raises TypeError or ValueError for bad arguments, and the source's errors when there is no key.
    """
    return _make("uniform", _shape(size), dtype, device, stream, freshness)


def randn(*size, dtype=None, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """Standard normals by Box and Muller (1958), tails to 7.54 (fp64: 9.49). Arguments and errors as `rand`."""
    return _make("normal", _shape(size), dtype, device, stream, freshness)


def exponential(*size, rate: float = 1.0, dtype=None, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """Exponentials of the given rate, from 64-bit draws: between 2^-65 and 45.05 at rate 1, never 0. Else as `rand`."""
    if not isinstance(rate, (int, float)):
        raise TypeError(f"rate: a positive number, got {type(rate).__name__}")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate: must be positive and finite, got {rate}")
    x = _make("exponential", _shape(size), dtype, device, stream, freshness)
    return x if rate == 1.0 else x.div_(rate)


def gumbel(*size, dtype=None, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """Standard Gumbels, -ln of an exponential: between -3.81 and 45.06. Arguments and errors as `rand`."""
    return _make("gumbel", _shape(size), dtype, device, stream, freshness)


def random_words(*size, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """32-bit words as int32 (every bit pattern equally likely). Arguments and errors as `rand`."""
    return _make("words", _shape(size), torch.int32, device, stream, freshness)


def bernoulli(p, *size, dtype=None, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """1 with probability p, else 0, decided by a 64-bit draw: exactly round(p * 2^64) / 2^64.

    p: a floating tensor of probabilities (the result has its shape, and its dtype unless given), or a number with
    `size`. Raises ValueError for a p outside [0, 1] or NaN; else as `rand`.
    """
    if isinstance(p, torch.Tensor):
        if size:
            raise TypeError("size: goes with a number for p; a tensor of p has its own shape")
        if not p.is_floating_point():
            raise TypeError(f"p: a floating tensor, got {p.dtype}")
        _refuse_strange(p, "p")
        _refuse_device(p.device)
        shape, dtype = tuple(p.shape), dtype or p.dtype
        p = p.detach().to(torch.float64).resolve_neg().contiguous()
    else:
        if not isinstance(p, (int, float)):
            raise TypeError(f"p: a number from 0 to 1 or a floating tensor, got {type(p).__name__}")
        shape = _shape(size)
        p = torch.full(shape, float(p), dtype=torch.float64)
    # functorch cannot branch on data: inside vmap the kernel's comparison is what limits p
    if in_plain_eager() and not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("p: probabilities must be from 0 to 1 and not NaN")
    return _make("bernoulli", shape, dtype, device, stream, freshness, p)
