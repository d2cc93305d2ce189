"""Categories: `multinomial`, by an inverse distribution function in 64-bit integers, or by exponential races.

With replacement (and for one sample) the weights of a row become integers: W = round(w * 2^S), with S so large that their
sum Z lies near 2^62. Draw j of the row is an integer u below Z (csrc/law/convert.h), and its category the first whose W and
those before it exceed u. Integers add up alike in every order, so a CPU and a GPU agree; rounding moves a probability by
2^-61 at most, and a weight of 0 stays 0. reference/categories.py says the same in Python's integers.

Without replacement the categories are those of the n smallest E/w, E being fp64 exponentials: as if each next one were drawn
by the weights that are left (Yellott 1977, Efraimidis and Spirakis 2006).
"""

import torch

from .errors import NoDistribution
from .generator import check_generator
from .noise import draw_fill, looks_at_data

_MOST = 2**30  # categories: below, rounding cannot take Z beyond 2^63


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """2^k in fp64, exactly, for integers from -1022 to 1023."""
    return ((k.to(torch.int64) + 1023) << 52).view(torch.float64)


def _scaled(w: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """w * 2^k. By two factors, since subnormal weights need more than fp64 has."""
    half = k // 2
    return w * _power_of_two(half) * _power_of_two(k - half)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """The k of the smallest 2^k that is above x; 0 for 0."""
    return torch.frexp(x).exponent.to(torch.int64)


def _cumulated(w: torch.Tensor) -> torch.Tensor:
    """Running sums of the integer weights of rows of fp64 weights: int64, (rows, categories)."""
    top = _exponent(w.amax(-1, keepdim=True))
    shift = 61 - (w.shape[-1] - 1).bit_length() - top  # for a sum of at most 2^61, were all weights the largest
    rough = _scaled(w, shift).round().to(torch.int64).sum(-1, keepdim=True)
    shift = shift + 62 - _exponent(rough.to(torch.float64))
    return _scaled(w, shift).round().to(torch.int64).cumsum(-1)


def _with_replacement(w, n, stream, generator):
    cumulated = _cumulated(w)
    totals = cumulated[:, -1:].expand(w.shape[0], n).contiguous()
    u = draw_fill("integers", totals.shape, torch.int64, w.device, stream, generator, totals)
    return torch.searchsorted(cumulated, u, right=True)


def _without_replacement(w, n, stream, generator):
    times = draw_fill("exponential", w.shape, torch.float64, w.device, stream, generator)
    times = times / _scaled(w, -_exponent(w.amax(-1, keepdim=True)))
    # The smallest weights come last but before those of 0, whose time is Inf.
    times = torch.where(w > 0, times.clamp(max=torch.finfo(torch.float64).max), torch.inf)
    return times.topk(n, -1, largest=False, sorted=True).indices


def _faults(w: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row: a weight is NaN, infinite or negative; fewer than `least` are above 0."""
    return ((w < 0) | ~w.isfinite()).any(-1), (w > 0).sum(-1) < least


def multinomial(
    weights: torch.Tensor, num_samples: int, replacement: bool = False, *, generator=None, stream: str = "chacha8"
) -> torch.Tensor:
    """Indices of categories drawn with probabilities in proportion to their weights. Like torch.multinomial.

    weights: (categories,) or (rows, categories), float32, float64, bfloat16 or float16, at least 0; a weight of 0 is never
    drawn. Returns int64, (num_samples,) or (rows, num_samples); without replacement in the order of the draws.
    Raises NoDistribution (a ValueError and, as torch's, a RuntimeError) where a weight is NaN, infinite or negative, or too
    few are above 0, whose check waits for a GPU; under vmap and in captured CUDA graphs nothing is checked, and such rows
    give -1. TypeError or ValueError for other arguments; else as `rand`. Source of the method: the head of this file.
    """
    check_generator(generator)
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights: a floating tensor, got {getattr(weights, 'dtype', type(weights).__name__)}")
    if weights.dim() not in (1, 2) or not 0 < weights.shape[-1] < _MOST:
        raise ValueError(
            f"weights: (categories,) or (rows, categories), below 2**30 of them, got {tuple(weights.shape)}"
        )
    if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__"):
        raise TypeError(f"num_samples: an integer, got {type(num_samples).__name__}")
    if num_samples <= 0:
        raise ValueError(f"num_samples: at least 1, got {num_samples}")
    if not replacement and num_samples > weights.shape[-1]:
        raise ValueError(
            f"num_samples: without replacement at most one a category ({weights.shape[-1]}), got {num_samples}"
        )
    w = weights.detach().reshape(-1, weights.shape[-1]).to(torch.float64)
    strange, too_few = _faults(w, 1 if replacement else num_samples)
    looks = looks_at_data()
    if looks and bool(strange.any()):
        raise NoDistribution("weights: must be finite and at least 0; found NaN, Inf or a negative one")
    if looks and bool(too_few.any()):
        raise NoDistribution(
            f"weights: {1 if replacement else num_samples} of a row must be above 0 to draw {num_samples}"
            f"{'' if replacement else ' without replacement'}; a row has fewer"
        )
    if not looks:
        bad = (strange | too_few).unsqueeze(-1)
        w = torch.where(bad, 1.0, w)
    draw = _with_replacement if replacement or num_samples == 1 else _without_replacement
    drawn = draw(w, num_samples, stream, generator)
    if not looks:
        drawn = torch.where(bad, -1, drawn)
    return drawn.view(*weights.shape[:-1], num_samples)
