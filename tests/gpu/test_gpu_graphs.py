"""Captured CUDA graphs on a real GPU: fresh masks at each replay, backward inside, keys replaced at steps, direct words."""

import pytest
import torch
from torch import nn

import everett_cuda as ev
from everett_cuda import kernels, kernels_cuda, pool
from everett_cuda.errors import EverettError, ReplayMiss

pytest.importorskip("everett_cuda._cuda", reason="built without nvcc")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.fixture(autouse=True)
def source():
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    yield opened
    ev.close()


def captured(step, warmup=3):
    """(graph, what step returned in it): warmed up on a side stream, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def graph_key():
    return kernels.of_device(torch.device("cuda")).graph_key


def test_every_replay_has_another_mask_with_and_without_a_new_key():
    x = torch.ones(100_003, device="cuda")
    graph, y = captured(lambda: ev.dropout(x, 0.5))
    masks, before = [], graph_key().refreshes
    for i in range(6):
        if i % 2:
            ev.step()
        graph.replay()
        masks.append(tuple((y[:300] != 0).tolist()))
        assert 0.49 < (y != 0).float().mean().item() < 0.51 and set(y.unique().tolist()) == {0.0, 2.0}
    assert len(set(masks)) == 6 and graph_key().refreshes - before == 3


def test_replays_follow_torchs_generator_and_the_key():
    """The same seed under the same key gives the same masks; under another key it does not."""
    x = torch.ones(5000, device="cuda")
    graph, y = captured(lambda: ev.dropout(x, 0.5))

    def replay():
        torch.cuda.manual_seed(7)
        graph.replay()
        return y.clone()

    a = replay()
    assert torch.equal(replay(), a)
    ev.step()
    assert not torch.equal(replay(), a)


def test_a_whole_training_step_in_one_graph_has_the_forwards_mask_in_its_backward():
    x = torch.randn(4096, 33, device="cuda")
    w = torch.ones(33, device="cuda", requires_grad=True)

    def step():
        y = ev.dropout(x * w, 0.25)
        (grad,) = torch.autograd.grad(y.sum(0), w, torch.ones(33, device="cuda"))
        return y, grad

    graph, (y, grad) = captured(step)
    for _ in range(3):
        ev.step()
        graph.replay()
        kept = y != 0
        assert torch.allclose(grad, (x * kept).sum(0) / 0.75, rtol=1e-4, atol=1e-3)


def test_many_layers_have_masks_of_their_own():
    x = torch.ones(2000, device="cuda")
    graph, ys = captured(lambda: [ev.dropout(x, 0.5) for _ in range(150)])
    graph.replay()
    assert len({tuple((y != 0).tolist()) for y in ys}) == 150


def test_make_graphed_callables_trains():
    layers = [nn.Linear(16, 64), ev.nn.Dropout(0.2), nn.Linear(64, 64), ev.nn.Dropout(0.2), nn.Linear(64, 1)]
    model = nn.Sequential(*layers).cuda()
    x = torch.randn(256, 16, device="cuda")
    target = x.sum(1, keepdim=True)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, before = [], graph_key().refreshes
    for _ in range(40):
        optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.mse_loss(graphed(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert graph_key().refreshes - before == 40
    assert sum(losses[-5:]) < sum(losses[:5])


def test_capturing_without_a_warm_up_is_refused_and_leaves_torch_usable(monkeypatch):
    monkeypatch.setitem(kernels._by_index, 0, kernels_cuda.open_gpu(0))  # as in a new process
    x = torch.ones(100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(EverettError, match="before its key is there"), torch.cuda.graph(graph):
        ev.dropout(x, 0.5)
    assert ev.dropout(x, 0.5).sum().item() > 0


def test_a_checkpoint_inside_a_capture_is_refused():
    x = torch.randn(100, device="cuda", requires_grad=True)
    y = ev.dropout(x, 0.5)

    def step():
        h = torch.utils.checkpoint.checkpoint(
            lambda x: torch.exp(ev.dropout(x, 0.5)), x, use_reentrant=False, preserve_rng_state=False
        )
        h.sum().backward()

    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ReplayMiss, match="captured graph"), torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    assert y.shape == (100,)


def test_captured_noise_and_fused_ops_change_at_each_replay():
    x = torch.randn(500, 64, device="cuda")
    b = torch.zeros(64, device="cuda")

    def step():
        noise = [ev.randn(5000, device="cuda"), ev.rand(9, device="cuda"), ev.add_noise(x, 1.0)]
        return [*noise, ev.bias_gelu_dropout(x, b, 0.5), ev.bernoulli(torch.full((99,), 0.5, device="cuda"))]

    graph, outs = captured(step)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([o.clone() for o in outs])
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert all(not torch.equal(u, v) for u, v in zip(seen[i], seen[j], strict=True))
    assert abs(seen[0][0].std().item() - 1) < 0.1


def test_direct_words_in_eager_are_the_cpus():
    for kind, call in (("rand", ev.rand), ("randn", ev.randn), ("gumbel", ev.gumbel), ("exponential", ev.exponential)):
        a = call(10_001, device="cuda", freshness="direct")
        assert a.is_cuda and torch.isfinite(a).all() and a.unique().numel() > 9000, kind
    bits = ev.bernoulli(torch.full((20_000,), 0.25, device="cuda"), freshness="direct")
    assert 0.23 < bits.mean().item() < 0.27
    words = ev.random_words(20_000, device="cuda", freshness="direct")
    assert words.unique().numel() > 19_900


def test_direct_words_in_a_graph_and_what_happens_without():
    ev.rand(4, device="cuda", freshness="direct")
    graph, y = captured(lambda: ev.rand(2000, device="cuda", freshness="direct"), warmup=1)
    seen = []
    for _ in range(5):
        ev.step()
        graph.replay()
        assert not y.isnan().any()
        seen.append(y.clone())
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    for _ in range(pool.LANE_WORDS // 1000 + 2):
        graph.replay()
    assert y.isnan().all()
    with pytest.raises(EverettError, match="found no direct words"):
        ev.step()
    graph.replay()
    assert not y.isnan().any()


def test_direct_words_on_streams_at_once():
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]):
            results.append(ev.random_words(2 * 700, device="cuda", freshness="direct"))
    torch.cuda.synchronize()
    words = torch.cat([r.view(torch.int64) for r in results])
    assert words.unique().numel() == words.numel() and not (words == 0).any()


def test_closing_zeroes_what_is_on_the_gpu():
    ev.random_words(10, device="cuda", freshness="direct")
    ev.close()
    torch.cuda.synchronize()
    assert kernels.of_device(torch.device("cuda")).pool._pool.all_zero()
    ev.open("sim:seed=9")
    assert ev.random_words(10, device="cuda", freshness="direct").unique().numel() == 10
