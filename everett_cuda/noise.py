"""Noise: uniforms, normals, exponentials, Gumbels, Bernoulli decisions and raw words, by quantum-keyed streams.

Values are a function of the subkey record and the element's logical index alone (`csrc/law/convert.h` states the
formulas), so they agree bit for bit between instruction sets and thread counts. With freshness="direct" nothing is
expanded: conditioned bits of the source go through the same formulas.
"""

import functools
import math
import operator

import torch

from . import kernels, registered
from .errors import EverettError
from .generator import Generator, check_generator
from .kernels import NOISE_TYPES, Fill
from .nonce import in_plain_eager, is_capturing, is_compiling
from .ops import _check_stream, _refuse_strange, record_tensor

_INTEGERS = (int, torch.SymInt)  # a SymInt must stay one: a compiled graph is for more than one size


# --- arguments --------------------------------------------------------------------------------------------------------


def checked_shape(size) -> tuple[int, ...]:
    """A shape from integers or one sequence of them. TypeError or ValueError for anything else."""
    if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)):
        size = size[0]
    if any(isinstance(n, bool) or not (isinstance(n, _INTEGERS) or hasattr(n, "__index__")) for n in size):
        raise TypeError(f"size: integers, got {tuple(size)}")
    size = tuple(n if isinstance(n, _INTEGERS) else operator.index(n) for n in size)
    if any(n < 0 for n in size):
        raise ValueError(f"size: must not be negative, got {size}")
    return size


def checked_device(device, generator: Generator | None = None) -> torch.device:
    """The device of a result: the one named, else the generator's, else torch's default."""
    if device is not None:
        return torch.device(device)
    if generator is not None:
        return generator.device
    return torch.empty(0).device if is_compiling() else torch.get_default_device()  # which dynamo cannot trace


def checked_float(dtype: torch.dtype | None) -> torch.dtype:
    """A floating dtype that noise has, torch's default for None. TypeError for others."""
    dtype = dtype or torch.get_default_dtype()
    if dtype not in NOISE_TYPES:
        raise TypeError(f"dtype: float32, float64, bfloat16 or float16, got {dtype}")
    return dtype


def _refuse_another(device, p: torch.Tensor, name: str = "p") -> None:
    wanted = p.device if device is None else torch.device(device)
    if wanted.type != p.device.type or wanted.index not in (None, p.device.index):
        raise EverettError(f"{name}: is on {p.device}, and {wanted} was asked for. Move it there, or leave device out.")


def looks_at_data() -> bool:
    """Whether a function may look at values to check them: functorch cannot branch on data, nor can a capture."""
    return in_plain_eager() and not is_capturing()


def of_parameters(size, dtype, device, **parameters) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """(size, dtype, device) of noise with parameters, some of them tensors: what is not given comes from these, the size
    as their broadcast shape. TypeError or ValueError where a tensor cannot serve or does not broadcast to the size."""
    tensors = {name: t for name, t in parameters.items() if isinstance(t, torch.Tensor)}
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(f"{name}: a floating tensor or a number, got {t.dtype}")
        _refuse_strange(t, name)
        _refuse_another(device, t, name)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    size = checked_shape(size) if size else None
    try:
        whole = tuple(torch.broadcast_shapes(*shapes.values(), *([] if size is None else [size])))
    except RuntimeError:
        whole = None
    if whole is None or size not in (None, whole):
        raise ValueError(f"size: {shapes} must broadcast to {'one shape' if size is None else size}")
    first = next(iter(tensors.values()))
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    return whole, dtype, first.device


def check_values(value, valid, rule: str) -> None:
    """ValueError with the rule unless all is valid: `valid` is a bool, or a tensor of them where value is one. Tensors are
    not looked at under functorch and in captures, where code cannot branch on data."""
    if isinstance(valid, torch.Tensor):
        valid = not looks_at_data() or bool(valid.all())
    if not valid:
        raise ValueError(f"{rule}, got {'such a tensor' if isinstance(value, torch.Tensor) else value}")


# --- draws ------------------------------------------------------------------------------------------------------------


def draw_fill(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    stream: str = "chacha8",
    generator: Generator | None = None,
    p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise of a kind of `kernels.KINDS`, expanded from a record of the world family, by the way that is right for the
    modes in force. p: the kind's parameters on `device`, contiguous, one an element or one for all."""
    check_generator(generator)
    runs = kernels.of_device(device)
    fill = Fill(kind, shape, dtype, _check_stream(stream))
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype, device=device)
    if generator is not None:
        return runs.fill(generator.draw(runs), fill, p)
    if in_plain_eager():
        return runs.fill(runs.draw(world=True), fill, p)
    return registered.fill(record_tensor(device, world=True), kind, shape, dtype, fill.stream, p)


def _make(kind, shape, dtype, device, stream, freshness, generator, p=None) -> torch.Tensor:
    check_generator(generator)
    device = checked_device(device, generator)
    if freshness is None:
        return draw_fill(kind, shape, dtype, device, stream, generator, p)
    if freshness != "direct":
        raise ValueError(f'freshness: None (the setting of ev.set_freshness) or "direct", got {freshness!r}')
    if generator is not None:
        raise ValueError('generator: direct bits have no nonce, so freshness="direct" takes none')
    if not in_plain_eager():
        raise EverettError('freshness="direct" works in plain eager code only, not under functorch or compilation')
    p = None if p is None else p.expand(shape).contiguous()
    return kernels.of_device(device).direct(Fill(kind, shape, dtype, _check_stream(stream)), p)


