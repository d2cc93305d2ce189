"""The policy of keys on four real ranks: who shares keys, who is surely different, and what stops the job."""

import contextlib
import copy
import time

import pytest
import ranks
import torch
import torch.distributed as dist

import everett_cuda as ev
from everett_cuda import distributed, keys
from everett_cuda.errors import EverettError, HealthAlarm, RNGDesync, SourceNotOpen

SIZE = 4


def open_own(job, **parameters):
    given = "".join(f",{k}={v}" for k, v in parameters.items())
    return ev.open(f"sim:seed={100 + job.rank}{given}")


def mask(n=4096):
    """The bits of one draw, as text to gather."""
    return bytes((ev.dropout(torch.ones(n), 0.5) != 0).numpy()).hex()


def pairs():
    """Two groups of two, as a tensor-parallel dimension makes them; this rank's."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return groups[dist.get_rank() // 2]


def raises_on_all(job, kind, match, call):
    with pytest.raises(kind, match=match):
        call()


# --- who shares -------------------------------------------------------------------------------------------------------


def ranks_differ_though_all_are_seeded_alike(job):
    open_own(job)
    distributed.setup()
    for _ in range(3):
        torch.manual_seed(0)
        masks = job.gather(mask())
        assert len(set(masks)) == SIZE
        torch.manual_seed(0)
        worlds = job.gather(ev.rand(8).tolist())
        assert all(w == worlds[0] for w in worlds)
        ev.step()
    assert keys.counters()["fresh"] >= 3 and distributed.shared_with() == (job.rank,)


def a_group_shares_its_rank_key_and_another_each_step(job):
    open_own(job)
    torch.manual_seed(0)
    distributed.setup(same_within=pairs())
    seen = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for step in range(3):
        torch.manual_seed(0)
        masks = job.gather(mask())
        assert masks[0] == masks[1] != masks[2] == masks[3]
        torch.manual_seed(0)
        with torch.inference_mode():
            assert mask() == masks[job.rank]  # the group's key, also here
        seen.append(masks[job.rank])
        ev.step() if step else optimizer.step()
    assert len(set(seen)) == 3 and distributed.shared_with() == ((0, 1) if job.rank < 2 else (2, 3))
    counters = keys.counters()
    assert counters["shared"] == 6
    assert "rank key of rank" in ev.status().followers[0] and "3 steps" in ev.status().followers[0]


def ranks_may_be_a_mesh_or_one_dimension_of_it(job):
    from torch.distributed.device_mesh import init_device_mesh

    open_own(job)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    for part, expected in ((mesh["dp"], (job.rank % 2, job.rank % 2 + 2)), (mesh, (0, 1, 2, 3))):
        distributed.setup(same_within=part)
        assert distributed.shared_with() == expected
        masks = job.gather(mask())
        assert all((masks[r] == masks[job.rank]) == (r in expected) for r in range(SIZE))


def a_key_of_the_step_before_serves_its_recomputation(job):
    from torch.utils.checkpoint import checkpoint

    open_own(job)
    torch.manual_seed(0)
    distributed.setup(same_within=pairs())
    x = (torch.rand(64, dtype=torch.float64) + 0.5).requires_grad_()
    y = checkpoint(lambda x: torch.exp(ev.dropout(torch.sin(x), 0.5)), x, use_reentrant=False)
    ev.step()
    y.sum().backward()
    kept = (torch.log(y) / torch.sin(x)).round().detach()
    assert torch.allclose(x.grad, (torch.exp(kept * torch.sin(x)) * kept * torch.cos(x)).detach())


class Tracker:
    """Named generator states that regions switch to and from, as Megatron's does for tensor-parallel ranks."""

    def __init__(self, **seeds):
        before = torch.get_rng_state()
        self.states = {name: torch.manual_seed(seed).get_state() for name, seed in seeds.items()}
        torch.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name):
        before = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        yield
        self.states[name] = torch.get_rng_state()
        torch.set_rng_state(before)


