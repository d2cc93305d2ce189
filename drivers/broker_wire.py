"""The broker's messages, protocol version 1, as Python packs and unpacks them; docs/broker.md describes them.

One message a packet of a SOCK_SEQPACKET Unix socket: a header, then a body of fixed structs, little endian, no pickle.
The framing is csrc/broker_wire.h's; what a broker serves and how it is are written and read here alone. Text is UTF-8 in
fields of fixed width, cut at whole characters and filled with zeros.
"""

import struct
from dataclasses import astuple, dataclass
from fractions import Fraction

MAGIC = 0x31425645  # "EVB1"
VERSION = 1
MOST_BYTES = 4096
MOST_DRAW = 2048
BLOCK = 32
HELLO, DRAW, WELCOME, BYTES, STATE, REFUSED = range(1, 7)
FLOWING, ENDED, ALARM = range(3)  # what bits a client may expect
KINDS = ("quantum", "quantum-remote", "electronic", "recorded", "simulated")  # weakest last

_HEADER = struct.Struct("<IHHII")
_PAIR = struct.Struct("<II")  # Hello, Draw, State and Refusal
_WELCOME = struct.Struct("<QII")
_SERVES = struct.Struct("<16s16sQQ64s256s128s64s512sIBB2x")
_HOW = struct.Struct("<512s6Q3QIIQQQ256s128s")


class Malformed(ValueError):
    """A message that this protocol does not have."""


def _text(value: str, width: int) -> bytes:
    """At most `width` bytes, cut at a whole character."""
    return value.encode("utf-8", "replace")[:width].decode("utf-8", "ignore").encode()


def _read(field: bytes) -> str:
    return field.rstrip(b"\0").decode("utf-8", "replace")


@dataclass(frozen=True)
class Serves:
    """What a broker serves. instance: 16 random bytes of this run of it; raw_bytes_per_block: behind 32 bytes.

    min_entropy: bits a raw byte, and its origin; of several sources the lowest. conditioned: by the device as well.
    """

    kind: str
    instance: bytes
    min_entropy: Fraction
    min_entropy_origin: str
    name: str
    serial: str
    conditioner: str
    uris: str
    raw_bytes_per_block: int
    conditioned: bool
    loop: bool

    def pack(self) -> bytes:
        """The text behind WELCOME."""
        h = self.min_entropy
        return _SERVES.pack(
            self.kind.encode(), self.instance, h.numerator, h.denominator, _text(self.min_entropy_origin, 64),
            _text(self.name, 256), _text(self.serial, 128), _text(self.conditioner, 64), _text(self.uris, 512),
            self.raw_bytes_per_block, self.conditioned, self.loop,
        )  # fmt: skip

    @classmethod
    def unpack(cls, text: bytes) -> "Serves":
        if len(text) != _SERVES.size:
            raise Malformed(f"what it serves takes {_SERVES.size} bytes, not {len(text)}")
        kind, instance, top, bottom, origin, name, serial, conditioner, uris, raw, conditioned, loop = _SERVES.unpack(text)
        if _read(kind) not in KINDS or bottom == 0 or not 0 < Fraction(top, bottom) <= 8:
            raise Malformed("it serves a kind or a min-entropy that there is not")
        return cls(
            _read(kind), instance, Fraction(top, bottom), _read(origin), _read(name), _read(serial), _read(conditioner),
            _read(uris), raw, bool(conditioned), bool(loop),
        )  # fmt: skip


@dataclass(frozen=True)
class How:
    """How a broker is. why: what stands in the way, or nothing. alarms: how often each test alarmed, in the tests' order.

    last_*: the last alarm; last_flags: 1 there is one, 2 in a start-up test, 4 permanent. Counts are over all sources.
    """

    why: str = ""
    alarms: tuple[int, ...] = (0,) * 6
    raw_bytes: int = 0
    transient_alarms: int = 0
    transport_errors: int = 0
    last_test: int = 0
    last_flags: int = 0
    last_offset: int = 0
    last_value: int = 0
    last_cutoff: int = 0
    last_said: str = ""
    last_source: str = ""

    def pack(self) -> bytes:
        """The text behind STATE."""
        why, alarms, *numbers, said, source = astuple(self)
        return _HOW.pack(_text(why, 512), *alarms, *numbers, _text(said, 256), _text(source, 128))

    @classmethod
    def unpack(cls, text: bytes) -> "How":
        if not text:  # said before the broker knew
            return cls()
        if len(text) != _HOW.size:
            raise Malformed(f"how it is takes {_HOW.size} bytes, not {len(text)}")
        why, *numbers, said, source = _HOW.unpack(text)
        return cls(_read(why), tuple(numbers[:6]), *numbers[6:], _read(said), _read(source))


def message(type_: int, first: int, second: int) -> bytes:
    """A client's message: HELLO with (1: shared memory is wanted, 0), DRAW with (bytes, tag)."""
    return _HEADER.pack(MAGIC, VERSION, type_, _HEADER.size + _PAIR.size, 0) + _PAIR.pack(first, second)


@dataclass(frozen=True)
class Message:
    """A broker's message: its type, the numbers of its fixed part, and what follows them."""

    type: int
    numbers: tuple[int, ...]
    rest: bytes


def parse(packet: bytes) -> Message:
    """A broker's packet, or Malformed."""
    if len(packet) < _HEADER.size:
        raise Malformed(f"{len(packet)} bytes are no message")
    magic, version, type_, length, _ = _HEADER.unpack_from(packet)
    if magic != MAGIC or length != len(packet):
        raise Malformed("no header of this protocol")
    if version != VERSION:
        raise Malformed(f"version {version} of the protocol; this side speaks {VERSION}")
    if type_ not in (WELCOME, BYTES, STATE, REFUSED):
        raise Malformed(f"type {type_}")
    fixed = _WELCOME if type_ == WELCOME else _PAIR
    if len(packet) < _HEADER.size + fixed.size:
        raise Malformed(f"type {type_} with {len(packet)} bytes")
    return Message(type_, fixed.unpack_from(packet, _HEADER.size), packet[_HEADER.size + fixed.size :])
