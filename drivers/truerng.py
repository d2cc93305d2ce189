"""`truerng:`: the TrueRNG of ubld.it (v1 to v3, Pro, ProV2), an avalanche generator that streams over USB CDC-ACM.

It takes no commands: bytes flow while DTR is set, in USB packets of 64 bytes, without framing and without a status. The
kernel sets DTR when the port is opened and clears it at the last close. Sources: ubld.it product pages, FAQ, "How to
change TrueRNGpro's mode", "TrueRNGpro raw binary format"; github euler357/TrueRNG @2c8a069. Never seen on hardware here.

    truerng:            the only one attached          truerng:SERIAL, truerng:/dev/serial/by-id/...
    mode=normal|rng1|rng2|unwhitened   Pro only: knocks before opening. Without it the mode that was set last stays.
    unproven=1          opens a port whose USB identity cannot be seen (a container without sysfs)

Not offered: the text modes, and `raw binary`, whose bytes carry a sequence number in their two upper bits (raw binary
format, D). A device that was left in one of them is recognized and refused, not conditioned into something.
"""

import threading
import time
from itertools import pairwise

from ..errors import BadParameter, SourceError
from .contract import Attached, DeviceLost, Driver, Finding, MinEntropy
from .named_port import found_finding, named_port, port_uri
from .reconnection import try_until
from .serial_port import Port, close_port, examine_port, open_port, ports, read_exact, read_some, state
from .uri import SourceURI, parse_flag

# USB identities: euler357/TrueRNG truerng_find.py (V). v1, v2 and v3 share one.
_MODELS = {(0x04D8, 0xF5FE): "TrueRNG", (0x16D0, 0x0AA0): "TrueRNGpro", (0x04D8, 0xEBB5): "TrueRNGproV2"}
# v2 is sold as more than 350, v3 as more than 400 kbit/s (D); the rates of the Pro models are not published.
_RATES_BYTES_PER_S = {"TrueRNG": 400e3 / 8}
# Line speeds that select a mode after the knock (ubld.it, D); 57600 is the ProV2's (euler357/TrueRNG truerng_mode.py).
_KNOCK = (110, 300, 110)
_MODE_SPEEDS = {"normal": 300, "rng1": 4800, "rng2": 9600, "unwhitened": 57600}
_KNOCK_PAUSE_S = 0.05
_MODE_CHANGE_S = 1.0  # "sleep 1" in the vendor's example
# The speed itself means nothing over USB; this one is no part of a knock.
_SPEED = 115200
# Read and thrown away at each opening. What its packet buffers held from before comes first ("no buffering other than
# what is required for the URBs", D: a few times 64 bytes), maybe of another mode; the rest shows which mode it is in.
_FIRST_BYTES = 1024
_STALE_BYTES = 256
_FIRST_BYTES_S = 2.0
_GATHER_S = 0.01  # one read gathers the packets of 10 ms: a hand-over of the GIL for each 64 bytes would cost more


def parse_mode(text: str) -> str:
    """A mode that gives random bytes."""
    if text not in _MODE_SPEEDS:
        raise ValueError(f"one of {', '.join(_MODE_SPEEDS)} (text and raw binary modes give no plain bytes)")
    return text


