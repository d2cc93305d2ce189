"""`everett doctor [URI]`: is this source any good, and if not, what stands in the way."""

from typing import Annotated

import typer

from ..drivers import Finding
from .output import ExitCode, print_json, printable


def doctor(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The source; auto is the first local quantum device.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long the rate is measured.")] = 3.0,
    install_udev: Annotated[
        bool,
        typer.Option("--install-udev", help="Install the udev rules and systemd units instead; without root, print them."),
    ] = False,
) -> None:
    """Examine a source from its cable to its bits: permission, rate, health tests, entropy estimates, verdict.

    Takes about half a minute, most of it for the estimates. Every bit that it reads is destroyed.
    """
    if install_udev:
        from .install import install

        install()
        return
    from .examination import examine

    if as_json:
        report = examine(uri, seconds, lambda finding: None)
        print_json(report.to_json())
    else:
        from rich.console import Console

        with Console().status("measuring and estimating: about half a minute"):
            report = examine(uri, seconds, _show)
        if report.estimates:
            _print_estimates(report.estimates)
        bad = report.exit_code != ExitCode.OK
        typer.echo(typer.style(f"verdict: {printable(report.verdict)}", fg="red" if bad else "green", bold=True))
        typer.echo(f"next:    {printable(report.next_step)}")
    if report.exit_code != ExitCode.OK:
        raise typer.Exit(report.exit_code)


def _show(finding: Finding) -> None:
    colour = {"ok": "green", "note": "yellow", "fail": "red"}[finding.verdict]
    lines = printable(finding.text).splitlines() or [""]
    typer.echo(f"{typer.style(f'{finding.verdict:4}', fg=colour)} {printable(finding.check):15} {lines[0]}")
    for line in lines[1:]:
        typer.echo(f"{'':20} {line}")
    if finding.next_step and finding.verdict != "ok":
        typer.echo(f"{'':20} next: {printable(finding.next_step)}")


def _print_estimates(estimates: dict[str, float]) -> None:
    """The estimators of SP 800-90B 6.3, the lowest first, three a line."""
    typer.echo("     estimates, bits a byte:")
    cells = [f"{value:.3f} {name}" for name, value in sorted(estimates.items(), key=lambda e: e[1])]
    for i in range(0, len(cells), 3):
        typer.echo("       " + "".join(f"{cell:32}" for cell in cells[i : i + 3]).rstrip())
