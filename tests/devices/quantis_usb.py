"""An emulated Quantis USB on an emulated bus, as a backend of pyusb in this process: what the wire does, not what any
driver expects. Facts: ID Quantique's library 20.2.4 and QUSB; what happens on wrong requests: USB 2.0, chapters 5, 8, 9.

    bus = EmulatedBus(QuantisUsb(Seeded(7)))
    with bus.plugged_into_pyusb(): ...   # usb.core.find, and every driver, sees that bus instead of the machine's
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

from usb.backend import IBackend, libusb1
from usb.core import USBError, USBTimeoutError

ENDPOINT = 0x86
FIFO_PACKETS = 4  # as much as the usual USB controllers of its time buffer for one endpoint
FAULTS = ("short", "stall", "overflow", "io", "silence", "unplug")
_MANUFACTURER, _PRODUCT, _SERIAL = 1, 2, 3


def _error(number: int, kind: type[USBError] = USBError) -> USBError:
    return kind(errno.errorcode[number], None, number)


class QuantisUsb:
    """One device. source(n) gives its next n random bytes.

    rate_bytes_per_s: 0 as fast as it is read; else a late reader loses what does not fit into its buffer.
    one_packet: gives one packet however much is asked for, as a device would that ends each transfer.
    Public fields may be changed at any time: status, ais31, forbidden, busy, ...
    """

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
        self.source, self.serial, self.port = source, serial, port
        self.packet_bytes, self.one_packet = packet_bytes, one_packet
        self.mask = self.status = self.power = modules
        self.version, self.rate_kbit = 0x00020008, 4000
        self.ais31 = 0
        self.ais31_sticks = False  # a flag that clearing does not clear
        self.unknown_requests: set[int] = set()  # refused by a stall
        self.plugged = True
        self.address = 2
        self.forbidden = False  # this user may not open it
        self.busy = False  # a process on another machine's side of the wall has claimed it
        self.requests: list[int] = []
        self.speaking = threading.Event()
        self.speaking.set()
        self._served = 0
        self._halted = False
        self._fault: tuple[str, int] | None = None
        self._rate = rate_bytes_per_s
        self._made_at = time.monotonic()
        self._gone = threading.Event()

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

    def unplug(self) -> None:
        self.plugged = False
        self._gone.set()

    def plug(self) -> None:
        """Back in: a new address, as the kernel gives."""
        self.address += 1
        self._halted = False
        self._gone.clear()
        self.plugged = True

    def enumerable(self) -> bool:
        """Whether the bus sees it."""
        return self.plugged

    def silence(self) -> None:
        self.speaking.clear()

    def speak(self) -> None:
        self.speaking.set()

    # --- what it answers ---

    def control(self, request_type: int, request: int, value: int, index: int, length: int) -> bytes:
        if request_type == 0x80 and request == 6 and value >> 8 == 3:
            return self._string(value & 0xFF)[:length]
        self.requests.append(request)
        if request in self.unknown_requests or value or index:
            raise _error(errno.EPIPE)
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
                return answers[request][:length]
        elif request_type == 0x41 and length == 0 and request in (0x11, 0x12, 0x18):
            if request == 0x18:
                self.ais31 = self.ais31 if self.ais31_sticks else 0
            else:
                self.status = 0 if request == 0x11 else self.mask
            return b""
        raise _error(errno.EPIPE)

    def _string(self, index: int) -> bytes:
        if index == 0:
            return bytes([4, 3, 0x09, 0x04])
        text = {_MANUFACTURER: "id Quantique", _PRODUCT: "Quantis USB", _SERIAL: self.serial}[index].encode("utf-16-le")
        return bytes([len(text) + 2, 3]) + text

    def bulk(self, into: memoryview, timeout_ms: int) -> int:
        fault = None
        if self._fault is not None and self._served >= self._fault[1]:
            fault, self._fault = self._fault[0], None
        if fault == "silence":
            self.silence()
        elif fault == "unplug":
            self.unplug()
        elif fault == "stall":
            self._halted = True
        elif fault in ("overflow", "io"):
            raise _error(errno.EOVERFLOW if fault == "overflow" else errno.EIO)
        if self._halted:
            raise _error(errno.EPIPE)
        if len(into) % self.packet_bytes:  # a packet does not fit into what is left of the buffer: babble
            raise _error(errno.EOVERFLOW)
        want = self.packet_bytes if self.one_packet else len(into)
        if not self.speaking.is_set() or self._rate:
            self._wait(want, timeout_ms)
        if not self.plugged:
            raise _error(errno.ENODEV)
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
                raise _error(errno.ETIMEDOUT, USBTimeoutError)
            if self._gone.wait(0.005):
                return
        if not self._rate:
            return
        self._made_at = max(self._made_at, time.monotonic() - FIFO_PACKETS * self.packet_bytes / self._rate)
        ready = self._made_at + want / self._rate
        if ready > deadline:
            self._gone.wait(max(0.0, deadline - time.monotonic()))
            raise _error(errno.ETIMEDOUT, USBTimeoutError)
        self._gone.wait(max(0.0, ready - time.monotonic()))
        self._made_at = ready

    def clear_halt(self) -> None:
        self._halted = False


class Handle:
    """An open device, at the address that it had then."""

    def __init__(self, device: QuantisUsb):
        self.device, self.address = device, device.address


class EmulatedBus(IBackend):
    """The bus as pyusb sees it. `open_handles` counts what was opened and not closed."""

    def __init__(self, *devices: QuantisUsb):
        self.devices = list(devices)
        self.open_handles = 0
        self._claims: dict[QuantisUsb, object] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def plugged_into_pyusb(self):
        """Inside, pyusb's own choice of a backend is this bus (its cached one is replaced)."""
        before, libusb1._lib_object = libusb1._lib_object, self
        try:
            yield self
        finally:
            libusb1._lib_object = before

    # --- identity ---

    def enumerate_devices(self):
        return [device for device in self.devices if device.enumerable()]

    def get_device_descriptor(self, device):
        return SimpleNamespace(
            bLength=18, bDescriptorType=1, bcdUSB=0x200, bDeviceClass=0xFF, bDeviceSubClass=0xFF, bDeviceProtocol=0xFF,
            bMaxPacketSize0=64, idVendor=0x0ABA, idProduct=0x0102, bcdDevice=0x100, iManufacturer=_MANUFACTURER,
            iProduct=_PRODUCT, iSerialNumber=_SERIAL if device.serial else 0, bNumConfigurations=1, bus=99,
            address=device.address, port_number=device.port, port_numbers=(device.port,),
            speed=3 if device.packet_bytes == 512 else 2,
        )  # fmt: skip

    def get_configuration_descriptor(self, device, config):
        if config:
            raise IndexError(config)
        return SimpleNamespace(
            bLength=9, bDescriptorType=2, wTotalLength=25, bNumInterfaces=1, bConfigurationValue=1, iConfiguration=0,
            bmAttributes=0x80, bMaxPower=150, extra_descriptors=b"",
        )  # fmt: skip

    def get_interface_descriptor(self, device, interface, setting, config):
        if interface or setting or config:
            raise IndexError(interface)
        return SimpleNamespace(
            bLength=9, bDescriptorType=4, bInterfaceNumber=0, bAlternateSetting=0, bNumEndpoints=1, bInterfaceClass=0xFF,
            bInterfaceSubClass=0xFF, bInterfaceProtocol=0xFF, iInterface=0, extra_descriptors=b"",
        )  # fmt: skip

    def get_endpoint_descriptor(self, device, endpoint, interface, setting, config):
        if endpoint or interface or setting or config:
            raise IndexError(endpoint)
        return SimpleNamespace(
            bLength=7, bDescriptorType=5, bEndpointAddress=ENDPOINT, bmAttributes=2, wMaxPacketSize=device.packet_bytes,
            bInterval=0, bRefresh=0, bSynchAddress=0, extra_descriptors=b"",
        )  # fmt: skip

    # --- handles ---

    def open_device(self, device):
        if not device.enumerable():
            raise _error(errno.ENODEV)
        if device.forbidden:
            raise _error(errno.EACCES)
        with self._lock:
            self.open_handles += 1
        return Handle(device)

    def close_device(self, handle):
        with self._lock:
            self.open_handles -= 1
            if self._claims.get(handle.device) is handle:
                del self._claims[handle.device]

    def _there(self, handle) -> QuantisUsb:
        if not handle.device.enumerable() or handle.device.address != handle.address:
            raise _error(errno.ENODEV)
        return handle.device

    def _claimed_by_other(self, handle) -> bool:
        return handle.device.busy or self._claims.get(handle.device, handle) is not handle

    def set_configuration(self, handle, value):
        self._there(handle)
        if self._claimed_by_other(handle):
            raise _error(errno.EBUSY)
        if value != 1:
            raise _error(errno.EINVAL)

    def get_configuration(self, handle):
        return 1

    def claim_interface(self, handle, interface):
        device = self._there(handle)
        with self._lock:
            if self._claimed_by_other(handle):
                raise _error(errno.EBUSY)
            self._claims[device] = handle

    def release_interface(self, handle, interface):
        self._there(handle)
        with self._lock:
            if self._claims.get(handle.device) is handle:
                del self._claims[handle.device]

    def is_kernel_driver_active(self, handle, interface):
        return False

    # --- transfers ---

    def bulk_read(self, handle, endpoint, interface, into, timeout):
        device = self._there(handle)
        if endpoint != ENDPOINT or self._claims.get(device) is not handle:
            raise _error(errno.ENOENT)
        return device.bulk(memoryview(into), timeout)

    def ctrl_transfer(self, handle, request_type, request, value, index, data, timeout):
        answer = self._there(handle).control(request_type, request, value, index, len(data))
        memoryview(data)[: len(answer)] = answer
        return len(answer)

    def clear_halt(self, handle, endpoint):
        self._there(handle).clear_halt()
