"""`fill_`: what torch's Tensor.uniform_, normal_, random_ and their like do, for tensors of any strides.

Values are those of our functions for a contiguous tensor of that shape, copied; so they follow the logical order.
"""

import torch

from . import distributions, noise
from .generator import check_generator
from .integers import integers_into
from .kernels import NOISE_TYPES


def _bernoulli(p=0.5, *, size, dtype, device, stream, generator):
    made = dtype if dtype in NOISE_TYPES else torch.float32
    if isinstance(p, torch.Tensor):
        p = p.to(torch.float64).expand(size)
        return noise.bernoulli(p, dtype=made, device=device, stream=stream, generator=generator)
    return noise.bernoulli(p, size, dtype=made, device=device, stream=stream, generator=generator)


def _exponential(rate=1.0, *, size, dtype, device, stream, generator):
    return noise.exponential(size, rate=rate, dtype=dtype, device=device, stream=stream, generator=generator)


def _geometric(p, *, size, dtype, device, stream, generator):
    made = dtype if dtype in NOISE_TYPES else torch.float64
    return distributions.geometric(p, size, dtype=made, device=device, stream=stream, generator=generator)


def _log_normal(mean=1.0, std=2.0, **place):
    return distributions.log_normal(mean, std, **place)


def greatest(dtype: torch.dtype) -> int:
    """The greatest number of torch's random_() in a dtype: all integers up to it have a place of their own."""
    if dtype == torch.bool:
        return 1
    return round(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else torch.iinfo(dtype).max


def _random(*bounds, size, dtype, device, stream, generator):
    """(): 0 to the greatest; (end): 0 to end - 1; (first, end): first to end - 1; (first, None): first to the greatest."""
    first, end = (0, None) if not bounds else (0, *bounds) if len(bounds) == 1 else bounds
    top = greatest(dtype)
    end = top + 1 if end is None else end
    if not first < end:
        raise ValueError(f"random: the first number must be below the end, got {first} and {end}")
    least = -top if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).min
    if first < least or end - 1 > top:
        raise ValueError(f"random: {dtype} holds the integers from {least} to {top}, got {first} to {end - 1}")
    return integers_into(size, first, end, dtype, device, stream, generator)


# By torch's name without the underscore; parameters as torch's.
_KINDS = {
    "bernoulli": _bernoulli,
    "cauchy": distributions.cauchy,
    "exponential": _exponential,
    "geometric": _geometric,
    "log_normal": _log_normal,
    "normal": distributions.normal,
    "random": _random,
    "uniform": distributions.uniform,
}
_ANY_TYPE = ("bernoulli", "geometric", "random")


def fill_(x: torch.Tensor, kind: str, *parameters, stream: str = "chacha8", generator=None) -> torch.Tensor:
    """Fills x in place with noise, and returns it: fill_(x, "normal", 0.0, 0.02) is x.normal_(0.0, 0.02) with our bits.

    x: any shape and strides; float32, float64, bfloat16 or float16; for "bernoulli", "geometric" and "random" any real
    dtype (no unsigned ones of 16 bits and more but uint64). kind: bernoulli(p = 0.5), cauchy(median, sigma),
    exponential(rate), geometric(p), log_normal(mean = 1, std = 2), normal(mean, std), random(), random(end),
    random(first, end), uniform(low, high). stream, generator: as `rand`. As torch's, in place means refused for a leaf that
    requires a gradient, and no gradient of x's old value. Errors as those functions'.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: one of {', '.join(_KINDS)}; got {kind!r}")
    check_generator(generator)
    if x.dtype not in NOISE_TYPES and (kind not in _ANY_TYPE or x.is_complex()):
        raise TypeError(f"x: float32, float64, bfloat16 or float16 for {kind}, got {x.dtype}")
    place = {"size": tuple(x.shape), "dtype": x.dtype, "device": x.device, "stream": stream, "generator": generator}
    values = _KINDS[kind](*parameters, **place)
    return x.copy_(values.detach())
