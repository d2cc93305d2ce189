"""Source URIs: `scheme:rest?key=value&key=value`, and for schemes with nothing to name `scheme:key=value,key=value`.

`rest` is literal up to the first `?` except for %XX escapes, so a path with a question mark writes it as %3F.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from urllib.parse import unquote

from ..errors import BadParameter

_SIZE_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_RATE_UNITS = {
    "bit/s": 1 / 8, "kbit/s": 1e3 / 8, "Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8, "B/s": 1, "kB/s": 1e3, "MB/s": 1e6,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes: `4096`, `64KiB`, `1MiB`, `2MB`."""
    found = re.fullmatch(r"(\d+)([A-Za-z]*)", text)
    if not found or found[2] not in _SIZE_UNITS:
        raise ValueError("a size in bytes, such as 4096, 64KiB or 1MiB")
    return int(found[1]) * _SIZE_UNITS[found[2]]


def parse_rate(text: str) -> float:
    """Bytes per second: `4Mbit/s`, `500kB/s`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]+/s)", text)
    if not found or found[2] not in _RATE_UNITS or float(found[1]) == 0:
        raise ValueError("a rate such as 4Mbit/s or 500kB/s")
    return float(found[1]) * _RATE_UNITS[found[2]]


def parse_flag(text: str) -> bool:
    """`1` or `0`."""
    if text not in ("0", "1"):
        raise ValueError("1 or 0")
    return text == "1"


def parse_count(text: str) -> int:
    """A whole number, not negative."""
    if not re.fullmatch(r"\d{1,19}", text):
        raise ValueError("a whole number")
    return int(text)


def parse_min_entropy(text: str) -> Fraction:
    """Bits of min-entropy a raw byte, above 0 and at most 8, as exactly the decimal that was written."""
    if not re.fullmatch(r"\d+(\.\d{1,12})?", text) or not 0 < Fraction(text) <= 8:
        raise ValueError("bits of min-entropy a byte, above 0 and at most 8")
    return Fraction(text)


def parse_condition(text: str) -> str:
    """`sha256` or `none`."""
    if text not in ("sha256", "none"):
        raise ValueError("sha256, or none for a source that declares full entropy")
    return text


# What every source takes, whatever its driver.
COMMON: Mapping[str, Callable[[str], object]] = {"h": parse_min_entropy, "condition": parse_condition}


@dataclass(frozen=True)
class SourceURI:
    """A URI in its parts; `given` holds the parameters as text until `parameters` has parsed them."""

    text: str
    scheme: str
    rest: str
    given: Mapping[str, str] = field(default_factory=dict)

    def parameters(self, known: Mapping[str, Callable[[str], object]]) -> dict[str, object]:
        """The given parameters, parsed; raises BadParameter naming one that is unknown or malformed."""
        known = {**COMMON, **known}
        values = {}
        for name, text in self.given.items():
            if name not in known:
                raise BadParameter(f"unknown parameter {name!r} in {self.text!r}; {self.scheme}: takes {_list(known)}")
            try:
                values[name] = known[name](text)
            except ValueError as error:
                raise BadParameter(f"{name}={text} in {self.text!r} is malformed: it must be {error}") from None
        return values


def _list(names) -> str:
    return ", ".join(sorted(names))


def parse_uri(text: str) -> SourceURI:
    """Cuts a URI into scheme, rest and parameters; raises BadParameter for one that has no such form."""
    if not isinstance(text, str):
        raise TypeError(f"a source is named by a string such as 'replay:FILE', not by {type(text).__name__}")
    scheme, colon, rest = text.partition(":")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", scheme) or (not colon and scheme != "auto"):
        raise BadParameter(f"{text!r} is not a source URI; write scheme:rest, such as 'replay:FILE' or 'sim:seed=7'")
    rest, _, query = rest.partition("?")
    pieces = [p for p in query.split("&")] if query else []
    if re.match(r"[a-z_]+=", rest):  # the form with commas
        pieces = rest.split(",") + pieces
        rest = ""
    given: dict[str, str] = {}
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals or not name or not value:
            raise BadParameter(f"{piece!r} in {text!r} is not of the form name=value")
        if name in given:
            raise BadParameter(f"parameter {name!r} is given twice in {text!r}")
        given[name] = value
    return SourceURI(text, scheme, unquote(rest), given)
