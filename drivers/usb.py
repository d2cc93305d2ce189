"""What drivers of USB devices share: a device found by identity, opened, claimed, asked and given back.

pyusb's backends are used directly (its documented `IBackend`), without its `Device` objects: those claim interfaces by
themselves, and give them back when a forked child exits, under the feet of the parent that reads. Each search has a
libusb context of its own. A context looks for devices when it is made, and afterwards waits for the kernel's messages,
which do not reach a container: there a shared one would never see a device that was plugged in again.
"""

import ctypes
import errno
import os
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from usb.backend import libusb1
from usb.core import Device, USBError

from ..errors import SourceError
from .contract import DeviceBusy, DeviceLost, TransportError
from .permission import holders, in_words, permission_hint

# pyusb turns libusb's codes into the errno that says the same; other backends give the errno itself.
_GONE = {errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
CONTROL_TIMEOUT_MS = 1000  # what the vendors' libraries wait
_SPEEDS = {1: "low speed", 2: "full speed", 3: "high speed", 4: "super speed"}
_GET_DESCRIPTOR, _STRING = 6, 3  # USB 2.0, tables 9-4 and 9-5

_backends: weakref.WeakSet = weakref.WeakSet()


def _leave_libusb_to_the_parent() -> None:
    """In a forked child: pyusb would end libusb when the child exits, and with it the event thread of the parent, which
    waits on a descriptor that both share."""
    for backend in list(_backends):
        backend._finalizer.detach()


os.register_at_fork(after_in_child=_leave_libusb_to_the_parent)


class _Context:
    """A libusb context, given back when the last of its devices has been."""

    def __init__(self):
        loaded = None
        try:
            import libusb_package

            loaded = libusb1.get_backend(find_library=libusb_package.find_library)
        except ImportError:
            pass
        loaded = loaded or libusb1.get_backend()
        if loaded is None:
            raise SourceError("no libusb-1.0 can be loaded; pip install libusb-package, or install the system's libusb")
        self.own = hasattr(loaded, "ctx")
        try:
            self.backend = type(loaded)(loaded.lib) if self.own else loaded
        except USBError as error:
            raise SourceError(f"libusb finds no USB on this system: {error.strerror}") from error
        _backends.update((loaded, self.backend))
        self.users = 0

    def leave(self) -> None:
        self.users -= 1
        if self.users <= 0 and self.own:
            self.backend.finalize()


class _Loan:
    """A pyusb backend in which the one device is open already and stays so: transfers pass, its life is not touched.

    What pyusb holds of it is this object, not libusb's: those must be gone when their context ends, and an exception
    of a library keeps all that its frames have seen.
    """

    def __init__(self, lender: "UsbDevice"):
        self._lender = lender

    def __getattr__(self, name: str):
        request = getattr(self._lender._context.backend, name)

        def asked(_, *more):
            real = self._lender._device if name.endswith("_descriptor") else self._lender._handle
            if real is None:
                raise USBError("the device was given back", None, errno.ENODEV)
            return request(real, *more)

        return asked

    def open_device(self, device):
        return self

    def close_device(self, handle) -> None:
        pass

    def set_configuration(self, handle, value: int) -> None:
        pass

    def claim_interface(self, handle, interface: int) -> None:
        pass

    def release_interface(self, handle, interface: int) -> None:
        pass

    def is_kernel_driver_active(self, handle, interface: int) -> bool:
        return False


class UsbDevice:
    """One device on the bus. It is listed closed; `open` and `claim` it for more than its identity. Always `close` it.

    vendor, product: the USB ids. path: bus and ports, such as "1-2.3", "" where the backend does not tell. serial,
    name: its own strings, "" where there is none, or where it may not be asked. node: its file under /dev.
    """

    def __init__(self, context: _Context, device, descriptor):
        context.users += 1
        self._context = context
        self._device = device
        self._descriptor = descriptor
        self._handle = None
        self._claimed: int | None = None
        self.vendor, self.product = descriptor.idVendor, descriptor.idProduct
        self.bus, self.address = descriptor.bus, descriptor.address
        ports = descriptor.port_numbers
        self.path = f"{self.bus}-{'.'.join(map(str, ports))}" if ports else ""
        self.node = f"/dev/bus/usb/{self.bus:03d}/{self.address:03d}"
        self.speed = _SPEEDS.get(descriptor.speed, "unknown speed")
        self.serial = self.name = ""
        self.serial, self.name = self._strings()

    def __str__(self) -> str:
        where = f"bus {self.bus} device {self.address}" + (f", port {self.path}" if self.path else "")
        return f"{self.name or f'{self.vendor:04x}:{self.product:04x}'} {self.serial or 'without serial'} ({where})"

    # --- identity ---

    def _strings(self) -> tuple[str, str]:
        """Serial and product: from sysfs, which needs no permission and no transfer, else from the device."""
        folder = Path("/sys/bus/usb/devices") / (self.path or "none")
        try:
            here = ((folder / "busnum").read_text().strip(), (folder / "devnum").read_text().strip())
            if here == (str(self.bus), str(self.address)):
                return _attribute(folder / "serial"), _attribute(folder / "product")
        except OSError:
            pass
        try:
            self.open()
            return self._string(self._descriptor.iSerialNumber), self._string(self._descriptor.iProduct)
        except SourceError:
            return "", ""
        finally:
            self._let_go()

    def _string(self, index: int) -> str:
        if index == 0:
            return ""
        setup = 0x80, _GET_DESCRIPTOR  # IN, standard, device
        languages = self._control(*setup, _STRING << 8, 0, 255, "string")
        language = int.from_bytes(languages[2:4], "little")
        text = self._control(*setup, _STRING << 8 | index, language, 255, "string")
        return text[2 : text[0]].decode("utf-16-le", "replace").strip("\0 ") if text else ""

    # --- opening ---

    def open(self) -> None:
        """Opens the device's node. SourceError (no permission), DeviceLost."""
        if self._handle is None:
            with self._said("opening it"):
                self._handle = self._context.backend.open_device(self._device)

    def claim(self, configuration: int, interface: int) -> None:
        """Sets the configuration and claims the interface for this process; SourceError names who has it."""
        self.open()
        backend = self._context.backend
        with self._said("setting its configuration"):
            try:
                backend.set_configuration(self._handle, configuration)
            except NotImplementedError:  # some systems do not let a process do this; the kernel has done it then
                pass
        with self._said("claiming it"):
            backend.claim_interface(self._handle, interface)
            self._claimed = interface

    def configurations(self) -> int:
        """How many configurations the device has."""
        return self._descriptor.bNumConfigurations

    def endpoints(self, configuration_index: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
        """(interface, endpoint address) → (transfer type, packet bytes) of the first alternate settings."""
        backend, found = self._context.backend, {}
        with self._said("reading its descriptors"):
            count = backend.get_configuration_descriptor(self._device, configuration_index).bNumInterfaces
            for interface in range(count):
                about = backend.get_interface_descriptor(self._device, interface, 0, configuration_index)
                for k in range(about.bNumEndpoints):
                    end = backend.get_endpoint_descriptor(self._device, k, interface, 0, configuration_index)
                    key = (about.bInterfaceNumber, end.bEndpointAddress)
                    found[key] = (end.bmAttributes & 3, end.wMaxPacketSize & 0x7FF)
        return found

    # --- transfers ---

    def control_in(self, request_type: int, request: int, length: int, what: str) -> bytes:
        """`length` bytes that the device answers; TransportError when it answers fewer. what: named in errors."""
        answer = self._control(request_type, request, 0, 0, length, what)
        if len(answer) != length:
            raise TransportError(f"{self}: {what}: {len(answer)} bytes of {length} were answered")
        return answer

    def control_out(self, request_type: int, request: int, what: str) -> None:
        """A request without data."""
        self._control(request_type, request, 0, 0, 0, what)

    def _control(self, request_type: int, request: int, value: int, index: int, length: int, what: str) -> bytes:
        data = array("B", bytes(length))
        with self._said(what):
            backend = self._context.backend
            got = backend.ctrl_transfer(self._handle, request_type, request, value, index, data, CONTROL_TIMEOUT_MS)
        return data[:got].tobytes()

    def bulk_read(self, endpoint: int, into: array, timeout_ms: int) -> int:
        """One transfer into an array("B"), on the claimed interface; returns its bytes. Raises pyusb's USBError."""
        return self._context.backend.bulk_read(self._handle, endpoint, self._claimed, into, timeout_ms)

    def bulk_write(self, endpoint: int, data: bytes, timeout_ms: int) -> None:
        """One transfer of all of `data`, on the claimed interface; TransportError when the device takes less."""
        with self._said("writing"):
            sent = self._context.backend.bulk_write(self._handle, endpoint, self._claimed, array("B", data), timeout_ms)
        if sent != len(data):
            raise TransportError(f"{self} took {sent} of {len(data)} bytes")

    def lend(self) -> Device:
        """The claimed device as pyusb's own `Device`, for a library that asks for one. Whatever that library does, this
        object alone claims and gives back."""
        loan = _Loan(self)
        return Device(loan, loan)

    def clear_halt(self, endpoint: int) -> None:
        """Lets an endpoint that stalled go on."""
        with self._said("clearing a stalled endpoint"):
            self._context.backend.clear_halt(self._handle, endpoint)

    def native(self) -> tuple[int, int] | None:
        """Addresses of libusb_bulk_transfer and of the open libusb_device_handle; None where the backend is another."""
        transfer = getattr(getattr(self._context.backend, "lib", None), "libusb_bulk_transfer", None)
        handle = getattr(self._handle, "handle", None)
        if transfer is None or handle is None:
            return None
        return ctypes.cast(transfer, ctypes.c_void_p).value, handle.value

    # --- errors ---

    @contextmanager
    def _said(self, doing: str) -> Iterator[None]:
        """Turns pyusb's errors inside a `with` into ours."""
        try:
            yield
        except USBError as error:
            raise self.explained(error, doing) from error
        except NotImplementedError as error:  # pyusb's word for LIBUSB_ERROR_NOT_SUPPORTED
            raise TransportError(f"{self}: {doing} is not supported by libusb on this system") from error

    def explained(self, error: USBError, doing: str) -> SourceError:
        """What an error of pyusb means to a reader of this device."""
        if error.errno in _GONE:
            return DeviceLost(f"{self} is gone ({doing})")
        if error.errno in _FORBIDDEN:
            return SourceError(f"{self}: no permission to open {self.node}; {self.permission_hint()}")
        if error.errno == errno.EBUSY:
            return DeviceBusy(f"{self} is in use by {self.users_in_words()}; stop that first")
        return TransportError(f"{self}: {doing} failed: {error.strerror or error} (errno {error.errno})")

    def failed_read(self, error: USBError, endpoint: int) -> SourceError:
        """`explained`, for a read from an endpoint, which is let go on if it has stalled."""
        if error.errno == errno.EPIPE:
            try:
                self.clear_halt(endpoint)
            except SourceError as failed:  # unplugged meanwhile, perhaps
                return failed
        return self.explained(error, "reading")

    @staticmethod
    def forbidden(error: SourceError) -> bool:
        """Whether it was the missing permission that an error of this class explained."""
        return isinstance(error.__cause__, USBError) and error.__cause__.errno in _FORBIDDEN

    def permission_hint(self) -> str:
        """What gives the present user this device."""
        return permission_hint(f"{self.vendor:04x}", f"{self.product:04x}")

    def kernel_driver(self, interface: int = 0) -> str:
        """The kernel driver that is bound to an interface of configuration 1, "" when there is none."""
        try:
            name = os.path.basename(os.readlink(f"/sys/bus/usb/devices/{self.path}:1.{interface}/driver"))
        except OSError:
            return ""
        return "" if name == "usbfs" else name  # usbfs: a process, by libusb

    def kernel_driver_active(self, interface: int = 0) -> bool:
        """Whether a kernel driver is bound to the interface, as the kernel says on the open device."""
        self.open()
        with self._said("asking for its kernel driver"):
            try:
                return self._context.backend.is_kernel_driver_active(self._handle, interface)
            except NotImplementedError:  # not Linux: no such thing
                return False

    def detach_kernel_driver(self, interface: int = 0) -> None:
        """Takes the interface from the kernel driver that is bound to it, if there is one, until the next replug."""
        if self.kernel_driver_active(interface):
            with self._said("detaching its kernel driver"):
                self._context.backend.detach_kernel_driver(self._handle, interface)

    def users_in_words(self) -> str:
        """Who has the device: a kernel driver, the processes that can be seen, or that none can."""
        driver = self.kernel_driver()
        if driver:
            unbind = f"echo {self.path}:1.0 > /sys/bus/usb/drivers/{driver}/unbind"
            return f"the kernel driver {driver} (unbind it: `{unbind}`)"
        others = holders(self.node, own=self._handle is not None)
        return in_words(others) or f"a process of another user (`sudo fuser -v {self.node}` names it)"

    # --- the end ---

    def _let_go(self) -> None:
        backend = self._context.backend
        if self._claimed is not None:
            try:
                backend.release_interface(self._handle, self._claimed)
            except (USBError, NotImplementedError):  # gone
                pass
            self._claimed = None
        if self._handle is not None:
            backend.close_device(self._handle)
            self._handle = None

    def close(self) -> None:
        """Gives the device back; may be called twice. No transfer may be running."""
        if self._device is not None:
            self._let_go()
            self._device = None  # before the context ends: libusb counts references
            self._context.leave()


def _attribute(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # a device without such a string
        return ""


def find(ids: set[tuple[int, int]] | frozenset[tuple[int, int]]) -> list[UsbDevice]:
    """The devices on the bus with these (vendor, product), in bus order. The caller closes each of them.

    SourceError when no libusb can be loaded, or it cannot list the bus.
    """
    context = _Context()
    try:
        devices = list(context.backend.enumerate_devices())
        about = [(d, context.backend.get_device_descriptor(d)) for d in devices]
        found = [UsbDevice(context, d, a) for d, a in about if (a.idVendor, a.idProduct) in ids]
    except USBError as error:
        raise SourceError(f"libusb cannot list the USB devices: {error}") from error
    finally:
        devices = about = None  # before the context can end
        if context.users == 0:
            context.leave()
    return sorted(found, key=lambda d: (d.bus, d.path, d.address))
