"""Calls that an intercepted function leaves to torch: which, why and how often.

Left are calls that our functions cannot serve (complex numbers, sparse tensors, subclasses that no rule covers), those
that pass a generator of torch's (data loaders of several ranks agree by theirs), and those of a data loader's worker.
"""

import os
from collections import Counter

import torch

from . import keys
from .nonce import _PLAIN, is_compiling

NOTHING_RANDOM = "meta"  # a tensor without numbers: torch makes its shape, and nothing is counted
_counts: Counter = Counter()
_child = False  # whether this process was forked after this module was imported


def _after_fork() -> None:
    global _child
    _child = True
    _counts.clear()


os.register_at_fork(after_in_child=_after_fork)


def leave(name: str, why: str, function, /, *args, **kwargs):
    """torch's own function in place of ours. `coverage` reads name and why from this frame."""
    if why != NOTHING_RANDOM and not is_compiling():
        _counts[name, why] += 1
    return function(*args, **kwargs)


def untouched() -> dict[tuple[str, str], int]:
    """{(function, why): calls} that interception left to torch in this process, eager calls only."""
    return dict(_counts)


def why_not(*tensors: torch.Tensor, generator=None, ruled: tuple[str, ...] = ()) -> str | None:
    """Why torch must serve a call with these tensors and generator; None where ours can. ruled: names of subclasses that
    the op has a rule for; what it refuses of them is an error and not torch's.

    In a forked worker of a torch DataLoader augmentations would die of the ForkedError that every draw with the parent's
    keys raises, so they stay torch's there, which is counted; not in other children, and not once the worker has opened
    a source of its own.
    """
    if isinstance(generator, torch.Generator):
        return "a torch.Generator was passed"
    if _child and torch.utils.data.get_worker_info() is not None and not keys.is_ours():
        return "worker"
    for x in tensors:
        if type(x).__name__ in ruled:
            continue
        if type(x) not in _PLAIN and (why := _why_not_subclass(x)):
            return why
        if x.layout is not torch.strided or x.is_nested:
            return "a nested tensor" if x.is_nested else f"layout {str(x.layout).removeprefix('torch.')}"
        if not (x.is_cpu or x.is_cuda):
            return NOTHING_RANDOM if x.is_meta else f"device {x.device.type}"
    return None


def _why_not_subclass(x: torch.Tensor) -> str | None:
    # One that keeps torch's dispatch has memory as any tensor, and its own __torch_function__ has been asked. A tracer's
    # tensor must not be left to torch: the graph would hold torch's numbers.
    if type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or type(x).__module__.startswith("torch._subclasses."):
        return None
    return f"no rule for {type(x).__name__}"
