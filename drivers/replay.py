"""`replay:FILE`: a recording of raw bytes, read once from its start to its end.

Its bits are public to whoever has the file, so its kind is `recorded` whatever was recorded. It never wraps around
unless `loop=1` is given, which every status then shows.
"""

import os
import stat
from pathlib import Path

from ..errors import SourceError, SourceExhausted
from .contract import ASSUMED_MIN_ENTROPY, Driver, EndOfRecording, MinEntropy
from .uri import SourceURI, parse_flag


class ReplayDriver(Driver):
    """Reads a regular file; parameters: `loop=1` begins again at the end."""

    scheme = "replay"
    parameters = {"loop": parse_flag}
    kind = "recorded"
    # A spinning Python thread lets a reader have the GIL every 5 ms, twice a read: 4 MiB a read keep 200 MB/s.
    chunk_bytes = 4 << 20

    def __init__(self, path: Path, loop: bool, min_entropy: MinEntropy):
        self._path = path
        self.loop = loop
        self.min_entropy = min_entropy
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
        self.chunk_bytes = min(self.chunk_bytes, max(65536, self.recorded_bytes))

    @classmethod
    def open(cls, uri: SourceURI) -> "ReplayDriver":
        values = uri.parameters(cls.parameters)
        if not uri.rest:
            raise SourceError(f"{uri.text!r} names no file; write replay:FILE")
        h = values.get("h")
        claim = MinEntropy(h, "claimed by user") if h is not None else MinEntropy(ASSUMED_MIN_ENTROPY, "assumed")
        return cls(Path(uri.rest), values.get("loop", False), claim)

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
