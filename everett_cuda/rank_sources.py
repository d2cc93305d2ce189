"""What ranks say of their sources when a policy of keys is set up, whether that makes a job, and whose device stands behind
whom."""

import ctypes
import socket
from dataclasses import dataclass

import torch.distributed as dist

from . import _C, keys, session
from .errors import EverettError


@dataclass(frozen=True)
class Provenance:
    """Whose device stands behind a rank. source_rank: the rank that has it open, with the device's label, name, serial
    and kind. over_network: whether keys came from there over the network. world_key_rank: who draws the world key.
    rank_key_rank: who draws the rank key, where it is shared; else None. shared_with: the ranks that it is shared with.
    """

    rank: int
    host: str
    source_rank: int
    label: str
    name: str
    serial: str
    kind: str
    over_network: bool
    world_key_rank: int
    rank_key_rank: int | None
    shared_with: tuple[int, ...]

    def __str__(self) -> str:
        device = f"{self.name}{f', serial {self.serial}' if self.serial else ''}: {self.label}"
        if not self.over_network:
            return f"rank {self.rank} has its own source, {device}"
        return f"rank {self.rank} gets root keys of rank {self.source_rank}, over the network in clear, {device}"


@dataclass(frozen=True)
class Said:
    """What each rank says of itself at setup."""

    rank: int
    host: str
    source: tuple[str, str, str, str] | None = None  # label, name, serial, kind
    repeatable: bool = False  # who opens the same source again gets the same bits again
    commitment: bytes = b""  # to a key that nobody uses
    shared_with: tuple[int, ...] = ()
    arguments: tuple = ()
    problem: str = ""


def say(shared_with: tuple[int, ...], arguments: tuple) -> Said:
    """What this rank has to say. What goes wrong here is said too, so that no rank waits in vain."""
    rank, host = dist.get_rank(), socket.gethostname()
    try:
        source = session.open_source(from_environment=True)
        if source is None:
            return Said(rank, host, shared_with=shared_with, arguments=arguments)
        key = (ctypes.c_uint8 * 32)()
        keys.draw_key_to_share(ctypes.addressof(key))
        driver = source.driver
        return Said(
            rank,
            host,
            (source.status().label, driver.name, driver.serial, driver.kind),
            driver.scheme != "broker" and driver.kind in ("simulated", "recorded"),
            _C.key_commitment(bytes(key)),
            shared_with,
            arguments,
        )
    except EverettError as error:
        return Said(rank, host, problem=f"{type(error).__name__}: {error}")


def check(said: list[Said], source_ranks) -> None:
    """Raises, on all ranks alike, where what they said does not make a job."""
    for s in said:
        if s.problem:
            raise EverettError(f"rank {s.rank} could not open its source: {s.problem}")
        if s.arguments != said[0].arguments:
            raise EverettError(
                f"(source_ranks, interval_steps) must be the same on all ranks: {said[0].arguments} on rank {said[0].rank}, "
                f"{s.arguments} on rank {s.rank}"
            )
    _check_sources(said, source_ranks)
    by_rank = {s.rank: s for s in said}
    for s in said:
        for other in s.shared_with:
            if other not in by_rank or by_rank[other].shared_with != s.shared_with:
                theirs = by_rank[other].shared_with if other in by_rank else "not in the job"
                raise EverettError(
                    f"same_within: rank {s.rank} names ranks {s.shared_with}, and rank {other} of these {theirs}. Give "
                    "each rank the group that it is in, the same on all its ranks."
                )


def _check_sources(said: list[Said], source_ranks) -> None:
    have = [s for s in said if s.source]
    lacking = [s.rank for s in said if not s.source]
    if not have:
        raise EverettError('no rank has a source open. Call ev.open("auto") or ev.open(URI) on at least one, before setup.')
    if source_ranks is None and lacking:
        raise EverettError(
            f"ranks {lacking} have no source open. Open one there (a broker serves all processes of a host), or give "
            'source_ranks="auto" to let them get root keys over the network from those that have one.'
        )
    if isinstance(source_ranks, tuple) and source_ranks != tuple(s.rank for s in have):
        raise EverettError(
            f"source_ranks: {source_ranks} were named, and ranks {tuple(s.rank for s in have)} have a source open. Open "
            'it on exactly these, or give source_ranks="auto".'
        )
    seen: dict = {}
    for s in have:
        for mark in (s.commitment, (s.source[1:], "again") if s.repeatable else s.commitment):
            first = seen.setdefault(mark, s)
            if first is not s:
                raise EverettError(
                    f"ranks {first.rank} and {s.rank} have sources that give the same bits ({s.source[1]}), so their masks "
                    "would be alike. Serve them all from one broker (everett serve), open the source on one rank only and "
                    'give source_ranks="auto", or give each rank a source of its own (sim: with other seeds).'
                )


def provenance_of(said: list[Said], giver: dict[int, int]) -> tuple[Provenance, ...]:
    by_rank = {s.rank: s for s in said}
    with_source = [s.rank for s in said if s.source]
    out = []
    for s in said:
        device = by_rank[giver.get(s.rank, s.rank)]
        label, name, serial, kind = device.source
        shared = len(s.shared_with) > 1
        leader = next((r for r in s.shared_with if r in with_source), s.shared_with[0]) if shared else None
        out.append(
            Provenance(
                s.rank,
                s.host,
                device.rank,
                label,
                name,
                serial,
                kind,
                device is not s,
                with_source[0],
                leader,
                s.shared_with,
            )  # fmt: skip
        )
    return tuple(out)
