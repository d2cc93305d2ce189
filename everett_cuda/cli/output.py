"""What the commands share: exit codes, error blocks, JSON, and how figures are written."""

import json
import math
import sys
from enum import IntEnum

import typer

from ..drivers import DeviceFault
from ..errors import BadParameter, DeviceNotFound, EverettError, HealthAlarm, UnknownScheme


class ExitCode(IntEnum):
    """What every command leaves with; typer itself uses 2 for wrong usage."""

    OK = 0
    BAD = 1
    USAGE = 2
    NO_DEVICE = 3
    ALARM = 4


class WrongUsage(EverettError):
    """A command was asked for something that it does not do."""


def exit_code_of(error: Exception) -> ExitCode:
    """The exit code that an error of this package stands for."""
    if isinstance(error, (UnknownScheme, BadParameter, WrongUsage)):
        return ExitCode.USAGE
    if isinstance(error, DeviceNotFound):
        return ExitCode.NO_DEVICE
    return ExitCode.ALARM if isinstance(error, (HealthAlarm, DeviceFault)) else ExitCode.BAD


def printable(text: str) -> str:
    """`text` with its control characters spelled out: what a device or a file calls itself must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_error(message: str) -> None:
    """One block on stderr; its lines are not wrapped, so that they can be searched for and copied."""
    typer.echo(typer.style("error: ", fg="red", bold=True) + printable(message).replace("\n", "\n  "), err=True)


def print_json(value: object, indent: int | None = 2) -> None:
    """One JSON document on stdout; indent None: on one line. Flushed, because monitors are read through pipes."""
    typer.echo(json.dumps(value, indent=indent))
    sys.stdout.flush()


def rate_text(bytes_per_s: float | None) -> str:
    """`4 Mbit/s`; a dash where it is not known."""
    if bytes_per_s is None:
        return "-"
    bits = 8 * bytes_per_s
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}" if bits < 999.5 * size else f"{bits / size:.0f} {unit}"
    return f"{bits:.3g} bit/s"


def floor_to(value: float, step: float = 0.01) -> float:
    """`value` rounded down, for claims that must not exceed an estimate."""
    return math.floor(value / step) * step
