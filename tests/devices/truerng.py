"""An emulated TrueRNG on a pty: it streams while DTR is set, and the Pro changes its mode by a knock of line speeds.

From the vendor's pages and scripts (ubld.it; github euler357/TrueRNG @2c8a069): no commands, 64 bytes a USB packet, no
buffer but those packets; what stood in them when DTR fell comes first when it rises again.
"""

import termios
from pathlib import Path

import numpy as np

from .noise_source import NoiseSource
from .pty_device import PtyDevice

PACKET = 64
KNOCK = [termios.B110, termios.B300, termios.B110]
MODES = {
    termios.B300: "normal", termios.B1200: "millivolts", termios.B2400: "debug", termios.B4800: "rng1",
    termios.B9600: "rng2", termios.B19200: "raw", termios.B38400: "raw text", termios.B57600: "unwhitened",
}  # fmt: skip


class TrueRNG(PtyDevice):
    """`noise` makes its bytes; `sent` holds those of the present opening; `stale` is what its packet buffers held."""

    def __init__(self, path: Path, seed: int = 1, mode: str = "normal"):
        super().__init__(path)
        self.noise = NoiseSource(seed)
        self.mode = mode
        self.silent = False
        self.sent = bytearray()
        self.stale = b""
        self.openings = 0
        self._speeds: list[int] = []
        self.streaming = False

    def plug(self) -> "TrueRNG":
        self.streaming = False
        self.stale = b""
        return super().plug()

    def serve(self) -> None:
        self.receive(0.002 if not self.streaming or self.silent else 0.0)
        if not self.dtr:
            self.streaming = False
            return
        self._hear(self.speed)
        if not self.ready or self.silent:
            return
        if not self.streaming:
            self.streaming = True
            self.openings += 1
            self.sent.clear()
            self._send(self.stale)
        packets = self._packets()
        self._send(packets)
        self.rest(0.001)  # about the rate of a Pro; without it this thread would hold the interpreter
        # The packet that the host did not fetch any more stays in the device.
        self.stale = packets[-PACKET:]

    def idle(self) -> None:
        self._hear(self.speed)

    def _send(self, data: bytes) -> None:
        self.sent += data
        self.send(data)

    def _packets(self) -> bytes:
        if self.mode == "millivolts":
            return b"12034\r\n" * 9
        if self.mode == "debug":
            return b"0x0213 0x01F4\r\n" * 4
        if self.mode == "raw text":
            return b"0213, 01F4\n" * 5
        if self.mode == "raw":  # two ADC samples of 10 bits in four bytes, numbered in the upper two bits
            fields = np.frombuffer(self.noise.make(8 * PACKET), dtype=np.uint8).reshape(-1, 4)
            return (fields & [0x0F, 0x3F, 0x0F, 0x3F] | [0x00, 0x40, 0x80, 0xC0]).astype(np.uint8).tobytes()
        return self.noise.make(8 * PACKET)

    def _hear(self, speed: int) -> None:
        if self._speeds[-1:] != [speed]:
            self._speeds.append(speed)
        if self._speeds[-4:-1] == KNOCK and speed in MODES:
            self.mode = MODES[speed]
            self._speeds = [speed]
