"""`swiftrng:`: TectroLabs SwiftRNG (LE, Pro, Z), two Zener noise sources behind a command protocol.

One command byte is answered by a fixed number of bytes and one status byte; 0 means good. Sources: github
tectrolabs/swiftrng @9e635e6 (V: read in its source) and the tech-spec pages of tectrolabs.com (D). The licence of that
source is for use with its devices; none of it is here. Never seen on hardware here.

    swiftrng:            the only one attached         swiftrng:SERIAL, swiftrng:/dev/serial/by-id/...
    swiftrng:usb:1-2     the first model (1fc9:8110, no serial port) at that place on the bus
    source=1|2           raw bytes of one noise source alone, for measurements; without it both, combined

Models with firmware 3 (Z) run a linear corrector (Lacharme) inside, so their output counts as conditioned; older ones
were made for a SHA-256 on the host, which is what the conditioner does.
"""

import re
import threading
import time

from ..errors import SourceError
from .contract import Attached, DeviceFault, DeviceLost, Driver, Finding, TransportError
from .named_port import found_finding, named_port, port_uri
from .named_usb import close_all, usb_findings, usb_state
from .reconnection import try_until
from .serial_port import Port, examine_port, ports, state
from .swiftrng_wire import SerialWire, UsbWire, Wire
from .uri import SourceURI
from .usb import UsbDevice, find

_SERIAL_IDS = {(0x1FC9, 0x8111), (0x3975, 0x0001), (0x3975, 0x0002), (0x3975, 0x0003), (0x3975, 0x0004)}
_LIBUSB_IDS = {(0x1FC9, 0x8110)}
_BLOCK = 16000
_ANSWER_S = 2.0  # the vendor's limit for an answer (V)
_TRIES = 3  # a device that was left in the middle of an answer is in step after the second
# Commands and the length of their answers, the status byte not counted (V).
_VERSION, _MODEL, _SERIAL, _DIAGNOSTICS = (b"v", 4), (b"m", 8), (b"s", 15), (b"d", 0)
_BOTH_SOURCES = b"x"
_ONE_SOURCE = {"1": b"<", "2": b">"}


def parse_source(text: str) -> bytes:
    """The command that reads one noise source."""
    if text not in _ONE_SOURCE:
        raise ValueError("1 or 2, the number of a noise source")
    return _ONE_SOURCE[text]


