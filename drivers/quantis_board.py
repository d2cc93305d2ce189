"""A Quantis USB on the bus: what its board answers, and what must be true of it before a byte is read.

Protocol: ID Quantique's library 20.2.4 (`QuantisUsb_Unix.c`, `QuantisUsb_Commands.h`), and where it agrees the
independent QUSB for OpenBSD. Requests go to the interface, with wValue = wIndex = 0.
"""

import errno
from collections.abc import Iterator

from usb.core import USBError

from ..errors import SourceError
from .contract import DeviceFault, Finding, TransportError
from .usb import UsbDevice

IDS = frozenset({(0x0ABA, 0x0102)})
CONFIGURATION, INTERFACE, ENDPOINT = 1, 0, 0x86
MODULE_BYTES_PER_S = 500_000  # the library's constant
_BULK = 2
_GET, _COMMAND = 0xC1, 0x41  # bmRequestType: vendor's, interface, in and out
_VERSION, _STATUS, _POWER, _MASK, _RATE, _AIS31, _CLEAR_AIS31 = 0x10, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18


class Board:
    """The board of a claimed device, which `Board(device)` claims. SourceError for one that is no Quantis or is in use.

    version: a number that the vendor does not explain. mask: one bit for each module that is fitted. packet_bytes: of
    the data endpoint. rate_bytes_per_s: of all modules together; rate_told: whether the board said so. ais31: whether
    it asked for a start-up test when it was claimed, None if its firmware does not know that question.
    """

    def __init__(self, device: UsbDevice):
        self.device = device
        ends = device.endpoints()
        kind, self.packet_bytes = ends.get((INTERFACE, ENDPOINT), (None, 0))
        # The vendor's library insists on the same.
        if device.configurations() != 1 or len(ends) != 1 or kind != _BULK or self.packet_bytes == 0:
            raise SourceError(f"{device} has the ids of a Quantis USB, not its one endpoint (bulk 0x86); it is not used")
        device.claim(CONFIGURATION, INTERFACE)
        self.version = self._number(_VERSION, 4, "board version")
        self.mask = self._number(_MASK, 1, "modules")
        self.powered = self._number(_POWER, 1, "modules' power") != 0
        self.modules = self.mask.bit_count()
        if self.modules == 0:
            raise SourceError(f"{device} says that it has no module (mask 0); it cannot give random bits")
        kbit = self._if_known(_RATE, 4, "rate") or 0  # kbit/s of one module, signed
        self.rate_told = 0 < kbit < 1 << 31
        self.rate_bytes_per_s = float(self.modules * (kbit * 125 if self.rate_told else MODULE_BYTES_PER_S))
        flag = self._if_known(_AIS31, 1, "AIS-31 flag")
        self.ais31 = None if flag is None else flag != 0

    def _number(self, request: int, length: int, what: str) -> int:
        answer = self.device.control_in(_GET, request, length, f"asking for the {what}")
        return int.from_bytes(answer, "little")

    def _if_known(self, request: int, length: int, what: str) -> int | None:
        """The answer to a question that QUSB does not list: firmware that does not know it refuses it by a stall."""
        try:
            return self._number(request, length, what)
        except TransportError as error:
            if isinstance(error.__cause__, USBError) and error.__cause__.errno == errno.EPIPE:
                return None
            raise

    def status(self) -> int:
        """One bit for each module that is fitted, enabled and works."""
        return self._number(_STATUS, 1, "modules' status") & self.mask

    def check_modules(self) -> None:
        """DeviceFault unless all modules work."""
        status = self.status()
        if status != self.mask:
            raise DeviceFault(
                f"{self.device}: a module is disabled or has failed (status {status:#x}, modules {self.mask:#x}); "
                "unplug the device and plug it in again",
                status,
                self.mask,
            )

    def asks_for_startup_test(self) -> bool:
        """The AIS-31 flag now."""
        return self.ais31 is not None and self._number(_AIS31, 1, "AIS-31 flag") != 0

    def clear_ais31(self) -> None:
        """Tells the board that the start-up test has passed."""
        self.device.control_out(_COMMAND, _CLEAR_AIS31, "clearing the AIS-31 flag")

    def in_words(self) -> dict[str, str]:
        """For `Driver.details`."""
        device = self.device
        return {
            "board version": f"{self.version:#x}",
            "modules": f"{self.modules} (mask {self.mask:#x})",
            "power": "on" if self.powered else "off",
            "rate": f"{self.rate_bytes_per_s * 8e-6:g} Mbit/s" + ("" if self.rate_told else " (assumed)"),
            "AIS-31 start-up test": {None: "unknown to this firmware", False: "not asked for"}.get(
                self.ais31, "asked for by the device"
            ),
            "USB": f"bus {device.bus} device {device.address}, {device.speed}, packets of {self.packet_bytes} bytes",
        }


def findings(device: UsbDevice) -> Iterator[Finding]:
    """What the doctor finds on a device that is attached and closed, until the first fail. The caller closes it."""
    yield Finding("cable", "ok", f"found {device}")
    try:
        device.open()
    except SourceError as error:
        hint = device.permission_hint() if device.forbidden(error) else "unplug it and plug it in again"
        yield Finding("permission", "fail", str(error), hint)
        return
    yield Finding("permission", "ok", f"this user may open {device.node}")
    driver = device.kernel_driver()
    try:
        board = Board(device)
    except TransportError as error:
        yield Finding("firmware", "fail", str(error), "unplug it and plug it in again; try another port and cable")
        return
    except SourceError as error:
        check = "kernel driver" if driver else "other process"
        yield Finding(check, "fail", str(error), "stop what has it, then try again")
        return
    yield Finding("other process", "ok", "no kernel driver and no other process has it")
    yield Finding("firmware", "ok", ", ".join(f"{what} {words}" for what, words in board.in_words().items()))
    if board.packet_bytes < 512:
        yield Finding("speed", "note", f"{device.speed}: packets of {board.packet_bytes} bytes", "use a USB 2.0 port")
    if not board.powered:
        yield Finding("power", "note", "the board says that its modules are not powered", "try a port with more power")
    try:
        board.check_modules()
    except DeviceFault as fault:
        yield Finding("modules", "fail", str(fault), "unplug it and plug it in again; if that stays, it is broken")
        return
    yield Finding("modules", "ok", f"all {board.modules} work")
    if board.ais31:
        yield Finding("AIS-31 flag", "note", "the device asks for its start-up test", "opening it runs that test")
