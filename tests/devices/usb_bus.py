"""An emulated USB bus in this process, as a backend of pyusb; the devices on it are `UsbGadget`s.

Rules of the bus from USB 2.0 (chapters 5, 8, 9) and from what Linux answers: EBUSY for an interface that another handle
or a kernel driver holds, ENODEV for a handle whose device has left, EOVERFLOW for a packet that does not fit.
"""

import contextlib
import errno
import os
import threading
from types import SimpleNamespace

from usb.backend import IBackend, libusb1
from usb.core import USBError, USBTimeoutError


def usb_error(number: int) -> USBError:
    kind = USBTimeoutError if number == errno.ETIMEDOUT else USBError
    return kind(os.strerror(number), None, number)


class UsbGadget:
    """What every emulated device has. Subclasses answer `control`, `bulk_in` and `bulk_out`."""

    vendor = product = device_class = 0
    release = 0x600  # bcdDevice
    maker, name = "emulated", ""
    endpoints: dict[int, int] = {}  # address → bytes of a packet

    def __init__(self, serial: str, port: int = 1):
        self.serial, self.port = serial, port
        self.address = 2
        self.plugged = True
        self.forbidden = False  # this user may not open it
        self.busy = False  # a process that cannot be seen has claimed it
        self.kernel_driver = False  # one is bound to its interface
        self.halted = False  # its endpoints stall until the host clears that
        self.gone = threading.Event()

    def unplug(self) -> None:
        self.plugged = False
        self.gone.set()

    def plug(self) -> None:
        """Back in: a new address, as the kernel gives."""
        self.address += 1
        self.gone.clear()
        self.plugged = True

    def enumerable(self) -> bool:
        """Whether the bus sees it."""
        return self.plugged

    def clear_halt(self) -> None:
        self.halted = False

    def control(self, request_type: int, request: int, value: int, index: int, data: memoryview) -> int:
        raise usb_error(errno.EPIPE)

    def bulk_in(self, into: memoryview, timeout_ms: int) -> int:
        raise usb_error(errno.EPIPE)

    def bulk_out(self, data: bytes, timeout_ms: int) -> int:
        raise usb_error(errno.EPIPE)


class Handle:
    """An open device, at the address that it had then."""

    def __init__(self, gadget: UsbGadget):
        self.gadget, self.address = gadget, gadget.address


