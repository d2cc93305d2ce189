"""Dropout of DTensors: on every rank exactly the slice of the mask that the whole tensor has in one process."""

import pytest
import ranks
import torch
from torch import nn

import everett_cuda as ev
from everett_cuda import distributed, keys, registered
from everett_cuda.errors import EverettError

SHAPE = (7, 10, 6)  # 7 is uneven over 2 and 4


def on_mesh(job, sizes):
    from torch.distributed.device_mesh import init_device_mesh

    ev.open(f"sim:seed={100 + job.rank}")
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])
    torch.manual_seed(0)
    distributed.setup(same_within=mesh)
    return mesh


def given(shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(shape, generator=generator) + 0.5).to(dtype), torch.rand(shape, generator=generator).to(dtype)


OPS = {
    "dropout": lambda x, r: ev.dropout(x, 0.3),
    "dropout of little p": lambda x, r: ev.dropout(x, 0.001),
    "dropout_add": lambda x, r: ev.dropout_add(x, r, 0.5),
    "alpha_dropout": lambda x, r: ev.alpha_dropout(x, 0.3),
    "dropout1d": lambda x, r: ev.dropout1d(x, 0.5),
    "drop_path": lambda x, r: ev.drop_path(x, 0.5),
    "p = 1": lambda x, r: ev.dropout(x, 1.0),
    "philox": lambda x, r: ev.dropout(x, 0.3, stream="philox"),
}


def same_as_whole(op, mesh, placements, dtype=torch.float32):
    """op on shards against op on the whole, and the gradients of both."""
    from torch.distributed.tensor import distribute_tensor

    x, r = given(dtype=dtype)
    weight = torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype)
    whole, residual = x.clone().requires_grad_(), r.clone().requires_grad_()
    torch.manual_seed(9)
    expected = op(whole, residual)
    (expected * weight).sum().backward()
    dx = distribute_tensor(x, mesh, placements).requires_grad_()
    dr = distribute_tensor(r, mesh, placements).requires_grad_()
    torch.manual_seed(9)
    got = op(dx, dr)
    (got * distribute_tensor(weight, mesh, placements)).sum().backward()
    assert got.placements == tuple(placements)
    assert torch.equal(got.full_tensor(), expected.detach())
    assert torch.equal(dx.grad.full_tensor(), whole.grad)
    if residual.grad is not None:
        assert torch.equal(dr.grad.full_tensor(), residual.grad)


def every_op_on_every_placement(job):
    from torch.distributed.tensor import Replicate, Shard

    mesh = on_mesh(job, (2,))
    for op in OPS.values():
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            same_as_whole(op, mesh, [placement])
    for dtype in (torch.bfloat16, torch.float64):
        same_as_whole(OPS["dropout_add"], mesh, [Shard(1)], dtype)
    assert keys.counters()["fresh"] == (3 if job.rank == 0 else 1)  # setup's: all ops took the group's key


def a_mesh_of_two_dimensions_and_empty_shards(job):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = on_mesh(job, (2, 2))
    S = Shard
    for placements in ([S(0), S(1)], [S(1), S(0)], [S(0), S(0)], [Replicate(), S(2)], [S(0), Replicate()]):
        for op in (OPS["dropout"], OPS["dropout_add"], OPS["drop_path"]):
            same_as_whole(op, mesh, placements)
    x, _ = given((3, 5))  # a rank of four has no row
    torch.manual_seed(9)
    expected = ev.dropout(x, 0.5)
    torch.manual_seed(9)
    got = ev.dropout(distribute_tensor(x, mesh, [S(0), S(0)]), 0.5)
    assert torch.equal(got.full_tensor(), expected)


def modules_and_training_flags(job):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = on_mesh(job, (2,))
    x, _ = given()
    shards = distribute_tensor(x, mesh, [Shard(0)])
    module = ev.nn.Dropout(0.4)
    torch.manual_seed(2)
    expected = module(x)
    torch.manual_seed(2)
    assert torch.equal(module(shards).full_tensor(), expected)
    module.eval()
    assert module(shards) is shards and ev.dropout(shards, 0.0) is shards


def checkpointed_shards_find_their_mask(job):
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.utils.checkpoint import checkpoint

    mesh = on_mesh(job, (2,))
    x, _ = given(dtype=torch.float64)
    for reentrant in (True, False):
        dx = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        y = checkpoint(lambda x: torch.exp(ev.dropout(torch.sin(x), 0.5)), dx, use_reentrant=reentrant)
        ev.step()
        y.sum().backward()
        kept = (torch.log(y.full_tensor()) / torch.sin(x)).round()
        assert torch.allclose(dx.grad.full_tensor(), torch.exp(kept * torch.sin(x)) * kept * torch.cos(x))


