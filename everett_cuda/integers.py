"""Integers and permutations: `randint` and `randperm`, from 64-bit draws.

An integer below n is the high 64 bits of draw * n (`csrc/law/convert.h`), so each has a probability within 2^-64 of 1/n. A
permutation is the order of n draws. Both are the same, bit for bit, on every device.
"""

import operator

import torch

from .generator import Generator, check_generator
from .noise import checked_device, checked_shape, draw_fill

_WHOLE = 2**64


def _bound(value, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: an integer, got {type(value).__name__}")
    return operator.index(value)


def _check_holds(dtype: torch.dtype, low: int, high: int, name: str) -> None:
    """ValueError where dtype cannot hold all integers from low to high - 1."""
    if dtype.is_complex:
        raise TypeError(f"dtype: integers, floats or bool, got {dtype}")
    if dtype == torch.bool:
        first, last = 0, 1
    elif dtype.is_floating_point:  # beyond that some integers have no float
        last = round(2 / torch.finfo(dtype).eps)
        last = min(last, int(torch.finfo(dtype).max))
        first = -last
    else:
        first, last = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if low < first or high - 1 > last:
        raise ValueError(
            f"{name}: {dtype} holds the integers from {first} to {last}, and {low} to {high - 1} are asked for"
        )


def integers_into(
    shape: tuple[int, ...], low: int, high: int, dtype, device: torch.device, stream: str, generator: Generator | None
) -> torch.Tensor:
    """Integers in [low, high), checked: -2^63 <= low < high <= 2^63 (or 2^64 for uint64)."""
    span = (high - low) % _WHOLE  # 0 for all 2^64
    p = torch.full((1,), span - _WHOLE if span >= _WHOLE // 2 else span, dtype=torch.int64, device=device)
    x = draw_fill("integers", shape, torch.int64, device, stream, generator, p)
    low = (low + _WHOLE // 2) % _WHOLE - _WHOLE // 2  # int64 wraps around, as the sum must
    x = x.add_(low) if low else x
    return x.view(dtype) if dtype == torch.uint64 else x.to(dtype)


def randint(
    low=None, high=None, size=None, *, dtype=torch.int64, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """Integers in [low, high), each with a probability within 2^-64 of 1/(high - low). Like torch.randint.

    Called as randint(high, size) or randint(low, high, size). dtype: any integer type, bool, or a float that holds each of
    these integers. device, stream, generator: as `rand`. Raises TypeError for bounds that are no integers, ValueError where
    low >= high or dtype does not hold them all; else as `rand`.
    """
    if size is None and isinstance(high, (tuple, list)):
        low, high, size = 0, low, high
    elif high is None:
        low, high = 0, low
    low, high = _bound(0 if low is None else low, "low"), _bound(high, "high")
    if size is None:
        raise TypeError("size: is missing; randint(high, size) or randint(low, high, size)")
    if low >= high:
        raise ValueError(f"low: must be below high, got {low} and {high}")
    _check_holds(dtype, low, high, "dtype")
    shape = checked_shape((size,) if hasattr(size, "__index__") else (tuple(size),))
    check_generator(generator)
    return integers_into(shape, low, high, dtype, checked_device(device, generator), stream, generator)


def randint_like(x: torch.Tensor, low, high=None, *, dtype=None, device=None, stream="chacha8", generator=None):
    """`randint` in the shape of x, and in its dtype and on its device unless given. Called as randint_like(x, high) or
    randint_like(x, low, high)."""
    low, high = (0, low) if high is None else (low, high)
    dtype, device = dtype or x.dtype, device or x.device
    return randint(low, high, tuple(x.shape), dtype=dtype, device=device, stream=stream, generator=generator)


def randperm(n: int, *, dtype=torch.int64, device=None, stream: str = "chacha8", generator=None) -> torch.Tensor:
    """A permutation of 0 ... n-1: the order of n 64-bit draws. Like torch.randperm.

    Equal draws keep their order. There are any with a probability below n^2 / 2^65 (3e-8 for a million, 0.03 for 10^9), and
    by no more than that is any event's probability off. dtype: as `randint`. Raises ValueError for a negative n or a dtype
    that does not hold n - 1; else as `rand`.
    """
    n = _bound(n, "n")
    if n < 0:
        raise ValueError(f"n: must not be negative, got {n}")
    _check_holds(dtype, 0, max(n, 1), "n")
    check_generator(generator)
    # Less 2^63, so that signed numbers are in the order of the draws.
    draws = integers_into((n,), -(2**63), 2**63, torch.int64, checked_device(device, generator), stream, generator)
    return torch.sort(draws, stable=True).indices.to(dtype)
