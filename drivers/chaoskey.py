"""`chaoskey:`: Altus Metrum's ChaosKey, a USB generator of avalanche noise (about 10 Mbit/s), by its kernel driver.

`chaoskey:` takes the only one, `chaoskey:SERIAL` or `chaoskey:/dev/chaoskey1` a certain one. Araneus' Alea, which the
same kernel driver serves, is found too. Where a container has /dev/hwrng only, `chaoskey:` reads that as long as a
ChaosKey is behind it. The device whitens its bits itself.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..errors import DeviceNotFound, SourceError
from . import hwrng
from .char_node import NodeDriver, ReadPlan, answer_within, lock_node, open_node
from .contract import Attached, Finding, MinEntropy
from .uri import SourceURI

_CLASS = Path("/sys/class/usbmisc")
_CHAR = Path("/sys/dev/char")
# Linux, drivers/usb/misc/chaoskey.c: both give 64 bytes a transfer; a read waits for as many transfers as it needs.
_IDS = {(0x1D50, 0x60C6): ("ChaosKey", 1.25e6), (0x12D8, 0x0001): ("Araneus Alea", 12_500.0)}
_RULE = "1d50"
_PLAN = ReadPlan(512, 64, 64)


@dataclass(frozen=True)
class Key:
    """One device that the kernel driver serves."""

    path: str
    name: str
    serial: str
    rate_bytes_per_s: float


def keys() -> list[Key]:
    """All that are there, by node."""
    places = sorted(_CLASS.glob("chaoskey*")) if _CLASS.is_dir() else []
    return [key for place in places if (key := _key(place)) is not None]


def _key(place: Path) -> Key | None:
    """The device behind a node's folder in sysfs; the folder's `device` is its USB interface, and that one's parent it."""
    usb = (place / "device").resolve().parent
    try:
        ids = tuple(int((usb / name).read_text(), 16) for name in ("idVendor", "idProduct"))
    except (OSError, ValueError):
        return None
    if ids not in _IDS:
        return None
    name, rate = _IDS[ids]
    try:
        serial = (usb / "serial").read_text().strip()
    except OSError:
        serial = ""
    return Key(f"/dev/{place.name}", name, serial, rate)


class ChaosKeyDriver(NodeDriver):
    """See the module."""

    scheme = "chaoskey"
    looks_for = "ChaosKey (USB 1d50:60c6) or Alea (12d8:0001), served by the kernel's chaoskey driver"
    kind = "electronic"
    conditioned = True
    chunk_bytes = 16384

    def __init__(self, key: Key, min_entropy: MinEntropy = NodeDriver.min_entropy):
        """Opens the node of `key`."""
        super().__init__()
        self.min_entropy = min_entropy
        self._plan = _PLAN
        self.serial, self.rate_bytes_per_s = key.serial, key.rate_bytes_per_s
        self.name = f"{key.name} {key.serial or key.path}"
        self._connect(key)

    @classmethod
    def open(cls, uri: SourceURI) -> NodeDriver:
        values = uri.parameters(cls.parameters)
        now = hwrng.sources()
        if not uri.rest and not keys() and now and now.current.lower().startswith("chaoskey"):
            return hwrng.HwrngDriver(now.current, min_entropy=cls.claim(values))
        return cls(_choose(uri), cls.claim(values))

    @classmethod
    def attached(cls) -> list[Attached]:
        return [Attached(_uri(k), k.name, k.serial, cls.kind, k.rate_bytes_per_s, hwrng.state(k.path)) for k in keys()]

    def _connect(self, key: Key) -> None:
        fd = answer_within(lambda: open_node(key.path, self.scheme, _RULE), key.path, os.close)
        try:
            proof = _prove(fd, key.path)
            if proof.serial != self.serial:
                raise SourceError(f"chaoskey: {key.path} is {proof.serial} now, not {self.serial}; open the source anew")
            lock_node(fd, key.path, self.scheme)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._path = fd, key.path
        self.details = {"node": key.path}

    def _look(self) -> str:
        if not self.serial:
            raise SourceError("a device without serial number cannot be told from another one; open the source anew")
        there = keys()
        why = "is not there"
        for key in there:
            if key.serial == self.serial:
                try:
                    self._connect(key)
                    return ""
                except SourceError as error:  # udev has not given permission yet
                    why = f"is there, but: {error}"
        if why == "is not there" and any(key.path == self._path for key in there):
            other = next(key for key in there if key.path == self._path)
            raise SourceError(
                f"where {self.serial} was there is now {other.serial or 'one without serial number'}, another "
                f"device; plug the first one in again, or open {_uri(other)}"
            )
        return why

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        uri.parameters(cls.parameters)
        try:
            key = _choose(uri)
        except SourceError as error:
            step = "`lsusb -d 1d50:60c6` must list it, and `modprobe chaoskey` serve it; a container needs /dev/chaoskey0"
            return [Finding("device", "fail", str(error), step, isinstance(error, DeviceNotFound))]
        found = [Finding("device", "ok", f"{key.name} {key.serial or 'without serial number'} at {key.path}")]
        return found + hwrng.examine_node(key.path, _RULE)


def _prove(fd: int, path: str) -> Key:
    about = os.fstat(fd)
    place = _CHAR / f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}"
    key = _key(place) if (place / "device").exists() else None
    if key is None:
        raise SourceError(f"chaoskey: {path} is a look-alike: the kernel shows no ChaosKey behind its device number")
    return key


def _uri(key: Key) -> str:
    return f"chaoskey:{quote(key.serial, safe='') if key.serial else key.path}"


def _choose(uri: SourceURI) -> Key:
    there = keys()
    wanted = [key for key in there if uri.rest in ("", key.serial, key.path)]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(map(_uri, there)) or "none"
    if wanted:
        raise SourceError(f"{uri.text}: {len(wanted)} are there; name one of {names}")
    raise DeviceNotFound(f"{uri.text}: there is no such ChaosKey (USB 1d50:60c6; there are: {names}); check the plug, and "
                         "that the kernel module chaoskey is loaded")  # fmt: skip
