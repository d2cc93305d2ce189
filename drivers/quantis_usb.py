"""`quantis-usb:SERIAL`: ID Quantique's Quantis USB-4M, an optical quantum generator of 4 Mbit/s.

`quantis-usb:` takes the only one that is attached; `quantis-usb:path=1-2` the one at that USB port. `transfer` is the
bytes asked for at once: by default one packet, which is all that the vendor's own library ever does. Larger multiples
are plausible and were never seen on hardware: `transfer=16KiB` uses them, `transfer=auto` measures at opening which is
fastest, and both fall back to one packet with the first transfer that comes short.

The library asks for the modules' status before every packet, which halves its speed; here every 64 KiB or 100 ms.
"""

import errno
import threading
import time
from array import array
from types import MappingProxyType
from urllib.parse import quote

from usb.core import USBError

from ..errors import BadParameter, DeviceNotFound, SourceError
from .contract import Attached, DeviceFault, DeviceLost, Driver, Finding, TransportError
from .permission import holders, in_words
from .quantis_board import ENDPOINT, IDS, MODULE_BYTES_PER_S, Board, findings
from .uri import SourceURI, parse_size
from .usb import UsbDevice, find
from .usb_read import ShortTransfer, reader

POLL_BYTES, POLL_S = 65536, 0.1
# What the device may have made before we asked: the vendor's library throws as much away when it resets a board.
DISCARD_BYTES = 4096
ENOUGH_BYTES = 16384  # a read returns with this much: 33 ms of one module
LARGEST_TRANSFER = 65536
LOOK_EVERY_S = 0.1
_AIS31 = "AIS-31 start-up test"


def parse_transfer(text: str) -> int | None:
    """A size in bytes, or None for `auto`."""
    if text == "auto":
        return None
    size = parse_size(text)
    if not 1 <= size <= LARGEST_TRANSFER:
        raise ValueError("auto, or 512 to 64KiB")
    return size


