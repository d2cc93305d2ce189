"""`everett responses`: whether a web service gave two clients, or one client twice, the same bytes."""

from pathlib import Path
from typing import Annotated

import typer

from ..drivers.responses import compare_responses, read_responses
from .output import ExitCode, print_json


def responses(
    logs: Annotated[list[Path], typer.Argument(help="Response logs of several machines or keys.", metavar="FILE...")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Compare the response logs of web sources: a response that is in them twice was served twice."""
    repeated = compare_responses(logs)
    count = sum(len(read_responses(log)) for log in logs)
    if as_json:
        fields = ("when", "n_bytes", "commitment")
        print_json(
            {
                "responses": count,
                "repeated": [
                    [{"file": str(r.path), "line": r.line, **{f: getattr(r, f) for f in fields}} for r in lines]
                    for lines in repeated
                ],
            }
        )
    else:
        for lines in repeated:
            typer.echo(f"REPEATED {lines[0].n_bytes} bytes, commitment {lines[0].commitment}")
            for response in lines:
                typer.echo(f"  {response.path}:{response.line}  {response.when}")
        typer.echo(f"{count} responses in {len(logs)} logs, {len(repeated)} of them served more than once")
    if repeated:
        raise typer.Exit(ExitCode.BAD)
