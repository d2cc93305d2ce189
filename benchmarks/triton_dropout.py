"""The dropout that one writes first in Triton, as a rival: one uniform of Triton's Philox an element, compared with p."""

import torch
import triton
import triton.language as tl


@triton.jit
def _seeded_dropout_kernel(x_ptr, y_ptr, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside)
    kept = tl.rand(seed, at) > p
    tl.store(y_ptr + at, tl.where(kept, x / (1 - p), 0.0), mask=inside)


def seeded_dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Dropout of a contiguous CUDA tensor; the mask is a function of the seed, so a backward can make it again."""
    y = torch.empty_like(x)
    n = x.numel()
    _seeded_dropout_kernel[(triton.cdiv(n, 1024),)](x, y, n, p, seed, BLOCK=1024)
    return y
