"""Captured graphs on an emulated GPU: each replay derives its masks on the GPU, from a key that steps replace."""

import re

import numpy as np
import pytest
import torch
from emulated_gpu import STREAM
from recompute import BOTH, ck, leaf

import everett_cuda as ev
from everett_cuda import _C, followers, keys
from everett_cuda.errors import EverettError, HealthAlarm, ReplayMiss


def test_a_graphs_masks_follow_the_key_and_its_backward_the_forward(gpu):
    gpu.warm()
    x, ones = torch.randn(3000).requires_grad_(), torch.ones(3000)

    def step():  # of our ops only: the emulation captures no others
        y = ev.dropout(ev.dropout(x, 0.2), 0.5)
        return y, torch.autograd.grad(y, x, ones)[0]

    (y, grad), graph = gpu.captured(step)
    seen = []
    for _ in range(3):
        keys.step()
        gpu.replay(graph)
        assert torch.equal(y.detach(), x.detach() * grad) and set(grad.tolist()) == {0.0, 2.5}
        seen.append(tuple((grad != 0).tolist()))
    assert len(set(seen)) == 3  # a new key, and a new mask
    gpu.replay(graph)
    assert tuple((grad != 0).tolist()) == seen[-1]  # the emulation draws the nonces once only, at capture
    assert gpu.kernels.graph_key.refreshes == 4
    assert 0.35 < np.mean(seen) < 0.45


def test_a_graphs_records_are_derived_from_the_key_that_lies_on_the_gpu(gpu):
    gpu.warm()
    nonces = torch.randint(-(2**63), 2**63 - 1, (5, 2), dtype=torch.int64)
    records, graph = gpu.captured(lambda: gpu.kernels.graph_key.derive(nonces, STREAM))
    for number in (2, 3):  # key 0 came first, key 1 served the warm-up
        keys.step()
        gpu.replay(graph)
        for nonce, record in zip(nonces, records, strict=True):
            expected = _C.derive_record((number + 1).to_bytes(32, "little"), nonce.numpy().tobytes())
            assert record.numpy().tobytes() == expected


def test_captured_noise_and_fused_ops_follow_the_key(gpu):
    gpu.warm()
    x, b = torch.randn(30, 40), torch.randn(40)

    def step():
        return [ev.randn(500), ev.rand(500), ev.bias_gelu_dropout(x, b, 0.5), ev.bias_dropout_add(x, b, x, 0.5)]

    outs, graph = gpu.captured(step)
    seen = []
    for _ in range(2):
        keys.step()
        gpu.replay(graph)
        seen.append([o.clone() for o in outs])
    assert all(not torch.equal(a, c) and torch.isfinite(a).all() for a, c in zip(*seen, strict=True))


def test_each_captured_op_has_a_record_of_its_own(gpu):
    gpu.warm()
    x = torch.ones(400)
    outs, graph = gpu.captured(lambda: [ev.dropout(x, 0.5) for _ in range(150)])
    gpu.replay(graph)
    assert len({tuple(y.tolist()) for y in outs}) == 150
    again, graph = gpu.captured(lambda: ev.dropout(x, 0.5))
    gpu.replay(graph)
    assert tuple(again.tolist()) not in {tuple(y.tolist()) for y in outs}


def test_a_capture_draws_nothing_from_the_source_nor_the_generators_offset(gpu):
    gpu.warm()
    before = keys.counters(), gpu.generator.offset
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    assert (keys.counters(), gpu.generator.offset) == before


def test_capturing_before_a_key_is_there_raises_before_anything_is_captured(gpu):
    gpu.control.emulation_begin_capture(STREAM)
    launches = gpu.control.emulation_launches()
    with pytest.raises(EverettError, match="captured on cuda:0 before its key is there.*run the model once"):
        ev.dropout(torch.ones(40), 0.5)
    gpu.control.emulation_end_capture()
    assert gpu.control.emulation_launches() == launches


