"""`hwrng:`: the kernel's hardware generator, /dev/hwrng, whatever stands behind it just now.

The kernel has a list of sources and one current one, which it changes by itself when a device comes or goes, and so does
anyone with root. So the source's name is recorded, read again after every piece of bytes before it is used, and once
more at the close; bytes that came while another source was current are refused.

No source is taken for quantum by its mere presence. `hwrng:?quantum=1` asks for one: only the driver of ID Quantique's
chip S2Q000 is known to be, and a virtual machine's, a TPM's and a CPU's are refused by name. Bytes of virtio_rng come
from the host, most often from its pseudo-random generator: their kind is `simulated`.

The kernel's own thread takes bytes from the same source; each byte goes to one of the two, and never to both. The bytes
are whitened by most drivers, and tested by none.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadParameter, DeviceNotFound, SourceError
from .char_node import NodeDriver, ReadPlan, answer_within, lock_node, open_node
from .contract import Attached, DeviceLost, Finding, Kind, MinEntropy
from .permission import holders, in_words, permission_hint
from .uri import SourceURI, parse_flag

NODE = "/dev/hwrng"
RULE = "hw_random"
_SYSFS = Path("/sys/class/misc/hw_random")
# The kernel copies at most a cache line at a time, under one lock, and a slow device (a TPM gives some kB a second) keeps
# a read until it is whole. What is left in its buffer of 64 bytes is from before.
PLAN = ReadPlan(512, 64, 64)
# The one kernel driver of a quantum chip that was read: ID Quantique's for the S2Q000 (2019), qrng_hwrng.c.
_QUANTUM = {"s2q000-rng": "ID Quantique S2Q000"}
# Linux, drivers/char/hw_random and drivers/char/tpm: what hides behind a name that begins so.
_ORIGINS: Mapping[str, tuple[Kind, str]] = {
    "virtio_rng": ("simulated", "the host's generator, which nothing shows to be more than a program"),
    "tpm-rng": ("electronic", "a TPM"),
    "chaoskey": ("electronic", "a ChaosKey"),
    "intel": ("electronic", "the CPU or its chip set"),
    "amd": ("electronic", "the CPU or its chip set"),
    "via": ("electronic", "the CPU"),
    "smccc_trng": ("electronic", "the CPU's firmware"),
    "powernv-rng": ("electronic", "the CPU"),
    "pseries-rng": ("electronic", "the hypervisor"),
}


def origin(name: str) -> tuple[Kind, str]:
    """(kind, what it is) of the source that the kernel calls `name`; electronic for one that is not known."""
    if name in _QUANTUM:
        return "quantum", _QUANTUM[name]
    for start, known in _ORIGINS.items():
        if name.lower().startswith(start):
            return known
    return "electronic", "a source that this version does not know"


@dataclass(frozen=True)
class Sources:
    """What the kernel says of its generators now. current: "" for none. quality: bits of entropy in 1,024, as its driver
    claims; "" where the kernel does not say."""

    current: str
    available: tuple[str, ...]
    chosen_by_user: bool
    quality: str


def sources() -> Sources | None:
    """None where the kernel has no hardware generators at all."""
    current = _attribute("rng_current")
    if current is None:
        return None
    available = tuple(n for n in (_attribute("rng_available") or "").split() if n != "none")
    return Sources(
        "" if current == "none" else current, available, _attribute("rng_selected") == "1", _attribute("rng_quality") or ""
    )


def _attribute(name: str) -> str | None:
    try:
        return (_SYSFS / name).read_text().strip()
    except OSError:
        return None


class HwrngDriver(NodeDriver):
    """See the module."""

    scheme = "hwrng"
    parameters = {"quantum": parse_flag}
    looks_for = f"the kernel's hardware generator ({NODE})"
    kind = "electronic"
    conditioned = True
    chunk_bytes = 16384

    def __init__(self, current: str, quantum: bool = False, min_entropy: MinEntropy = NodeDriver.min_entropy):
        """Opens the node; `current` is the source that has to be behind it, as long as it is open."""
        super().__init__()
        self._current = self.serial = current
        self.min_entropy = min_entropy
        kind, what = origin(current)
        self.kind = kind if kind != "quantum" or quantum else "electronic"  # by request only, see the module
        self.name = f"hwrng {current} ({what})"
        self._plan = PLAN
        self._connect()

    @classmethod
    def open(cls, uri: SourceURI) -> "HwrngDriver":
        values = uri.parameters(cls.parameters)
        if uri.rest not in ("", NODE):
            raise BadParameter(f"{uri.text!r}: hwrng: has one node, {NODE}; write hwrng:")
        now, quantum = _usable(), values.get("quantum", False)
        kind, what = origin(now.current)
        if quantum and kind != "quantum":
            raise SourceError(
                f"hwrng: quantum=1 was asked for, and the current source is {now.current} ({what}); available are "
                f"{', '.join(now.available)}. Choose a quantum one with `echo NAME > {_SYSFS}/rng_current`, or leave "
                "quantum=1 out: its bits then count as not quantum"
            )
        return cls(now.current, quantum, cls.claim(values))

    @classmethod
    def attached(cls) -> list[Attached]:
        now = sources()
        if now is None or not now.current:
            return []
        kind, what = origin(now.current)
        kind = "electronic" if kind == "quantum" else kind
        return [Attached("hwrng:", f"hwrng {now.current} ({what})", now.current, kind, None, state(NODE))]

    def _connect(self) -> None:
        fd = answer_within(lambda: open_node(NODE, self.scheme, RULE), NODE, os.close)
        try:
            _is_hwrng(fd)
            lock_node(fd, NODE, self.scheme)
            self._refuse_another()
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._path = fd, NODE
        now = sources()
        self.details = {
            "source": self._current,
            "available": " ".join(now.available) if now else "",
            "chosen by": "the user" if now and now.chosen_by_user else "the kernel",
            "quality": f"{now.quality} of 1024 (the kernel driver's claim)" if now and now.quality else "not stated",
        }

    def _refuse_another(self) -> None:
        now = sources()
        if now is None or not now.current:
            raise DeviceLost(f"{self.name}: the kernel has no current source any more")
        if now.current != self._current:
            raise SourceError(
                f"hwrng: the kernel's current source is {now.current} now, not {self._current}, which this source was "
                "opened on; open it anew to read that one"
            )

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        got = super().readinto(buffer, timeout_s)
        if got:
            # After the bytes, not before: then the source that was current when they were read is the one seen here.
            try:
                self._refuse_another()
            except SourceError:
                buffer[:got] = bytes(got)
                raise
        return got

    def _look(self) -> str:
        try:
            self._connect()
        except DeviceLost as error:
            return str(error)
        return ""

    def close(self) -> None:
        super().close()
        now = sources()
        self._say(source_at_close=(now.current if now else "") or "none")

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        quantum = uri.parameters(cls.parameters).get("quantum", False)
        now = sources()
        if now is None or not now.current:
            text = f"the kernel has no current source (available: {', '.join(now.available) if now else 'none'})"
            step = "load the kernel module of your device; see rng_available in sysfs"
            return [Finding("source", "fail", text, step, absent=True)]
        kind, what = origin(now.current)
        found = [Finding("source", "ok" if kind != "simulated" else "note", f"{now.current}: {what}")]
        if quantum and kind != "quantum":
            text = f"quantum=1 was asked for, and {now.current} is not"
            return [*found, Finding("kind", "fail", text, "leave quantum=1 out, or choose another source")]
        found += examine_node(NODE, RULE)
        if found[-1].verdict != "fail":
            text = "the kernel's own thread takes bytes from the same source too"
            found.append(Finding("kernel thread", "note", text, "each byte goes to one of you; expect less than its rate"))
        return found


def _usable() -> Sources:
    now = sources()
    if now is None or not now.current:
        available = ", ".join(now.available) if now else ""
        raise DeviceNotFound(
            f"hwrng: the kernel has no hardware generator in use (available: {available or 'none'}); load the kernel module "
            "of your device, or pass one through to the virtual machine"
        )
    return now


def _is_hwrng(fd: int) -> None:
    about, listed = os.fstat(fd), _attribute("dev")
    if f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}" != listed:
        raise SourceError(f"hwrng: {NODE} is not the kernel's hardware generator (device {listed}): it is a look-alike")


def state(path: str) -> str:
    """A node in few words, without opening it."""
    if not os.path.exists(path):
        return "no device node"
    if not os.access(path, os.R_OK):
        return "no permission"
    others = holders(path)
    return f"in use by {in_words(others)}" if others else "ready"


def examine_node(path: str, rule: str) -> list[Finding]:
    """Node, permission and other processes; rule: as in `permission_hint`."""
    if not os.path.exists(path):
        return [Finding("node", "fail", f"{path} does not exist", "a container needs the node passed in", absent=True)]
    found = [Finding("node", "ok", f"{path} is there")]
    if not os.access(path, os.R_OK):
        return [*found, Finding("permission", "fail", f"{path} may not be read by this user", permission_hint(rule))]
    found.append(Finding("permission", "ok", "this user may read it"))
    others = holders(path)
    if others:
        return [*found, Finding("other process", "note", f"{in_words(others)} has it open", "each byte goes to one of you")]
    return [*found, Finding("other process", "ok", "no other process that can be seen has it open")]
