"""`everett capture URI FILE --bytes N`: a recording of raw bytes, with a sidecar that says what it is.

The driver is opened directly: no source, no ring, so a captured byte is in the recording and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..drivers import open_driver, parse_uri
from ..drivers.uri import parse_size
from ..source_status import label
from .output import WrongUsage, print_error, printable, rate_text


def capture(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The source, such as quantis-usb: or auto.")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The recording; it must not exist. FILE.json will be its sidecar.")
    ],
    size: Annotated[str, typer.Option("--bytes", metavar="N", help="How many: 1000000, 64KiB, 1MiB, ...")],
) -> None:
    """Record raw bytes of a device to a file, with a sidecar that says where they are from.

    Recorded bytes are public from then on: replay:FILE calls them recorded, never quantum.
    """
    from .recording import Recording, path_of, record

    wanted = _size(size)
    if parse_uri(uri).scheme == "replay":
        raise WrongUsage(f"{uri} is a recording already; copy the file, and its sidecar with it")
    with Recording(file) as recording, closing(open_driver(uri)) as driver:
        try:
            with _progress(wanted) as progress:
                sidecar = record(driver, uri, recording, wanted, progress)
            recording.finish(sidecar)
        except BaseException:
            print_error(f"nothing was kept: {recording.bytes:,} of {wanted:,} bytes had been recorded")
            raise
    serial = f", serial {sidecar.serial}" if sidecar.serial else ""
    typer.echo(printable(f"recorded  {sidecar.bytes:,} bytes of {sidecar.device}{serial}: {label(sidecar.kind)}"))
    if sidecar.gaps:
        shown = ", ".join(map(str, sidecar.gaps[:5])) + (", ..." if len(sidecar.gaps) > 5 else "")
        typer.echo(f"gaps      {len(sidecar.gaps)}: bytes of the device were lost before byte {shown}")
    typer.echo(f"rate      {rate_text(recording.rate_bytes_per_s)}")
    typer.echo(f"SHA-256   {sidecar.sha256}")
    typer.echo(printable(f"wrote     {file} and {path_of(file)}"))


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise WrongUsage(f"--bytes {text} is not {error}") from None
    if size == 0:
        raise WrongUsage("--bytes 0: a recording has at least 1 byte")
    return size


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; what it is given is told how many bytes there are."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console()
    columns = (TextColumn("recording"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=size)
        yield lambda done: bar.update(task, completed=done)
