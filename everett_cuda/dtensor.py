"""Masked ops on DTensors: each rank makes exactly its slice of the mask that the whole tensor would have in one process.

The op `masked_shard` takes, beside the shard, one index tensor a dimension (0, 1, ..., n-1 for the whole), and the sharding
rule below shards it as that dimension of x: so each rank reads off its own part where its shard begins. This is what also
works under torch.compile, where a rank's offset may not become a constant of the graph. All ranks of the mesh must have
one rank key and equal torch RNG states: `ev.distributed.setup(same_within=mesh)`.
"""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import distributed, registered
from .errors import EverettError
from .kernels import Mask


@register_sharding(registered.masked_shard)
def _sharding(x, residual, record, index, p, stream, affine, mask_dims, shape):
    """(output, inputs) placements for one dimension of the mesh: x whole, or sharded in any of its dimensions."""

    def rule(placement, index_placements):
        tensors = [placement, *([] if residual is None else [placement]), Replicate(), *index_placements]
        return [placement], tensors

    whole = [Replicate()] * len(index)
    sharded = [[Shard(0) if i == d else Replicate() for i in range(len(index))] for d in range(len(index))]
    return [rule(Replicate(), whole), *(rule(Shard(d), places) for d, places in enumerate(sharded))]


def masked(x: DTensor, residual: DTensor | None, record: torch.Tensor, mask: Mask) -> DTensor:
    """The masked op on x under a record (int32, (12,), equal on all ranks). residual: a DTensor like x, on the same mesh.
    The result has the placements of x. EverettError for a placement that has no slice of the mask."""
    _check_placements(x, "x")
    if residual is not None:
        if not isinstance(residual, DTensor) or residual.device_mesh != x.device_mesh:
            raise EverettError("residual: must be a DTensor on the mesh of x. Use distribute_tensor(residual, mesh, ...).")
        _check_placements(residual, "residual")

    def whole(t):
        return DTensor.from_local(t, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)

    index = [whole(torch.arange(n, device=record.device)) for n in x.shape]
    affine = None if mask.affine is None else list(mask.affine)
    return registered.masked_shard(
        x, residual, whole(record), index, mask.p, mask.stream, affine, mask.mask_dims, list(x.shape)
    )


@torch.compiler.assume_constant_result
def check_mesh(mesh) -> None:
    """EverettError where the ranks of the mesh do not share this rank's key."""
    ranks = set(mesh.mesh.flatten().tolist())
    if len(ranks) > 1 and not ranks <= set(distributed.shared_with()):
        raise EverettError(
            f"a DTensor on ranks {sorted(ranks)} needs one rank key on all of them, and rank {torch.distributed.get_rank()} "
            f"shares its key with {list(distributed.shared_with()) or 'nobody'}: their parts would not be of one mask. Call "
            "ev.distributed.setup(same_within=mesh) first, or drop on x.to_local()."
        )


def _check_placements(x: DTensor, name: str) -> None:
    for placement in x.placements:
        if isinstance(placement, Partial):
            raise EverettError(
                f"{name}: dropout of a Partial DTensor has no meaning, since its elements are sums not yet taken. Call "
                f"{name}.redistribute(placements=[Replicate()]) or [Shard(dim)] first."
            )
        if not (type(placement) is Shard or placement.is_replicate()):
            raise EverettError(
                f"{name}: the placement {placement} is not served, only Shard and Replicate are. Redistribute it first."
            )
