"""`replay:FILE`: a recording of raw bytes, read once from its start to its end.

Its bits are public to whoever has the file, so its kind is `recorded` whatever was recorded. It never wraps around
unless `loop=1` is given, which every status then shows. A sidecar FILE.json (see `sidecar`) must match: its size always,
its SHA-256 for recordings up to 64 MiB, or with `hash=1`.
"""

import os
import stat
from fractions import Fraction
from pathlib import Path

from ..errors import SourceError, SourceExhausted
from . import sidecar
from .contract import ASSUMED_MIN_ENTROPY, Driver, EndOfRecording, Finding, MinEntropy
from .uri import SourceURI, parse_flag

HASHED_UNASKED_BYTES = 64 << 20  # about 0.1 s


class ReplayDriver(Driver):
    """Reads a regular file; parameters: `loop=1` begins again at the end, `hash=1` or `0` checks or trusts its SHA-256."""

    scheme = "replay"
    parameters = {"loop": parse_flag, "hash": parse_flag}
    kind = "recorded"
    # A spinning Python thread lets a reader have the GIL every 5 ms, twice a read: 4 MiB a read keep 200 MB/s.
    chunk_bytes = 4 << 20

    def __init__(self, path: Path, loop: bool = False, check_hash: bool | None = None):
        """check_hash: compare the SHA-256 with the sidecar's; None: for files up to 64 MiB."""
        self._path = path
        self.loop = loop
        self.name = f"recording {path}"
        self.serial = path.name
        self._file = None
        try:
            # Not blocking, so that a pipe is refused below instead of waited for.
            self._file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
            about = os.fstat(self._file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise OSError("it is not a regular file, so it is no recording")
        except OSError as error:
            self.close()
            reason = error.strerror or str(error)
            raise SourceError(f"replay: cannot open {path}: {reason}; name an existing file of raw bytes") from error
        self.recorded_bytes = about.st_size
        if self.recorded_bytes == 0:
            self.close()
            raise SourceExhausted(f"replay: {path} is empty: 0 bytes used; record some with `everett capture`")
        try:
            self._take_sidecar(check_hash)
        except BaseException:
            self.close()
            raise
        self.chunk_bytes = min(self.chunk_bytes, max(65536, self.recorded_bytes))

    @classmethod
    def open(cls, uri: SourceURI) -> "ReplayDriver":
        values = uri.parameters(cls.parameters)
        if not uri.rest:
            raise SourceError(f"{uri.text!r} names no file; write replay:FILE")
        driver = cls(Path(uri.rest), values.get("loop", False), values.get("hash"))
        if "h" in values:
            driver.min_entropy = cls.claim(values)
        return driver

    def _take_sidecar(self, check_hash: bool | None) -> None:
        found = sidecar.read(self._path)
        if found is None:
            return
        sidecar.check_size(self.recorded_bytes, found, self._path)
        if check_hash is None:
            check_hash = self.recorded_bytes <= HASHED_UNASKED_BYTES
        if check_hash:
            sidecar.check_hash(self._file, found, self._path)
        self.bit_order = found.bit_order
        self.conditioned = found.conditioned
        claim = Fraction(repr(float(found.min_entropy)))
        if claim < ASSUMED_MIN_ENTROPY:  # never more than of a recording of which nothing is known
            self.min_entropy = MinEntropy(claim, f"when recorded: {found.min_entropy_origin}")
        serial = f" serial {found.serial}" if found.serial else ""
        self.name = f"recording {self._path}, recorded from {found.device}{serial}"
        self.details = {
            "recorded from": f"{found.device}{serial} ({found.driver}:, kind {found.kind})",
            "recorded at": found.started_utc,
            "gaps": str(len(found.gaps)),
            "SHA-256": "checked" if check_hash else "not checked (hash=1 does)",
        }

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        try:
            driver = cls.open(uri)
        except SourceError as error:
            return [Finding("recording", "fail", str(error))]
        try:
            about = "matches the recording" if driver.details else "there is none, so nothing says what was recorded"
            return [
                Finding("recording", "ok", f"{driver.recorded_bytes:,} bytes"),
                Finding("sidecar", "ok" if driver.details else "note", about),
            ]
        finally:
            driver.close()

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        try:
            got = self._file.readinto(buffer)
            if got == 0 and self.loop:
                self._file.seek(0)
                self.passes += 1
                got = self._file.readinto(buffer)
        except (OSError, ValueError) as error:
            raise SourceError(f"replay: reading {self._path} failed: {error}") from error
        if got == 0:
            raise EndOfRecording(f"the recording {self._path} has come to its end")
        return got

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
