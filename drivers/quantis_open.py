"""A Quantis card opened: locked, proven and asked; and one card chosen among those that are there."""

import os
from dataclasses import dataclass
from urllib.parse import quote

from ..errors import DeviceNotFound, SourceError
from . import quantis_card
from .char_node import answer_within, lock_node, open_node
from .contract import Attached, DeviceLost
from .permission import holders, in_words
from .quantis_card import CHIP_CLASS, MODULE_CLASS, Identity, Node, NotQuantis
from .quantis_ioctl import (
    AIS31_FLAG,
    BOARD_VERSION,
    CURRENT_MODE,
    DRIVER_VERSION,
    MODULES_MASK,
    MODULES_STATUS,
    Card,
    chip_board_version,
    driver_version,
)
from .uri import SourceURI

SCHEME = "quantis-pcie"
_LARGEST_NUMBER = 999  # what is longer than three digits is a serial number


@dataclass
class OpenCard:
    """An open and locked node, and what it says of itself. identity: None for an unproven one, `why` says why."""

    fd: int
    path: str
    identity: Identity | None
    why: str = ""
    driver: str = ""
    board: str = ""
    serial: str = ""
    mask: int = 0
    status: int = 0
    mode: int | None = None
    ais31: bool | None = None  # None: the driver does not know the flag

    def close(self) -> None:
        os.close(self.fd)

def open_card(path: str, unproven: bool = False, lock: bool = True) -> OpenCard:
    """Opens, proves, locks and asks. SourceError says why not: NotQuantis where the proof is missing and unproven is
    False. A card whose driver hangs is given up after a few seconds."""
    return answer_within(lambda: _ask(path, unproven, lock), path, OpenCard.close)


def _ask(path: str, unproven: bool, lock: bool) -> OpenCard:
    fd = open_node(path, SCHEME, rule_of(path), follow=unproven)
    try:
        try:
            identity, why = quantis_card.prove(fd), ""
        except NotQuantis as error:
            if not unproven:
                raise NotQuantis(
                    f"{SCHEME}: {path} is not proven to be a Quantis: {error}. A pseudo-random program may stand behind "
                    "such a name; unproven=1 reads it all the same, and never calls it quantum"
                ) from error
            identity, why = None, str(error)
        if lock:
            lock_node(fd, path, SCHEME)
        return OpenCard(fd, path, None, why) if identity is None else _ask_proven(fd, path, identity)
    except OSError as error:
        os.close(fd)
        raise DeviceLost(f"{SCHEME}: {path} stopped answering ({error.strerror}); look at `dmesg`") from error
    except BaseException:
        os.close(fd)
        raise


def _ask_proven(fd: int, path: str, identity: Identity) -> OpenCard:
    card = Card(fd)
    chips = identity.model.chips
    board = card.word(BOARD_VERSION)
    flag = None if chips else card.word_if_known(AIS31_FLAG)
    return OpenCard(
        fd,
        path,
        identity,
        driver=driver_version(card.word(DRIVER_VERSION)),
        board=chip_board_version(board) if chips else f"core {board:#010x}",
        serial=card.serial() or "",
        mask=card.word(MODULES_MASK),
        status=card.word(MODULES_STATUS),
        mode=card.word_if_known(CURRENT_MODE) if chips else None,
        ais31=None if flag is None else flag != 0,
    )


def rule_of(path: str) -> str:
    """The class whose udev rule serves this node."""
    chips = {node.path: node.identity.model.chips for node in quantis_card.nodes()}
    return CHIP_CLASS if chips.get(path, 1) else MODULE_CLASS


# --- one card among others ---


def row(node: Node) -> Attached:
    """How `everett devices` lists a node. It is opened to be asked for its serial number, and not read."""
    model, serial, rate, state = node.identity.model, "", None, "ready"
    others = holders(node.path)
    if not os.path.exists(node.path):
        state = "no device node"
    elif not os.access(node.path, os.R_OK):
        state = "no permission"
    elif others:
        state = f"in use by {in_words(others)}"
    else:
        try:
            card = open_card(node.path, lock=False)
        except SourceError as error:
            state = str(error)
        else:
            serial, rate = card.serial, model.rate(card.mask)
            card.close()
    which = quote(serial, safe="") if serial else str(node.number)
    return Attached(f"{SCHEME}:{which}", model.name, serial or node.identity.pci, "quantum", rate, state)


def path_of(uri: SourceURI) -> str:
    """The node that a URI names; DeviceNotFound when there is none, SourceError when there are several."""
    rest = uri.rest
    if rest.startswith("/"):
        return rest
    if rest.isdigit() and int(rest) <= _LARGEST_NUMBER:
        return f"/dev/qrandom{int(rest)}"
    rows = [(node, row(node)) for node in quantis_card.nodes()]
    wanted = [node for node, about in rows if rest in ("", about.serial, node.identity.pci)]
    if len(wanted) == 1:
        return wanted[0].path
    there = ", ".join(f"{about.uri} ({about.state})" for _, about in rows) or "none"
    if wanted:
        raise SourceError(f"{uri.text}: {len(wanted)} cards are there; name one of {there}")
    raise DeviceNotFound(f"{uri.text}: there is no such Quantis card (there are: {there}). {no_card()}")


def no_card() -> str:
    """What to do when a card has no node, from what is on the PCI bus."""
    cards = quantis_card.pci_cards()
    return " ".join(
        f"{card.model.name} at PCI {card.address} has {card.driver or 'no driver'} bound to it; it needs the kernel "
        f"module {card.model.kernel_module}, built for this kernel and loaded."
        for card in cards
        if card.driver != card.model.kernel_module
    ) or (
        "Look at `dmesg` for what its kernel module says."
        if cards
        else "`lspci -d 1e89:` and `lspci -d 179a:` must list the card; a virtual machine needs it passed through."
    )
