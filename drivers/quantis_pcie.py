"""`quantis-pcie:0`: ID Quantique's Quantis PCI and PCIe cards, optical quantum generators of 4 to 240 Mbit/s.

`quantis-pcie:` takes the only card, `quantis-pcie:1` or `quantis-pcie:/dev/qrandom1` a node, `quantis-pcie:SERIAL` the
card with that serial number or PCI address. `modules=0x7` says which modules or chips have to work, for a card on which
one is known to be dead; by default all that the card has.

A node counts as quantum only with the proof of `quantis_card`. `unproven=1` opens a pipe, a link or a foreign character
device all the same: nothing then shows what feeds it, a program with a pseudo-random generator would look no different,
so its kind is `simulated`, the weakest there is.

Chip cards have two modes, shared by everyone who uses the card: RNG (processed in the card) and SAMPLE (unprocessed).
The mode is recorded; a change while the card is open ends the source, as what is claimed of its bytes changes with it.
"""

from dataclasses import replace

from ..errors import SourceError
from . import quantis_card
from .char_node import NodeDriver, ReadPlan, lock_node
from .contract import Attached, DeviceFault, Finding, MinEntropy, TransportError
from .quantis_card import Identity
from .quantis_doctor import findings
from .quantis_ioctl import (
    AIS31_FLAG,
    CURRENT_MODE,
    MODES,
    MODULE_BITS,
    MODULES_STATUS,
    PACKET_ERROR_BITS,
    Card,
    mode_in_words,
    modules,
)
from .quantis_open import SCHEME, OpenCard, open_card, path_of, row
from .uri import SourceURI, parse_flag

_KiB = 1024
# Module cards: 64 KiB is the most that a read returns, and takes 131 ms of one module; 16 KiB keep the checks frequent.
_MODULE_PLAN = ReadPlan(16 * _KiB, 16, 64 * _KiB, check_bytes=64 * _KiB, check_s=0.1)
# Chip cards: the first read has to be large (the driver throws away 64 KiB in RNG and 16 MiB in SAMPLE mode in pieces of
# what it asks for), and a look at the chips costs 1 ms of spinning in the driver: every 100 ms, or 52 and 35 ms of bytes.
_CHIP_PLANS = {
    2: ReadPlan(64 * _KiB, 16, 1024 * _KiB, check_bytes=256 * _KiB, check_s=0.1),
    12: ReadPlan(256 * _KiB, 8, 1024 * _KiB, check_bytes=1024 * _KiB, check_s=0.1),
}
# A pipe holds 64 KiB. When the reader in Python waits 5 ms for the GIL twice, 4 MiB are 400 MB/s.
_UNPROVEN_PLAN = ReadPlan(64 * _KiB, 64, 1024 * _KiB, lock=False)
_AIS31 = "AIS-31 start-up test"


def parse_modules(text: str) -> int:
    """A mask of modules, bit 0 the first: `0x7` or `7`."""
    try:
        mask = int(text, 0)
    except ValueError:
        mask = 0
    if not 0 < mask <= MODULE_BITS:
        raise ValueError("a mask of modules such as 0x7, from 1 to 0xfff")
    return mask


