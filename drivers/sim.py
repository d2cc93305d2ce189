"""`sim:seed=7`: a simulated device, for development and for tests of what happens when a device breaks.

Its bytes are a pure function of (seed, offset), made by Philox: pseudo-random, never quantum, and its kind says so.
Parameters: `seed`; `rate=4Mbit/s` paces it like a device with a small buffer; `fault=KIND@OFFSET`, several joined by
`+`, breaks it at a raw byte offset:

    stuck       all bytes from there on are 0x00
    biased      each bit from there on is 1 with probability 1/8
    slow        from there on it gives 2,000 bytes a second
    short       a transfer of 512 bytes comes short there: its bytes are lost, the device goes on
    duplicate   the unit of 512 bytes there repeats the one before it
    unplug      it is gone after exactly that many bytes
"""

import threading
import time
from dataclasses import dataclass

import numpy as np

from ..errors import BadParameter
from .contract import ASSUMED_MIN_ENTROPY, DeviceLost, Driver, MinEntropy, TransportError
from .uri import SourceURI, parse_count, parse_rate, parse_size

_PAGE = 65536
_UNIT = 512
_SLOW_BYTES_PER_S = 2000.0
# What a USB device and its queued transfers hold. What does not fit is never made, so a late reader lowers the rate.
FIFO_BYTES = 65536
FAULTS = ("stuck", "biased", "slow", "short", "duplicate", "unplug")


@dataclass(frozen=True)
class Fault:
    """One fault and the raw byte offset at which it begins."""

    kind: str
    offset: int


def parse_faults(text: str) -> tuple[Fault, ...]:
    """`stuck@1MiB+short@64KiB`."""
    faults = []
    for piece in text.split("+"):
        kind, at, offset = piece.partition("@")
        if kind not in FAULTS or not at:
            raise ValueError(f"KIND@OFFSET with KIND one of {', '.join(FAULTS)}")
        fault = Fault(kind, parse_size(offset))
        if kind == "duplicate" and (fault.offset % _UNIT or fault.offset == 0):
            raise ValueError("duplicate@ a multiple of 512, above 0")
        faults.append(fault)
    return tuple(sorted(faults, key=lambda f: f.offset))


class SimulatedDriver(Driver):
    """See the module."""

    scheme = "sim"
    parameters = {"seed": parse_count, "rate": parse_rate, "fault": parse_faults}
    kind = "simulated"

    def __init__(
        self,
        seed: int,
        rate_bytes_per_s: float | None = None,
        faults: tuple[Fault, ...] = (),
        min_entropy: MinEntropy = MinEntropy(ASSUMED_MIN_ENTROPY, "assumed"),
    ):
        self.name = f"simulated source (Philox, seed {seed})"
        self.serial = f"seed-{seed}"
        self.rate_bytes_per_s = rate_bytes_per_s
        self.min_entropy = min_entropy
        self.chunk_bytes = 1 << 20 if rate_bytes_per_s is None else FIFO_BYTES
        self._seed = seed
        self._faults = faults
        self._past: set[Fault] = set()  # short transfers that have happened
        self._offset = 0
        self._made_at = time.monotonic()  # the moment at which the device's buffer was empty
        self._closed = threading.Event()
        self._pages: dict[int, tuple[int, np.ndarray]] = {}

    @classmethod
    def open(cls, uri: SourceURI) -> "SimulatedDriver":
        values = uri.parameters(cls.parameters)
        if uri.rest:
            raise BadParameter(f"sim: takes parameters only, such as sim:seed=7, not {uri.rest!r}")
        h = values.get("h")
        claim = MinEntropy(h, "claimed by user") if h is not None else MinEntropy(ASSUMED_MIN_ENTROPY, "assumed")
        return cls(values.get("seed", 0), values.get("rate"), values.get("fault", ()), claim)

    def _at(self, kind: str) -> int | None:
        return next((f.offset for f in self._faults if f.kind == kind), None)

    def _page(self, stream: int, index: int) -> np.ndarray:
        cached = self._pages.get(stream)
        if cached is None or cached[0] != index:
            # One count of Philox4x64 is 32 bytes.
            philox = np.random.Philox(key=self._seed + (stream << 64), counter=index * (_PAGE // 32))
            cached = self._pages[stream] = (index, philox.random_raw(_PAGE // 8).view(np.uint8))
        return cached[1]

    def _stream(self, stream: int, offset: int, n: int) -> np.ndarray:
        parts = []
        while n:
            index, at = divmod(offset, _PAGE)
            part = self._page(stream, index)[at : at + n]
            parts.append(part)
            offset += len(part)
            n -= len(part)
        return np.concatenate(parts)

    def bytes_at(self, offset: int, n: int) -> np.ndarray:
        """The raw bytes at [offset, offset + n), faults included; shape (n,), dtype uint8."""
        out = self._stream(0, offset, n)
        biased, stuck = self._at("biased"), self._at("stuck")
        if biased is not None and biased < offset + n:
            first = max(biased - offset, 0)
            for stream in (1, 2):
                out[first:] &= self._stream(stream, offset + first, n - first)
        for fault in self._faults:
            if fault.kind == "duplicate" and fault.offset < offset + n and offset < fault.offset + _UNIT:
                first, last = max(fault.offset, offset), min(fault.offset + _UNIT, offset + n)
                out[first - offset : last - offset] = self._stream(0, first - _UNIT, last - first)
        if stuck is not None and stuck < offset + n:
            out[max(stuck - offset, 0) :] = 0
        return out

    def _made(self, want: int, timeout_s: float) -> int:
        """Waits for up to `want` bytes, or 20 ms of them; returns how many the device has made, at most `want`."""
        slow = self._at("slow")
        rate = _SLOW_BYTES_PER_S if slow is not None and self._offset >= slow else self.rate_bytes_per_s
        if rate is None:
            return want
        enough = min(want, FIFO_BYTES // 2, max(1, int(rate * 0.02)))
        wait = enough / rate - (time.monotonic() - self._made_at)
        if wait > 0:
            self._closed.wait(min(wait, timeout_s))
        now = time.monotonic()
        made = min(int((now - self._made_at) * rate), FIFO_BYTES)
        taken = min(made, want)
        # The buffer keeps what is not taken; what did not fit into it was never made.
        self._made_at = max(self._made_at, now - FIFO_BYTES / rate) + taken / rate
        return taken

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        want = len(buffer)
        unplug = self._at("unplug")
        if self._offset == unplug:
            raise DeviceLost(f"{self.name} was unplugged at byte {unplug}")
        for fault in self._faults:
            if fault.kind == "short" and fault not in self._past and fault.offset == self._offset:
                self._past.add(fault)
                self._offset += _UNIT
                raise TransportError(f"{self.name}: short read at byte {fault.offset}, {_UNIT} bytes lost")
            if fault.kind in ("short", "slow", "unplug") and fault.offset > self._offset:
                want = min(want, fault.offset - self._offset)  # a read ends where the next fault begins
        got = self._made(want, timeout_s)
        if self._closed.is_set():
            raise DeviceLost(f"{self.name} was closed")
        buffer[:got] = self.bytes_at(self._offset, got).data if got else b""
        self._offset += got
        return got

    def close(self) -> None:
        self._closed.set()
