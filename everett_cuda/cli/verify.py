"""`everett verify FILE...`: whether ledgers are unchanged, whose they are, and what they do not prove. Offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import ExitCode, WrongUsage, print_json, printable

if TYPE_CHECKING:
    from ..ledgers.verify import Verdict, Verdicts


def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Ledgers, such as run.evl.")],
    key: Annotated[
        str | None, typer.Option("--key", metavar="PUB", help="The signer's public key: 64 hex digits, or a .pub file.")
    ] = None,
    root: Annotated[
        str | None, typer.Option("--root", metavar="FILE", help="The key of QCicada's vendor, for attestations.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Check ledgers offline: chain, signature, arithmetic, device attestations; several together for what came twice."""
    from ..errors import LedgerError
    from ..ledgers.signature import load_public
    from ..ledgers.verify import verify_ledgers

    try:
        public = None if key is None else load_public(key)
    except LedgerError as error:
        raise WrongUsage(str(error)) from None
    verdicts = verify_ledgers(files, public, root)
    if as_json:
        print_json(_to_json(verdicts))
    else:
        _print(verdicts)
    if verdicts.alarm:
        raise typer.Exit(ExitCode.ALARM)
    if not verdicts.good:
        raise typer.Exit(ExitCode.BAD)


def _print(verdicts: "Verdicts") -> None:
    from ..ledgers.verify import NOT_PROVED

    for verdict in verdicts.ledgers:
        colour = "red" if verdict.problems else "green"
        typer.echo(typer.style(printable(f"{verdict.path}: {verdict.words}"), fg=colour, bold=True))
        for line in _lines(verdict):
            typer.echo(printable(f"  {line}"))
    for line in verdicts.across:
        typer.echo(typer.style(printable(line), fg="red", bold=True))
    typer.echo("not proved:")
    for line in NOT_PROVED:
        typer.echo(f"  {line}")


def _lines(verdict: "Verdict") -> list[str]:
    summary = verdict.summary
    begin = summary.begin
    lines = [f"run          {begin['run']} on {begin['host']}, begun {begin['utc']}"]
    if verdict.signed_by:
        lines.append(
            f"signer       {verdict.signed_by} by its own words, for {verdict.signed_lines} of {verdict.lines} lines"
        )
    lines.append(f"last hash    {verdict.head}")
    for source in summary.sources.values():
        r = source.record
        alarms = f", {len(source.alarms)} health alarms" if source.alarms else ""
        lines.append(f"source       {r['uri']}, serial {r['serial'] or 'none'}: {r['label']}{alarms}")
    draws = summary.draws
    if draws:
        lines.append(
            f"keys         {draws['fresh']:,} fresh, {draws['stretched']:,} stretched of {draws['draws']:,} draws"
        )
    lines += [f"attestation  {text}" for text in verdict.attestations]
    lines += [f"PROBLEM      {text}" for text in verdict.problems]
    return lines


def _to_json(verdicts: "Verdicts") -> dict:
    from ..ledgers.verify import NOT_PROVED

    return {
        "good": verdicts.good,
        "alarm": verdicts.alarm,
        "ledgers": [
            {
                "verdict": v.words,
                "chain": v.chain,
                "signer": v.signer,
                "signed_by": v.signed_by or None,
                "signed_lines": v.signed_lines,
                "lines": v.lines,
                "head": v.head,
                "attestations": v.attestations,
                "problems": v.problems,
                "summary": v.summary.to_json(),
            }
            for v in verdicts.ledgers
        ],
        "across": verdicts.across,
        "not_proved": list(NOT_PROVED),
    }
