"""The driver contract: what a source of raw bytes declares about itself, and how its bytes are read.

A driver knows its device and nothing of health tests, keys, torch or CUDA. It is opened from a `SourceURI`, fills
buffers, and is closed. Whatever it declares is shown to the user, so it declares no more than is known. Facts of a
device that were never seen on hardware are parameters of its URI with a default, not assumptions.
"""

import abc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import SourceError

if TYPE_CHECKING:
    from .._C import RingReader

Kind = Literal["quantum", "quantum-remote", "electronic", "recorded", "simulated"]
BitOrder = Literal["msb_first", "lsb_first"]

# No published assessment covers most devices, so a source without a certificate for exactly that product and mode is
# taken at half a bit of min-entropy a bit.
ASSUMED_MIN_ENTROPY = Fraction(4)


class TransportError(SourceError):
    """Bytes were lost on the way (a short read, a time-out). No alarm: the source drops what it holds and goes on."""


class DeviceLost(TransportError):
    """The device is gone. The source asks the driver to `reconnect` for a while, then gives up."""


class DeviceBusy(SourceError):
    """Another process has the device."""


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
class Attached:
    """One device that is present, before it is opened: a row of `everett devices`.

    uri: opens exactly this device. state: "ready", or in a few words why it cannot be opened now ("no permission",
    "in use by rngd (pid 71)").
    """

    uri: str
    name: str
    serial: str
    kind: Kind
    rate_bytes_per_s: float | None
    state: str = "ready"


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor looked at. check: a noun ("cable", "permission", "kernel driver", "firmware").

    verdict: "ok", "note" (works, but should be known) or "fail" (stands in the way). next_step: what to do about it.
    absent: it fails because the device that is meant is not there; `open` raises DeviceNotFound then.
    """

    check: str
    verdict: Literal["ok", "note", "fail"]
    text: str
    next_step: str = ""
    absent: bool = False


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
    from text that raises ValueError; `looks_for`, what `attached` looks for, in the words of a user.

    `bit_order` says which bit of a byte the device made first. `conditioned` devices whiten their output, so that the
    health tests can see total failure only. `full_entropy` allows `condition=none`. `chunk_bytes` is the most that one
    read should ask for: large enough to spare hand-overs, small enough for the device's own buffer. `metered` sources
    cost money or quota a byte and get a shorter start-up test. `details` is what the device says of itself (firmware,
    mode, modules, spend), shown by status and doctor: other threads read it, so it is replaced as a whole, never changed.
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
    # Of `broker:` alone: where bits arrive that were tested and conditioned already. It gives no raw bytes.
    ring: "RingReader | None" = None
    details: Mapping[str, str] = MappingProxyType({})

    @classmethod
    @abc.abstractmethod
    def open(cls, uri) -> "Driver":
        """Opens what the `SourceURI` names, or raises SourceError: DeviceNotFound when no such device is there,
        SourceExhausted for a recording with no bytes."""

    @classmethod
    def claim(cls, values: Mapping[str, object]) -> MinEntropy:
        """The user's `h` among parsed parameters, else what the driver declares."""
        return MinEntropy(values["h"], "claimed by user") if "h" in values else cls.min_entropy

    @classmethod
    def attached(cls) -> list[Attached]:
        """The real local devices that are present, found without opening them for reading. A recording, a simulation or
        a web service is never listed."""
        return []

    @classmethod
    def examine(cls, uri) -> list[Finding]:
        """What the doctor finds between the cable and a successful `open` of this `SourceURI`, in that order: found,
        permission, who else holds it. It opens nothing for longer than a question takes, and ends at the first fail."""
        return []

    @abc.abstractmethod
    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        """Fills the front of `buffer` with the next raw bytes, in order; returns how many, at least 1.

        Returns fewer than asked for rather than wait long, and 0 when none came within `timeout_s` but none were lost.
        Raises TransportError, DeviceLost, DeviceFault or EndOfRecording.
        """

    def reconnect(self, timeout_s: float) -> None:
        """Finds the lost device again within timeout_s, or raises DeviceLost; it will be asked again for a while.

        Another serial number in its place is a SourceError that ends the source. Bytes read before the loss are gone.
        """
        raise SourceError(f"{self.name} does not connect again by itself; open the source anew")

    def startup_passed(self) -> None:  # noqa: B027 - most devices have nothing to be told
        """The start-up test has passed on bytes of this device: at opening, after an alarm, after a transport error.

        Called by the thread that reads, between reads. For devices that ask for the test and want to be told.
        """

    def responses_from(self, start: int) -> list:
        """The `responses.Response`s of a web service since it was opened, from the start-th on; other threads ask. Others
        have none: whole reads of a device are never committed to, because nobody else could have had them."""
        return []

    @abc.abstractmethod
    def close(self) -> None:
        """Gives the device back. May be called twice, and while another thread is in `readinto`."""


def require(module: str, extra: str, package: str | None = None):
    """Imports a module of an optional extra; SourceError names the extra when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(
            f"{package or module} is needed and cannot be imported ({error}); install it with "
            f"pip install 'everett_cuda[{extra}]'"
        ) from error
