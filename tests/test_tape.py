"""The tape within a step, in hooks and in what torch does around it: gradients under recomputation are those of the
forward, or there is an error. One test per failure of a weaker rule."""

import threading

import numpy as np
import pytest
import torch
from recompute import BLOCKS, BOTH, N, block, block_gradient, ck, dropout, leaf, mask_of, nested_pair, right
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import everett_cuda
from everett_cuda import _C, keys, nonce
from everett_cuda.errors import ReplayMiss

pytestmark = pytest.mark.usefixtures("freshness")


# --- rule 1: within a step one state, one key -------------------------------------------------------------------------


@BOTH
@BLOCKS
@pytest.mark.parametrize("microbatches", [2, 3])
def test_microbatches_from_one_rng_state(reentrant, f, gradient, microbatches):
    xs = [leaf() for _ in range(microbatches)]
    ys = []
    for x in xs:
        torch.manual_seed(0)
        ys.append(ck(f, x, reentrant))
    for y in ys:
        y.sum().backward()
    assert all(right(x, y, gradient) for x, y in zip(xs, ys, strict=True))
    counters = keys.counters()
    assert (counters["reused"], counters["replayed"]) == (microbatches - 1, microbatches)


def test_seed_replaying_optimizer_returns_exactly(recwarn):
    w = torch.zeros(100, dtype=torch.float64)
    for scale in (1, -2, 1):
        torch.manual_seed(42)
        with torch.no_grad():
            w.add_(scale * 1e-3 * dropout(torch.ones(100, dtype=torch.float64)))
    assert (w == 0).all()
    assert [str(w.message)[:23] for w in recwarn] == ["the torch RNG state rep"]


def test_inference_mode_is_fresh_each_time_and_leaves_no_entry():
    x = torch.ones(N, dtype=torch.float64)
    with torch.inference_mode():
        torch.manual_seed(0)
        first = dropout(x)
        torch.manual_seed(0)
        assert not torch.equal(dropout(x), first)
    assert keys.counters()["tape_entries"] == 0


def test_step_ends_a_step_for_loops_without_gradients():
    x = torch.ones(N, dtype=torch.float64)
    results = []
    with torch.no_grad():
        for _ in range(3):
            torch.manual_seed(0)
            results.append(dropout(x))
            keys.step()
    assert len({tuple(r.tolist()) for r in results}) == 3


def test_a_no_grad_recomputation_inside_function_backward_finds_its_key():
    """Reversible layers: the backward restores the RNG state and draws again with gradients off."""

    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.state = torch.get_rng_state()
            ctx.save_for_backward(x)
            return x * dropout(torch.ones_like(x))

        @staticmethod
        def backward(ctx, grad):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(ctx.state)
                with torch.no_grad():
                    return grad * dropout(torch.ones_like(grad))

    x1, x2 = leaf(), leaf()
    torch.manual_seed(0)
    y1 = Reversible.apply(x1)
    keys.step()
    torch.manual_seed(0)
    y2 = Reversible.apply(x2)
    keys.step()
    for x, y in ((x1, y1), (x2, y2)):
        y.sum().backward()
        assert torch.equal(x.grad, (y / x).detach().round())
    assert not torch.equal(x1.grad, x2.grad)


# --- rule 2: entries leave by count, and boundaries inside a backward are none ----------------------------------------


@BOTH
@BLOCKS
def test_a_graph_lives_over_50_steps_of_another_model(reentrant, f, gradient):
    x = leaf()
    discriminator = torch.nn.Linear(N, 1).double()
    opt = torch.optim.SGD(discriminator.parameters(), 1e-3)
    y = ck(f, x, reentrant)
    for _ in range(50):
        opt.zero_grad()
        dropout(discriminator(y.detach())).sum().backward()
        opt.step()
    y.sum().backward()
    assert right(x, y, gradient)
    assert keys.counters()["boundaries"] == 50