class SwiftRngDriver(Driver):
    """See the module."""

    scheme = "swiftrng"
    parameters = {"source": parse_source}
    looks_for = "TectroLabs SwiftRNG on a USB serial port (1fc9:8111, 3975:0001 to 0004) or on USB (1fc9:8110)"
    kind = "electronic"
    chunk_bytes = _BLOCK  # an answer; rates of the models are not published in a form that was found

    def __init__(self, uri: SourceURI):
        values = uri.parameters(self.parameters)
        self._uri = uri
        self._command: bytes = values.get("source", _BOTH_SOURCES)
        self.min_entropy = self.claim(values)
        self._reading = threading.Lock()
        self._closed = False
        self._failed_answers = 0
        # Larger than an answer, so that one that is too long is seen.
        self._answer = memoryview(bytearray(_BLOCK + 512))
        self._wire: Wire | None = None
        self._connect(named_port(uri, self._found(), self.looks_for), _ANSWER_S)

    @classmethod
    def open(cls, uri: SourceURI) -> "SwiftRngDriver":
        return cls(uri)

    @classmethod
    def _found(cls) -> list[Port]:
        """All that are attached; the first model, which makes no serial port, as a port `usb:PLACE`."""
        devices = find(_LIBUSB_IDS)
        try:
            return ports(ids=_SERIAL_IDS, text="SwiftRNG") + [_as_port(d) for d in devices]
        finally:
            close_all(devices)

    @classmethod
    def attached(cls) -> list[Attached]:
        devices = find(_LIBUSB_IDS)
        try:
            found = [(p, state(p.device)) for p in ports(ids=_SERIAL_IDS, text="SwiftRNG")]
            found += [(_as_port(d), usb_state(d)) for d in devices]
        finally:
            close_all(devices)
        return [
            Attached(port_uri(cls.scheme, p), p.product or "SwiftRNG", p.serial, cls.kind, None, words) for p, words in found
        ]

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        port, finding = found_finding(uri, cls._found(), cls.looks_for)
        if port is None:
            return [finding]
        device = _at(port.device)
        if device is None:
            return [finding, *examine_port(port.device)]
        try:
            return [finding, *usb_findings(device)]
        finally:
            device.close()

    # --- opening ---

    def _connect(self, port: Port, answer_s: float) -> None:
        device = _at(port.device)
        wire = UsbWire(device) if device else SerialWire(port.device)
        try:
            firmware, model, serial = self._identity(wire, answer_s)
        except BaseException:
            wire.close()
            raise
        self._wire, self._port_serial, self.serial = wire, port.serial, serial
        self._begin_anew()
        self.name = f"SwiftRNG {model} on {wire.where}"
        self.conditioned = firmware >= 3.0 and self._command == _BOTH_SOURCES
        self._about = {
            "model": model,
            "firmware": f"{firmware:g}",
            "port": wire.where,
            "output": "both sources, combined" if self._command == _BOTH_SOURCES else f"source {self._uri.given['source']}",
            "corrector": "Lacharme, inside" if self.conditioned else "none inside",
        }
        self._show()

    def _identity(self, wire: Wire, answer_s: float) -> tuple[float, str, str]:
        """(firmware, model, serial number), once the device is in step and has passed its own diagnostics."""
        for tries_left in reversed(range(_TRIES)):
            try:
                wire.drain()
                text = _ask(wire, _VERSION, answer_s)
                break
            except DeviceLost:
                raise
            except TransportError as error:
                if not tries_left:
                    raise SourceError(f"{wire.where} does not answer as a SwiftRNG does: {error}") from error
        version = re.fullmatch(r"[!-~](\d+(?:\.\d+)?)", text)
        if not version:
            raise SourceError(f"{wire.where} says it has firmware {text!r}, which no SwiftRNG says; name another port")
        firmware = float(version[1])
        model, serial = _ask(wire, _MODEL, answer_s), _ask(wire, _SERIAL, answer_s)
        if firmware >= 2.0:  # older ones do not have the command (V)
            _ask(wire, _DIAGNOSTICS, answer_s)
        return firmware, model, serial

    def _show(self) -> None:
        self.details = {**self._about, "failed answers": str(self._failed_answers)}

    def reconnect(self, timeout_s: float) -> None:
        try_until(timeout_s, lambda: self._reconnect_now(timeout_s))

    def _reconnect_now(self, answer_s: float) -> None:
        with self._reading:
            self._give_back()
            if self._closed:
                raise DeviceLost(f"{self.name} was closed")
            before = self.serial
            try:
                found = self._found()
                same = [p for p in found if p.serial and p.serial == self._port_serial]
                self._connect(same[0] if same else named_port(self._uri, found, self.looks_for), answer_s)
            except SourceError as error:  # not there, or udev has not set its permissions yet
                raise DeviceLost(str(error)) from error
            if self.serial != before:
                self._give_back()
                raise SourceError(f"{self._about['port']} is another SwiftRNG now: {self.serial}, not {before}")

    # --- reading ---

    def _begin_anew(self) -> None:
        """Forgets everything that came: the next read drains, then asks."""
        self._in_step = False
        self._asked_at: float | None = None
        self._at = 0  # bytes of the answer that have come
        self._block = memoryview(b"")  # proven bytes that did not fit into the caller's buffer

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        with self._reading:
            if self._wire is None or self._closed:
                raise DeviceLost(f"{self.name} is {'closed' if self._closed else 'gone'}")
            try:
                if not len(self._block) and not self._receive(timeout_s):
                    return 0
            except SourceError:
                self._begin_anew()
                raise
            got = min(len(buffer), len(self._block))
            buffer[:got] = self._block[:got]
            self._block = self._block[got:]
            return got

    def _receive(self, timeout_s: float) -> bool:
        """Whether a whole block has come, with a good status, within timeout_s; goes on at the next call if not."""
        wire = self._wire
        if self._asked_at is None:
            if not self._in_step:
                wire.drain()
                self._in_step = True
            if wire.read(self._answer, 0.0):
                raise TransportError(f"{self.name} sent bytes unasked: answers and commands are out of step")
            wire.write(self._command)
            self._asked_at, self._at = time.monotonic(), 0
        deadline = min(time.monotonic() + timeout_s, self._asked_at + _ANSWER_S)
        while self._at <= _BLOCK:
            left = deadline - time.monotonic()
            got = wire.read(self._answer[self._at :], left) if left > 0 else 0
            self._at += got
            if got == 0:
                if time.monotonic() - self._asked_at >= _ANSWER_S:
                    raise TransportError(f"{self.name} gave {self._at} of {_BLOCK + 1} bytes in {_ANSWER_S:g} s")
                return False
        self._asked_at = None
        if self._at > _BLOCK + 1:
            raise TransportError(f"{self.name} gave {self._at} bytes for {_BLOCK + 1}: out of step")
        self._judge(self._answer[_BLOCK])
        self._block = self._answer[:_BLOCK]
        return True

    def _judge(self, status: int) -> None:
        """The status byte. The device tests both noise sources itself and says here when one deviates (tech specs, D),
        so a bad status is an alarm. The vendor's library asks again up to 15 times (V); here the start-up test decides.
        But out of step any byte may stand in its place: then more bytes follow, and it is an error of transport."""
        if status == 0:
            return
        surplus = self._wire.drain()
        if surplus:
            raise TransportError(f"{self.name}: {surplus} bytes came after an answer: out of step")
        self._failed_answers += 1
        self._show()
        raise DeviceFault(f"{self.name} reports a failure of its noise sources, status {status:#04x}", status, 0)

    def close(self) -> None:
        self._closed = True
        wire = self._wire
        if wire is not None:
            wire.wake()
        with self._reading:
            self._give_back()

    def _give_back(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


def _as_port(device: UsbDevice) -> Port:
    return Port(f"usb:{device.path}", device.vendor, device.product, device.serial, device.name)


def _at(place: str) -> UsbDevice | None:
    """The first model at `usb:PLACE`, closed; None for a serial port. DeviceLost when it is not there any more."""
    if not place.startswith("usb:"):
        return None
    devices = find(_LIBUSB_IDS)
    here = next((d for d in devices if _as_port(d).device == place), None)
    close_all([d for d in devices if d is not here])
    if here is None:
        raise DeviceLost(f"there is no SwiftRNG at {place} any more")
    return here


def _ask(wire: Wire, command: tuple[bytes, int], answer_s: float) -> str:
    """The text that answers a command; TransportError when it is short or its status bad, SourceError if it is no text."""
    byte, n = command
    wire.write(byte)
    answer, at = memoryview(bytearray(512)), 0
    deadline = time.monotonic() + answer_s
    while at <= n and (left := deadline - time.monotonic()) > 0:
        at += wire.read(answer[at:], left)
    if at != n + 1:
        raise TransportError(f"{wire.where} gave {at} of {n + 1} bytes for command {byte.decode()!r}")
    if answer[n]:
        raise SourceError(f"{wire.where}: command {byte.decode()!r} failed with status {answer[n]:#04x}")
    try:
        return bytes(answer[:n]).decode("ascii").strip("\0 ")
    except UnicodeDecodeError:
        raise TransportError(f"{wire.where} answered command {byte.decode()!r} with no text") from None
