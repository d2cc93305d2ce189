"""`everett capture URI FILE --bytes N`: a recording of raw bytes, with a sidecar that says what it is.

The driver is opened directly: no source, no ring, so a captured byte is in the recording and nowhere else. A file of that
name appears whole or not at all: the name is taken at once (empty, 0600), the bytes go to FILE.part, and that is renamed
when all are there and on the disk. After Ctrl-C, a fault or an unplugged device nothing of it is left.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..drivers import DeviceLost, Driver, EndOfRecording, TransportError, open_driver, parse_uri
from ..drivers.sidecar import Sidecar, path_of
from ..drivers.uri import parse_size
from ..errors import SourceError
from ..source_status import label
from .output import WrongUsage, print_error, rate_text

READ_TIMEOUT_S = 0.2
PATIENCE_S = 60.0  # without a byte for this long, the device counts as failed


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not {error}") from None
    if size == 0:
        raise typer.BadParameter("a recording has at least 1 byte")
    return size


def capture(
    uri: Annotated[str, typer.Argument(help="The source, such as quantis-usb: or auto.")],
    file: Annotated[Path, typer.Argument(help="The recording; it must not exist. FILE.json will be its sidecar.")],
    size: Annotated[int, typer.Option("--bytes", parser=_size, metavar="N", help="How many: 1000000, 64KiB, 1MiB, ...")],
) -> None:
    """Record raw bytes of a device to a file, with a sidecar that says where they are from.

    Recorded bytes are public from then on: replay:FILE calls them recorded, never quantum.
    """
    if parse_uri(uri).scheme == "replay":
        raise WrongUsage(f"{uri} is a recording already; copy the file, and its sidecar with it")
    with ExitStack() as stack:
        recording = stack.enter_context(_new_recording(file))
        driver = stack.enter_context(_opened(uri))
        try:
            sidecar = _record(driver, uri, recording, size)
        except BaseException:
            print_error(f"nothing was kept: {recording.bytes:,} of {size:,} bytes had been recorded")
            raise
        recording.finish(sidecar)
    typer.echo(f"recorded  {sidecar.bytes:,} bytes of {sidecar.device}, serial {sidecar.serial or '-'}: {label(sidecar.kind)}")
    if sidecar.gaps:
        shown = ", ".join(map(str, sidecar.gaps[:5])) + (", ..." if len(sidecar.gaps) > 5 else "")
        typer.echo(f"gaps      {len(sidecar.gaps)}: bytes of the device were lost before byte {shown}")
    typer.echo(f"rate      {rate_text(recording.rate_bytes_per_s)}")
    typer.echo(f"SHA-256   {sidecar.sha256}")
    typer.echo(f"wrote     {file} and {path_of(file)}")


class _Recording:
    """The files of a recording that is being made."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.bytes, self.rate_bytes_per_s = 0, 0.0
        self.digest = hashlib.sha256()
        self.made: list[Path] = []
        self._files = {name: self._create(name) for name in (path, path_of(path), self.part)}

    def _create(self, path: Path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            self.abandon()
            raise WrongUsage(f"{path} exists already; a recording never replaces a file: name another") from None
        except OSError:
            self.abandon()
            raise
        self.made.append(path)
        return open(descriptor, "wb", buffering=0)

    def write(self, piece: memoryview) -> None:
        self.digest.update(piece)
        self.bytes += len(piece)
        while piece:
            piece = piece[self._files[self.part].write(piece) :]

    def finish(self, sidecar: Sidecar) -> None:
        """From here on the recording has its name, and its sidecar is complete."""
        self._files[path_of(self.path)].write(sidecar.to_json().encode())
        for file in self._files.values():
            os.fsync(file.fileno())
        os.rename(self.part, self.path)
        self.made.clear()

    def abandon(self) -> None:
        """Removes what was made, unless it was finished."""
        while self.made:
            self.made.pop().unlink(missing_ok=True)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def _new_recording(path: Path) -> Iterator[_Recording]:
    recording = _Recording(path)
    try:
        yield recording
    finally:
        recording.close()
        recording.abandon()


@contextmanager
def _opened(uri: str) -> Iterator[Driver]:
    driver = open_driver(uri)
    try:
        yield driver
    finally:
        driver.close()


def _record(driver: Driver, uri: str, recording: _Recording, size: int) -> Sidecar:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    gaps: list[int] = []
    buffer = memoryview(bytearray(driver.chunk_bytes))  # always whole: some devices give multiples of 1 KiB only
    started, start = _utc(), time.monotonic()
    last_byte = start
    columns = (TextColumn("recording"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=size)
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
                progress.update(task, completed=recording.bytes)
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
        sha256=recording.digest.hexdigest(),
        min_entropy=float(driver.min_entropy.bits_per_byte),
        min_entropy_origin=driver.min_entropy.origin,
        bit_order=driver.bit_order,
        conditioned=driver.conditioned,
        gaps=gaps,
        recorded_by=f"everett_cuda {__version__}",
    )


def _utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
