"""The sidecar of a recording: FILE.json, which says what FILE holds. `everett capture` writes it, `replay:FILE` reads it.

It is a claim, as good as the file is kept: nothing in it is signed. So a recording takes from it only what makes it more
careful (a lower min-entropy, a device that conditions) and what it cannot know otherwise (bit order, where it is from).
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from ..errors import SourceError

FORMAT = "everett recording 1"
_MOST_BYTES = 1 << 20
_KINDS = ("quantum", "quantum-remote", "electronic", "recorded", "simulated")


@dataclass(frozen=True)
class Sidecar:
    """What is known of a recording.

    uri, driver (its scheme), device, serial, kind, details: the source, as it described itself when it was opened.
    started_utc, ended_utc: ISO 8601. min_entropy: bits a raw byte that were claimed. gaps: the offsets in the file at
    which bytes of the device were lost (transport errors).
    """

    uri: str
    driver: str
    device: str
    serial: str
    kind: str
    details: Mapping[str, str]
    started_utc: str
    ended_utc: str
    bytes: int
    sha256: str
    min_entropy: float
    min_entropy_origin: str
    bit_order: str
    conditioned: bool
    gaps: list[int]
    recorded_by: str

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"


def path_of(recording: Path) -> Path:
    """Where the sidecar of a recording lies."""
    return recording.with_name(recording.name + ".json")


def read(recording: Path) -> Sidecar | None:
    """The sidecar of a recording, or None where there is none; SourceError for one that cannot be understood."""
    path = path_of(recording)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is not a regular file")
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from error
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        sidecar = Sidecar(**{f.name: values.get(f.name) for f in fields(Sidecar)})
        _check(sidecar)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, str(error)) from error
    return sidecar


def check_hash(file: BinaryIO, sidecar: Sidecar, recording: Path) -> None:
    """Reads the whole recording and compares its SHA-256; leaves the file at its start. SourceError if they differ."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    file.seek(0)
    if digest.hexdigest() != sidecar.sha256:
        raise _wrong(path_of(recording), f"it says sha256 {sidecar.sha256}, and {recording} has {digest.hexdigest()}")


def check_size(size: int, sidecar: Sidecar, recording: Path) -> None:
    """SourceError unless the recording has as many bytes as its sidecar says."""
    if size != sidecar.bytes:
        raise _wrong(path_of(recording), f"it says {sidecar.bytes} bytes, and {recording} has {size}")


def _wrong(path: Path, why: str) -> SourceError:
    return SourceError(
        f"replay: the sidecar {path} does not belong to the recording beside it: {why}; get both files again as they were "
        "recorded, or move the sidecar away to read the recording without it"
    )


def _check(s: Sidecar) -> None:
    """ValueError naming the first field whose value cannot be."""
    text = ("uri", "driver", "device", "serial", "kind", "started_utc", "ended_utc", "sha256", "min_entropy_origin",
            "bit_order", "recorded_by")  # fmt: skip
    rules = {name: isinstance(getattr(s, name), str) for name in text}
    rules["kind"] = s.kind in _KINDS
    rules["details"] = isinstance(s.details, dict) and all(isinstance(v, str) for v in s.details.values())
    rules["bytes"] = type(s.bytes) is int and s.bytes >= 0
    rules["sha256"] = isinstance(s.sha256, str) and len(s.sha256) == 64 and set(s.sha256) <= set("0123456789abcdef")
    rules["min_entropy"] = type(s.min_entropy) in (int, float) and 0 < s.min_entropy <= 8
    rules["bit_order"] = s.bit_order in ("msb_first", "lsb_first")
    rules["conditioned"] = type(s.conditioned) is bool
    rules["gaps"] = isinstance(s.gaps, list) and all(type(g) is int and g >= 0 for g in s.gaps)
    for name, holds in rules.items():
        if not holds:
            raise ValueError(f"its field {name!r} is {getattr(s, name)!r}")
