"""Running the `everett` command in tests: in this process, or as a process of its own."""

import os
import subprocess
import sys

from typer.testing import CliRunner

from everett_cuda.cli import app


def everett(*arguments, columns: int = 120):
    """Runs the command in this process; the result has exit_code, stdout, stderr and output (both)."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def everett_process(*arguments, **options) -> subprocess.Popen:
    """Starts the command as a process, with pipes for its output as text."""
    return subprocess.Popen(
        [sys.executable, "-m", "everett_cuda", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        **options,
    )
