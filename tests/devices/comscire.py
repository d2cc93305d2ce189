"""An emulated ComScire generator: an FTDI chip on the emulated bus, and the generator behind it.

The chip from FTDI's own documents and libftdi: every USB packet begins with two modem status bytes, and one without data
comes each time the latency timer runs out. The generator from the vendor's library (github vfp2/go-comscire @51c60bd,
`qwqng.hpp`, `qwqng.cpp`): one-byte commands with answers of fixed length, a stream between start and stop.
"""

import errno
import time

from .noise_source import NoiseSource
from .usb_bus import UsbGadget, usb_error

START, STOP, DELIMITER, STATUS, CLEAR = 0x96, 0xE0, 0x60, 0xB0, 0xC0
NEVER = (0x00, 0xFF)
SETTLING = 256  # bytes after a start that are not to be used; here they are all alike
BAD_STATISTICS = 0x0004


def answer_length(command: int) -> int:
    """Bytes that a command is answered by, from the table in qwqng.hpp."""
    for last, length in ((0x00, 0), (0x0F, 1024), (0x3F, 128), (0x5F, 1), (0x60, 6), (0x95, 4), (0x96, 0), (0xBF, 4)):
        if command <= last:
            return length
    return 0


class FtdiChip(UsbGadget):
    """FT232R (64-byte packets) or FT232H (512-byte packets). Subclasses give `produce` and take `consume`."""

    vendor = 0x0403

    def __init__(self, serial: str, product: int, port: int = 1):
        super().__init__(serial, port)
        self.product = product
        self.packet = 512 if product == 0x6014 else 64
        self.endpoints = {0x81: self.packet, 0x02: self.packet}
        self.latency_ms, self.bit_mode, self.flow_control = 16, 0, 0
        self.line_status = 0x60  # transmitter empty; errors are bits 1 (overrun), 2, 3, 4 and 7

    def purge(self) -> None:
        raise NotImplementedError

    def produce(self, n: int) -> bytes:
        raise NotImplementedError

    def consume(self, data: bytes) -> None:
        raise NotImplementedError

    def control(self, request_type, request, value, index, data):
        if request_type != 0x40 or index & 0xFF != 1:
            raise usb_error(errno.EPIPE)
        if request == 0x00:  # reset, purge
            self.purge()
        elif request == 0x02:
            self.flow_control = index >> 8
        elif request == 0x09:
            self.latency_ms = value
        elif request == 0x0B:
            self.bit_mode = value >> 8
        else:
            raise usb_error(errno.EPIPE)
        return 0

    def bulk_in(self, into, timeout_ms):
        if len(into) % self.packet:  # a packet need not fit
            raise usb_error(errno.EOVERFLOW)
        head, at = bytes([0x01, self.line_status]), 0
        deadline = time.monotonic() + min(self.latency_ms, timeout_ms) / 1000
        while at < len(into):
            payload = self.produce(self.packet - 2)
            if not self.plugged:
                raise usb_error(errno.ENODEV)
            if at and not payload:
                break
            if not payload and time.monotonic() < deadline and not self.gone.wait(0.001):
                continue
            into[at : at + 2 + len(payload)] = head + payload
            at += 2 + len(payload)
            if len(payload) < self.packet - 2:  # a short packet ends the transfer
                break
        self.line_status = 0x60
        return at

    def bulk_out(self, data, timeout_ms):
        self.consume(data)
        return len(data)


class ComScire(FtdiChip):
    """`runs` holds the usable bytes of each streaming, from its start to its stop; `asked` all commands.

    Faults, at any time: bad_statistics (and bad_again: clearing does not help), silent, deaf (so many commands are not
    heard), line_status, unplug_after (so many more bytes of the stream), noise.fault.
    """

    name = "ComScire QNG"

    def __init__(self, serial: str = "QWR40123", seed: int = 1, rate: float | None = None, port: int = 1):
        super().__init__(serial, 0x6014 if serial[3] in "3578" else 0x6001, port)
        self.noise = NoiseSource(seed)
        self.delimiter = bytes([0x51, 0x57, 0x00, 0xFF, 0x60, ord(serial[-1])])
        self.runs: list[bytearray] = []
        self.asked: list[int] = []
        self.bad_statistics = self.bad_again = self.silent = False
        self.deaf = 0
        self.unplug_after: int | None = None
        self._rate = rate
        self.power_up()

    @property
    def generation(self) -> int:
        return sum(self.serial[3] >= first for first in "12478")

    def power_up(self) -> None:
        self._fifo = bytearray()
        self._streaming = False
        self._settling = 0
        self._made_at = time.monotonic()

    def plug(self) -> None:
        self.power_up()
        super().plug()

    def leave_streaming(self) -> None:
        """As a program leaves it that was killed."""
        self._streaming, self._settling = True, 0
        self.runs.append(bytearray())

    # --- the chip's side ---

    def purge(self) -> None:
        self._fifo.clear()

    def produce(self, n: int) -> bytes:
        if self._fifo:
            out, self._fifo = bytes(self._fifo[:n]), self._fifo[n:]
            return out
        if not self._streaming or self.silent or not self._set_up:
            return b""
        if self._rate is not None:  # made at its rate, and never more than the chip's kilobyte ahead
            self._made_at = max(self._made_at, time.monotonic() - 1024 / self._rate)
            n = min(n, int((time.monotonic() - self._made_at) * self._rate))
            self._made_at += n / self._rate
        if self._settling:
            n = min(n, self._settling)
            self._settling -= n
            return b"\xee" * n
        if self.unplug_after is not None:
            n = min(n, self.unplug_after)
            self.unplug_after -= n
        made = self.noise.make(n)
        self.runs[-1] += made
        if self.unplug_after == 0:
            self.unplug_after = None
            self.unplug()
        return made

    @property
    def _set_up(self) -> bool:
        """Fast generators talk through the synchronous FIFO with flow control only."""
        return self.generation < 4 or (self.bit_mode == 0x40 and self.flow_control == 0x01)

    # --- the generator's side ---

    def consume(self, data: bytes) -> None:
        for command in data:
            self.asked.append(command)
            assert command not in NEVER, f"command {command:#04x} must never be sent"
            if self.deaf:
                self.deaf -= 1
            elif self._set_up:
                self._obey(command)

    def _obey(self, command: int) -> None:
        if command == START:
            self._streaming, self._settling = True, SETTLING
            self.runs.append(bytearray())
            self._made_at = time.monotonic()
        elif command == STOP:
            if self._streaming:
                self._fifo += self.noise.make(300)  # on its way already
            self._streaming = False
        elif command == CLEAR:
            self.bad_statistics = self.bad_again
        elif self.generation > 1:
            self._fifo += self._answer(command)

    def _answer(self, command: int) -> bytes:
        if command == DELIMITER:
            return self.delimiter
        if command == STATUS:
            bits = 0x0009 | 0x0002 * self._streaming | BAD_STATISTICS * self.bad_statistics
            return bits.to_bytes(4, "little")
        return bytes(answer_length(command))
