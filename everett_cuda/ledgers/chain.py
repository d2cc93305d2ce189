"""The lines of a ledger: canonical JSON, each with the SHA-256 of the line before it.

A line that is changed, taken out, put in or moved changes every hash behind it, so the last hash stands for the file.
Canonical: ASCII, keys sorted, no spaces, no floats (whose text differs between programs); a line that would be written
differently is refused, so there is one file for one content. docs/ledger.md has the format.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LedgerError
from .schema import check

FORMAT = "everett ledger 1"
FIRST = "0" * 64  # the hash before the first line
# A ledger is read by whoever was given it: nothing in it may take much memory before it is known to be one.
MAX_LINE = 1 << 20


def _check(value: object, where: str) -> None:
    """TypeError or ValueError for what has no canonical form."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: a key must be text, not {key!r}")
            _check(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _check(inner, f"{where}[{i}]")
    elif isinstance(value, float) or not isinstance(value, (str, int, bool, type(None))):
        raise TypeError(f"{where}: a ledger holds text, integers, true, false, null, lists and mappings, not {value!r}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {value} has more than 64 bits")


def encode(record: Mapping) -> bytes:
    """The one line (without its line feed) that stands for `record`; TypeError, ValueError for what has none."""
    _check(record, "record")
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def decode(line: bytes) -> dict:
    """The record of a line; ValueError says why it is none."""
    try:
        record = json.loads(line.decode("ascii"))
        if not isinstance(record, dict):
            raise ValueError("it is no record")
        canonical = encode(record)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    except UnicodeDecodeError:
        raise ValueError("it is not ASCII") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if canonical != line:
        raise ValueError("it is not in canonical form")
    return record


def hash_of(line: bytes) -> str:
    """64 hexadecimal digits for a line without its line feed."""
    return hashlib.sha256(line).hexdigest()


@dataclass
class Chain:
    """The end of a chain of lines: how many there are, and the hash of the last."""

    n: int = 0
    head: str = FIRST

    def line(self, record: Mapping) -> bytes:
        """`record` as the next line, with its number `n` and the hash `prev`; the chain does not move yet."""
        return encode({**record, "n": self.n, "prev": self.head})

    def moved(self, line: bytes) -> "Chain":
        """The chain behind `line`."""
        return Chain(self.n + 1, hash_of(line))


@dataclass
class Reading:
    """What was read of a file, as far as the chain holds.

    heads: the hash of each record's line. torn: bytes behind the last line feed, which a kill in the middle of a write
    leaves. damage: why the reading ended before the end of the file; empty if it did not.
    """

    path: Path
    records: list[dict] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    torn: int = 0
    damage: str = ""


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            yield line


def read_chain(path: Path) -> Reading:
    """Reads a ledger up to its end, or to the first line that breaks the chain. LedgerError for a file that is none."""
    if not path.is_file():
        raise LedgerError(f"{path} is not a file")
    reading, chain = Reading(path), Chain()
    for text in _lines(path):
        number = chain.n + 1  # as editors count
        if not text.endswith(b"\n"):
            if len(text) == MAX_LINE:
                reading.damage = f"line {number} is longer than {MAX_LINE} bytes"
            else:
                reading.torn = len(text)
            break
        line = text[:-1]
        try:
            record = decode(line)
            if (record.get("n"), record.get("prev")) != (chain.n, chain.head):
                raise ValueError("it does not follow the line before it")
            if chain.n == 0 and (record.get("type"), record.get("format")) != ("begin", FORMAT):
                raise LedgerError(f"{path} is no ledger of this version: it must begin with {FORMAT!r}")
            check(record)
        except ValueError as error:
            if chain.n == 0:
                raise LedgerError(f"{path} is no ledger: its first line is refused, {error}") from None
            reading.damage = f"line {number}: {error}"
            break
        chain = chain.moved(line)
        reading.records.append(record)
        reading.heads.append(chain.head)
    if not reading.records:
        raise LedgerError(f"{path} is no ledger: it has no whole line")
    return reading
