"""The questions that ID Quantique's kernel drivers answer: ioctl numbers, and what their answers mean.

Three drivers serve the PCI and PCIe cards: the module cards' driver up to 2010, its successor with more requests, and
the chip cards' driver (IDQ library 20.2.4). They share numbers 0 to 4 and 8; the rest differs, and a request that a
driver does not know is ENOTTY (module cards) or EINVAL (chip cards).
"""

import errno
import fcntl

_MAGIC = ord("q")
_READ, _WRITE = 2, 1  # directions in Linux's ioctl numbers, seen from the caller


def request(number: int, direction: int = _READ, size: int = 4) -> int:
    """Linux's ioctl number for a Quantis request: direction, argument size, magic 'q' and number in one word."""
    return direction << 30 | size << 16 | _MAGIC << 8 | number


# IDQ library 20.2.4, quantis_ioctl.h; each reads an unsigned 32-bit word unless said otherwise.
DRIVER_VERSION = request(0)
CARD_COUNT = request(1)
MODULES_MASK = request(2)  # the modules or chips that the card has; the chip driver writes a log line each time
BOARD_VERSION = request(3)
MODULES_STATUS = request(8)  # those of them that work; on chip cards the driver spins for 1 ms first
PCI_ID = request(9)  # module cards, newer drivers
AIS31_FLAG = request(10)  # likewise
AIS31_CLEAR = request(11, _WRITE)  # likewise
SERIAL_BYTES = 256
SERIAL = request(12, _READ, SERIAL_BYTES)  # text; chip cards, and module cards with a newer driver
CURRENT_MODE = request(15)  # chip cards

MODES = {0: "RNG", 1: "SAMPLE"}
MODULE_BITS = 0xFFF  # four modules, or up to twelve chips
# The chip driver gives the working chips only; its register also has packet errors, one bit a chip. A driver that hands
# the register out as it is must not pass as healthy, so these bits have to be clear.
PACKET_ERROR_BITS = 0xFFF00000


class Card:
    """An open node of a Quantis card, and its answers. Every method raises OSError as ioctl(2) does, when the driver
    does not know the request too, unless it says that it answers None then."""

    def __init__(self, fd: int):
        self.fd = fd

    def word(self, number: int) -> int:
        """The 32-bit word that answers a request of this module."""
        return int.from_bytes(fcntl.ioctl(self.fd, number, bytes(4)), "little")

    def word_if_known(self, number: int) -> int | None:
        """As `word`; None when this driver does not know the request."""
        try:
            return self.word(number)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            raise

    def serial(self) -> str | None:
        """The serial number; None when the driver does not know the request or the card has none."""
        try:
            return decode_serial(fcntl.ioctl(self.fd, SERIAL, bytes(SERIAL_BYTES)))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            raise

    def clear_ais31(self) -> None:
        """Tells the card that its start-up test has passed. The vendor's library passes no argument either."""
        fcntl.ioctl(self.fd, AIS31_CLEAR, 0)


def decode_serial(answer: bytes) -> str | None:
    """The text up to the first NUL: what comes after it is whatever lay on the driver's stack. None when there is no
    text, or none that is printable ASCII (an unprogrammed card answers 0x00 or 0xFF)."""
    text = answer.split(b"\0", 1)[0]
    if not text or not all(0x21 <= byte <= 0x7E for byte in text):
        return None
    return text.decode("ascii")


def driver_version(word: int) -> str:
    """`20.2` for 202."""
    return f"{word // 10}.{word % 10}"


def chip_board_version(word: int) -> str:
    """PCB revision in the top byte, then the three numbers of the firmware (20.2.4, idq-rng.c)."""
    return f"PCB {word >> 24}, firmware {word >> 16 & 255}.{word >> 8 & 255}.{word & 255}"


def modules(mask: int) -> str:
    """`0, 2 and 3` for 0b1101, `0 to 11` for 0xfff."""
    numbers = [n for n in range(32) if mask >> n & 1]
    if not numbers:
        return "none"
    if len(numbers) > 2 and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]} to {numbers[-1]}"
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def mode_in_words(mode: int | None, chips: int) -> str:
    """What a card's bytes are. mode: None where the driver does not say. chips: 0 for a module card, which has no modes."""
    if not chips:
        return "module output, as it is"
    if mode is None:
        return "unknown (the driver does not say)"
    return f"{MODES.get(mode, mode)} ({'unprocessed' if mode == 1 else 'processed in the card'})"
