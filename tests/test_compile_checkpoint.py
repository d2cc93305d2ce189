"""Checkpoints and recomputation under torch.compile: gradients are those of the mask that the forward used."""

import functools
import shutil

import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import everett_cuda as ev
from everett_cuda import keys, registered


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    torch._dynamo.reset()
    yield opened
    ev.close()


def block(x, w):
    """z^2 with z = dropout(sin(x w)): its derivative needs the dropout's result and its mask."""
    return ev.dropout(torch.sin(x * w), 0.5).pow(2)


def two_blocks(x, w):
    """Both masks can be read off the result, which is a sum of separate powers of ten."""
    return torch.stack([block(x, w), 100 + block(x + 1, w)])


def check(results, x, w):
    """The gradient of w through `two_blocks` under the masks that the result shows."""
    assert results.shape == (2, *x.shape)
    wanted = 0.0
    for row, shift, base in ((results[0], 0, 0), (results[1], 1, 100)):
        kept = (row.detach() - base).abs() > 1e-3
        assert 0.3 < kept.float().mean() < 0.7
        wanted = wanted + torch.where(kept, 4 * torch.sin((x + shift) * w) ** 2, 0.0).sum()
    wanted = torch.autograd.grad(wanted, w)[0]
    (got,) = torch.autograd.grad(results.sum(), w)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.fixture
def tensors():
    x = torch.empty(30, 40).uniform_(0.3, 0.9)
    return x, torch.empty(40).uniform_(0.5, 1.2).requires_grad_()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_compiled_code(tensors, use_reentrant, rotate):
    inner = compiled(two_blocks)
    results = checkpoint(inner, *tensors, use_reentrant=use_reentrant)
    ev.dropout(torch.ones(5))
    if rotate:
        ev.step()
    replayed = keys.counters()["replayed"] + keys.counters()["reused"]
    x, w = tensors
    masks = results.detach().clone()
    results.sum().backward()  # a reentrant checkpoint allows nothing else
    assert keys.counters()["replayed"] + keys.counters()["reused"] - replayed == 2
    got, w.grad = w.grad, None
    kept = (masks - torch.tensor([0.0, 100.0]).view(2, 1, 1)).abs() > 1e-3
    both = torch.where(kept, torch.stack([4 * torch.sin(x * w) ** 2, 4 * torch.sin((x + 1) * w) ** 2]), 0.0)
    assert torch.allclose(got, torch.autograd.grad(both.sum(), w)[0], rtol=1e-4, atol=1e-3)


CHECKPOINTED = {
    "one": lambda x, w: checkpoint(two_blocks, x, w, use_reentrant=False),
    "nested": lambda x, w: checkpoint(
        lambda x, w: torch.stack(
            [block(x, w), 100 + checkpoint(block, x + 1, w, use_reentrant=False)]
        ), x, w, use_reentrant=False,
    ),
    "state not preserved": lambda x, w: checkpoint(two_blocks, x, w, use_reentrant=False, preserve_rng_state=False),
}  # fmt: skip


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_checkpoint_inside_compiled_code(tensors, kind, rotate):
    results = compiled(CHECKPOINTED[kind])(*tensors)
    ev.dropout(torch.ones(5))
    if rotate:
        ev.step()
    check(results, *tensors)


def test_checkpoint_under_inductor(tensors):
    if shutil.which("g++") is None:
        pytest.skip("inductor's CPU code needs g++")
    results = compiled(CHECKPOINTED["one"], "inductor")(*tensors)
    ev.step()
    check(results, *tensors)


def _policy(saved, ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


SAVED = {
    "nothing": (),
    "masked": (registered.masked,),
    "mix": (registered.mix,),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_selective_checkpoint(tensors, mode, saved):
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, SAVED[saved]))

    def run(x, w):
        return checkpoint(two_blocks, x, w, use_reentrant=False, context_fn=contexts)

    results = (compiled(run) if mode == "compiled" else run)(*tensors)
    ev.step()
    check(results, *tensors)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.01])
def test_an_activation_memory_budget_is_right_or_refused(tensors, budget):
    # With a small budget torch 2.13 recomputes random ops without restoring the RNG state: F.dropout's gradient is then
    # silently wrong. The tape knows that the nonce belongs to no forward.
    with torch._functorch.config.patch(activation_memory_budget=budget):
        results = compiled(two_blocks)(*tensors)
        ev.step()
        try:
            check(results, *tensors)
        except ev.ReplayMiss:
            assert budget < 1


def test_a_recomputation_that_finds_no_key_is_refused(tensors):
    inner = compiled(two_blocks)
    results = checkpoint(inner, *tensors, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(ev.ReplayMiss):
        results.sum().backward()


def test_compiled_autograd(tensors):
    results = compiled(two_blocks)(*tensors)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        check(results, *tensors)
