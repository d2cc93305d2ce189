"""What the doctor finds between the PCI slot and a Quantis card that can be opened."""

import os
import stat
from collections.abc import Iterator

from ..errors import DeviceNotFound, SourceError
from . import quantis_card
from .char_node import lock_node
from .contract import Finding
from .permission import holders, in_words, permission_hint
from .quantis_card import NotQuantis
from .quantis_ioctl import mode_in_words, modules
from .quantis_open import SCHEME, OpenCard, no_card, open_card, path_of, rule_of
from .uri import SourceURI


def findings(uri: SourceURI, unproven: bool, wanted_modules: int | None) -> Iterator[Finding]:
    """Card, kernel driver, node, permission, other processes, proof, firmware, mode, modules; ends at the first fail."""
    if not unproven:
        cards = quantis_card.pci_cards()
        if not cards:
            yield Finding("card", "fail", "no Quantis card is on the PCI bus", no_card(), absent=True)
            return
        yield Finding("card", "ok", ", ".join(f"{card.model.name} at PCI {card.address}" for card in cards))
        for card in cards:
            text = f"PCI {card.address} is served by {card.driver or 'no driver'}"
            if card.driver == card.model.kernel_module:
                yield Finding("kernel driver", "ok", text)
            elif not quantis_card.nodes():
                yield Finding("kernel driver", "fail", text, no_card())
                return
            else:
                yield Finding("kernel driver", "note", text, f"if this card is meant, load {card.model.kernel_module}")
    try:
        path = path_of(uri)
        mode = os.lstat(path).st_mode
    except SourceError as error:
        yield Finding("node", "fail", str(error), "name a card that is there", isinstance(error, DeviceNotFound))
        return
    except OSError as error:
        step = "see `ls -l /dev/qrandom*`; a container needs the node"
        yield Finding("node", "fail", f"{path}: {error.strerror}", step, absent=True)
        return
    if not stat.S_ISCHR(mode) and not unproven:
        yield Finding("node", "fail", f"{path} is {_kind(mode)}, not a character device", "name the driver's own node")
        return
    yield Finding("node", "ok", f"{path} is {_kind(mode)}")
    if not os.access(path, os.R_OK):
        yield Finding("permission", "fail", f"{path} may not be read by this user", permission_hint(rule_of(path)))
        return
    yield Finding("permission", "ok", "this user may read it")
    try:
        card = open_card(path, unproven, lock=False)
    except NotQuantis as error:
        yield Finding("proof", "fail", str(error), "name the node that the card's own driver made")
        return
    except SourceError as error:
        yield Finding("answers", "fail", str(error), "look at `dmesg`")
        return
    try:
        yield from _of_open_card(card, wanted_modules)
    finally:
        card.close()


def _of_open_card(card: OpenCard, wanted_modules: int | None) -> Iterator[Finding]:
    others = holders(card.path, own=1)
    try:
        lock_node(card.fd, card.path, SCHEME)
    except SourceError as error:
        yield Finding("other process", "fail", str(error), "close that first: a card serves one source")
        return
    if others:
        text = f"{in_words(others)} has it open too"
        yield Finding("other process", "note", text, "each byte goes to one of you, and a reset by one is felt by all")
    else:
        yield Finding("other process", "ok", "no other process that can be seen has it open")
    if card.identity is None:
        yield Finding("proof", "note", f"none: {card.why}", "without unproven=1 it is refused; it never counts as quantum")
        return
    model = card.identity.model
    yield Finding("proof", "ok", card.identity.proof)
    serial = card.serial or "no serial number"
    yield Finding("firmware", "ok", f"{serial}, board {card.board}, driver {card.driver}")
    if model.chips and card.mode != 1:
        text = f"mode {mode_in_words(card.mode, model.chips)}: the health tests can see total failure only"
        yield Finding("mode", "note", text, "for the chips' own bits load the module with default_qrng_mode=1")
    else:
        yield Finding("mode", "ok", mode_in_words(card.mode, model.chips))
    wanted = wanted_modules or (1 << model.chips) - 1 or card.mask
    working = card.status & ~(card.status >> 20)
    if wanted & ~working or not wanted:
        text = f"{modules(wanted)} have to work, {modules(working)} do (status {card.status:#x})"
        yield Finding("modules", "fail", text, f"have the card checked; modules={wanted & working:#x} goes on without")
    else:
        yield Finding("modules", "ok", f"{modules(wanted)} work")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFCHR: "a character device", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe",
        stat.S_IFREG: "a regular file", stat.S_IFDIR: "a directory", stat.S_IFBLK: "a block device",
        stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")
