"""The `everett` command: what is attached, whether it is any good, how it is doing, and raw recordings of it.

One file a command. Their modules import what is light; numpy, the sources and rich's tables come in when a command runs,
and torch never does: `everett --help` has to answer at once.
"""

import signal
import sys

import typer
from typer.core import TyperGroup

from ..errors import EverettError
from . import capture, devices, doctor, journal, ledger, monitor, replay, responses, serve, verify, version
from .output import exit_code_of, print_error


class _Commands(TyperGroup):
    """Says what went wrong in one block, and leaves with the exit code that docs/cli.md promises."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `everett devices | head`: typer leaves quietly
            raise
        except (EverettError, OSError) as error:
            print_error(str(error))
            raise typer.Exit(exit_code_of(error)) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(name="everett", cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def _everett() -> None:
    """Quantum random number generators for PyTorch: find, check, watch and record them.

    Exit codes: 0 good; 1 device not usable, or verdict bad; 2 wrong usage or unknown URI; 3 no device found; 4 health
    alarm.
    """


app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.command("monitor")(monitor.monitor)
app.command("capture")(capture.capture)
app.command("journal")(journal.journal)
app.command("replay")(replay.replay)
app.command("responses")(responses.responses)
app.add_typer(ledger.app, name="ledger")
app.command("verify")(verify.verify)
app.command("serve")(serve.serve)
app.command("version")(version.version)


def main() -> None:
    """The console script: runs the command that sys.argv names, and exits."""
    # A service that is stopped gives its device back and leaves no half-written file, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="everett")