def rand(*size, dtype=None, device=None, stream="chacha8", freshness=None, generator=None) -> torch.Tensor:
    """Uniforms in [0, 1): multiples of 2^-24 (fp32), 2^-53 (fp64), 2^-11 (fp16) or 2^-8 (bf16). Like torch.rand.

    size: integers or one tuple. dtype: default torch's. device: CPU or CUDA, default torch's. stream: see `dropout`.
    freshness: None expands a key by the process's setting; "direct" uses conditioned bits of the source themselves (32 or
    64 a value); a captured CUDA graph takes them at each replay, and gives NaN where `ev.step()` has not brought enough.
    generator: an `ev.Generator`, or None for torch's generator of the device.
    Raises TypeError or ValueError for bad arguments (a torch.Generator is one), and the source's errors when there is no
    key.
    """
    return _make("uniform", checked_shape(size), checked_float(dtype), device, stream, freshness, generator)


def randn(*size, dtype=None, device=None, stream="chacha8", freshness=None, generator=None) -> torch.Tensor:
    """Standard normals by Box and Muller (1958), tails to 7.54 (fp64: 9.49). Arguments and errors as `rand`."""
    return _make("normal", checked_shape(size), checked_float(dtype), device, stream, freshness, generator)


def rand_like(x: torch.Tensor, *, dtype=None, device=None, stream="chacha8", generator=None) -> torch.Tensor:
    """Uniforms in the shape of x, and in its dtype and on its device unless given: `rand`, contiguous."""
    return rand(x.shape, dtype=dtype or x.dtype, device=device or x.device, stream=stream, generator=generator)


def randn_like(x: torch.Tensor, *, dtype=None, device=None, stream="chacha8", generator=None) -> torch.Tensor:
    """Standard normals in the shape of x, and in its dtype and on its device unless given: `randn`, contiguous."""
    return randn(x.shape, dtype=dtype or x.dtype, device=device or x.device, stream=stream, generator=generator)


def random_words(*size, device=None, stream="chacha8", freshness=None, generator=None) -> torch.Tensor:
    """32-bit words as int32 (every bit pattern equally likely). Arguments and errors as `rand`."""
    return _make("words", checked_shape(size), torch.int32, device, stream, freshness, generator)


def exponential(
    *size, rate=1.0, dtype=None, device=None, stream="chacha8", freshness=None, generator=None
) -> torch.Tensor:
    """Exponentials of the given rate, from 64-bit draws: between 2^-65 and 45.05 at rate 1, never 0.

    rate: a positive number, or a floating tensor that broadcasts to `size` (the result's size, dtype and device where they
    are not given); gradients flow to it (the value is a standard one divided by the rate). Else as `rand`; ValueError for
    a rate that is not positive and finite.
    """
    if isinstance(rate, torch.Tensor):
        size, dtype, device = of_parameters(size, dtype, device, rate=rate)
        check_values(rate, (rate > 0) & rate.isfinite(), "rate: must be positive and finite")
    elif not isinstance(rate, (int, float)):
        raise TypeError(f"rate: a positive number or a tensor of them, got {type(rate).__name__}")
    elif not 0 < rate < math.inf:
        raise ValueError(f"rate: must be positive and finite, got {rate}")
    x = _make("exponential", checked_shape(size), checked_float(dtype), device, stream, freshness, generator)
    return x / rate if isinstance(rate, torch.Tensor) else x if rate == 1.0 else x.div_(rate)


def gumbel(*size, dtype=None, device=None, stream="chacha8", freshness=None, generator=None) -> torch.Tensor:
    """Standard Gumbels, -ln of an exponential: between -3.81 and 45.06. Arguments and errors as `rand`."""
    return _make("gumbel", checked_shape(size), checked_float(dtype), device, stream, freshness, generator)


def bernoulli(p, *size, dtype=None, device=None, stream="chacha8", freshness=None, generator=None) -> torch.Tensor:
    """1 with probability p, else 0, decided by a 64-bit draw: exactly round(p * 2^64) / 2^64.

    p: a floating tensor of probabilities (the result has its shape, its device, and its dtype unless given), or a number
    with `size`. Raises ValueError for a p outside [0, 1] or NaN (not under vmap or while a CUDA graph is captured: there
    a p above 1 counts as 1, all else that is no probability as 0); else as `rand`. On a GPU the check of a tensor waits
    for the GPU.
    """
    check_generator(generator)
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
        # Where data cannot be looked at, the kernel's comparison is what limits p.
        valid = not looks_at_data() or bool(((p >= 0) & (p <= 1)).all())
    else:
        if not isinstance(p, (int, float)):
            raise TypeError(f"p: a number from 0 to 1 or a floating tensor, got {type(p).__name__}")
        shape, device = checked_shape(size), checked_device(device, generator)
        valid = 0 <= p <= 1
        p = torch.full((1,), float(p), dtype=torch.float64, device=device) if valid else None
    if not valid:
        raise ValueError("p: probabilities must be from 0 to 1 and not NaN")
    return _make("bernoulli", shape, checked_float(dtype), device, stream, freshness, generator, p)