class QuantisPcieDriver(NodeDriver):
    """See the module. No certificate covers these cards: 4 bits of min-entropy a byte, until the user claims otherwise."""

    scheme = SCHEME
    parameters = {"unproven": parse_flag, "modules": parse_modules}
    looks_for = "ID Quantique Quantis PCI/PCIe (PCI 179a:0001, 1e89:0002, 1e89:0003) with its kernel driver loaded"
    kind = "quantum"
    name = "Quantis PCIe"

    def __init__(self, card: OpenCard, wanted_modules: int | None = None, min_entropy: MinEntropy = NodeDriver.min_entropy):
        """Takes over `card`, and closes it on an error."""
        super().__init__()
        self.min_entropy = min_entropy
        self._modules = wanted_modules or 0
        self._ais31_asked = False
        self._card: OpenCard | None = None  # as it said when it was connected last
        self._connect(card)

    @classmethod
    def open(cls, uri: SourceURI) -> "QuantisPcieDriver":
        values = uri.parameters(cls.parameters)
        card = open_card(path_of(uri), values.get("unproven", False))
        return cls(card, values.get("modules"), cls.claim(values))

    @classmethod
    def attached(cls) -> list[Attached]:
        return [row(node) for node in quantis_card.nodes()]

    # --- opening ---

    def _connect(self, card: OpenCard) -> None:
        try:
            if card.identity is None:
                self._connect_unproven(card)
            else:
                self._connect_proven(card, card.identity)
        except BaseException:
            card.close()
            raise
        self._card, self._fd, self._path = card, card.fd, card.path

    def _connect_unproven(self, card: OpenCard) -> None:
        self.kind = "simulated"
        self.name = f"unproven node {card.path} (nothing shows that a Quantis feeds it)"
        self.serial = card.path
        self.conditioned = True  # unknown: claims the least for the health tests
        self._plan = _UNPROVEN_PLAN
        self.chunk_bytes = _UNPROVEN_PLAN.slot_bytes * _UNPROVEN_PLAN.slots
        self.details = {"proof": f"none (unproven=1): {card.why}"}

    def _connect_proven(self, card: OpenCard, identity: Identity) -> None:
        model = identity.model
        self.serial = card.serial or identity.pci
        self.name = f"{model.name} {self.serial or card.path}"
        if self._card is not None and card.mode != self._card.mode:
            raise SourceError(_mode_changed(self.name, self._card.mode, card.mode))
        if card.mode is not None and card.mode not in MODES:
            raise SourceError(f"{self.name} says that it is in mode {card.mode}; known are 0 (RNG) and 1 (SAMPLE)")
        # The same after a reconnection: a module that does not come back is missed.
        self._modules = self._modules or (1 << model.chips) - 1 or card.mask
        if not self._modules:
            raise SourceError(f"{self.name} has no modules; check that the card sits well in its slot")
        if (card.status ^ self._modules) & self._care:
            raise self._fault(card.status)
        self.conditioned = bool(model.chips) and card.mode != 1
        self.rate_bytes_per_s = model.rate(self._modules)
        self._ais31_asked = bool(card.ais31)  # the start-up test runs now anyway, and is reported when it has passed
        self._plan = self._plan_of(card)
        self.chunk_bytes = max(64 * _KiB, self._plan.check_bytes)
        self.details = {
            "driver": f"{model.kernel_module} {card.driver}",
            "board": card.board,
            "modules": self._working(card),
            "mode": mode_in_words(card.mode, model.chips),
            "proof": identity.proof,
            **({_AIS31: "asked for by the card" if card.ais31 else "not asked for"} if card.ais31 is not None else {}),
        }

    @property
    def _care(self) -> int:
        """The bits of a status word that count: the wanted modules', and their packet errors'."""
        return self._modules | (self._modules << 20 & PACKET_ERROR_BITS)

    def _working(self, card: OpenCard) -> str:
        return f"{modules(self._modules)} work" + f" of {modules(card.mask)}" * (card.mask != self._modules)

    def _plan_of(self, card: OpenCard) -> ReadPlan:
        every = (1 << 32) - 1
        checks = [(MODULES_STATUS, self._care, self._modules)]
        if card.mode is not None:
            checks.append((CURRENT_MODE, every, card.mode))
        if card.ais31 is not None and not self._ais31_asked:
            checks.append((AIS31_FLAG, every, 0))
        chips = card.identity.model.chips
        return replace(_CHIP_PLANS[chips] if chips else _MODULE_PLAN, checks=tuple(checks))

    # --- what the card says between reads ---

    def _fault(self, status: int) -> DeviceFault:
        missing = self._modules & ~status | (status >> 20 & self._modules)
        return DeviceFault(
            f"{self.name}: of modules {modules(self._modules)}, {modules(missing)} failed (status {status:#x}). Have the "
            f"card checked; modules={self._modules & ~missing:#x} goes on without, if you accept that",
            status & self._care,
            self._modules,
        )

    def _deviation(self, check: int, answer: int) -> SourceError:
        number, _, expected = self._plan.checks[check]
        if number == MODULES_STATUS:
            fault = self._fault(answer)
            self._say(modules=f"{modules(self._modules)} wanted, status {answer:#x}")
            return fault
        if number == CURRENT_MODE:
            return SourceError(_mode_changed(self.name, expected, answer))
        self._ais31_asked = True
        self._plan = self._plan_of(self._card)
        self._say(**{_AIS31: "asked for by the card"})
        return TransportError(f"{self.name} asks for its start-up test (AIS-31 flag), which begins anew")

    def startup_passed(self) -> None:
        with self._changing:
            if self._fd is None or self._card.identity is None:
                return
            self._say(modules=self._working(self._card))
            if not self._ais31_asked:
                return
            card, words = Card(self._fd), "passed"
            try:
                card.clear_ais31()
                self._ais31_asked = card.word(AIS31_FLAG) != 0
            except OSError as error:
                words += f" ({error.strerror} when it was reported)"
            # A flag that cannot be cleared is remembered as set: it would ask without end.
            self._say(**{_AIS31: words + (", but the card's flag stays set" if self._ais31_asked else "")})
            self._plan = self._plan_of(self._card)
            self._stop_reading()  # it would not look at the flag

    # --- loss ---

    def _look(self) -> str:
        if self._card.identity is None:
            raise SourceError("an unproven node cannot be told from another one; open the source anew")
        if not self.serial:
            raise SourceError("several cards without serial number cannot be told apart; open the source anew")
        why = "is not there"
        for node in quantis_card.nodes():
            here = node.path == self._path or node.identity.pci == self._card.identity.pci != ""
            try:
                card = open_card(node.path, lock=False)  # most likely another one, which others may want to open now
            except SourceError as error:  # udev has not given permission yet
                why = f"is there, but: {error}" if here else why
                continue
            serial = card.serial or card.identity.pci
            if serial == self.serial:
                return self._connect_again(card)
            card.close()
            if here:
                raise SourceError(
                    f"where {self.serial} was there is now {serial or 'a card without serial number'}, another card; put "
                    "the first one back, or open the source anew"
                )
        return why

    def _connect_again(self, card: OpenCard) -> str:
        try:
            lock_node(card.fd, card.path, SCHEME)
        except SourceError as error:
            card.close()
            return f"is there, but: {error}"
        try:
            self._connect(card)
        except DeviceFault as error:  # its modules warm up
            return f"is there, but: {error}"
        return ""

    # --- the doctor ---

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        values = uri.parameters(cls.parameters)
        return list(findings(uri, values.get("unproven", False), values.get("modules")))


def _mode_changed(name: str, before: int | None, after: int | None) -> str:
    return (
        f"{name} was put from mode {MODES.get(before, before)} into {MODES.get(after, after)} by someone who reset it; "
        "open the source anew to read it in that mode"
    )
