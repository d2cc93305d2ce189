"""An FTDI chip as a pipe of bytes: set up by pyftdi, read past the modem status that begins each of its packets.

pyftdi knows the chip's requests. Its own reading is not used: it caps a transfer at 16 KiB, cuts out each packet in
Python, and only logs that the line had errors. Nor is its claiming: it would give the device back to the kernel's serial
driver at its close, and pyusb's objects give a device back when a forked child exits.
"""

import errno
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from usb.core import USBError

from ..errors import SourceError
from .contract import TransportError, require
from .usb import UsbDevice

ftdi = require("pyftdi.ftdi", "serial", "pyftdi")

_CONFIGURATION, _INTERFACE = 1, 0
_BULK = 2
_WRITE_MS = 100
# Second status byte (libftdi, ftdi.h): parity, framing, break, error in the receive FIFO. Bit 1, overrun, is none of
# them: bytes were lost because nobody read in time, and those that are there are whole.
_LINE_ERRORS = 0x04 | 0x08 | 0x10 | 0x80


def payload(packets: np.ndarray, packet_bytes: int) -> tuple[np.ndarray, int]:
    """(data, line status of all packets ORed) of one transfer; packets: shape (n,), dtype uint8.

    Each packet of packet_bytes, and a shorter last one, begins with two status bytes. TransportError for a transfer
    that ends inside them: where the status bytes are is then not known.
    """
    whole = len(packets) // packet_bytes * packet_bytes
    full, last = packets[:whole].reshape(-1, packet_bytes), packets[whole:]
    if len(last) == 1:
        raise TransportError("an FTDI packet of one byte came, without its modem status; the transfer is dropped")
    status = int(np.bitwise_or.reduce(full[:, 1], initial=0)) | (int(last[1]) if len(last) else 0)
    return np.concatenate([full[:, 2:].ravel(), last[2:]]), status


class FtdiPipe:
    """Takes over an open or closed `UsbDevice`, claims it and sets the chip up; `close` closes that device.

    transfer_bytes: asked for at once, rounded up to whole packets. latency_ms: after this time the chip sends what it
    has, be it nothing. synchronous: the chip's synchronous FIFO (FT232H), with flow control. Errors: SourceError (no
    permission, in use), DeviceLost, TransportError.
    """

    def __init__(self, device: UsbDevice, transfer_bytes: int, latency_ms: int, synchronous: bool):
        self._device = device
        device.claim(_CONFIGURATION, _INTERFACE)
        inward = {a: packet for (i, a), (kind, packet) in device.endpoints().items()
                  if i == _INTERFACE and kind == _BULK and a & 0x80}  # fmt: skip
        if len(inward) != 1:
            raise SourceError(f"{device} has {len(inward)} bulk inputs, and an FTDI chip with one port has 1")
        ((self._endpoint, self._packet_bytes),) = inward.items()
        self.transfer_bytes = -(-transfer_bytes // self._packet_bytes) * self._packet_bytes
        self.latency_s = latency_ms / 1000
        self._into = array("B", bytes(self.transfer_bytes))
        self._chip = ftdi.Ftdi()
        with self._said("setting up its FTDI chip"):
            self._chip.open_from_device(device.lend())  # resets it and empties its buffers
            self._chip.timeouts = (_WRITE_MS, _WRITE_MS)
            if synchronous:  # in the order and with the pause of the vendor's library (qwqng.cpp, V)
                self._chip.set_bitmode(0xFF, ftdi.Ftdi.BitMode.RESET)
                time.sleep(0.01)
                self._chip.set_bitmode(0xFF, ftdi.Ftdi.BitMode.SYNCFF)
                self._chip.set_flowctrl("hw")
            self._chip.set_latency_timer(latency_ms)

    def purge(self) -> None:
        """Empties the chip's buffers."""
        with self._said("emptying its buffers"):
            self._chip.purge_buffers()

    def write(self, data: bytes) -> None:
        """Sends all of `data`."""
        with self._said("writing"):
            self._chip.write_data(data)

    def read(self, timeout_s: float) -> np.ndarray:
        """The data of one transfer, shape (n,), dtype uint8; n is 0 when the chip had none within its latency time.

        TransportError for a failed transfer and for errors on the line; its data is dropped.
        """
        try:
            got = self._device.bulk_read(self._endpoint, self._into, max(1, int(timeout_s * 1000)))
        except USBError as error:
            if error.errno != errno.ETIMEDOUT:
                raise self._device.failed_read(error, self._endpoint) from error
            got = 0
        data, status = payload(np.frombuffer(self._into, dtype=np.uint8, count=got), self._packet_bytes)
        if status & _LINE_ERRORS:
            raise TransportError(f"{self._device}: the FTDI chip reports errors on its line, status {status:#04x}")
        return data

    def close(self) -> None:
        """Gives the device back; may be called twice, not while another thread reads."""
        self._device.close()

    @contextmanager
    def _said(self, doing: str) -> Iterator[None]:
        """Turns errors of pyftdi and pyusb inside a `with` into ours; pyftdi keeps pyusb's as the context of its own."""
        try:
            yield
        except ftdi.FtdiError as error:
            usb_error = error.__context__
            if isinstance(usb_error, USBError):
                raise self._device.explained(usb_error, doing) from error
            raise TransportError(f"{self._device}: {doing} failed: {error}") from error
        except USBError as error:
            raise self._device.explained(error, doing) from error
