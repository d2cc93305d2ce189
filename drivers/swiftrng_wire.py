"""The two ways to a SwiftRNG: a USB serial port (newer models) or two bulk endpoints (the first model).

Both take a command byte and give an answer back; neither says where an answer begins.
"""

import abc
import errno
import time
from array import array

from usb.core import USBError

from .contract import TransportError
from .serial_port import close_port, drain, open_port, read_some, write_all
from .usb import UsbDevice

_WRITE_S = 0.1  # tectrolabs/swiftrng @9e635e6 (V)
# The device is silent between answers; the vendor's library takes 100 ms without a byte as the end.
_QUIET_S = 0.1
_DRAIN_S = 2.0


class Wire(abc.ABC):
    """What the protocol needs of either way. Errors: DeviceLost, TransportError."""

    where: str  # the port, or the place on the USB

    @abc.abstractmethod
    def write(self, data: bytes) -> None:
        """Sends all of `data`."""

    @abc.abstractmethod
    def read(self, buffer: memoryview, timeout_s: float) -> int:
        """Fills the front of `buffer` with what comes; 0 when nothing came in the time."""

    @abc.abstractmethod
    def drain(self) -> int:
        """Reads until the device is silent; returns how many bytes were thrown away."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Ends a read of another thread soon."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the device back."""


class SerialWire(Wire):
    """CDC-ACM: 1fc9:8111, 3975:0001 to 0004. The line speed means nothing."""

    def __init__(self, device: str):
        self.where = device
        self._port = open_port(device, 115200, _WRITE_S)

    def write(self, data: bytes) -> None:
        write_all(self._port, data, _WRITE_S)

    def read(self, buffer: memoryview, timeout_s: float) -> int:
        return read_some(self._port, buffer, timeout_s)

    def drain(self) -> int:
        return drain(self._port, _QUIET_S, _DRAIN_S)

    def wake(self) -> None:
        self._port.cancel_read()

    def close(self) -> None:
        close_port(self._port)


class UsbWire(Wire):
    """The first model, 1fc9:8110: interface 0, commands to endpoint 0x01, answers from 0x81 (V). Takes over `device`."""

    _OUT, _IN = 0x01, 0x81
    _TRANSFER = 17 * 1024  # whole packets, and more than an answer: a transfer ends with the answer's short packet

    def __init__(self, device: UsbDevice):
        self.where = f"{device}"
        self._device = device
        self._into = array("B", bytes(self._TRANSFER))
        try:
            device.claim(1, 0)
        except BaseException:
            device.close()
            raise

    def write(self, data: bytes) -> None:
        self._device.bulk_write(self._OUT, data, int(_WRITE_S * 1000))

    def read(self, buffer: memoryview, timeout_s: float) -> int:
        # Not longer than 0.1 s at once (the vendor's time-out, V): nothing but its end can break off a transfer.
        try:
            got = self._device.bulk_read(self._IN, self._into, min(100, max(1, int(timeout_s * 1000))))
        except USBError as error:
            if error.errno == errno.ETIMEDOUT:
                return 0
            raise self._device.failed_read(error, self._IN) from error
        if got > len(buffer):
            raise TransportError(f"{self.where} sent {got} bytes where {len(buffer)} at most were expected: out of step")
        buffer[:got] = memoryview(self._into)[:got]
        return got

    def drain(self) -> int:
        dropped, deadline = 0, time.monotonic() + _DRAIN_S
        junk = memoryview(bytearray(self._TRANSFER))
        while time.monotonic() < deadline:
            got = self.read(junk, _QUIET_S)
            if got == 0:
                return dropped
            dropped += got
        raise TransportError(f"{self.where} does not fall silent: {dropped} bytes came in {_DRAIN_S:g} s")

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self._device.close()
