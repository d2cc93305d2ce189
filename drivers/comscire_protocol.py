"""ComScire's commands over an FTDI pipe: one byte each, answered by a fixed number of bytes, or by a stream until stop.

Source: the vendor's library (github vfp2/go-comscire @51c60bd, `qwqng.hpp` and `qwqng.cpp`, V), restated. Answers carry
no mark, so the device is brought into step by its delimiter: six bytes, its own but always the same, that answer 0x60.
The bytes 0x00 and 0xFF must never be sent. Devices of generation 1 know start only.
"""

import time
from typing import TYPE_CHECKING

from .contract import TransportError

if TYPE_CHECKING:
    from .ftdi_pipe import FtdiPipe

START, STOP, DELIMITER, STATUS, CLEAR_STATISTICS = b"\x96", b"\xe0", b"\x60", b"\xb0", b"\xc0"
DELIMITER_BYTES, STATUS_BYTES = 6, 4
BAD_STATISTICS = 0x0004
START_DISCARD_BYTES = 256
ANSWER_S = 0.1
# In generations before 3 a command may be missed; the vendor's library tries 40 times for 100 ms each.
SYNCHRONIZE_S = 4.0


class Generator:
    """The device behind a pipe. All methods raise TransportError when it is out of step, DeviceLost when it is gone."""

    def __init__(self, pipe: "FtdiPipe", generation: int):
        self.pipe = pipe
        self.answers = generation >= 2
        self._answer_s = ANSWER_S + 2 * pipe.latency_s  # a short answer waits in the chip for its latency timer
        self._delimiter = b""

    def synchronize(self, limit_s: float) -> None:
        """Stops the stream and drops what is on its way, until the delimiter is the last that came."""
        if not self.answers:
            return self.pipe.purge()
        deadline = time.monotonic() + limit_s
        while True:
            self.pipe.write(STOP)
            self._drain()
            answer = self._delimiter_answer()
            if not self._delimiter:
                again = self._delimiter_answer()
                if len(answer) == DELIMITER_BYTES and again == answer:
                    self._delimiter = answer
                    return
            elif answer[-DELIMITER_BYTES:] == self._delimiter:
                return
            if time.monotonic() >= deadline:
                raise TransportError(f"the generator gave no delimiter within {limit_s:g} s; unplug it and plug it in again")

    def _drain(self) -> None:
        """Until the chip had nothing for two of its latency times, or it must have missed the stop."""
        quiet, deadline = 0, time.monotonic() + self._answer_s
        while quiet < 2 and time.monotonic() < deadline:
            quiet = 0 if len(self.pipe.read(self._answer_s)) else quiet + 1

    def _delimiter_answer(self) -> bytes:
        self.pipe.write(DELIMITER)
        return self._receive(DELIMITER_BYTES)

    def _receive(self, n: int) -> bytes:
        """At least n bytes, or what came of them in the time of an answer."""
        out, deadline = b"", time.monotonic() + self._answer_s
        while len(out) < n and time.monotonic() < deadline:
            out += self.pipe.read(self._answer_s).tobytes()
        return out

    def status(self) -> int:
        """The status word; between streams only."""
        self.pipe.write(STATUS)
        answer = self._receive(STATUS_BYTES)
        if len(answer) != STATUS_BYTES:
            raise TransportError(f"the generator answered {len(answer)} of {STATUS_BYTES} bytes of status")
        return int.from_bytes(answer, "little")

    def clear_statistics(self) -> None:
        """Lets its statistics, and what it says of them, begin anew; between streams only."""
        self.pipe.write(CLEAR_STATISTICS)

    def start(self, rate_bytes_per_s: float) -> memoryview:
        """Starts the stream and drops its first 256 bytes; returns those that came with them."""
        self.pipe.write(START)
        limit_s = self._answer_s + 4 * START_DISCARD_BYTES / rate_bytes_per_s
        got, deadline = b"", time.monotonic() + limit_s
        while len(got) < START_DISCARD_BYTES:
            if time.monotonic() >= deadline:
                raise TransportError(f"the generator did not begin its stream within {limit_s:.2f} s")
            got += self.pipe.read(self._answer_s).tobytes()
        return memoryview(got)[START_DISCARD_BYTES:]

    def stop(self) -> None:
        """Asks it to stop, without waiting for it."""
        if self.answers:
            self.pipe.write(STOP)
