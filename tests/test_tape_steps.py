"""The tape over several steps that start from one RNG state, over threads and in nested checkpoints: each recomputation
finds the key of its own forward, or there is an error."""

import itertools
import threading

import numpy as np
import pytest
import torch
from recompute import (
    BLOCKS,
    BOTH,
    block,
    ck,
    leaf,
    nested_forms,
    nested_pair,
    optimizer,
    right,
)
from torch.utils.checkpoint import checkpoint

from everett_cuda import _C, keys
from everett_cuda.errors import ReplayMiss

pytestmark = pytest.mark.usefixtures("freshness")


# --- rule 4: the same state in several steps ------------------------------------------------------------------------


@BOTH
@BLOCKS
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("boundary_after_last", [True, False])
def test_one_seed_in_three_steps_backward_in_any_order(reentrant, f, gradient, order, boundary_after_last):
    opt = optimizer()
    xs, ys = [leaf() for _ in range(3)], []
    for i, x in enumerate(xs):
        torch.manual_seed(0)
        ys.append(ck(f, x, reentrant))
        if i < 2 or boundary_after_last:
            opt.step()
    for i in order:
        ys[i].sum().backward()
    assert [right(x, y, gradient) for x, y in zip(xs, ys, strict=True)] == [True] * 3
    masks = [tuple((g != 0).tolist()) for g in (x.grad for x in xs)]
    assert len(set(masks)) == 3, "a seed that repeats in the next step must give another mask"


@BOTH
@BLOCKS
def test_one_seed_in_every_step_with_the_backward_one_step_late(reentrant, f, gradient):
    """Pipelines: in each step first the backward of the last step's graph, then the forward."""
    late = None
    for _ in range(6):
        if late is not None:
            late[1].sum().backward()
            assert right(*late, gradient)
        x = leaf()
        torch.manual_seed(0)
        late = (x, ck(f, x, reentrant))
        keys.step()


@BOTH
def test_steps_that_draw_nothing_are_no_windows_but_still_boundaries(reentrant, freshness):
    xs, ys = [leaf() for _ in range(2)], []
    for x in xs:
        torch.manual_seed(0)
        ys.append(checkpoint(block, x, use_reentrant=reentrant))
        for _ in range(1000):
            keys.step()
    for i in (1, 0):
        ys[i].sum().backward()
    assert [right(x, y) for x, y in zip(xs, ys, strict=True)] == [True, True]
    assert keys.counters()["fresh"] == 2


@BOTH
def test_windows_stay_right_when_the_tape_has_forgotten_the_oldest(reentrant):
    """Windows of forgotten steps are dropped from the front: those behind must not shift."""
    ring = _C.Ring(1 << 16)
    ring.put(np.random.default_rng(4).bytes(1 << 16))
    keys.detach()
    keys.attach(ring, tape_entries=6)
    pairs = []
    for _ in range(40):
        x = leaf()
        torch.manual_seed(0)
        pairs.append((x, checkpoint(block, x, use_reentrant=reentrant)))
        keys.step()
    for x, y in reversed(pairs[-6:]):
        y.sum().backward()
        assert right(x, y)
    with pytest.raises(ReplayMiss):
        pairs[-7][1].sum().backward()


@BOTH
def test_one_state_in_several_threads_and_steps_is_an_error_not_a_guess(reentrant):
    pairs = []

    def forward():
        x = leaf()
        pairs.append((x, checkpoint(block, x, use_reentrant=reentrant)))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(state)
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        keys.step()
    with pytest.raises(ReplayMiss, match="per thread"):
        pairs[0][1].sum().backward()
    assert keys.counters()["replay_misses"] == 1


@BOTH
def test_forwards_in_threads_of_their_own_states(reentrant):
    pairs = []

    def forward():
        x = leaf()
        pairs.append((x, checkpoint(block, x, use_reentrant=reentrant)))

    for _ in range(4):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        keys.step()
    for x, y in pairs:
        y.sum().backward()
        assert right(x, y)


@nested_forms
def test_nested_checkpoints(outer, inner):
    x, y, expected = nested_pair(outer, inner)
    y.sum().backward()
    assert torch.allclose(x.grad, expected)


@nested_forms
def test_nested_checkpoints_over_step_boundaries(outer, inner):
    """The inner nodes are made in the outer recomputation, steps after the draw they ask for."""
    x, y, expected = nested_pair(outer, inner)
    for _ in range(3):
        keys.draw_record()
        keys.step()
    y.sum().backward()
    assert torch.allclose(x.grad, expected)


@nested_forms
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_checkpoints_with_one_seed_in_three_steps(outer, inner, order):
    made = []
    for _ in range(3):
        torch.manual_seed(0)
        made.append(nested_pair(outer, inner))
        keys.step()
    for i in order:
        x, y, expected = made[i]
        y.sum().backward()
        assert torch.allclose(x.grad, expected)
