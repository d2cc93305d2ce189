"""ComScire's generators by their serial numbers: which are meant as sources of random bits, and which are not.

They carry FTDI's own USB identity; what they are stands in the serial number alone, QWR and then the generation. Sources:
the vendor's library (github vfp2/go-comscire @51c60bd, `qwqng.cpp`, V) for generations; github vfp2/MeterFeeder
@d4811b7, `MED_DEVICES.md` (D) for the letter in the fifth place. Rates are of the product names and pages (D); what was
not found is None.
"""

from dataclasses import dataclass

from ..errors import SourceError

IDS = {(0x0403, 0x6001), (0x0403, 0x6014)}
PREFIX = "QWR"


@dataclass(frozen=True)
class Model:
    """conditioned: whether the device processes its bits; None where that is not known. refused: why it is no source."""

    name: str
    generation: int
    rate_bytes_per_s: float | None = None
    conditioned: bool | None = None
    refused: str = ""


_BY_FOURTH = {
    "1": Model("ComScire, first generation", 1),
    "2": Model("R2000KU", 2, 2e6 / 8),
    "3": Model("R32MU", 2, 32e6 / 8),
    "4": Model("PQ4000KU", 3, 4e6 / 8),
    "5": Model("PQ32MU", 3, 32e6 / 8),
    "6": Model("PQ4000KS", 3, 4e6 / 8),
    "7": Model("PQ128MU", 4, 128e6 / 8, conditioned=False),  # "no postprocessing"
    "8": Model("ComScire, fifth generation", 5),
}


def _amplified(times: int) -> str:
    return f"it amplifies its bias {times} times on purpose, so that its bits are far from uniform"


# The fifth character of QWR4...: mind-matter research devices ("MED") beside the generators.
_BY_FIFTH = {
    "A": Model("MED100K", 3, refused=_amplified(36)),
    "B": Model("MED100Kx3", 3, refused=_amplified(62)),
    "C": Model("MED1Kx3", 3, refused=_amplified(320)),
    "D": Model("MED100Kx4", 3, refused=_amplified(72)),
    "E": Model("MED100Kx8", 3, refused=_amplified(101)),
    "P": Model("MED100KP", 3, refused="its output is purely pseudo-random, a baseline for experiments"),
    "M": Model("PQ4000KM", 3, 4e6 / 8, conditioned=False),  # "no deterministic postprocessing"
    "R": Model("MED100KR", 3, 100e3 / 8, conditioned=False),  # likewise
    "X": Model("MED100KX", 3, 100e3 / 8, conditioned=True),  # "special XOr processing"
}


def model_of(serial: str, unlisted: bool = False) -> Model:
    """The model that a serial number stands for; SourceError for one that is no source of random bits, or not known.

    unlisted: take one with a letter that is not in the list; such a letter may stand for a new kind of amplification.
    """
    model = _BY_FOURTH.get(serial[3:4])
    if not serial.startswith(PREFIX) or model is None:
        raise SourceError(f"serial number {serial!r} is of no known ComScire generator ({PREFIX} and a digit 1 to 8)")
    fifth = serial[4:5]
    if serial[3] == "4" and fifth in _BY_FIFTH:
        model = _BY_FIFTH[fifth]
    elif serial[3] == "4" and fifth.isalpha() and not unlisted:
        raise SourceError(
            f"{serial} is a model that is not in the list: its letter {fifth} may mean that its bias is amplified. If you "
            "know that it is not, add unlisted=1"
        )
    if model.refused:
        raise SourceError(f"{serial} is a {model.name}, and no source of random bits: {model.refused}")
    return model
