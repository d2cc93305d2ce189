"""A recording in the making: raw bytes of an open driver into a file that appears whole or not at all.

The name is taken at once (an empty file, 0600, never one that is there), the bytes go to FILE.part, and that is renamed
when all of them and the sidecar are on the disk. After Ctrl-C, a fault or an unplugged device nothing of it is left; after
a kill -9 an empty FILE, which `replay:` refuses, and FILE.part are.
"""

import hashlib
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from .. import __version__
from ..drivers import DeviceLost, Driver, EndOfRecording, TransportError
from ..drivers.sidecar import Sidecar, path_of
from ..errors import SourceError
from .output import WrongUsage

READ_TIMEOUT_S = 0.2
PATIENCE_S = 60.0  # without a byte for this long, the device counts as failed


class Recording:
    """The files of a recording that is being made; use it in a `with`, and `finish` it or nothing is left of it."""

    def __init__(self, path: Path):
        """Makes the three files; raises WrongUsage where one is there already, and OSError."""
        self.path, self._part, self._sidecar = path, path.with_name(path.name + ".part"), path_of(path)
        self.bytes, self.rate_bytes_per_s = 0, 0.0
        self._digest = hashlib.sha256()
        self._finished = False
        self._files: dict[Path, BinaryIO] = {}
        try:
            for name in (path, self._sidecar, self._part):
                self._files[name] = _create(name)
        except BaseException:
            self.__exit__()
            raise

    def write(self, piece: memoryview) -> None:
        self._digest.update(piece)
        self.bytes += len(piece)
        while piece:
            piece = piece[self._files[self._part].write(piece) :]

    @property
    def sha256(self) -> str:
        """Of the bytes written so far, in hex."""
        return self._digest.hexdigest()

    def finish(self, sidecar: Sidecar) -> None:
        """From here on the recording has its name, and its sidecar is complete."""
        self._files[self._sidecar].write(sidecar.to_json().encode())
        for file in self._files.values():
            os.fsync(file.fileno())
        os.rename(self._part, self.path)
        self._finished = True

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_) -> None:
        for path, file in self._files.items():
            file.close()
            if not self._finished:
                path.unlink(missing_ok=True)


def _create(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise WrongUsage(f"{path} exists already; a recording never replaces a file: name another") from None
    return open(descriptor, "wb", buffering=0)


def record(driver: Driver, uri: str, recording: Recording, size: int, progress: Callable[[int], None]) -> Sidecar:
    """Reads `size` raw bytes from an open driver into `recording`; progress is told how many there are after each read.

    Returns the sidecar to finish it with. A transport error leaves a gap, which the sidecar names. Raises SourceError
    (the device is gone, at fault, or silent for a minute) and OSError (disk full).
    """
    gaps: list[int] = []
    buffer = memoryview(bytearray(driver.chunk_bytes))  # always asked for whole: some devices give multiples of 1 KiB only
    started, start = _utc(), time.monotonic()
    last_byte = start
    while recording.bytes < size:
        got = 0
        try:
            got = min(driver.readinto(buffer, READ_TIMEOUT_S), size - recording.bytes)
        except (DeviceLost, EndOfRecording):
            raise
        except TransportError:
            if recording.bytes not in (0, *gaps[-1:]):
                gaps.append(recording.bytes)
            time.sleep(0.01)
        if got:
            last_byte = time.monotonic()
            recording.write(buffer[:got])
            progress(recording.bytes)
        elif time.monotonic() - last_byte > PATIENCE_S:
            raise SourceError(f"{driver.name} gave no bytes for {PATIENCE_S:g} s; run `everett doctor {uri}`")
    recording.rate_bytes_per_s = size / max(time.monotonic() - start, 1e-9)
    return Sidecar(
        uri=uri,
        driver=driver.scheme,
        device=driver.name,
        serial=driver.serial,
        kind=driver.kind,
        details=dict(driver.details),
        started_utc=started,
        ended_utc=_utc(),
        bytes=recording.bytes,
        sha256=recording.sha256,
        min_entropy=float(driver.min_entropy.bits_per_byte),
        min_entropy_origin=driver.min_entropy.origin,
        bit_order=driver.bit_order,
        conditioned=driver.conditioned,
        gaps=gaps,
        recorded_by=f"everett_cuda {__version__}",
    )


def _utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