@BOTH
@pytest.mark.parametrize("seeded", [False, True], ids=["one stream", "one seed for all layers"])
def test_optimizer_inside_the_backward(reentrant, seeded):
    layers = [torch.nn.Parameter(torch.ones(N, dtype=torch.float64)) for _ in range(8)]
    for p in layers:
        opt = torch.optim.SGD([p], 0.0)
        p.register_post_accumulate_grad_hook(lambda _, opt=opt: opt.step())
    x = leaf()
    h, masks = x, []
    for p in layers:
        if seeded:
            torch.manual_seed(1)
        before = h
        h = checkpoint(lambda h, p: h + torch.sin(dropout(h * p)), h, p, use_reentrant=reentrant)
        masks.append(((h - before).detach().abs() > 1e-12).double() * 2)
    h.sum().backward()
    expected = x.detach().clone().requires_grad_()
    g = expected
    for mask in masks:
        g = g + torch.sin(mask * g)
    g.sum().backward()
    assert torch.allclose(x.grad, expected.grad)
    counters = keys.counters()
    assert (counters["boundaries"], counters["boundaries_ignored"]) == (0, 8)


@BOTH
def test_a_boundary_inside_the_backward_does_not_split_a_step(reentrant):
    """With gradients accumulated in the hook: draws after the ignored boundary still find the step's keys."""
    x, p = leaf(), torch.nn.Parameter(torch.ones(N, dtype=torch.float64))
    opt = torch.optim.SGD([p], 0.0)
    p.register_post_accumulate_grad_hook(lambda _: opt.step())
    torch.manual_seed(0)
    first = dropout(torch.ones(N, dtype=torch.float64))
    checkpoint(lambda x, p: torch.sin(x * p), x, p, use_reentrant=reentrant).sum().backward()
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(N, dtype=torch.float64)), first)


@BOTH
def test_a_tape_that_was_too_small_is_an_error(reentrant):
    ring = _C.Ring(1 << 16)
    ring.put(np.random.default_rng(2).bytes(1 << 16))
    keys.detach()
    keys.attach(ring, tape_entries=8)
    x = leaf()
    y = checkpoint(block, x, use_reentrant=reentrant)
    for _ in range(8):
        dropout(torch.ones(1))
    with pytest.raises(ReplayMiss, match="tape_entries"):
        y.sum().backward()


@BOTH
def test_a_forgotten_entry_is_not_mistaken_for_a_later_one_of_the_same_state(reentrant):
    ring = _C.Ring(1 << 16)
    ring.put(np.random.default_rng(3).bytes(1 << 16))
    keys.detach()
    keys.attach(ring, tape_entries=8)
    x = leaf()
    torch.manual_seed(0)
    y = checkpoint(block, x, use_reentrant=reentrant)
    keys.step()
    for _ in range(8):
        dropout(torch.ones(1))
    torch.manual_seed(0)
    dropout(torch.ones(1))
    with pytest.raises(ReplayMiss):
        y.sum().backward()


# --- rule 3: an unknown nonce in a recomputation is an error; in hooks it is a new draw -------------------------------