class QuantisUsbDriver(Driver):
    """See the module. The device's output is raw, and counts as 4 bits of min-entropy a byte."""

    scheme = "quantis-usb"
    parameters = {"transfer": parse_transfer, "path": str}
    looks_for = "ID Quantique Quantis USB (USB id 0aba:0102)"
    kind = "quantum"
    name = "Quantis USB"
    chunk_bytes = 65536

    def __init__(self, device: UsbDevice, transfer: int | None = 0, min_entropy=Driver.min_entropy):
        """Takes over `device`, found and closed; closes it on an error. transfer: in bytes, 0 one packet, None auto."""
        self.serial = device.serial
        self.min_entropy = min_entropy
        self._who = f"{self.name} {device.serial or 'without serial'}"
        self._path = device.path
        self._wanted_transfer = transfer
        self._board: Board | None = None  # while the device is there
        self._reader = None
        self._faulty = False  # the last thing that the board said of its modules
        self._closed = threading.Event()
        self._using = threading.Lock()  # held by whoever talks to the device
        self._connect(device)

    @classmethod
    def open(cls, uri: SourceURI) -> "QuantisUsbDriver":
        values = uri.parameters(cls.parameters)
        return cls(_choose(uri), values.get("transfer", 0), cls.claim(values))

    @classmethod
    def attached(cls) -> list[Attached]:
        devices = find(IDS)
        try:
            return [Attached(_uri(d), cls.name, d.serial, cls.kind, MODULE_BYTES_PER_S, _state(d)) for d in devices]
        finally:
            _close(devices)

    # --- opening ---

    def _connect(self, device: UsbDevice) -> None:
        """Claims the device and asks it everything. On any error it is closed."""
        try:
            board = Board(device)
            board.check_modules()
            self.rate_bytes_per_s = board.rate_bytes_per_s
            self._transfer, how = self._choose_transfer(board)
        except BaseException:
            device.close()
            raise
        self._board = board
        self._ais31_asked = board.ais31 is True  # the start-up test runs now anyway, and is reported when it has passed
        self.details = MappingProxyType({**board.in_words(), "transfer": f"{self._transfer} bytes ({how})"})

    def _choose_transfer(self, board: Board) -> tuple[int, str]:
        """(bytes, why): see the module. BadParameter for a size that is no multiple of the packet."""
        packet, wanted = board.packet_bytes, self._wanted_transfer
        if wanted is None:
            return _fastest_transfer(board), "the fastest when measured"
        if wanted in (0, packet):
            return packet, "one packet"
        if wanted % packet:
            raise BadParameter(
                f"transfer={wanted} is no multiple of {packet}, the bytes of a packet of {board.device} at "
                f"{board.device.speed}"
            )
        return wanted, "as asked for"

    # --- reading ---

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        with self._using:
            board = self._board
            if board is None or self._closed.is_set():
                raise self._gone()
            try:
                if self._reader is None:
                    self._begin(board)
                elif self._unasked_bytes >= POLL_BYTES or time.monotonic() - self._asked_at >= POLL_S:
                    self._ask(board)
                room = buffer[: POLL_BYTES - self._unasked_bytes]
                got = self._reader.take(room, min(len(room), ENOUGH_BYTES), timeout_s)
                self._unasked_bytes += got
                return got
            except (SourceError, USBError) as error:
                raise self._broken_off(board, error) from error

    def _gone(self) -> DeviceLost:
        return DeviceLost(f"{self._who} {'was closed' if self._closed.is_set() else 'is not attached'}")

    def _begin(self, board: Board) -> None:
        """Begins to read, with bytes that the device makes from now on."""
        if self._faulty:  # a fault that lasts is the second alarm, and that one is permanent: give it a moment
            self._closed.wait(POLL_S)
        self._ask(board)
        timeout_ms = _timeout_ms(board, self._transfer)
        self._reader = reader(board.device, ENDPOINT, self._transfer, timeout_ms, discard_bytes=DISCARD_BYTES)

    def _ask(self, board: Board) -> None:
        board.check_modules()
        self._faulty = False
        if not self._ais31_asked and board.asks_for_startup_test():
            self._ais31_asked = True
            self._say(_AIS31, "asked for by the device")
            raise TransportError(f"{self._who} asks for its start-up test (AIS-31 flag), which begins anew")
        self._asked_at, self._unasked_bytes = time.monotonic(), 0

    def _broken_off(self, board: Board, error: SourceError | USBError) -> SourceError:
        """After any error: ends the reading, whose bytes are not used, and says what to raise."""
        self._stop_reading()
        said = board.device.explained(error, "reading") if isinstance(error, USBError) else error
        if self._closed.is_set():
            return self._gone()
        if isinstance(said, DeviceLost):
            self._let_go()
        elif isinstance(said, DeviceFault):
            self._faulty = True
        elif isinstance(error, ShortTransfer) or getattr(error, "errno", None) in (errno.EPIPE, errno.EOVERFLOW):
            if self._transfer != board.packet_bytes:
                self._say("transfer", f"{board.packet_bytes} bytes (one packet, since {self._transfer} bytes failed)")
                self._transfer = self._wanted_transfer = board.packet_bytes
            if getattr(error, "errno", None) == errno.EPIPE:
                try:
                    board.device.clear_halt(ENDPOINT)
                except SourceError as failed:  # unplugged meanwhile, perhaps: the next read will tell
                    return failed
        return said

    def _say(self, what: str, words: str) -> None:
        self.details = MappingProxyType({**self.details, what: words})

    def startup_passed(self) -> None:
        with self._using:
            board = self._board
            if board is None or not self._ais31_asked:
                return
            board.clear_ais31()
            # A flag that cannot be cleared is remembered as set: it would ask without end.
            self._ais31_asked = board.asks_for_startup_test()
            self._say(_AIS31, "passed" + (", but the device's flag stays set" if self._ais31_asked else ""))

    # --- loss and end ---

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    def _let_go(self) -> None:
        self._stop_reading()
        if self._board is not None:
            self._board.device.close()
            self._board = None

    def reconnect(self, timeout_s: float) -> None:
        with self._using:
            self._let_go()
            deadline = time.monotonic() + timeout_s
            while not self._closed.is_set():
                why = self._look()
                if self._board is not None:
                    return
                if time.monotonic() >= deadline:
                    raise DeviceLost(f"{self._who} {why}")
                self._closed.wait(LOOK_EVERY_S)
            raise self._gone()

    def _look(self) -> str:
        """Connects the device if it is there again, or says why not. SourceError when another one is in its place."""
        devices = find(IDS)
        try:
            for device in devices:
                if device.serial == self.serial and (self.serial or device.path == self._path):
                    try:
                        self._connect(device)
                    except BadParameter:
                        raise
                    except SourceError as error:  # its modules warm up, or udev has not given permission yet
                        return f"is attached, but: {error}"
                    self._path = device.path
                    devices.remove(device)
                    return ""
                if device.serial and device.path == self._path:
                    raise SourceError(
                        f"where {self._who} was there is now {device.serial}, another device; plug in {self.serial} "
                        f"again, or open {_uri(device)}"
                    )
            others = ", ".join(map(_uri, devices))
            return "is not attached" + (f" (but {others})" if others else "")
        finally:
            _close(devices)

    def close(self) -> None:
        self._closed.set()
        running = self._reader
        if running is not None:
            running.stop()  # wakes a readinto, which holds the lock
        with self._using:
            self._let_go()

    # --- the doctor ---

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        uri.parameters(cls.parameters)
        try:
            device = _choose(uri)
        except SourceError as error:
            step = "connect the device; `lsusb -d 0aba:0102` must list it"
            return [Finding("cable", "fail", str(error), step, isinstance(error, DeviceNotFound))]
        try:
            return list(findings(device))
        finally:
            device.close()


