"""The two ways to a SwiftRNG: a USB serial port (newer models) or two bulk endpoints (the first model).

Both take a command byte and give an answer back; neither says where an answer begins or ends.
"""

import abc

from .serial_port import close_port, drain, open_port, read_some, write_all

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
