"""`everett devices`: what is attached, found without opening it."""

from typing import Annotated

import typer

from ..drivers import Attached, attached, driver_of, parse_uri
from ..source_status import label
from .output import ExitCode, print_json, printable, rate_text


def devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the devices that are attached, quantum or not, without opening them."""
    found, looked_for = attached()
    rows = [_row(device) for device in found]
    if as_json:
        print_json({"devices": rows, "looked_for": looked_for})
    elif rows:
        _print_table(rows)
    else:
        typer.echo("no device is attached" + ("; looked for:" if looked_for else ": no driver of one is installed"))
        for line in looked_for:
            typer.echo(f"  {line}")
        typer.echo("Connect one, or run `everett doctor URI` on the one you expect. Without one: replay:FILE, sim:seed=7.")
    if not rows:
        raise typer.Exit(ExitCode.NO_DEVICE)


def _row(device: Attached) -> dict:
    claim = driver_of(parse_uri(device.uri)).min_entropy
    return {
        "uri": device.uri,
        "name": device.name,
        "serial": device.serial,
        "kind": device.kind,
        "label": label(device.kind),
        "rate_bytes_per_s": device.rate_bytes_per_s,
        "min_entropy": float(claim.bits_per_byte),
        "min_entropy_origin": claim.origin,
        "state": device.state,
    }


def _print_table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("URI", "device", "kind", "serial", "rate", "min-entropy", "state"):
        table.add_column(heading, overflow="fold")  # whole on a narrow terminal too: URIs and serial numbers are copied
    for row in rows:
        cells = (
            row["uri"],
            row["name"],
            row["label"],
            row["serial"] or "-",
            rate_text(row["rate_bytes_per_s"]),
            f"{row['min_entropy']:g} of 8 ({row['min_entropy_origin']})",
            row["state"],
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))  # Text: what a device calls itself is no markup
    Console().print(table)
