"""`everett ledger keygen` and `everett ledger show`: a key to sign ledgers with, and what a ledger says."""

from pathlib import Path
from typing import Annotated

import typer

from .output import ExitCode, print_json, printable

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _ledger() -> None:
    """Ledgers of runs, which ev.ledger("run.evl") writes. To check one: everett verify."""


@app.command()
def keygen(
    out: Annotated[
        Path | None, typer.Option("--out", help="The private key's file; by default ~/.config/everett/ledger.key.")
    ] = None,
) -> None:
    """Make an Ed25519 key that signs ledgers: the private one (0600), and beside it the public one (.pub).

    Not in the current folder: a run's folder is copied and shared as a whole.
    """
    from ..ledgers.signature import default_key_path, generate

    path = default_key_path() if out is None else out
    signer = generate(path)
    typer.echo(printable(f"wrote       {path} (private: keep it, show it to nobody) and {path}.pub"))
    typer.echo(f"public key  {signer.public}")
    typer.echo("Give the public key to those who will check; ev.ledger(..., key=FILE) signs with the private one.")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The ledger, such as run.evl.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Sum up what a ledger says, as far as its chain holds. It checks no signature: everett verify does."""
    from ..ledgers.chain import read_chain
    from ..ledgers.verify import summary_of

    reading = read_chain(file)
    summary = summary_of(reading)
    if as_json:
        print_json({**summary.to_json(), "damage": reading.damage, "torn_bytes": reading.torn})
    else:
        typer.echo(printable(str(summary)))
        typer.echo(
            "signer not checked" + ("" if summary.ended else f"; unfinished: it ends with line {summary.records}")
        )
        if reading.damage:
            typer.echo(typer.style(printable(f"BROKEN at {reading.damage}"), fg="red", bold=True))
    if reading.damage:
        raise typer.Exit(ExitCode.BAD)