def sharded_regions_differ_and_replicated_ones_do_not(job):
    open_own(job)
    torch.manual_seed(5)
    distributed.setup(same_within=pairs())
    tracker = Tracker(sharded=2718 + job.rank % 2)
    for _ in range(2):
        replicated = job.gather(mask())
        with tracker.fork("sharded"):
            sharded = job.gather(mask())
        again = job.gather(mask())
        assert replicated[0] == replicated[1] and replicated[2] == replicated[3] and again[0] == again[1]
        assert len({*sharded, *replicated, *again}) == 4 + 2 + 2
        ev.step()  # the forked states are no part of what must agree


# --- what stops the job -----------------------------------------------------------------------------------------------


def a_draw_on_one_rank_only_is_found_and_named(job):
    open_own(job)
    torch.manual_seed(0)
    distributed.setup(same_within=pairs())
    if job.rank == 1:
        torch.rand(1)
    if job.rank < 2:
        raises_on_all(job, RNGDesync, r"rank 1 \(CPU\): CPU generator state\.", ev.step)
        raises_on_all(job, RNGDesync, "no key in common", mask)
        raises_on_all(job, RNGDesync, "no key in common", lambda: ev.rand(1))
        raises_on_all(job, RNGDesync, "setup", ev.step)
        assert "FAILED" in ev.status().followers[0]
    else:
        ev.step()
        mask()
    distributed.teardown()
    assert len(set(job.gather(mask()))) == SIZE


