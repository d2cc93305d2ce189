"""What the tests of the tape share: the smallest op that rests on records, blocks whose gradient can be read off their
output, and the ways to checkpoint them.

The op makes a mask from the record by numpy's Philox; its backward makes the mask again.
"""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from everett_cuda import keys

N = 64
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def mask_of(record, shape, p):
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(record[:16], "little"))).random(tuple(shape))
    return torch.from_numpy((uniform >= p) / (1 - p))


class DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, p, record):
        return x * mask_of(record, x.shape, p).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, ctx.record = inputs

    @staticmethod
    def backward(ctx, grad):
        return DropoutFunction.apply(grad, ctx.p, ctx.record), None, None


def dropout(x, p=0.5):
    return DropoutFunction.apply(x, p, keys.draw_record())


def ck(f, x, reentrant):
    """checkpoint, and without stopping early: else a non-reentrant one need not repeat a draw that comes last."""
    with set_checkpoint_early_stop(False):
        return checkpoint(f, x, use_reentrant=reentrant)


def block(x):
    """exp saves its output behind the draw, sin its input before it; the mask can be read off the result."""
    return torch.exp(dropout(torch.sin(x)))


def block_gradient(x, y):
    x, y = x.detach(), y.detach()
    mask = (torch.log(y) / torch.sin(x)).round()
    return torch.exp(mask * torch.sin(x)) * mask * torch.cos(x)


def tail_block(x):
    """The last thing is the draw, and it saves no tensor: the backward asks first for one saved before the draw."""
    return dropout(torch.sin(x))


def tail_gradient(x, y):
    x, y = x.detach(), y.detach()
    return (y / torch.sin(x)).round() * torch.cos(x)


BLOCKS = pytest.mark.parametrize("f, gradient", [(block, block_gradient), (tail_block, tail_gradient)])


def leaf():
    """A leaf in [0.5, 1.5), from a generator of its own."""
    return (torch.rand(N, dtype=torch.float64, generator=leaf.generator) + 0.5).requires_grad_()


leaf.generator = torch.Generator().manual_seed(77)


def right(x, y, gradient=block_gradient):
    return torch.allclose(x.grad, gradient(x, y))


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


# Inside a reentrant checkpoint's forward gradients are off, and torch warns that the inner one sees none.
NO_GRAD_WARNING = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def nested_forms(test):
    return NO_GRAD_WARNING(
        pytest.mark.parametrize("outer, inner", list(itertools.product([True, False], repeat=2)))(test)
    )


def nested_pair(outer, inner):
    """(x, y, expected gradient of y.sum()), from masks seen in the forward. Each inner region draws twice, and what it
    saves lies before, between and (with `tail` off) behind its draws."""
    seen = []

    def draw(x):
        record = keys.draw_record()
        seen.append(mask_of(record, x.shape, 0.5))
        return DropoutFunction.apply(x, 0.5, record)

    def f(x, tail):
        x = draw(torch.sin(x) + draw(torch.cos(x)))
        return x if tail else torch.exp(x)

    def whole(x):
        with set_checkpoint_early_stop(False):
            h = checkpoint(f, x, False, use_reentrant=inner)
            return checkpoint(f, torch.sin(h), True, use_reentrant=inner)

    x = leaf()
    with set_checkpoint_early_stop(False):
        y = checkpoint(whole, x, use_reentrant=outer)
    m1, m2, m3, m4 = seen[:4]
    z = x.detach().clone().requires_grad_()
    h = torch.sin(torch.exp(m2 * (torch.sin(z) + m1 * torch.cos(z))))
    (m4 * (torch.sin(h) + m3 * torch.cos(h))).sum().backward()
    return x, y, z.grad