def what_has_no_slice_is_refused(job):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    ev.open(f"sim:seed={100 + job.rank}")
    mesh = init_device_mesh("cpu", (2,))
    x, r = given()
    shards = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(EverettError, match=r"shares its key with nobody.*setup\(same_within=mesh\)"):
        ev.dropout(shards)
    distributed.setup()
    with pytest.raises(EverettError, match=rf"shares its key with \[{job.rank}\]"):
        ev.dropout(shards)
    torch.manual_seed(0)
    distributed.setup(same_within=mesh)
    partial = DTensor.from_local(x, mesh, [Partial()])
    with pytest.raises(EverettError, match="Partial.*redistribute"):
        ev.dropout(partial)
    with pytest.raises(EverettError, match="residual.*Partial"):
        ev.dropout_add(shards, DTensor.from_local(r, mesh, [Partial()]))
    with pytest.raises(EverettError, match="residual: must be a DTensor"):
        ev.dropout_add(shards, r)
    ev.dropout(shards)


def mask_of_a_compiled_draw(x):
    """dropout(x, 0.5) under the nonce that a compiled draw takes from torch's present RNG state, of the whole tensor."""
    quarters = [torch.randint(0, 2**32, (1,), dtype=torch.int64) for _ in range(4)]
    record = registered.mix(torch.cat(quarters[:2]) | (torch.cat(quarters[2:]) << 32), True, False)
    return registered.masked(x, None, record, 0.5, 0, None, 0, None)


def compiled_shards_are_slices_of_the_whole(job):
    import torch._inductor.config
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch._inductor.config.fallback_random = True  # so that the nonce is known here: it comes from torch's own randint

    mesh = on_mesh(job, (2,))
    x, _ = given((7, 10))
    for backend in ("aot_eager", "inductor"):
        for placement in (Shard(0), Shard(1), Replicate()):
            torch._dynamo.reset()
            run = torch.compile(lambda x: ev.dropout(x, 0.5), backend=backend, fullgraph=True)
            dx = distribute_tensor(x, mesh, [placement]).requires_grad_()
            torch.manual_seed(4)
            y = run(dx)
            y.sum().backward()
            kept = y.full_tensor().detach() != 0
            assert torch.equal(dx.grad.full_tensor(), kept * 2.0), (backend, placement)
            torch.manual_seed(4)
            assert torch.equal(y.full_tensor(), mask_of_a_compiled_draw(x)), (backend, placement)


def sequence_parallel_modules_drop_the_slice(job):
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh = on_mesh(job, (2,))
    x, _ = given((3, 8, 6))  # (batch, sequence, width)
    plain = nn.Sequential(nn.LayerNorm(6), ev.nn.Dropout(0.5))
    torch.manual_seed(6)
    expected = plain(x)
    parallel = parallelize_module(plain, mesh, {"0": SequenceParallel(), "1": SequenceParallel()})
    torch.manual_seed(6)
    local = x.chunk(2, dim=1)[job.rank].requires_grad_()
    y = parallel(local)
    assert y.to_local().shape[1] == 4 and torch.allclose(y.full_tensor(), expected, atol=1e-6)
    y.sum().backward()
    assert torch.isfinite(local.grad).all()


ON_TWO = [
    every_op_on_every_placement,
    modules_and_training_flags,
    checkpointed_shards_find_their_mask,
    what_has_no_slice_is_refused,
    sequence_parallel_modules_drop_the_slice,
    compiled_shards_are_slices_of_the_whole,
]
ON_FOUR = [a_mesh_of_two_dimensions_and_empty_shards]


@pytest.fixture(scope="module")
def on_two():
    return ranks.run(2, ON_TWO)


@pytest.fixture(scope="module")
def on_four():
    return ranks.run(4, ON_FOUR)


@pytest.mark.parametrize("check", ON_TWO, ids=lambda check: check.__name__)
def test_on_two_ranks(check, on_two):
    ranks.right(on_two[check.__name__], 2)


@pytest.mark.parametrize("check", ON_FOUR, ids=lambda check: check.__name__)
def test_on_four_ranks(check, on_four):
    ranks.right(on_four[check.__name__], 4)