def states_that_differ_at_setup_are_refused(job):
    open_own(job)
    torch.manual_seed(job.rank // 2 + (job.rank == 3))
    if job.rank < 2:
        distributed.setup(same_within=pairs())
    else:
        raises_on_all(job, RNGDesync, "rank 3", lambda: distributed.setup(same_within=pairs()))
        mask()  # and no policy is left
        assert distributed.shared_with() == ()


def equal_sources_are_refused(job):
    source = ev.open(f"sim:seed={7 if job.rank in (1, 2) else job.rank}")
    raises_on_all(job, EverettError, "ranks 1 and 2 have sources that give the same bits.*seed 7", distributed.setup)
    if job.rank == 2:
        source.take(320)  # at another place of the same stream
    raises_on_all(job, EverettError, "ranks 1 and 2", distributed.setup)
    mask()


def groups_and_arguments_that_do_not_fit_are_refused(job):
    open_own(job)
    both = [dist.new_group([0, 1, 2]), dist.new_group([2, 3])]
    raises_on_all(
        job, EverettError, "same_within: rank 0 names ranks", lambda: distributed.setup(same_within=both[job.rank // 2])
    )
    raises_on_all(job, EverettError, "must be the same on all", lambda: distributed.setup(interval_steps=1 + job.rank))
    raises_on_all(job, TypeError, "ProcessGroup", lambda: distributed.setup(same_within=[0, 1]))
    raises_on_all(job, ValueError, "from 1 on", lambda: distributed.setup(interval_steps=0))
    raises_on_all(job, EverettError, "no policy", distributed.provenance)


def a_rank_that_does_not_come_is_named(job):
    open_own(job)
    distributed.setup(timeout_s=2.0)
    if job.rank == 3:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not dist.distributed_c10d._get_default_store().check(["told"]):
            time.sleep(0.1)
    else:
        raises_on_all(job, RNGDesync, r"waited .* rank 3 did not come", ev.step)
        raises_on_all(job, RNGDesync, "no key in common", lambda: ev.rand(1))
        if job.rank == 0:
            dist.distributed_c10d._get_default_store().set("told", "1")


def a_source_opened_after_setup_stops_all(job):
    open_own(job)
    distributed.setup()
    match = "source was closed or opened" if job.rank == 2 else "rank 2 cannot go on"
    if job.rank == 2:
        raises_on_all(job, EverettError, match, lambda: ev.open("sim:seed=9"))  # which ends a step
    else:
        raises_on_all(job, EverettError, match, ev.step)
    raises_on_all(job, RNGDesync, "no key in common", lambda: ev.rand(1))


# --- ranks without a source -------------------------------------------------------------------------------------------


def ranks_without_a_source_are_refused_unless_allowed(job):
    raises_on_all(job, EverettError, "no rank has a source open", lambda: distributed.setup(source_ranks="auto"))
    if job.rank < 2:
        open_own(job)
    raises_on_all(job, EverettError, r"ranks \[2, 3\] have no source", distributed.setup)
    raises_on_all(job, EverettError, r"\(0,\) were named", lambda: distributed.setup(source_ranks=[0]))
    if job.rank > 1:
        raises_on_all(job, SourceNotOpen, "before any source", mask)


def they_get_root_keys_of_their_own_at_an_interval(job):
    if job.rank < 2:
        open_own(job)
    distributed.setup(source_ranks="auto", interval_steps=2)
    for step in range(5):
        torch.manual_seed(0)
        assert len(set(job.gather(mask()))) == SIZE
        mask()
        torch.manual_seed(0)
        assert len(set(job.gather(str(ev.rand(4).tolist())))) == 1
        ev.step() if step < 4 else None
    commitments = distributed.root_commitments()
    told = job.gather(commitments)
    assert [len(t) for t in told] == [0, 0, 3, 3] and len({c for t in told for c in t}) == 6
    counters = keys.counters()
    if job.rank > 1:
        # Ten rank draws: in each of three intervals the first has the root key, the others are stretched from it.
        assert (counters["fresh"], counters["stretched"], counters["shared"]) == (3, 7, 5)
        line = ev.status().followers[0]
        assert f"root keys of rank {job.rank - 2}, over the network in clear" in line and "NOT QUANTUM (simulated)" in line
        assert f"serial seed-{98 + job.rank}" in line and "none open in this process" in str(ev.status())
    rows = distributed.provenance()
    assert [(p.rank, p.source_rank, p.over_network, p.kind) for p in rows] == [
        (0, 0, False, "simulated"),
        (1, 1, False, "simulated"),
        (2, 0, True, "simulated"),
        (3, 1, True, "simulated"),
    ]
    distributed.teardown()
    if job.rank > 1:
        raises_on_all(job, SourceNotOpen, "before any source", mask)


def an_alarm_of_the_giver_stops_those_it_gives_to(job):
    source = open_own(job, fault="stuck@4MiB") if job.rank == 0 else None
    distributed.setup(source_ranks=[0], interval_steps=100)
    mask()
    if source is not None:
        with pytest.raises(HealthAlarm):
            while True:
                source.take(1 << 18)
    raises_on_all(job, HealthAlarm, "reached cutoff" if job.rank == 0 else "rank 0 cannot go on.*reached cutoff", ev.step)
    raises_on_all(job, HealthAlarm, "reached cutoff", mask)  # nothing is stretched from the root key either


def a_stretching_that_is_forbidden_starves(job):
    if job.rank == 0:
        open_own(job)
    else:
        keys.configure(on_starved="error")
    distributed.setup(source_ranks="auto")
    try:
        mask()  # the root key itself
        if job.rank:
            raises_on_all(job, ev.Starved, "on_starved.*stretched from its root key", mask)
    finally:
        keys.configure(on_starved="stretch")


# --- training ---------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.drop = ev.nn.Dropout(0.5)
        self.checkpointed = checkpointed

    def inner(self, x):
        return torch.tanh(self.drop(torch.tanh(self.first(x))))

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return self.last(checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x))


def _gradients_beside_a_plain_model(job, wrap, checkpointed):
    """wrap(model)'s gradients are the mean over ranks of a plain copy's, under the same masks."""
    torch.manual_seed(1)
    plain = Net(False)
    wrapped = wrap(copy.deepcopy(plain))
    for module in wrapped.modules():
        if isinstance(module, Net):
            module.checkpointed = checkpointed
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    masks = []
    for step in range(2):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        torch.manual_seed(3)
        wrapped(x).square().sum().backward()
        torch.manual_seed(3)  # the same draw of the same step: the same mask
        plain(x).square().sum().backward()
        torch.manual_seed(3)
        masks.append(mask(64))
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            mean = p.grad.clone()
            dist.all_reduce(mean)
            got = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
            assert torch.allclose(got, mean / SIZE, atol=1e-6), (step, got, mean / SIZE)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()
        with torch.no_grad():
            for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
                p.copy_(q.full_tensor() if hasattr(q, "full_tensor") else q)
    assert masks[0] != masks[1] and len(set(job.gather(masks[0]))) == SIZE


def ddp_trains_with_a_mask_for_each_rank(job):
    open_own(job)
    distributed.setup()
    _gradients_beside_a_plain_model(job, torch.nn.parallel.DistributedDataParallel, True)


def fsdp2_trains_with_a_mask_for_each_rank(job):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    open_own(job)
    distributed.setup()
    mesh = init_device_mesh("cpu", (SIZE,))
    for checkpointed in (False, True):
        _gradients_beside_a_plain_model(job, lambda model: fully_shard(model, mesh=mesh), checkpointed)


def hsdp_replicas_are_equal_after_a_random_start(job):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    open_own(job)
    distributed.setup()
    torch.manual_seed(0)
    with ev.intercept():
        model = Net(False)
        for p in model.parameters():
            torch.nn.init.normal_(p)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    local = [p.to_local().clone() for p in model.parameters()]
    told = job.gather(local)
    assert all(torch.equal(a, b) for a, b in zip(told[0], told[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(told[1], told[3], strict=True))
    assert not torch.equal(told[0][0], told[1][0])


def every_sample_is_seen_once_under_interception(job):
    """A sampler that shuffles by a generator of its own keeps torch's; one that shuffles by torch.randperm has ours."""
    from torch.utils.data import DistributedSampler

    open_own(job)
    distributed.setup()
    torch.manual_seed(0)
    with ev.intercept():
        told = job.gather(list(DistributedSampler(range(1000), SIZE, job.rank, shuffle=True, seed=3)))
        orders = job.gather(torch.randperm(1000).tolist())
        torch.manual_seed(0)
        masks = job.gather((torch.nn.functional.dropout(torch.ones(64), 0.5) != 0).tolist())
    assert sorted(sum(told, [])) == list(range(1000))
    assert all(order == orders[0] for order in orders) and sorted(orders[0]) == list(range(1000))
    assert len({tuple(m) for m in masks}) == SIZE


CHECKS = [
    ranks_differ_though_all_are_seeded_alike,
    a_group_shares_its_rank_key_and_another_each_step,
    ranks_may_be_a_mesh_or_one_dimension_of_it,
    a_key_of_the_step_before_serves_its_recomputation,
    sharded_regions_differ_and_replicated_ones_do_not,
    a_draw_on_one_rank_only_is_found_and_named,
    states_that_differ_at_setup_are_refused,
    equal_sources_are_refused,
    groups_and_arguments_that_do_not_fit_are_refused,
    a_rank_that_does_not_come_is_named,
    a_source_opened_after_setup_stops_all,
    ranks_without_a_source_are_refused_unless_allowed,
    they_get_root_keys_of_their_own_at_an_interval,
    an_alarm_of_the_giver_stops_those_it_gives_to,
    a_stretching_that_is_forbidden_starves,
    ddp_trains_with_a_mask_for_each_rank,
    fsdp2_trains_with_a_mask_for_each_rank,
    hsdp_replicas_are_equal_after_a_random_start,
    every_sample_is_seen_once_under_interception,
]


@pytest.fixture(scope="module")
def results():
    return ranks.run(SIZE, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_four_ranks(check, results):
    ranks.right(results[check.__name__], SIZE)


def test_without_torch_distributed_setup_is_refused(ring):
    with pytest.raises(EverettError, match="init_process_group"):
        distributed.setup()
    distributed.teardown()  # without a policy nothing happens
    assert distributed.root_commitments() == ()