class UsbBus(IBackend):
    """The bus as pyusb sees it. `open_handles` counts what was opened and not closed."""

    def __init__(self, *gadgets: UsbGadget):
        self.gadgets = list(gadgets)
        self.open_handles = 0
        self._claims: dict[UsbGadget, object] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def plugged_into_pyusb(self):
        """Inside, pyusb's own choice of a backend is this bus (its cached one is replaced)."""
        before, libusb1._lib_object = libusb1._lib_object, self
        try:
            yield self
        finally:
            libusb1._lib_object = before

    # --- descriptors ---

    def enumerate_devices(self):
        return [gadget for gadget in self.gadgets if gadget.enumerable()]

    def get_device_descriptor(self, gadget):
        return SimpleNamespace(
            bLength=18, bDescriptorType=1, bcdUSB=0x200, bDeviceClass=gadget.device_class,
            bDeviceSubClass=gadget.device_class, bDeviceProtocol=gadget.device_class, bMaxPacketSize0=64,
            idVendor=gadget.vendor, idProduct=gadget.product,
            bcdDevice=gadget.release, iManufacturer=1, iProduct=2, iSerialNumber=3 if gadget.serial else 0,
            bNumConfigurations=1, bus=99, address=gadget.address, port_number=gadget.port, port_numbers=(gadget.port,),
            speed=3 if 512 in gadget.endpoints.values() else 2,
        )  # fmt: skip

    def get_configuration_descriptor(self, gadget, config):
        if config:
            raise IndexError(config)
        return SimpleNamespace(
            bLength=9, bDescriptorType=2, wTotalLength=32, bNumInterfaces=1, bConfigurationValue=1, iConfiguration=0,
            bmAttributes=0x80, bMaxPower=90, extra_descriptors=b"",
        )  # fmt: skip

    def get_interface_descriptor(self, gadget, interface, setting, config):
        if interface or setting or config:
            raise IndexError(interface)
        return SimpleNamespace(
            bLength=9, bDescriptorType=4, bInterfaceNumber=0, bAlternateSetting=0, bNumEndpoints=len(gadget.endpoints),
            bInterfaceClass=0xFF, bInterfaceSubClass=0xFF, bInterfaceProtocol=0xFF, iInterface=0, extra_descriptors=b"",
        )  # fmt: skip

    def get_endpoint_descriptor(self, gadget, endpoint, interface, setting, config):
        if interface or setting or config:
            raise IndexError(interface)
        address, packet = list(gadget.endpoints.items())[endpoint]
        return SimpleNamespace(
            bLength=7, bDescriptorType=5, bEndpointAddress=address, bmAttributes=2, wMaxPacketSize=packet, bInterval=0,
            bRefresh=0, bSynchAddress=0, extra_descriptors=b"",
        )  # fmt: skip

    # --- handles ---

    def open_device(self, gadget) -> Handle:
        if not gadget.enumerable():
            raise usb_error(errno.ENODEV)
        if gadget.forbidden:
            raise usb_error(errno.EACCES)
        with self._lock:
            self.open_handles += 1
        return Handle(gadget)

    def close_device(self, handle):
        with self._lock:
            self.open_handles -= 1
            if self._claims.get(handle.gadget) is handle:
                del self._claims[handle.gadget]

    def _there(self, handle) -> UsbGadget:
        gadget = handle.gadget
        if not gadget.enumerable() or gadget.address != handle.address:
            raise usb_error(errno.ENODEV)
        return gadget

    def _refuse_if_held(self, handle) -> None:
        gadget = handle.gadget
        if gadget.busy or gadget.kernel_driver or self._claims.get(gadget, handle) is not handle:
            raise usb_error(errno.EBUSY)

    def set_configuration(self, handle, value):
        gadget = self._there(handle)
        self._refuse_if_held(handle)
        if gadget in self._claims:
            raise usb_error(errno.EBUSY)
        if value != 1:
            raise usb_error(errno.EINVAL)

    def get_configuration(self, handle):
        self._there(handle)
        return 1

    def claim_interface(self, handle, interface):
        gadget = self._there(handle)
        with self._lock:
            self._refuse_if_held(handle)
            self._claims[gadget] = handle

    def release_interface(self, handle, interface):
        gadget = self._there(handle)
        with self._lock:
            if self._claims.get(gadget) is handle:
                del self._claims[gadget]

    def is_kernel_driver_active(self, handle, interface):
        return self._there(handle).kernel_driver

    def detach_kernel_driver(self, handle, interface):
        self._there(handle).kernel_driver = False

    # --- transfers ---

    def _claimed(self, handle, endpoint) -> UsbGadget:
        gadget = self._there(handle)
        if endpoint not in gadget.endpoints or self._claims.get(gadget) is not handle:
            raise usb_error(errno.ENOENT)
        return gadget

    def clear_halt(self, handle, endpoint):
        self._claimed(handle, endpoint).clear_halt()

    def bulk_read(self, handle, endpoint, interface, into, timeout):
        gadget = self._claimed(handle, endpoint)
        if gadget.halted:
            raise usb_error(errno.EPIPE)
        got = gadget.bulk_in(memoryview(into).cast("B"), timeout)
        self._there(handle)
        return got

    def bulk_write(self, handle, endpoint, interface, data, timeout):
        return self._claimed(handle, endpoint).bulk_out(bytes(data), timeout)

    def ctrl_transfer(self, handle, request_type, request, value, index, data, timeout):
        gadget = self._there(handle)
        view = memoryview(data).cast("B")
        if request_type == 0x80 and request == 6 and value >> 8 == 3:
            text = self._string(gadget, value & 0xFF)[: len(view)]
            view[: len(text)] = text
            return len(text)
        return gadget.control(request_type, request, value, index, view)

    def _string(self, gadget: UsbGadget, index: int) -> bytes:
        if index == 0:
            return bytes([4, 3, 0x09, 0x04])
        text = {1: gadget.maker, 2: gadget.name, 3: gadget.serial}[index].encode("utf-16-le")
        return bytes([len(text) + 2, 3]) + text
