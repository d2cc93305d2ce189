"""Root keys: 32 fresh bytes an interval for each rank that has no source of its own, from a rank that has one.

They travel by scatter over the job's process group, so the network sees them in the clear. A receiving rank draws from a
ring that gets 32 bytes an interval; all further keys of the interval are stretched from these, and counted so.
"""

import torch

from . import _C, session
from .errors import EverettError, HealthAlarm, SourceError
from .rank_group import RankGroup

_WORDS = 4
_RING_BYTES = 64
TAKE_TIMEOUT_S = 60.0


def givers(sources: list[int], hosts: dict[int, str]) -> dict[int, int]:
    """Which rank gives to each rank without a source: one on the same host where there is one, else taking turns.

    sources: ranks that have one; hosts: the host of every rank."""
    out: dict[int, int] = {}
    for rank in sorted(hosts):
        if rank in sources:
            continue
        near = [s for s in sorted(sources) if hosts[s] == hosts[rank]] or sorted(sources)
        out[rank] = near[len(out) % len(near)]
    return out


class RootKeys:
    """One process's part. giver: receiving rank -> giving rank, the same on all ranks; empty: nobody receives."""

    def __init__(self, group: RankGroup, giver: dict[int, int]):
        self._group = group
        self.giver = giver
        self.intervals = 0
        self._failure = ""
        self._rows = torch.zeros(len(group.ranks), _WORDS, dtype=torch.int64, device="cpu")
        self._got = torch.zeros(_WORDS, dtype=torch.int64, device="cpu")
        self.ring = _C.Ring(_RING_BYTES) if group.rank in giver else None
        self.commitments: list[bytes] = []

    def draw(self) -> None:
        """On a giving rank: takes fresh bytes for each receiver, never stretched ones. Waits and raises as Source.take."""
        for rank, giver in self.giver.items():
            if giver == self._group.rank:
                row = self._rows[self._group.ranks.index(rank)]
                session.current_source().take_into(_memory(row), TAKE_TIMEOUT_S)

    def exchange(self) -> None:
        """The scatter, on all ranks, after all have drawn. The key of the interval before is destroyed."""
        for giver in sorted(set(self.giver.values())):
            mine = self.giver.get(self._group.rank) == giver
            out = self._got if mine else torch.empty_like(self._got)
            rows = list(self._rows) if giver == self._group.rank else None
            self._group.scatter(out, rows, giver)
        self._rows.zero_()
        self.intervals += 1
        if self.ring is not None:
            key = _memory(self._got)
            self.commitments.append(_C.key_commitment(bytes(key)))
            self.ring.destroy_unread()
            self.ring.put(key)
            self._got.zero_()

    def stop(self, failure: Exception) -> None:
        """No key of a receiving rank is used or stretched from here on."""
        if self.ring is not None:
            self._failure = str(failure)
            self.ring.end(_C.Take.alarm if isinstance(failure, HealthAlarm) else _C.Take.closed)

    def explain(self, reason: str) -> EverettError | str | None:
        """What a draw on a receiving rank has to say (`keys.attach`)."""
        if reason == "starved":
            return (
                "this rank has no source, and the other keys of an interval are stretched from its root key: allow it, or "
                "raise max_stretch, or give ev.distributed.setup fewer interval_steps"
            )
        if reason == "alarm":
            return HealthAlarm(self._failure)
        if reason == "closed":
            return SourceError(f"{self._failure} Call ev.distributed.setup(...) again on all ranks.".lstrip())
        return None


def _memory(words: torch.Tensor) -> memoryview:
    return memoryview(words.numpy()).cast("B")