# --- one device among others ---


def _close(devices: list[UsbDevice]) -> None:
    for device in devices:
        device.close()


def _uri(device: UsbDevice) -> str:
    return f"quantis-usb:{quote(device.serial, safe='')}" if device.serial else f"quantis-usb:path={device.path}"


def _state(device: UsbDevice) -> str:
    others = holders(device.node)
    if others:
        return f"in use by {in_words(others)}"
    try:
        device.open()
    except SourceError as error:
        return "no permission" if device.forbidden(error) else str(error)
    return "ready"


def _choose(uri: SourceURI) -> UsbDevice:
    """The one device that the URI names, closed; DeviceNotFound when there is none, SourceError for several."""
    path = uri.given.get("path", "")
    devices = find(IDS)
    wanted = [d for d in devices if uri.rest in ("", d.serial) and path in ("", d.path)]
    _close([d for d in devices if len(wanted) != 1 or d is not wanted[0]])
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        raise SourceError(f"{uri.text}: {len(wanted)} are attached; name one of {', '.join(map(_uri, wanted))}")
    others = ", ".join(map(_uri, devices)) or "none"
    raise DeviceNotFound(
        f"{uri.text}: no such Quantis USB is attached (USB id 0aba:0102; attached: {others}). Check the cable; a "
        "container needs /dev/bus/usb, a virtual machine the device itself"
    )


def _timeout_ms(board: Board, transfer_bytes: int) -> int:
    """How long a transfer may wait: a tenth of a second, and four times as long as its bytes take to be made."""
    return 100 + int(4000 * transfer_bytes / board.rate_bytes_per_s)


def _fastest_transfer(board: Board) -> int:
    """The transfer that brings most bytes a second; a larger one must be 5 % faster. What is read here is dropped."""
    best, best_rate = board.packet_bytes, 0.0
    for size in (board.packet_bytes, 4096, 16384, LARGEST_TRANSFER):
        into, count = array("B", bytes(size)), LARGEST_TRANSFER // size
        timeout_ms = _timeout_ms(board, size)
        start = time.monotonic()
        try:
            whole = all(board.device.bulk_read(ENDPOINT, into, timeout_ms) == size for _ in range(count))
        except USBError as error:
            said = board.device.explained(error, "measuring transfers")
            if size == board.packet_bytes or isinstance(said, DeviceLost):
                raise said from error
            if error.errno == errno.EPIPE:
                board.device.clear_halt(ENDPOINT)
            whole = False
        if not whole:
            break
        rate = count * size / max(time.monotonic() - start, 1e-9)
        if rate > 1.05 * best_rate:
            best, best_rate = size, rate
    return best