def test_steps_refresh_only_keys_that_a_graph_reads(gpu):
    gpu.warm()
    for _ in range(3):
        keys.step()
    assert gpu.kernels.graph_key.refreshes == 1 and keys.counters()["fresh"] == 2
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    for _ in range(3):
        keys.step()
    assert gpu.kernels.graph_key.refreshes == 4


def test_the_status_tells_the_age_of_the_key_that_graphs_read(gpu):
    gpu.warm()
    assert followers.status() == ()
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    (line,) = followers.status()
    assert re.fullmatch(r"graphs: +cuda:0 reads its key number 1, \d+\.\d s old", line)
    assert line in str(ev.status())
    keys.detach()
    assert "no key" in followers.status()[0]


def test_no_key_changes_during_a_capture_or_inside_a_backward(gpu):
    gpu.warm()
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    gpu.captured(keys.step)
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda _: keys.step())
    x.sum().backward()
    assert gpu.kernels.graph_key.refreshes == 1 and keys.counters()["boundaries_ignored"] == 1


def test_the_optimizers_hook_refreshes_unless_a_captured_backward_recomputes(gpu):
    gpu.warm()
    graph_key = gpu.kernels.graph_key
    nonces = torch.zeros(1, 2, dtype=torch.int64)
    gpu.captured(lambda: graph_key.derive(nonces, STREAM))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.step()
    assert graph_key.refreshes == 2
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda _: gpu.kept.append(graph_key.derive(nonces, STREAM)))
    gpu.captured(x.sum().backward)
    optimizer.step()
    assert graph_key.refreshes == 2
    keys.step()
    assert graph_key.refreshes == 3


@BOTH
def test_a_recomputation_inside_a_capture_raises(gpu, reentrant):
    """torch cannot restore the RNG state there (here nobody does), so the mask would be another one."""
    gpu.warm()
    x = leaf()
    with pytest.raises(ReplayMiss, match="captured graph"):
        gpu.captured(lambda: ck(lambda x: torch.exp(ev.dropout(x, 0.5)), x, reentrant).sum().backward())


def test_a_key_in_flight_is_read_by_later_replays_only_and_wiped_when_it_arrived(gpu):
    gpu.warm()
    slot = gpu.kernels.graph_key._slot
    x = torch.ones(500)
    y, graph = gpu.captured(lambda: ev.dropout(x, 0.5))
    gpu.control.emulation_defer(1)
    seen = []
    for _ in range(6):  # more steps than the slot has staging for
        gpu.replay(graph)
        keys.step()
        gpu.control.emulation_run(0, 1)
    assert not slot.staging_all_zero
    gpu.control.emulation_defer(0)
    slot.reap()
    assert slot.staging_all_zero
    last = _C.derive_record((8).to_bytes(32, "little"), bytes(16))  # keys 1 (graphs), 2 (warm-up), 3 to 8
    nonces = torch.zeros(1, 2, dtype=torch.int64)
    records, graph = gpu.captured(lambda: gpu.kernels.graph_key.derive(nonces, STREAM))
    gpu.replay(graph)
    assert records[0].numpy().tobytes() == last and not seen


def test_an_alarm_stops_the_next_step(gpu, ring):
    gpu.warm()
    gpu.captured(lambda: ev.dropout(torch.ones(40), 0.5))
    ring.destroy_unread()
    ring.end(_C.Take.alarm)
    with pytest.raises(HealthAlarm):
        keys.step()
    assert gpu.kernels.graph_key._slot.staging_all_zero


def test_after_closing_replays_stop_and_opening_again_brings_a_key(gpu, ring):
    gpu.warm()
    x, ones = torch.ones(2000).requires_grad_(), torch.ones(2000)

    def step():
        y = ev.dropout(x, 0.5)
        return y, torch.autograd.grad(y, x, ones)[0]

    (y, grad), graph = gpu.captured(step)
    gpu.replay(graph)
    keys.detach()
    with pytest.raises(RuntimeError, match="replayed without a key: open a source"):
        gpu.replay(graph)
    keys.attach(ring)
    keys.step()
    gpu.replay(graph)
    assert set(y.tolist()) == {0.0, 2.0} and torch.equal(y, grad)
