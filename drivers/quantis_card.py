"""Which Quantis PCI and PCIe cards there are, and the proof that a node is one of them.

`/dev/qrandom0` is a name that a daemon with a pseudo-random generator, a client of a web service and a phone's driver
have used too. A node is proven by the kernel, from its device number on: /sys/dev/char/MAJOR:MINOR is a device of the
class that only ID Quantique's drivers make, with the card's PCI identity behind it; and the open descriptor answers
their requests 0 and 3. Only a loaded kernel module could forge that.
"""

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from .quantis_ioctl import BOARD_VERSION, DRIVER_VERSION, Card

CHIP_CLASS = "quantis_chip_pcie"  # 20.2.4, xdma-core.c: nodes have the PCI device as parent
MODULE_CLASS = "qrandom"  # 2010 driver: nodes have no parent
_PROC = Path("/proc/qrandom")  # 2010 driver
_CHAR = Path("/sys/dev/char")
_CLASSES = Path("/sys/class")
_PCI = Path("/sys/bus/pci/devices")
MODULE_BYTES_PER_S = 500_000  # a module makes 4 Mbit/s


@dataclass(frozen=True)
class Model:
    """A kind of card. chips: how many it has, 0 for a module card, which says itself how many modules it has.

    The rate of chip cards is the data sheet's: the vendor's library counts 4 Mbit/s a chip, which is wrong for them.
    """

    name: str
    kernel_module: str
    chips: int = 0
    bytes_per_s: float | None = None

    def rate(self, mask: int) -> float:
        """Bytes a second of a card with these modules."""
        return self.bytes_per_s or float(MODULE_BYTES_PER_S * mask.bit_count())


MODELS = {
    (0x179A, 0x0001): Model("Quantis PCI/PCIe with modules", "quantis_pci"),
    (0x1E89, 0x0002): Model("Quantis PCIe-40M", CHIP_CLASS, 2, 5e6),
    (0x1E89, 0x0003): Model("Quantis PCIe-240M", CHIP_CLASS, 12, 30e6),
}
_MODULE_MODEL = (0x179A, 0x0001)


@dataclass(frozen=True)
class PciCard:
    """A card on the PCI bus. driver: the kernel driver bound to it, "" for none."""

    address: str
    model: Model
    driver: str


@dataclass(frozen=True)
class Identity:
    """What the kernel says of a proven node. pci: the card's address, "" when several module cards share a class that
    does not say which is which. proof: what was found, in words."""

    model: Model
    pci: str
    proof: str


@dataclass(frozen=True)
class Node:
    """A node that one of the drivers has made; whether it can be opened is another question."""

    path: str
    number: int
    identity: Identity


class NotQuantis(SourceError):
    """A node that is not proven to be a Quantis."""


def pci_cards() -> list[PciCard]:
    """All Quantis cards on the PCI bus, whether a driver serves them or not."""
    cards = []
    for place in sorted(_PCI.iterdir()) if _PCI.is_dir() else []:
        model = MODELS.get(_ids(place))
        if model is not None:
            bound = place / "driver"
            cards.append(PciCard(place.name, model, bound.resolve().name if bound.exists() else ""))
    return cards


def nodes() -> list[Node]:
    """The nodes of all cards that a driver serves, by number. Nothing is opened."""
    found = []
    for kind in (CHIP_CLASS, MODULE_CLASS):
        folder = _CLASSES / kind
        for place in folder.iterdir() if folder.is_dir() else []:
            name = re.fullmatch(r"qrandom(\d+)", place.name)
            try:
                major, minor = map(int, (place / "dev").read_text().split(":"))
                identity = _identity(major, minor)
            except (OSError, ValueError, NotQuantis):
                continue
            if name:
                found.append(Node(f"/dev/{place.name}", int(name[1]), identity))
    return sorted(found, key=lambda node: node.number)


def prove(fd: int) -> Identity:
    """The proof that an open descriptor is a Quantis card; NotQuantis says what is missing. OSError when the device
    behind it does not answer any more."""
    about = os.fstat(fd)
    if not stat.S_ISCHR(about.st_mode):
        raise NotQuantis("it is not a character device")
    identity = _identity(os.major(about.st_rdev), os.minor(about.st_rdev))
    card = Card(fd)
    try:
        card.word(DRIVER_VERSION)
        card.word(BOARD_VERSION)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        raise NotQuantis(f"it does not answer a Quantis driver's requests 0 and 3 ({error.strerror})") from error
    return identity


def _identity(major: int, minor: int) -> Identity:
    place = _CHAR / f"{major}:{minor}"
    kind = (place / "subsystem").resolve().name if (place / "subsystem").exists() else ""
    if kind == CHIP_CLASS:
        parent = (place / "device").resolve()
        model = MODELS.get(_ids(parent))
        if model is None or not model.chips:
            raise NotQuantis(f"the kernel shows no Quantis chip card behind device {major}:{minor}")
        return Identity(model, parent.name, f"{kind} device {major}:{minor} on PCI {parent.name}")
    if kind == MODULE_CLASS:
        cards = [card for card in pci_cards() if not card.model.chips]
        if not cards:
            raise NotQuantis(f"device {major}:{minor} is of class {kind}, but no card 179a:0001 is on the PCI bus")
        said = _proc_major()
        if said not in (None, major):
            raise NotQuantis(f"{_PROC} names {said} as the driver's major number, and the node's is {major}")
        where = cards[0].address if len(cards) == 1 else ""
        proof = f"{kind} device {major}:{minor}, PCI {', '.join(card.address for card in cards)}"
        return Identity(MODELS[_MODULE_MODEL], where, proof + (f", {_PROC}" if said == major else ""))
    raise NotQuantis(
        f"the kernel lists device {major}:{minor} under {f'class {kind}' if kind else 'no class'}, not under "
        f"{CHIP_CLASS} or {MODULE_CLASS}"
    )


def _proc_major() -> int | None:
    """The major number of the 2010 driver's nodes; None where it does not say."""
    try:
        found = re.search(r"device major number\s*:\s*(\d+)", _PROC.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def _ids(place: Path) -> tuple[int, int] | None:
    try:
        return int((place / "vendor").read_text(), 16), int((place / "device").read_text(), 16)
    except (OSError, ValueError):
        return None
