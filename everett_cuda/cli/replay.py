"""`everett replay FILE -- COMMAND`: runs a recorded program again, on the keys of its journal instead of a source."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .journal import KeyFile
from .output import ExitCode, WrongUsage, print_error, printable


def replay(
    file: Annotated[str, typer.Argument(metavar="FILE", help='The journal; "{rank}" in it becomes each process\'s rank.')],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="The program that was recorded.")],
    key_file: KeyFile = None,
    allow_versions: Annotated[
        bool, typer.Option("--allow-versions", help="Also with another version of torch or everett_cuda.")
    ] = False,
) -> None:
    """Run a recorded program again, bit for bit. It opens no device; its first difference from the journal is an error.

    Leaves with the program's exit code, or with 1 if the program did not draw everything that the journal holds.
    """
    from .. import journal_file as names

    if "{rank}" not in file:  # before a program is started in vain
        key = names.read_key_file(key_file) if key_file else None
        with names.read_journal(file, key) as reader:
            next(iter(reader), None)
        file = str(Path(file).absolute())
    with tempfile.TemporaryDirectory(prefix="everett-replay-") as folder:
        environment = {
            **os.environ,
            names.REPLAY_VARIABLE: file,
            names.REPLAY_REPORT_VARIABLE: folder,
            names.REPLAY_ALLOW_VERSIONS_VARIABLE: "1" if allow_versions else "0",
        }
        environment.pop(names.REPLAY_KEY_FILE_VARIABLE, None)
        if key_file:
            environment[names.REPLAY_KEY_FILE_VARIABLE] = str(key_file.absolute())
        code = _run(command, environment)
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    for report in reports:
        verdict = "all of it" if report["complete"] else "NOT ALL OF IT"
        said = f"replayed  {report['compared']:,} records of {report['journal']}: {verdict} ({report['end']})"
        typer.echo(printable(said), err=True)
    if code == 0 and not reports:
        print_error("the program ended without having opened a source: nothing was replayed")
    if code == 0 and not (reports and all(report["complete"] for report in reports)):
        code = ExitCode.BAD
    raise typer.Exit(code)


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The program's exit code, as a shell would give it. It does not outlive this process's end by a signal."""
    try:
        program = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise WrongUsage(f"{command[0]}: {error.strerror}") from None
    try:
        code = program.wait()
    finally:
        if program.poll() is None:
            program.terminate()
            program.wait()
    return code if code >= 0 else 128 - code
