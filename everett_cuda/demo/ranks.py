"""The demo in several processes, as torchrun starts them: each rank's own bits, gradients averaged, one report."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from .. import distributed, session
from ..drivers.broker_connection import DEFAULT_PATH
from ..errors import SourceError
from ..source import Source


@dataclass(frozen=True)
class Ranks:
    """rank: this process's number among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: with several ranks, gradients are averaged over them."""
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model)


@contextlib.contextmanager
def started() -> Iterator[Ranks]:
    """The ranks that torchrun started, over gloo; one rank without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        distributed.teardown()
        dist.destroy_process_group()


def default_source() -> str:
    """EVERETT_SOURCE, or the broker where one serves, or a device of this machine."""
    return os.environ.get("EVERETT_SOURCE") or ("broker:" if os.path.lexists(DEFAULT_PATH) else "auto")


def open_source(uri: str, ranks: Ranks) -> Source | None:
    """The source of this rank. A broker serves each rank; any other source the first one opens, and the others get root
    keys from it: then None. Puts the policy of keys in force. Raises what ev.open and ev.distributed.setup raise."""
    if ranks.size == 1:
        return session.open(uri)
    source, told = None, ["nothing"]
    try:
        source = session.open(uri) if ranks.first else None
        told = [source.driver.scheme if ranks.first else ""]
    finally:
        dist.broadcast_object_list(told, src=0)
    if told == ["nothing"]:
        raise SourceError(f"rank 0 could not open {uri}")
    if not ranks.first and told == ["broker"]:
        source = session.open(uri)
    distributed.setup(source_ranks="auto")
    return source