class TrueRngDriver(Driver):
    """See the module."""

    scheme = "truerng"
    parameters = {"mode": parse_mode, "unproven": parse_flag}
    looks_for = "TrueRNG on a USB serial port (04d8:f5fe, 16d0:0aa0, 04d8:ebb5)"
    kind = "electronic"
    chunk_bytes = 16384

    def __init__(self, uri: SourceURI):
        values = uri.parameters(self.parameters)
        self._uri = uri
        self._mode: str | None = values.get("mode")
        self._unproven = values.get("unproven", False)
        self.min_entropy: MinEntropy = self.claim(values)
        # All whiten inside: v2 by XOR, v3 by a multiplication in GF(2^8), Pro by mixing with a Mersenne Twister (D).
        self.conditioned = self._mode != "unwhitened"
        if not self.conditioned and "h" not in values:
            raise BadParameter(f"mode=unwhitened in {uri.text!r} needs h=, the min-entropy a byte that you claim for it")
        self._reading = threading.Lock()
        self._closed = False
        self._port = None
        self._connect(named_port(uri, self._found(), self.looks_for))

    @classmethod
    def open(cls, uri: SourceURI) -> "TrueRngDriver":
        return cls(uri)

    @classmethod
    def _found(cls) -> list[Port]:
        return ports(ids=_MODELS.keys())

    @classmethod
    def attached(cls) -> list[Attached]:
        rows = []
        for port in cls._found():
            model = _MODELS[port.vid, port.pid]
            rate = _RATES_BYTES_PER_S.get(model)
            rows.append(Attached(port_uri(cls.scheme, port), model, port.serial, cls.kind, rate, state(port.device)))
        return rows

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        port, finding = found_finding(uri, cls._found(), cls.looks_for)
        if port is None:
            return [finding]
        if (port.vid, port.pid) not in _MODELS and not uri.parameters(cls.parameters).get("unproven"):
            finding = Finding("device", "fail", _no_proof(port), "name another port, or add unproven=1")
            return [finding]
        return [finding, *examine_port(port.device)]

    # --- opening ---

    def _connect(self, port: Port) -> None:
        model = _MODELS.get((port.vid, port.pid))
        if model is None and not self._unproven:
            raise SourceError(f"{self._uri.text}: {_no_proof(port)}; name another port, or add unproven=1 to take it")
        if self._mode is not None and model == "TrueRNG":
            raise BadParameter(f"mode={self._mode} in {self._uri.text!r}: {model} has one mode only; leave it out")
        if self._mode is not None:
            _knock(port.device, _MODE_SPEEDS[self._mode])
        opened = open_port(port.device, _SPEED, _FIRST_BYTES_S)
        try:
            first = read_exact(opened, _FIRST_BYTES, _FIRST_BYTES_S)
            wrong = _wrong_mode(first[_STALE_BYTES:])
            if wrong:
                raise SourceError(f"{self._uri.text}: {port.device} {wrong}; set mode=normal, or plug it in again")
        except BaseException as error:
            close_port(opened)
            if isinstance(error, DeviceLost) or not isinstance(error, SourceError):
                raise
            raise SourceError(f"{self._uri.text}: no plain stream of random bytes: {error}") from error
        self._port = opened
        self.serial = port.serial
        self.name = f"{model or 'unproven TrueRNG'} on {port.device}"
        self.rate_bytes_per_s = _RATES_BYTES_PER_S.get(model)
        mode = f"{self._mode} (set at opening)" if self._mode else "as it was left"
        self.details = {"port": port.device, "mode": mode, "identity": "USB" if model else "unproven"}

    def reconnect(self, timeout_s: float) -> None:
        try_until(timeout_s, self._reconnect_now)

    def _reconnect_now(self) -> None:
        with self._reading:
            self._drop_port()
            if self._closed:
                raise DeviceLost(f"{self.name} was closed")
            found = self._found()
            try:
                same = [p for p in found if self.serial and p.serial == self.serial]
                port = same[0] if same else named_port(self._uri, found, self.looks_for)
            except SourceError as error:
                raise DeviceLost(f"{self.name} is not there: {error}") from error
            if port.vid is None and not self._unproven:
                raise DeviceLost(f"{port.device} does not say yet what it is")
            if port.serial != self.serial:
                raise SourceError(f"{port.device} is another device now: serial {port.serial!r}, not {self.serial!r}")
            try:
                self._connect(port)
            except SourceError as error:  # udev has not set its permissions yet, or ModemManager still looks at it
                raise DeviceLost(str(error)) from error

    # --- reading ---

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        with self._reading:
            if self._port is None or self._closed:
                raise DeviceLost(f"{self.name} is {'closed' if self._closed else 'gone'}")
            got = read_some(self._port, buffer, timeout_s)
            if 0 < got < len(buffer) and not self._closed:
                time.sleep(_GATHER_S)
                more = got
                while more and got < len(buffer):  # the kernel gives 4,095 bytes a read at most
                    more = read_some(self._port, buffer[got:], 0.0)
                    got += more
            return got

    def close(self) -> None:
        self._closed = True
        port = self._port
        if port is not None and port.fd is not None:
            try:
                port.cancel_read()
            except OSError:  # closed meanwhile
                pass
        with self._reading:
            self._drop_port()

    def _drop_port(self) -> None:
        if self._port is not None:
            close_port(self._port)
            self._port = None


def _no_proof(port: Port) -> str:
    seen = f"{port.vid:04x}:{port.pid:04x}" if port.vid is not None else "nothing"
    return f"{port.device} does not show that it is a TrueRNG (its USB identity: {seen})"


def _knock(device: str, mode_speed: int) -> None:
    """Opens and closes the port at the speeds of the knock and of the mode, as the vendor's script does."""
    for speed in (*_KNOCK, mode_speed):
        port = open_port(device, speed, _FIRST_BYTES_S)
        time.sleep(_KNOCK_PAUSE_S)
        close_port(port)
        time.sleep(_KNOCK_PAUSE_S)
    time.sleep(_MODE_CHANGE_S)


def _wrong_mode(first: bytes) -> str:
    """What a stream is if it is not plain random bytes; "" if it may be. first: at least 512 bytes."""
    if all(0x20 <= byte < 0x7F or byte in b"\n\r" for byte in first):  # chance: (97/256)^n
        return "sends text: it is in one of its text modes, or it is another kind of device"
    # Raw binary: bytes of four kinds take turns, told apart by their two upper bits.
    in_turn = sum(((after >> 6) - (before >> 6)) & 3 == 1 for before, after in pairwise(first))
    if in_turn > 0.9 * (len(first) - 1):  # chance: below 2^-n
        return "is in its raw binary mode (ADC samples with sequence numbers)"
    return ""
