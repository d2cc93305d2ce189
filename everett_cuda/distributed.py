"""Keys of several processes that work on one model: which ranks share them, and who is surely different.

`setup` puts the policy in force and follows the steps (`ev.step()`, optimizers), which all ranks then end together:
- the *world key*, for numbers that may reach weights, permutations or control flow, is one for the whole job: ranks whose
  torch RNG states are equal get equal numbers, as in torch;
- the *rank key*, for masks and noise, is each rank's own, unless `same_within` names ranks that hold parts of one tensor:
  these share one, and must have equal torch RNG states, which is checked at each step;
- a rank without a source gets root keys from one that has one (`root_keys`), if `source_ranks` allows it.
Shared keys change at each step, and cross the network in the clear.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import _C, followers, keys, session
from .errors import EverettError, RNGDesync, SourceError
from .rank_group import RankGroup
from .rank_sources import Provenance, check, provenance_of, say
from .root_keys import RootKeys, givers

INTERVAL_STEPS = 1000
TIMEOUT_S = 600.0


class _Policy:
    """The policy in force: a follower of the keys."""

    def __init__(
        self,
        job: RankGroup,
        within: RankGroup | None,
        root: RootKeys,
        provenance: tuple[Provenance, ...],
        interval_steps: int,
    ):
        self.job, self.within, self.root, self.provenance = job, within, root, provenance
        self.own = provenance[job.ranks.index(job.rank)]
        self._interval_steps = interval_steps
        self._source = session.open_source()
        self._steps = 0
        self._failed = False
        self._forgotten = False

    def end_step(self, by_optimizer: bool) -> None:
        if self._failed:
            raise RNGDesync("an earlier step of this job failed to end. Call ev.distributed.setup(...) again on all ranks.")
        self._steps += 1
        self.renew_keys(root=self._steps % self._interval_steps == 0)

    def renew_keys(self, root: bool) -> None:
        """All collectives of a boundary; root: the root keys too. After an error no shared key is left, and draws that
        took one are refused."""
        try:
            problem = self._problem()
            if root and self.root.giver:
                problem = problem or _error_of(self.root.draw)
                self.job.agree(self._steps, problem=problem)
                self.root.exchange()
                if self.root.ring is not None and self.root.intervals == 1:
                    keys.attach(self.root.ring, self.root.explain)
            self._renew(self.job, self.own.world_key_rank, (0, 0), True, problem)
            if self.within is not None:
                self._renew(self.within, self.own.rank_key_rank, _states(), False)
        except BaseException as error:
            self._failed = True
            keys.withhold_group_key(world=True)
            if self.within is not None:
                keys.withhold_group_key(world=False)
            self.root.stop(error)
            raise

    def _renew(self, group: RankGroup, leader: int, states: tuple[int, int], world: bool, problem=None) -> None:
        group.agree(self._steps, states, keys.draw_key_to_share if group.rank == leader else None, problem)
        keys.set_group_key(world, group.key_address)
        group.forget_key()

    def _problem(self) -> EverettError | None:
        """Why this rank cannot go on, where that is known before it draws."""
        if self._forgotten or session.open_source() is not self._source:
            return EverettError(
                "the source was closed or opened after ev.distributed.setup(...). Call ev.distributed.teardown() before "
                "that, and setup again on all ranks after it."
            )
        if self._source is not None:
            answer = self._source.ring.take_into(bytearray(0), 0.0)  # an alarm, or the end
            if answer != _C.Take.ok:
                return self._source.error_for(answer, 0)
        return None

    def forget(self) -> None:
        self._forgotten = True
        self.root.stop(SourceError("the source was closed."))

    def status(self) -> str:
        own = self.own
        if self._failed or self._forgotten:
            return "distributed:  FAILED at a step boundary, or the source was closed: draws from shared keys are refused"
        root = f" ({self.root.intervals:,} so far, one in {self._interval_steps:,} steps)" if own.over_network else ""
        within = f", rank key of rank {own.rank_key_rank} with ranks {own.shared_with}" if self.within else ""
        return (
            f"distributed:  {own}{root}; world key of rank {own.world_key_rank}{within}, over the network in the clear; "
            f"{len(self.job.ranks)} ranks, {self._steps:,} steps"
        )

    def end(self) -> None:
        """A rank without a source has no keys then."""
        if self.root.ring is not None and session.open_source() is None:
            keys.detach()
        self.root.stop(SourceError("ev.distributed.teardown() was called."))
        keys.clear_group_keys()


_policy: _Policy | None = None


def setup(
    same_within: dist.ProcessGroup | DeviceMesh | None = None,
    world: dist.ProcessGroup | None = None,
    *,
    source_ranks: str | Sequence[int] | None = None,
    interval_steps: int = INTERVAL_STEPS,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Puts the policy in force; all ranks of the job call it, after dist.init_process_group and ev.open.

    same_within: the ranks that hold parts of one tensor (a tensor-parallel group, a mesh or a dimension of one): one rank
    key for all of them, changed at each step. None, or a group of one: each rank its own key for every draw. world: the
    ranks that the world key is for; None: all. source_ranks: None: each rank must have a source open; "auto": ranks
    without one get root keys from those that have one; a list: exactly these have one. interval_steps: steps between two
    root keys. timeout_s: how long ranks wait for each other at a step boundary.

    From here on all ranks end their steps together. Raises on all ranks: EverettError where torch.distributed is not
    initialized, where ranks name different groups or arguments, where a rank has no source, or where two ranks' sources
    give the same bits; RNGDesync where torch RNG states differ in `same_within` or a rank does not come in time; what a
    draw raises. ValueError and TypeError for arguments of the wrong kind.
    """
    global _policy
    if source_ranks is not None and source_ranks != "auto":
        source_ranks = tuple(sorted({int(r) for r in source_ranks}))
    if interval_steps < 1 or timeout_s <= 0:
        raise ValueError(f"interval_steps: from 1 on, and timeout_s: above 0; got {interval_steps} and {timeout_s}")
    if not dist.is_available() or not dist.is_initialized():
        raise EverettError("torch.distributed is not initialized. Call dist.init_process_group(...) first, or use torchrun.")
    teardown()
    ranks = tuple(sorted(dist.get_process_group_ranks(world or dist.group.WORLD)))
    job = RankGroup(ranks, "job", timeout_s)
    said = job.gather(say(_ranks_of(same_within), (source_ranks, interval_steps)))
    check(said, source_ranks)
    shared_with = said[ranks.index(job.rank)].shared_with
    within = RankGroup(shared_with, "same_within group", timeout_s) if len(shared_with) > 1 else None
    giver = givers([s.rank for s in said if s.source], {s.rank: s.host for s in said})
    policy = _Policy(job, within, RootKeys(job, giver), provenance_of(said, giver), interval_steps)
    try:
        policy.renew_keys(root=True)
        keys.step()  # no draw from here on finds a key of before
    except BaseException:
        policy.end()
        raise
    followers.follow(policy, first=True)  # before GPUs, whose graphs take the new key
    _policy = policy


