"""Readers of a bulk endpoint: in C++ where the backend is libusb-1.0 (csrc/usb_read.h), through pyusb elsewhere.

Both begin to read with a transfer of `transfer_bytes`, throw the first `discard_bytes` away, and end for good with the
first transfer that fails or comes short: then the device's driver makes a new one.
"""

import errno
import os
import threading
import time
from array import array

from usb.backend import libusb1
from usb.core import USBError

from .. import _C
from .contract import TransportError
from .usb import UsbDevice

# What may wait in the C++ reader's queue: 131 ms of a device that gives 4 Mbit/s, many times what the GIL takes.
AHEAD_BYTES = 65536
# As pyusb maps them, but for its private table.
_ERRNO_OF = {
    libusb1.LIBUSB_ERROR_IO: errno.EIO,
    libusb1.LIBUSB_ERROR_ACCESS: errno.EACCES,
    libusb1.LIBUSB_ERROR_NO_DEVICE: errno.ENODEV,
    libusb1.LIBUSB_ERROR_BUSY: errno.EBUSY,
    libusb1.LIBUSB_ERROR_OVERFLOW: errno.EOVERFLOW,
    libusb1.LIBUSB_ERROR_PIPE: errno.EPIPE,
    libusb1.LIBUSB_ERROR_INTERRUPTED: errno.EINTR,
    libusb1.LIBUSB_ERROR_NO_MEM: errno.ENOMEM,
}


class ShortTransfer(TransportError):
    """A transfer brought fewer bytes than it asked for; its bytes were dropped."""


class _Stopped(TransportError):
    """The reader was stopped while it read, or belongs to the parent of this process."""


def reader(
    device: UsbDevice, endpoint: int, transfer_bytes: int, timeout_ms: int, discard_bytes: int
) -> "_NativeReader | _PythonReader":
    """The reader for an open and claimed device. timeout_ms: how long a transfer may wait for its data, above 0."""
    kind = _PythonReader if device.native() is None else _NativeReader
    return kind(device, endpoint, transfer_bytes, timeout_ms, discard_bytes)


class _NativeReader:
    def __init__(self, device: UsbDevice, endpoint: int, transfer_bytes: int, timeout_ms: int, discard_bytes: int):
        bulk_transfer, handle = device.native()
        self._device = device  # keeps libusb and the handle
        self._reader = _C.UsbReader(
            bulk_transfer=bulk_transfer,
            handle=handle,
            endpoint=endpoint,
            transfer_bytes=transfer_bytes,
            timeout_ms=timeout_ms,
            discard_bytes=discard_bytes,
            ahead_bytes=AHEAD_BYTES,
        )

    def take(self, buffer: memoryview, enough: int, timeout_s: float) -> int:
        """Moves bytes into the front of `buffer` and returns how many; 0 when the time was over and none had come.

        Returns once there are `enough`. Raises pyusb's USBError, ShortTransfer, or TransportError after `stop`.
        """
        got, status = self._reader.take(buffer, enough, timeout_s)
        if status == 0:
            return got
        if status == _C.UsbReader.SHORT:
            raise ShortTransfer(f"{self._device}: a transfer came short; its bytes were dropped")
        if status == _C.UsbReader.STOPPED:
            raise _Stopped(f"{self._device}: reading was stopped")
        number = _ERRNO_OF.get(status)
        raise USBError(os.strerror(number) if number else f"libusb's error {status}", status, number)

    def stop(self) -> None:
        """Ends the reading; returns when no transfer is running any more. May be called from any thread, and twice."""
        self._reader.stop()


class _PythonReader:
    """As `_NativeReader`. Each packet costs Python's time, so a device may be read slower beside a busy program."""

    def __init__(self, device: UsbDevice, endpoint: int, transfer_bytes: int, timeout_ms: int, discard_bytes: int):
        self._device, self._endpoint, self._timeout_ms = device, endpoint, timeout_ms
        self._into = array("B", bytes(transfer_bytes))
        self._packet = memoryview(self._into)
        self._left = self._packet[:0]  # of the last packet, not yet taken
        self._discard = discard_bytes
        self._stop = False
        self._reading = threading.Lock()

    def take(self, buffer: memoryview, enough: int, timeout_s: float) -> int:
        """As `_NativeReader.take`; it may last one transfer's timeout longer than timeout_s."""
        with self._reading:
            return self._take(buffer, enough, timeout_s)

    def _take(self, buffer: memoryview, enough: int, timeout_s: float) -> int:
        bulk_read, endpoint, into = self._device.bulk_read, self._endpoint, self._into
        want, size = len(buffer), len(into)
        at = min(want, len(self._left))
        buffer[:at] = self._left[:at]
        self._left = self._left[at:]
        deadline = time.monotonic() + timeout_s
        while at < enough:
            if self._stop:
                raise _Stopped(f"{self._device}: reading was stopped")
            try:
                got = bulk_read(endpoint, into, self._timeout_ms)
            except USBError as error:
                if error.errno != errno.ETIMEDOUT:
                    raise
                if time.monotonic() >= deadline:
                    break
                continue
            if got != size:
                raise ShortTransfer(f"{self._device}: a transfer came short: {got} of {size} bytes; they were dropped")
            if self._discard > 0:
                self._discard -= size
            elif want - at >= size:
                buffer[at : at + size] = into
                at += size
            else:
                used = want - at
                buffer[at:] = self._packet[:used]
                self._left = self._packet[used:]
                at = want
            if time.monotonic() >= deadline:
                break
        return at

    def stop(self) -> None:
        """As `_NativeReader.stop`; waits for a transfer that is running."""
        self._stop = True
        with self._reading:
            self._left = self._packet[:0]
            self._packet[:] = bytes(len(self._packet))