@BOTH
def test_without_the_saved_rng_state_a_recomputation_is_an_error(reentrant):
    y = checkpoint(block, leaf(), use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.raises(ReplayMiss, match="preserve_rng_state=False"):
        y.sum().backward()
    assert keys.counters()["replay_misses"] == 1


@BOTH
def test_without_the_saved_rng_state_an_older_steps_key_is_no_answer(reentrant):
    """One seed in all steps: the nonce that the recomputation draws by mistake is on the tape, but of another step."""
    torch.manual_seed(0)
    dropout(torch.ones(1))
    dropout(torch.ones(1))
    keys.step()
    torch.manual_seed(0)
    y = checkpoint(block, leaf(), use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.raises(ReplayMiss):
        y.sum().backward()


@BOTH
def test_a_forward_before_the_source_was_open_is_an_error(reentrant):
    """The forward draws nothing from us, its recomputation does."""
    use = [False]

    def f(x):
        return torch.exp(dropout(torch.sin(x)) if use[0] else torch.nn.functional.dropout(torch.sin(x), 0.5))

    y = checkpoint(f, leaf(), use_reentrant=reentrant)
    use[0] = True
    with pytest.raises(ReplayMiss, match="before the source was open"):
        y.sum().backward()


def test_an_op_that_draws_inside_its_function_passes_on_the_callers_gradient_mode():
    """Inside Function.forward gradients are off, which would look like a hook: the op says what its caller saw."""

    class Draw(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, drawn, grad_enabled):
            ctx.record = keys.record_from_nonce(drawn, grad_enabled)
            return x * mask_of(ctx.record, x.shape, 0.5)

        @staticmethod
        def backward(ctx, grad):
            return grad * mask_of(ctx.record, grad.shape, 0.5), None, None

    def f(x):
        return torch.exp(Draw.apply(torch.sin(x), nonce.nonce_tensor(), torch.is_grad_enabled()))

    x = leaf()
    y = checkpoint(f, x, use_reentrant=False)
    keys.step()
    y.sum().backward()
    assert right(x, y)
    with pytest.raises(ReplayMiss):
        checkpoint(f, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    noisy = leaf() * 2
    noisy.register_hook(f)
    noisy.sum().backward()  # a hook: new, no alarm


def test_our_dropout_under_a_dispatch_mode_is_checked_too():
    """There it draws its nonce as a tensor and its record inside a Function, where torch says that gradients are off."""

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def f(x):
        with Passing():
            return torch.exp(everett_cuda.dropout(torch.sin(x), 0.5))

    x = leaf()
    y = checkpoint(f, x, use_reentrant=False)
    keys.step()
    y.sum().backward()
    assert right(x, y)
    with pytest.raises(ReplayMiss):
        checkpoint(f, leaf(), use_reentrant=False, preserve_rng_state=False).sum().backward()


def test_draws_in_hooks_are_new_draws():
    x = leaf()

    def add_noise(p):
        p.grad.copy_(dropout(p.grad))

    y = x * 2
    y.register_hook(dropout)
    x.register_hook(dropout)
    x.register_post_accumulate_grad_hook(add_noise)
    y.register_hook(lambda g: torch.autograd.Variable._execution_engine.queue_callback(lambda: dropout(g)) or g)
    y.sum().backward()
    counters = keys.counters()
    assert counters["draws"] == counters["fresh"] + counters["shared"] == 4
    assert counters["unverified"] == 0


def test_a_draw_in_function_backward_is_a_new_draw():
    class NoisyGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return dropout(grad)

    x = leaf()
    NoisyGradient.apply(x).sum().backward()
    assert set(x.grad.tolist()) == {0.0, 2.0}


def test_a_hook_of_an_older_graph_obeys_rule_1_too():
    """The graph is of step 1, the hook draws in step 2, twice from one state: one key."""
    x, results = leaf(), []

    def noisy(g):
        for _ in range(2):
            torch.manual_seed(0)
            results.append(dropout(torch.ones_like(g)))

    y = x * 2
    y.register_hook(noisy)
    keys.draw_record()
    keys.step()
    y.sum().backward()
    assert torch.equal(results[0], results[1])


def test_a_hook_seeded_alike_in_every_step_gets_a_new_key_in_every_step():
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        y = leaf() * 2
        y.register_hook(lambda g: results.append(dropout(torch.ones_like(g))))
        y.sum().backward()
        keys.step()
    assert len({tuple(r.tolist()) for r in results}) == 3


def test_a_draw_in_a_hook_under_create_graph_is_no_false_alarm():
    x = leaf()
    y = x * 2
    y.register_hook(dropout)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert set(g.tolist()) == {0.0, 4.0}
    assert keys.counters()["unverified"] == 1


def test_a_backward_that_raised_leaves_no_trace():
    def fail(_):
        raise RuntimeError("on purpose")

    y = leaf() * 2
    y.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    torch.manual_seed(123)
    keys.draw_record()  # outside: an unknown nonce with gradients on is no miss
    keys.step()
    assert keys.counters()["boundaries"] == 1


# --- rules 16 to 20: what is sound must stay so ---------------------------------------------------------------------


@BOTH
def test_plain_forward_and_backward_need_no_tape(reentrant):
    """Without a checkpoint the record is kept by the op: nothing is looked up, over any boundary."""
    x = leaf()
    y = block(x)
    keys.step()
    y.sum().backward()
    assert right(x, y)
    assert keys.counters()["replayed"] == 0


def test_backward_twice_with_retain_graph():
    x = leaf()
    y = checkpoint(block, x, use_reentrant=False)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    keys.step()
    y.sum().backward()
    assert torch.allclose(x.grad, 2 * first) and torch.allclose(first, block_gradient(x, y))


def test_double_backward_through_a_checkpoint():
    x = leaf()
    y = checkpoint(block, x, use_reentrant=False)
    keys.step()
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    keys.step()
    g.sum().backward()
    mask = (torch.log(y.detach()) / torch.sin(x.detach())).round()
    s, c = torch.sin(x.detach()), torch.cos(x.detach())
    assert torch.allclose(x.grad, torch.exp(mask * s) * ((mask * c) ** 2 - mask * s))
    assert keys.counters()["unverified"] == 0


def test_double_backward_through_nested_checkpoints():
    """Second-order nodes are made in the first backward, steps after the draw they ask for."""
    x, y, expected = nested_pair(False, False)
    keys.draw_record()
    keys.step()
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.allclose(g.detach(), expected)
    keys.step()
    (gg,) = torch.autograd.grad(g.sum(), x)
    assert torch.isfinite(gg).all() and keys.counters()["replay_misses"] == 0


def test_gradgradcheck_of_a_checkpointed_block():
    x = torch.rand(6, dtype=torch.float64, generator=leaf.generator).add_(0.5).requires_grad_()

    def f(x):
        torch.manual_seed(5)
        return checkpoint(block, x, use_reentrant=False)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@BOTH
def test_a_checkpointed_chain_equals_its_uncheckpointed_run(reentrant):
    layers = torch.nn.Sequential(*[torch.nn.Linear(N, N) for _ in range(4)]).double()

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return dropout(torch.nn.functional.gelu(self.layer(x)))

    model = torch.nn.Sequential(*[Block(layer) for layer in layers])

    def run(f):
        model.zero_grad()
        x = torch.ones(3, N, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        y = f(x)
        y.sum().backward()
        return [y.detach(), x.grad, *[p.grad for p in model.parameters()]]

    plain = run(model)
    chain = run(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant))
    assert all(torch.allclose(a, b) for a, b in zip(plain, chain, strict=True))
    assert torch.equal(plain[0], chain[0])


def test_saved_tensors_on_the_cpu():
    x = leaf()
    with torch.autograd.graph.save_on_cpu():
        y = checkpoint(block, x, use_reentrant=False)
    keys.step()
    y.sum().backward()
    assert right(x, y)


@BOTH
def test_backward_in_another_thread(reentrant):
    xs, ys = [leaf() for _ in range(2)], []
    for x in xs:
        torch.manual_seed(0)
        ys.append(checkpoint(block, x, use_reentrant=reentrant))
        keys.step()
    failed = []

    def backward():
        try:
            for i in (1, 0):
                ys[i].sum().backward()
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failed
    # ys[i].sum() was made in that thread, but the nodes that recompute were made here: windows of this thread decide.
    assert [right(x, y) for x, y in zip(xs, ys, strict=True)] == [True, True]


def test_a_thread_started_inside_a_backward_shares_the_step():
    x, results = leaf(), []
    torch.manual_seed(0)
    first = dropout(torch.ones(N, dtype=torch.float64))

    def draw():
        torch.manual_seed(0)
        results.append(dropout(torch.ones(N, dtype=torch.float64)))

    def hook(_):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()

    y = x * 2
    y.register_hook(hook)
    y.sum().backward()
    assert torch.equal(results[0], first)


def test_optimizers_end_a_step_once():
    p = torch.nn.Parameter(torch.ones(3))
    optimizers = [
        torch.optim.SGD([p], 0.1),
        torch.optim.Adam([p], 0.1, foreach=True),
        torch.optim.AdamW([p], 0.1, fused=True),
        torch.optim.LBFGS([p], max_iter=2),
    ]

    def closure():
        p.grad = torch.ones(3)
        return p.sum().detach()

    for i, opt in enumerate(optimizers, 1):
        opt.step(closure)
        assert keys.counters()["boundaries"] == i


def test_a_skipped_scaler_step_is_no_boundary():
    p = torch.nn.Parameter(torch.ones(3))
    opt, scaler = torch.optim.SGD([p], 0.1), torch.amp.GradScaler("cpu")
    scaler.scale(p.sum() * float("inf")).backward()
    scaler.step(opt)
    assert keys.counters()["boundaries"] == 0


def test_every_draw_is_counted_once():
    x = leaf()
    torch.manual_seed(0)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    torch.manual_seed(0)
    block(x)
    block(x)
    with torch.inference_mode():
        dropout(torch.ones(1))
    c = keys.counters()
    assert c["draws"] == c["fresh"] + c["stretched"] + c["shared"] + c["reused"] + c["replayed"] == 5
    assert (c["reused"], c["replayed"], c["fresh"] + c["shared"], c["tape_entries"]) == (1, 1, 3, 2)