def teardown() -> None:
    """Ends the policy on this rank; draws take keys of its own again. Nothing is sent, and without a policy nothing done.

    Call it before dist.destroy_process_group() and before another source is opened.
    """
    global _policy
    if _policy is None:
        return
    policy, _policy = _policy, None
    followers.unfollow(policy)
    policy.end()
    keys.step()


def provenance() -> tuple[Provenance, ...]:
    """Whose device stands behind each rank of the job, as all ranks said at setup. EverettError without a policy."""
    if _policy is None:
        raise EverettError("no policy is in force: call ev.distributed.setup(...) first")
    return _policy.provenance


def root_commitments() -> tuple[bytes, ...]:
    """Labelled commitments (`keys`, 32 bytes each) to the root keys that this rank got, one an interval; for a ledger."""
    return () if _policy is None else tuple(_policy.root.commitments)


def shared_with() -> tuple[int, ...]:
    """The ranks that have this rank's rank key, this one included; () without a policy."""
    return () if _policy is None else _policy.own.shared_with


# --- setup's parts ----------------------------------------------------------------------------------------------------


def _ranks_of(group: dist.ProcessGroup | DeviceMesh | None) -> tuple[int, ...]:
    if group is None:
        return (dist.get_rank(),)
    if isinstance(group, DeviceMesh):
        return tuple(sorted(group.mesh.flatten().tolist()))
    if isinstance(group, dist.ProcessGroup):
        return tuple(sorted(dist.get_process_group_ranks(group)))
    raise TypeError(f"same_within: a ProcessGroup or a DeviceMesh such as mesh['tp'], got {type(group).__name__}")


def _states() -> tuple[int, int]:
    """Digests, 63 bits each, of torch's default generators: of the CPU and of the current GPU (0 before torch uses one)."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return _digest(torch.get_rng_state()), 0 if gpu is None else _digest(gpu)


def _digest(state: torch.Tensor) -> int:
    return int.from_bytes(hashlib.sha256(state.numpy().data).digest()[:8], "little") >> 1


def _error_of(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
