"""Noise: uniforms, normals, exponentials, Gumbels, Bernoulli decisions and raw words, by quantum-keyed streams.

Values are a function of the subkey record and the element's logical index alone (`csrc/law/convert.h` states the
formulas), so they agree bit for bit between instruction sets and thread counts. With freshness="direct" nothing is
expanded: conditioned bits of the source go through the same formulas.
"""

import math
import operator

import torch

from . import kernels, registered
from .errors import EverettError
from .kernels import NOISE_TYPES, Fill
from .nonce import in_plain_eager, is_capturing, is_compiling
from .ops import _check_stream, _refuse_strange, record_tensor

_INTEGERS = (int, torch.SymInt)  # a SymInt must stay one: a compiled graph is for more than one size


def _shape(size) -> tuple:
    if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)):
        size = size[0]
    if any(isinstance(n, bool) or not (isinstance(n, _INTEGERS) or hasattr(n, "__index__")) for n in size):
        raise TypeError(f"size: integers, got {tuple(size)}")
    size = tuple(n if isinstance(n, _INTEGERS) else operator.index(n) for n in size)
    if any(n < 0 for n in size):
        raise ValueError(f"size: must not be negative, got {size}")
    return size


def _device(device) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.empty(0).device if is_compiling() else torch.get_default_device()  # which dynamo cannot trace


def _refuse_another(device, p: torch.Tensor) -> None:
    wanted = p.device if device is None else torch.device(device)
    if wanted.type != p.device.type or wanted.index not in (None, p.device.index):
        raise EverettError(f"p: is on {p.device}, and {wanted} was asked for. Move p there, or leave device out.")


def _make(kind, size, dtype, device, stream, freshness, p=None) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in NOISE_TYPES and not (kind == "words" and dtype == torch.int32):
        raise TypeError(f"dtype: float32, float64, bfloat16 or float16, got {dtype}")
    device = _device(device)
    runs = kernels.of_device(device)
    fill = Fill(kind, size, dtype, _check_stream(stream))
    if freshness == "direct":
        if not in_plain_eager():
            raise EverettError('freshness="direct" works in plain eager code only, not under functorch or compilation')
        return runs.direct(fill, p)
    if freshness is not None:
        raise ValueError(f'freshness: None (the setting of ev.set_freshness) or "direct", got {freshness!r}')
    if not math.prod(size):
        return torch.empty(size, dtype=dtype, device=device)
    if in_plain_eager():
        return runs.fill(runs.draw(world=True), fill, p)
    return registered.fill(record_tensor(device, world=True), kind, size, dtype, fill.stream, p)


def rand(*size, dtype=None, device=None, stream="chacha8", freshness=None) -> torch.Tensor:
    """Uniforms in [0, 1): multiples of 2^-24 (fp32), 2^-53 (fp64), 2^-11 (fp16) or 2^-8 (bf16). Like torch.rand.

    size: integers or one tuple. dtype: default torch's. device: CPU or CUDA, default torch's. stream: see `dropout`.
    freshness: None expands a key by the process's setting; "direct" uses conditioned bits of the source themselves (32 or
    64 a value); a captured CUDA graph takes them at each replay, and gives NaN where `ev.step()` has not brought enough.
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

    p: a floating tensor of probabilities (the result has its shape, its device, and its dtype unless given), or a number
    with `size`. Raises ValueError for a p outside [0, 1] or NaN (not under vmap or while a CUDA graph is captured: there
    a p above 1 counts as 1, all else that is no probability as 0); else as `rand`. On a GPU the check of a tensor waits
    for the GPU.
    """
    if isinstance(p, torch.Tensor):
        if size:
            raise TypeError("size: goes with a number for p; a tensor of p has its own shape")
        if not p.is_floating_point():
            raise TypeError(f"p: a floating tensor, got {p.dtype}")
        _refuse_strange(p, "p")
        _refuse_another(device, p)
        shape, dtype, device = tuple(p.shape), dtype or p.dtype, p.device
        kernels.of_device(device)  # refuses what has no kernels
        p = p.detach().to(torch.float64).resolve_neg().contiguous()
        # functorch cannot branch on data, nor can a capture: there the kernel's comparison is what limits p
        valid = not in_plain_eager() or is_capturing() or bool(((p >= 0) & (p <= 1)).all())
    else:
        if not isinstance(p, (int, float)):
            raise TypeError(f"p: a number from 0 to 1 or a floating tensor, got {type(p).__name__}")
        shape, device = _shape(size), _device(device)
        valid = 0 <= p <= 1
        p = torch.full(shape, float(p), dtype=torch.float64, device=device) if valid else None
    if not valid:
        raise ValueError("p: probabilities must be from 0 to 1 and not NaN")
    return _make("bernoulli", shape, dtype, device, stream, freshness, p)
