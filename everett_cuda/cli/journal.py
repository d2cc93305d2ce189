"""`everett journal FILE`: what a journal holds and how it ended, without any key material."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from .output import ExitCode, print_json, printable

KeyFile = Annotated[Path | None, typer.Option("--key-file", help="The key of an encrypted journal: a file of mode 0600.")]


def journal(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A journal that ev.journal wrote.")],
    key_file: KeyFile = None,
    records: Annotated[bool, typer.Option("--records", help="List every record.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Show what a journal says of itself, count its records, and tell whether it is whole. Keys are never printed."""
    from ..journal_file import TYPES, read_journal, read_key_file

    with read_journal(file, read_key_file(key_file) if key_file else None) as reader:
        counts: Counter[str] = Counter()
        header = reader.header
        if not as_json:
            source = header["source"]
            typer.echo(printable(f"recorded  {header['started_utc']} from {source['uri']}: {source['label']}"))
            typer.echo(
                printable(
                    f"by        everett_cuda {header['everett_cuda']}, stream law {header['stream_law']}, "
                    f"torch {header['torch']}, Python {header['python']}, rank {header['rank']} of {header['world_size']}"
                )
            )
            typer.echo(f"encrypted {header['encryption']}")
        for record in reader:
            counts[TYPES[record.type]] += 1
            if records and not as_json:
                typer.echo(f"{record.index:9,} {printable(str(record))}")
    if as_json:
        print_json(
            {
                "header": header,
                "records": dict(counts),
                "good_bytes": reader.good_bytes,
                "closed": reader.closed,
                "end": reader.end,
            }
        )
    else:
        typer.echo("records   " + (", ".join(f"{n:,} {name}" for name, n in counts.items()) or "none"))
        typer.echo(printable(f"end       {reader.end}; {reader.good_bytes:,} bytes are good"))
    if not reader.closed:
        raise typer.Exit(ExitCode.BAD)
