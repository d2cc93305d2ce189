"""Direct words on a GPU: conditioned bits of the source, copied there ahead of the ops that they decide.

Two stores a GPU, filled by the ring with different bytes, so no word is ever in both:
- the pool serves ops outside of captured graphs. The host knows which words an op takes, and waits for the source when
  there are none;
- the lane serves captured graphs, whose replays take words without the host. It is topped up at step boundaries. A
  replay that finds too few words gives NaN (integers: -1), and the next step boundary raises.
An alarm of the source, its closing and another source make all words void that were not used yet. A replay that comes
before the host has heard of an alarm still uses them: the host cannot reach into a graph.
"""

import atexit
import contextlib
import threading

import torch

from . import _C, keys
from .errors import EverettError
from .kernels import address

SLAB_WORDS = 2048  # of 64 bits: 16 KiB, 32 direct tokens for a batch of 64
SLABS = 4
POOL, LANE = 1, 2  # how a source names the two stores (`Source.take_into`)
LANE_WORDS = 4096  # words that the replays between two steps may take


class DirectPool:
    """One GPU's. module: `_cuda`; current_stream: gives the handle of torch's current stream on the GPU."""

    def __init__(self, index: int, module, current_stream, device: torch.device):
        self._index = index
        self._module = module
        self._current_stream = current_stream
        self._device = device
        self._lock = threading.RLock()
        self._pool = None
        self._lane = None
        self._lane_used = False  # a captured graph takes words from it
        self._ring = None  # the ring whose bytes are here, and its count of destructions when they were taken
        self._destructions = 0
        self._witness = None  # who was told of them
        atexit.register(self.forget)

    def convert(self, kind: int, type_: int, p: torch.Tensor | None, out: torch.Tensor) -> None:
        """Fills `out` (contiguous, on this GPU) with values of direct words, as `ev.rand(..., freshness="direct")` on the
        CPU makes them from the same words. kind, type_: numbers of the kernels; p: fp64 probabilities (bernoulli).

        Waits for the source as long as the settings allow. Under capture it takes what the lane will hold at replay.
        """
        stream = self._current_stream(self._index)
        arguments = (self._index, kind, type_, address(p), out.data_ptr(), out.numel())
        if self._module.capture_id(self._index, stream):
            return self._capture(arguments, stream)
        source = _current_source()
        if source.ring.forked:  # words that are here already are the parent's too
            raise source.error_for(_C.Take.forked, 8 * out.numel())
        granules, words = self._module.direct_size(kind, type_, out.numel())
        done = 0
        with self._lock:
            self._prepare()
            source.use_words(granules, (self._index, POOL))
            while done < granules:
                self._drop_void_words(source, stream, POOL)
                got = self._pool.direct(*arguments, done, stream)
                done += got
                if not got:
                    self._fill(source, (granules - done) * words)
            self._fill_ahead(source)

    def _prepare(self) -> None:
        """Memory, at the first use: the lane's too, because none can be made during a capture."""
        if self._pool is None:
            self._lane = self._module.Lane(self._index, LANE_WORDS)
            self._pool = self._module.Pool(self._index, SLAB_WORDS, SLABS)

    def _drop_void_words(self, source, stream: int, store: int) -> None:
        """Destroys the words here if they came from another source, before an alarm, or before a journal began."""
        ring, witness = source.ring, source.witness
        destructions = ring.destructions
        same = ring is self._ring and destructions == self._destructions and witness is self._witness
        if same and not source.must_drop_words((self._index, store)):
            return
        if self._ring is not None:
            self._pool.destroy()
            self._lane.destroy(stream)
        source.drop_words((self._index, store))
        self._ring, self._destructions, self._witness = ring, destructions, witness

    def _fill(self, source, words: int) -> None:
        """One slab, with at most `words`: what a slow source need not give now is left to others."""
        memory = self._pool.open()
        words = min(words, self._pool.slab_words)
        try:
            taken = source.take_slab(memory, 8 * words, _timeout_s(), (self._index, POOL))
        except BaseException:
            self._pool.abandon()
            raise
        self._pool.submit(taken // 8)

    def _fill_ahead(self, source) -> None:
        """Whole slabs as long as the ring is more than half full, so that keys are never short for this."""
        self._pool.reap()
        ring, size = source.ring, 8 * self._pool.slab_words
        while ring.unread >= size + ring.capacity // 2:
            memory = self._pool.open()
            if memory is None:
                return
            try:
                ahead = source.take_ahead(memory[:size], (self._index, POOL))
            except BaseException:
                self._pool.abandon()
                raise
            if not ahead:
                return self._pool.abandon()
            self._pool.submit(self._pool.slab_words)

    def _capture(self, arguments: tuple, stream: int) -> None:
        with self._lock:
            if self._lane is None:
                raise EverettError(
                    f'a graph is being captured on cuda:{self._index} with freshness="direct" before there is memory for '
                    "its words, and during a capture none can be had. Run the op once without capturing, then capture."
                )
            start = torch.empty(1, dtype=torch.int64, device=self._device)
            self._lane.direct(*arguments, start.data_ptr(), stream)
            self._lane_used = True

    def end_step(self, by_optimizer: bool) -> None:
        """Tops up the lane in the order of the current stream, which it waits for. Raises EverettError where a replay found
        too few words, and the source's errors where it cannot give more."""
        if not self._lane_used or self._lane.forked:
            return
        stream = self._current_stream(self._index)
        if self._module.capture_id(self._index, stream):
            return
        source = _current_source()
        with self._lock:
            *_, failed = self._lane.read(stream)
            self._drop_void_words(source, stream, LANE)
            room = self._lane.room
            if room:
                memory = self._lane.open(stream)
                try:
                    source.take_into(memory[: 8 * room], _timeout_s(), (self._index, LANE))
                except BaseException:
                    self._lane.abandon()
                    raise
                self._lane.submit(room, stream)
            if failed:
                self._lane.forgive(stream)
                raise EverettError(
                    f"{failed} captured ops on cuda:{self._index} found no direct words when they were replayed, and gave "
                    f"NaN (integers: -1). Call ev.step() before the first replay, and again before {LANE_WORDS} words are "
                    "used."
                )

    def status(self) -> str:
        if self._pool is None:
            return ""
        return (
            f"direct words: cuda:{self._index} has {self._pool.ready:,} ahead, {self._pool.skipped:,} destroyed as odd ends"
            + (f", graphs a lane of {LANE_WORDS:,}" if self._lane_used else "")
        )

    def forget(self) -> None:
        """Destroys all words; ops and replays find none."""
        if self._pool is None or self._pool.forked:
            return
        with self._lock, contextlib.suppress(RuntimeError):  # a GPU that lost its context gives nothing away any more
            self._pool.destroy()
            self._lane.destroy(self._current_stream(self._index))
            self._ring = None


def _current_source():
    from .session import current_source  # here, because session needs keys and the package needs the kernels

    return current_source()


def _timeout_s() -> float | None:
    return keys.settings()["timeout_s"]
