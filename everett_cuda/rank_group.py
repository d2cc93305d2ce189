"""A group of ranks and the one collective by which it agrees at a step boundary, on CPU tensors over gloo.

All ranks reduce one small int64 tensor by maximum. It carries, at once,
- what must be equal, as x and ~x: the maxima of both tell whether the smallest and the largest x are one;
- whether a rank cannot go on, as its number plus one;
- the key, which its leader puts in and everybody else leaves at the smallest int64.
So nobody leaves before everybody has come, a rank that fails takes the others with it by name, and a key costs no
collective of its own. The network sees the key in the clear: gloo does not encrypt.
"""

import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from . import errors
from .errors import EverettError, RNGDesync

_KEY_WORDS = 4
_NOTHING = -(2**63)  # the smallest int64: no contribution to a maximum
_GRACE_S = 5.0  # a collective fails on all present ranks within about this time of each other
CHECKED = ("step count", "CPU generator state", "CUDA generator state")


_made: dict[tuple, int] = {}  # how often these ranks have made a group of this name: equally often on all of them


class RankGroup:
    """ranks: global, ascending; this process is one of them, and all of them make the group at the same point. name: in
    errors. timeout_s: how long the group waits for its last rank.

    The gloo backend is made apart from torch's list of groups: a name there depends on how many groups a rank is in, and
    is given again after a group is destroyed, when gloo waits for the addresses of the old one for ever.
    """

    def __init__(self, ranks: tuple[int, ...], name: str, timeout_s: float):
        self.ranks, self.name, self.timeout_s = ranks, name, timeout_s
        self.rank = dist.get_rank()
        _made[ranks, name] = turn = _made.get((ranks, name), 0) + 1
        store = c10d._get_default_store()
        self._store = dist.PrefixStore(f"everett_cuda/{name}/{'_'.join(map(str, ranks))}/{turn}", store)
        self._failures = 0
        # At the end so that the key's words lie together.
        self._said = torch.empty(2 * len(CHECKED) + 1 + _KEY_WORDS, dtype=torch.int64, device="cpu")
        self.key_address = self._said[-_KEY_WORDS:].data_ptr()
        self._gloo = None
        self._run("setup", self._connect)

    def _connect(self) -> None:
        place = self.ranks.index(self.rank)
        self._gloo = dist.ProcessGroupGloo(self._store, place, len(self.ranks), timedelta(seconds=self.timeout_s))

    def gather(self, what) -> list:
        """What each rank gives (anything that can be pickled), by its place in the group."""
        mine = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8)
        sizes = [n.item() for n in self._all_gather(torch.tensor([len(mine)], device="cpu"))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: len(mine)] = mine
        return [pickle.loads(t.numpy()[:n].tobytes()) for t, n in zip(self._all_gather(padded), sizes, strict=True)]

    def _all_gather(self, t: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty_like(t) for _ in self.ranks]
        self._run("gather", lambda: self._gloo.allgather([out], [t], c10d.AllgatherOptions()).wait())
        return out

    def agree(
        self,
        step: int,
        states: tuple[int, int] = (0, 0),
        put_key: Callable[[int], None] | None = None,
        problem: Exception | None = None,
    ) -> None:
        """Everybody meets; then the leader's key lies at `key_address`, until `forget_key`.

        states: digests of the CPU's and the GPU's generator states, 63 bits each. put_key: of the leader only, writes 32
        bytes to an address. problem: why this rank cannot go on. Raises on every rank: the problem itself, or its kind
        with the rank's name before it; RNGDesync where step or states differ, or where a rank did not come in time.
        """
        said = self._said
        said.fill_(_NOTHING)
        if problem is None and put_key is not None:
            try:
                put_key(self.key_address)
            except Exception as error:
                problem = error
        mine = (step, *states)
        for i, x in enumerate(mine):
            said[2 * i], said[2 * i + 1] = x, ~x
        failing = 2 * len(mine)
        said[failing] = 0 if problem is None else self.rank + 1
        options = c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._run(f"step {step}", lambda: self._gloo.allreduce([said], options).wait())
        if int(said[failing]):
            self.forget_key()
            self._raise_problem(problem)
        if any(int(said[2 * i]) != ~int(said[2 * i + 1]) for i in range(len(mine))):
            self.forget_key()
            self._raise_difference(mine)

    def forget_key(self) -> None:
        self._said.zero_()

    def scatter(self, out: torch.Tensor, rows: list[torch.Tensor] | None, giver: int) -> None:
        """Rank `giver` gives rows[i] to the group's i-th rank, whose `out` it fills."""
        options = c10d.ScatterOptions()
        options.rootRank = self.ranks.index(giver)
        self._run("root keys", lambda: self._gloo.scatter([out], [rows] if rows else [], options).wait())

    def _raise_problem(self, problem: Exception | None):
        told = self.gather(None if problem is None else (type(problem).__name__, str(problem)))
        if problem is not None:
            raise problem
        rank, (kind, text) = next((r, t) for r, t in zip(self.ranks, told, strict=True) if t is not None)
        kind = getattr(errors, kind, EverettError)
        raise (kind if issubclass(kind, EverettError) else EverettError)(
            f"rank {rank} cannot go on, so all ranks of the {self.name} stop: {text}"
        )

    def _raise_difference(self, mine: tuple[int, ...]):
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_initialized() else "CPU"
        told = self.gather((mine, device))
        leader = told[0][0]
        differing = []
        for rank, (theirs, device) in zip(self.ranks, told, strict=True):
            which = [name for name, x, y in zip(CHECKED, theirs, leader, strict=True) if x != y]
            if which:
                differing.append(f"rank {rank} ({device}): {', '.join(which)}")
        raise RNGDesync(
            f"ranks of the {self.name} {_list(self.ranks)} must have the same torch RNG states, and from rank "
            f"{self.ranks[0]} differ: {'; '.join(differing)}. Their masks would not be those of one model. Seed them alike "
            "(torch.manual_seed) before ev.distributed.setup(...), and look for a random torch op that only some ranks call "
            "or call with another size."
        )

    def _run(self, what: str, collective: Callable[[], object]) -> None:
        """A collective; where it fails, RNGDesync names the ranks that did not come."""
        if not dist.is_initialized():
            raise EverettError(
                "torch.distributed was shut down while ev.distributed was in force. Call ev.distributed.teardown() before "
                "dist.destroy_process_group()."
            )
        begin = time.monotonic()
        try:
            collective()
        except RuntimeError as error:  # gloo: timed out, or a peer's connection closed
            missing = self._missing()
            waited = time.monotonic() - begin
            who = f"rank{'s' * (len(missing) > 1)} {_list(missing)} did not come" if missing else "one came too late"
            raise RNGDesync(
                f"the ranks of the {self.name} {_list(self.ranks)} have to end each step together ({what}); rank "
                f"{self.rank} waited {waited:.1f} s (timeout_s {self.timeout_s:g}) and {who}. Call ev.step() and "
                f"optimizers equally often on all ranks. From torch: {str(error).splitlines()[0]}"
            ) from error

    def _missing(self) -> list[int]:
        """The ranks that have not met this failure too."""
        self._failures += 1
        try:
            self._store.set(f"{self._failures}/{self.rank}", "here")
            deadline = time.monotonic() + min(_GRACE_S, self.timeout_s)
            while True:
                missing = [r for r in self.ranks if not self._store.check([f"{self._failures}/{r}"])]
                if not missing or time.monotonic() > deadline:
                    return missing
                time.sleep(0.05)
        except RuntimeError:  # the store is gone with the rank that kept it
            return [0]


def _list(ranks: Sequence[int]) -> str:
    """Ranks in words: runs of them as first-last."""
    runs: list[list[int]] = []
    for r in ranks:
        if runs and r == runs[-1][1] + 1:
            runs[-1][1] = r
        else:
            runs.append([r, r])
    return ", ".join(f"{a}-{b}" if b > a + 1 else f"{a}, {b}" if b > a else f"{a}" for a, b in runs)
