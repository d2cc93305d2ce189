"""The driver contract: what a source of raw bytes declares about itself, and how its bytes are read.

A driver knows its device and nothing of health tests, keys, torch or CUDA. It is opened from a `SourceURI`, fills
buffers, and is closed. Whatever it declares is shown to the user, so it declares no more than is known.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from ..errors import SourceError

Kind = Literal["quantum", "quantum-remote", "electronic", "recorded", "simulated"]
BitOrder = Literal["msb_first", "lsb_first"]

# No published assessment covers most devices, so a source without a certificate for exactly that product and mode is
# taken at half a bit of min-entropy a bit.
ASSUMED_MIN_ENTROPY = Fraction(4)


class TransportError(SourceError):
    """Bytes were lost on the way (a short read, a time-out). Not an alarm: the source drops what it holds and goes on."""


class DeviceLost(TransportError):
    """The device is gone. The source asks the driver to `reconnect` for a while, then gives up."""


class EndOfRecording(SourceError):
    """A recording has no bytes left."""


class DeviceFault(SourceError):
    """The device itself says that it is faulty (a missing module, a failed self-test): a health alarm.

    `status` is what the device said and `expected` what a healthy one says, as integers.
    """

    def __init__(self, message: str, status: int, expected: int):
        super().__init__(message)
        self.status = status
        self.expected = expected


@dataclass(frozen=True)
class MinEntropy:
    """Claimed min-entropy in bits a raw byte, and where the claim comes from."""

    bits_per_byte: Fraction
    origin: str  # "assumed", "claimed by user", or "certified, NUMBER"

    def __str__(self) -> str:
        return f"{float(self.bits_per_byte):g} bits a byte ({self.origin})"


class Driver(abc.ABC):
    """One open source of raw bytes.

    Class attributes: `scheme`, the URI's first word; `parameters`, the names that its URI may give, each with a parser
    from text that raises ValueError; `looks_for`, what `discover` looks for, in the words of a user.

    `bit_order` says which bit of a byte the device made first. `conditioned` devices whiten their output, so that the
    health tests can see total failure only. `full_entropy` allows `condition=none`. `chunk_bytes` is the most that one
    read should ask for: large enough to spare hand-overs, small enough for the device's own buffer. `metered` sources
    cost money or quota a byte and get a shorter start-up test.
    """

    scheme: ClassVar[str]
    parameters: ClassVar[Mapping[str, Callable[[str], object]]] = {}
    looks_for: ClassVar[str] = ""

    name: str
    serial: str = ""
    kind: Kind
    min_entropy: MinEntropy = MinEntropy(ASSUMED_MIN_ENTROPY, "assumed")
    conditioned: bool = False
    full_entropy: bool = False
    bit_order: BitOrder = "msb_first"
    rate_bytes_per_s: float | None = None
    chunk_bytes: int = 65536
    metered: bool = False
    loop: bool = False  # begins again at its end, by request
    passes: int = 0  # how often it has begun again; a read never reaches across

    @classmethod
    @abc.abstractmethod
    def open(cls, uri) -> "Driver":
        """Opens what the `SourceURI` names, or raises SourceError (SourceExhausted for a recording with no bytes)."""

    @classmethod
    def discover(cls) -> list[str]:
        """URIs of the real local devices that are present. A recording or a simulation is never discovered."""
        return []

    @abc.abstractmethod
    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        """Fills the front of `buffer` with the next raw bytes, in order; returns how many, at least 1.

        Returns fewer than asked for rather than wait long, and 0 when none came within `timeout_s` but none were lost.
        Raises TransportError, DeviceLost, DeviceFault or EndOfRecording.
        """

    def reconnect(self, timeout_s: float) -> None:
        """Finds the lost device again within timeout_s or raises DeviceLost."""
        raise DeviceLost(f"{self.name} does not connect again by itself; open the source anew")

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the device back. May be called twice, and while another thread is in `readinto`."""
