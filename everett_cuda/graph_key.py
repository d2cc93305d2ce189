"""The key of a GPU's captured graphs: it lies on the GPU, so that each replay derives the records of its draws there.

A captured op cannot ask the host for a key: the host is not there at replay. So under capture
- the nonce is drawn by torch inside the graph, from the generator that torch registers with it: another at each replay;
- the record is derived from key and nonce by a kernel of the graph, and the op and its backward read that one record;
- the key is replaced between replays, at step boundaries, in the order of the current stream.
A replay without a boundary in between has the same key and other nonces: other masks, though no fresh quantum bits.
"""

import atexit
import contextlib
import threading
import time

import torch

from . import keys
from .errors import EverettError, ReplayMiss
from .nonce import graph_task_id, keep_graph, random_

ROWS = 64  # records that one random kernel and one derivation make together: two small kernels for 64 ops


class GraphKey:
    """One GPU's. module: `_cuda`; current_stream: gives the handle of torch's current stream on the GPU."""

    def __init__(self, index: int, module, current_stream, device: torch.device):
        self._index = index
        self._module = module
        self._current_stream = current_stream
        self._device = device
        self._lock = threading.RLock()
        self._slot = None  # the memory that graphs read: for the life of the process
        self._ready = False  # a key is in it
        self._captured = False  # a graph reads it, so it is replaced at boundaries
        self._recomputed = False  # a captured backward derives the records of its forward anew
        self._capture = 0
        self._rows: dict[int, tuple[torch.Tensor, int]] = {}  # by stream: records of the present capture, number used
        self.refreshes = 0
        self.refreshed_at = 0.0  # time.monotonic()
        atexit.register(self.forget)

    def prepare(self, stream: int) -> None:
        """Puts a key there if there is none. Called by ops outside a capture: the warm-up that torch asks for before a
        capture makes the key, which cannot be made during it."""
        if not self._ready:
            self._refresh(stream)
            # CUDA loads a kernel at its first launch, which is better not a captured one: here are the two of a capture.
            self._records(random_(torch.empty(1, 2, dtype=torch.int64, device=self._device), -(2**63), None), stream)

    def _refresh(self, stream: int) -> None:
        with self._lock:
            if self._slot is None:
                self._slot = self._module.KeySlot(self._index)
            slot = self._slot
            address = slot.open()
            try:
                keys.draw_graph_key(address)
            except BaseException:
                slot.abandon()
                raise
            slot.publish(stream)
            self._ready = True
            self.refreshes += 1
            self.refreshed_at = time.monotonic()

    def record(self, capture: int, stream: int) -> torch.Tensor:
        """Under capture: the record (twelve int32 on the GPU) of a new draw. capture: the capture's number.

        Raises EverettError before anything is captured where no key is there yet; ReplayMiss for a recomputation, which
        has nothing by which to find its forward (torch's RNG state cannot be read back during a capture).
        """
        if graph_task_id() != -1 and torch.is_grad_enabled() and not keep_graph():
            raise ReplayMiss(
                "a recomputation inside the backward of a captured graph drew a new mask, so its gradient would be silently "
                "wrong: torch cannot restore the RNG state during a capture. Leave out the checkpoint in what is captured, "
                "or run it without a graph."
            )
        with self._lock:
            if capture != self._capture:
                self._rows.clear()
                self._capture = capture
            rows, used = self._rows.get(stream, (None, ROWS))
            if used == ROWS:
                self._require_key()
                nonces = torch.empty(ROWS, 2, dtype=torch.int64, device=self._device)
                rows, used = self.derive(random_(nonces, -(2**63), None), stream), 0
            self._rows[stream] = rows, used + 1
            return rows[used]

    def derive(self, nonces: torch.Tensor, stream: int) -> torch.Tensor:
        """Under capture: the records, (n, 12) int32, of nonces, (n, 2) int64 contiguous, both on the GPU."""
        self._require_key()
        self._captured = True
        if graph_task_id() != -1:
            # The graph draws the forward's records again at replay, from the same nonces: the key must not change in
            # between, and only the user knows when it may.
            self._recomputed = True
        return self._records(nonces, stream)

    def _records(self, nonces: torch.Tensor, stream: int) -> torch.Tensor:
        records = torch.empty(nonces.shape[0], 12, dtype=torch.int32, device=self._device)
        self._module.subkeys(
            self._slot.address, nonces.data_ptr(), records.data_ptr(), nonces.shape[0], self._index, stream
        )
        return records

    def _require_key(self) -> None:
        if not self._ready:
            raise EverettError(
                f"a graph is being captured on cuda:{self._index} before its key is there, and during a capture none can "
                "be brought. Open a source and run the model once without capturing (torch asks for such a warm-up "
                "anyway), then capture."
            )

    def end_step(self, by_optimizer: bool) -> None:
        """A new key for the graphs, after what is queued on the current stream and before what will be. For the optimizer's
        hook not where a captured backward recomputes: it may run between the two replays of a step."""
        if self._slot is None or self._slot.forked:
            return
        stream = self._current_stream(self._index)
        if self._module.capture_id(self._index, stream):
            return
        with self._lock:
            self._rows.clear()
            if self._captured and not (by_optimizer and self._recomputed):
                self._refresh(stream)
            else:
                self._slot.reap()

    def status(self) -> str:
        if not self._captured:
            return ""
        if not self._ready:
            return f"graphs:       cuda:{self._index} has no key; a replay would stop with an error"
        age = time.monotonic() - self.refreshed_at
        return f"graphs:       cuda:{self._index} reads its key number {self.refreshes:,}, {age:,.1f} s old"

    def forget(self) -> None:
        """No key from here on. A graph that is replayed then stops with a CUDA error, as at a failed device assertion."""
        if self._slot is None or self._slot.forked:
            return
        with self._lock:
            self._ready = False
            with contextlib.suppress(RuntimeError):  # a GPU that lost its context replays nothing any more
                self._slot.forget(self._current_stream(self._index))
