"""An emulated SwiftRNG: its command protocol, on a pty (the newer models) or on the emulated USB (the first one).

From github tectrolabs/swiftrng @9e635e6 (`SwiftRngApi.cpp`): a command byte, an answer of fixed length, a status byte.
"""

import errno
import threading
from pathlib import Path

from .noise_source import NoiseSource
from .pty_device import PtyDevice
from .usb_bus import UsbGadget, usb_error

BLOCK = 16000


class SwiftRngProtocol:
    """What the firmware answers. `sent` holds the random bytes of good answers, in order; `asked` all commands."""

    def __init__(self, serial: str = "SWRNG-012345-A1", firmware: str = "V2.1", model: str = "SwiftPro", seed: int = 1):
        assert len(serial) == 15 and len(firmware) == 4 and len(model) == 8
        self.serial, self.firmware, self.model = serial, firmware, model
        self.noise = NoiseSource(seed)
        self.source_noise = {"<": NoiseSource(seed + 1), ">": NoiseSource(seed + 2)}
        self.sent = bytearray()
        self.asked = ""
        self.status = 0  # of the next answers of random bytes
        self.diagnostics = 0
        self.lose = 0  # bytes that the next answer lacks
        self.surplus = b""  # comes behind the next answer
        self.late = b""  # the same, but a moment later

    def answer(self, command: str) -> bytes:
        """The whole answer to one command byte; none for a byte that is no command."""
        self.asked += command
        texts = {"v": self.firmware, "m": self.model, "s": self.serial}
        if command in texts:
            return texts[command].encode("latin-1") + b"\0"
        if command == "d" and self.firmware >= "V2.0":
            return bytes([self.diagnostics])
        if command not in "x<>":
            return b""
        made = (self.noise if command == "x" else self.source_noise[command]).make(BLOCK)
        whole = made + bytes([self.status])
        if self.status == 0 and not self.lose:
            self.sent += made
        whole, self.lose = whole[self.lose :], 0
        whole, self.surplus = whole + self.surplus, b""
        return whole


class SwiftRng(PtyDevice):
    """The CDC-ACM models. `silent` stops it answering; `cut_at` is where in the next answer its cable comes off."""

    def __init__(self, path: Path, **identity):
        super().__init__(path)
        self.firmware = SwiftRngProtocol(**identity)
        self.silent = False
        self.cut_at: int | None = None
        self.left_over = b""  # stands in its output when the port is opened
        self.late_sent = threading.Event()

    def serve(self) -> None:
        if self.left_over and self.dtr:
            left_over, self.left_over = self.left_over, b""
            self.send(left_over)
        for command in self.receive(0.01).decode("latin-1"):
            if self.silent:
                continue
            answer = self.firmware.answer(command)
            if self.cut_at is not None:
                self.send(answer[: self.cut_at])
                self.cut_at = None
                return self.pull()
            self.send(answer)
            late, self.firmware.late = self.firmware.late, b""
            if late:
                self.rest(0.03)
                self.send(late)
                self.late_sent.set()


class SwiftRngUsb(UsbGadget):
    """The first model, 1fc9:8110: bulk endpoints 0x01 and 0x81, packets of 64 bytes. Its USB has no serial number."""

    vendor, product, name = 0x1FC9, 0x8110, "SwiftRNG"
    endpoints = {0x01: 64, 0x81: 64}

    def __init__(self, port: int = 1, **identity):
        super().__init__("", port)
        self.firmware = SwiftRngProtocol(**identity)
        self.silent = False
        self.cut_at: int | None = None
        self.left_over = b""

    def plug(self) -> None:
        self.left_over = b""
        super().plug()

    def bulk_out(self, data, timeout_ms):
        for command in data.decode("latin-1"):
            if not self.silent:
                self.left_over += self.firmware.answer(command)
        return len(data)

    def bulk_in(self, into, timeout_ms):
        if len(into) % 64:
            raise usb_error(errno.EOVERFLOW)
        if not self.left_over:
            if not self.gone.wait(timeout_ms / 1000):
                raise usb_error(errno.ETIMEDOUT)
            raise usb_error(errno.ENODEV)
        n = min(len(into), len(self.left_over))
        if self.cut_at is not None and n >= self.cut_at:
            self.cut_at = None
            self.unplug()
            raise usb_error(errno.ENODEV)
        into[:n], self.left_over = self.left_over[:n], self.left_over[n:]
        return n
