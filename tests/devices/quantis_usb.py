"""An emulated Quantis USB on the emulated bus of this process: what the wire does, not what any driver expects. Facts: ID
Quantique's library 20.2.4 and QUSB; what happens on wrong requests: USB 2.0, chapters 5, 8, 9.

    bus = UsbBus(QuantisUsb(Seeded(7)))
    with bus.plugged_into_pyusb(): ...   # usb.core.find, and every driver, sees that bus instead of the machine's
"""

import errno
import threading
import time
from collections.abc import Callable

from .usb_bus import UsbGadget, usb_error

ENDPOINT = 0x86
FIFO_PACKETS = 4  # as much as the usual USB controllers of its time buffer for one endpoint
FAULTS = ("short", "stall", "overflow", "io", "silence", "unplug")


class QuantisUsb(UsbGadget):
    """One device. source(n) gives its next n random bytes.

    rate_bytes_per_s: 0 as fast as it is read; else a late reader loses what does not fit into its buffer.
    one_packet: gives one packet however much is asked for, as a device would that ends each transfer.
    Public fields may be changed at any time: status, ais31, forbidden, busy, ...
    """

    vendor, product, device_class, release = 0x0ABA, 0x0102, 0xFF, 0x100
    maker, name = "id Quantique", "Quantis USB"

    def __init__(
        self,
        source: Callable[[int], bytes],
        serial: str = "1000231A410",
        *,
        rate_bytes_per_s: float = 0.0,
        modules: int = 0b1,
        packet_bytes: int = 512,
        one_packet: bool = False,
        port: int = 1,
    ):
        super().__init__(serial, port)
        self.source = source
        self.packet_bytes, self.one_packet = packet_bytes, one_packet
        self.mask = self.status = self.power = modules
        self.version, self.rate_kbit = 0x00020008, 4000
        self.ais31 = 0
        self.ais31_sticks = False  # a flag that clearing does not clear
        self.unknown_requests: set[int] = set()  # refused by a stall
        self.requests: list[int] = []
        self.speaking = threading.Event()
        self.speaking.set()
        self._served = 0
        self._fault: tuple[str, int] | None = None
        self._rate = rate_bytes_per_s
        self._made_at = time.monotonic()

    @property
    def endpoints(self) -> dict[int, int]:
        return {ENDPOINT: self.packet_bytes}

    @property
    def served(self) -> int:
        """Bytes of data given so far."""
        return self._served

    # --- what people do to it ---

    def fault(self, kind: str, at: int) -> None:
        """The first transfer after `at` bytes of data suffers it: "short" brings 256 bytes less, "stall" halts the endpoint
        until it is cleared, "overflow" and "io" fail once, "silence" lasts until `speak`, "unplug" until `plug`."""
        assert kind in FAULTS
        self._fault = kind, at

    def plug(self) -> None:
        self.halted = False
        super().plug()

    def silence(self) -> None:
        self.speaking.clear()

    def speak(self) -> None:
        self.speaking.set()

    # --- what it answers ---

    def control(self, request_type: int, request: int, value: int, index: int, data: memoryview) -> int:
        self.requests.append(request)
        if request in self.unknown_requests or value or index:
            raise usb_error(errno.EPIPE)
        if request_type == 0xC1:
            answers = {
                0x10: self.version.to_bytes(4, "little"),
                0x13: bytes([self.status]),
                0x14: bytes([self.power]),
                0x15: bytes([self.mask]),
                0x16: self.rate_kbit.to_bytes(4, "little", signed=True),
                0x17: bytes([self.ais31]),
            }
            if request in answers:
                answer = answers[request][: len(data)]
                data[: len(answer)] = answer
                return len(answer)
        elif request_type == 0x41 and not len(data) and request in (0x11, 0x12, 0x18):
            if request == 0x18:
                self.ais31 = self.ais31 if self.ais31_sticks else 0
            else:
                self.status = 0 if request == 0x11 else self.mask
            return 0
        raise usb_error(errno.EPIPE)

    def bulk_in(self, into: memoryview, timeout_ms: int) -> int:
        fault = None
        if self._fault is not None and self._served >= self._fault[1]:
            fault, self._fault = self._fault[0], None
        if fault == "silence":
            self.silence()
        elif fault == "unplug":
            self.unplug()
        elif fault == "stall":
            self.halted = True
        elif fault in ("overflow", "io"):
            raise usb_error(errno.EOVERFLOW if fault == "overflow" else errno.EIO)
        if self.halted:
            raise usb_error(errno.EPIPE)
        if len(into) % self.packet_bytes:  # a packet does not fit into what is left of the buffer: babble
            raise usb_error(errno.EOVERFLOW)
        want = self.packet_bytes if self.one_packet else len(into)
        if not self.speaking.is_set() or self._rate:
            self._wait(want, timeout_ms)
        if not self.plugged:
            raise usb_error(errno.ENODEV)
        if fault == "short":
            want -= 256
        into[:want] = self.source(want)
        self._served += want
        return want

    def _wait(self, want: int, timeout_ms: int) -> None:
        """Until the bytes are made; those that found the buffer full were not made."""
        deadline = time.monotonic() + timeout_ms / 1000
        while not self.speaking.is_set():
            if time.monotonic() > deadline:
                raise usb_error(errno.ETIMEDOUT)
            if self.gone.wait(0.005):
                return
        if not self._rate:
            return
        self._made_at = max(self._made_at, time.monotonic() - FIFO_PACKETS * self.packet_bytes / self._rate)
        ready = self._made_at + want / self._rate
        if ready > deadline:
            self.gone.wait(max(0.0, deadline - time.monotonic()))
            raise usb_error(errno.ETIMEDOUT)
        self.gone.wait(max(0.0, ready - time.monotonic()))
        self._made_at = ready
