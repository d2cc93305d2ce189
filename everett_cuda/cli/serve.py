"""`everett serve URI...`: the broker. It owns devices, and shares their conditioned bits among the processes of a machine.

It says on stdout, a line each, what it serves, who comes and goes, and what happened to its sources. EVERETT_SOURCE means
nothing to it: what it serves is named on its command line or in its configuration.
"""

import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EverettError
from .output import WrongUsage, printable, rate_text

if TYPE_CHECKING:
    from ..broker import Broker, BrokerConfig

TURN_S = 0.5


def serve(
    uris: Annotated[list[str] | None, typer.Argument(metavar="[URI]...", help="The sources, such as quantis-usb:.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Where to listen. [default: /run/everett/everett.sock]")] = None,
    config: Annotated[Path | None, typer.Option(help="A file with a section [broker]; options here go before it.")] = None,
    failover: Annotated[bool, typer.Option("--failover", help="The first source that gives bits; not all in turn.")] = False,
    mix_kinds: Annotated[
        bool, typer.Option("--mix-kinds", help="Serve sources of different kinds together, all as the weakest.")
    ] = False,
    quota: Annotated[str | None, typer.Option(help="Most that a client gets, such as 1MB/s.")] = None,
    user_quota: Annotated[str | None, typer.Option(help="Most that all clients of a user get together.")] = None,
    group: Annotated[str | None, typer.Option(help="Group that may use the socket. [default: everett]")] = None,
    check_config: Annotated[bool, typer.Option("--check-config", help="Say what would be served, and leave.")] = False,
) -> None:
    """Serve conditioned bits of one or several devices to the processes of this machine, until SIGTERM or Ctrl-C.

    Health tests and conditioner run here, once for all. SIGHUP reads the configuration again, and opens sources that have
    stopped. Clients open broker:, or auto.
    """
    given = {
        "sources": tuple(uris) if uris else None, "socket": socket, "group": group, "failover": failover or None,
        "mix_kinds": mix_kinds or None, "quota": quota, "user_quota": user_quota,
    }  # fmt: skip
    settings = configure(config, given)
    if check_config:
        for line in describe(settings):
            typer.echo(line)
        return
    run(settings, lambda: configure(config, given))


def configure(file: Path | None, given: dict[str, object]) -> "BrokerConfig":
    """The configuration of a file and of what was given on the command line, which goes first. BadParameter, OSError."""
    from ..broker import BrokerConfig
    from ..broker.config import parse_setting, read_config

    values = read_config(file) if file else {}
    for name, value in given.items():
        if value is not None:
            values[name] = parse_setting(name, value) if name in ("quota", "user_quota") else value
    if not values.get("sources"):
        raise WrongUsage("name at least one source: everett serve URI, or `sources = URI` in --config FILE")
    return BrokerConfig(**values)


def describe(settings: "BrokerConfig") -> list[str]:
    """The configuration in lines."""
    allowed = [*settings.allow_users, *(f"group {g}" for g in settings.allow_groups)]
    several = "the first that gives bits" if settings.failover else "in turn"
    return [
        f"sources  {', '.join(settings.sources)}" + (f" ({several})" if len(settings.sources) > 1 else ""),
        f"socket   {settings.socket}, mode 0660" + (f", group {settings.group}" if settings.group else ""),
        f"clients  {', '.join(allowed) if allowed else 'whoever may open the socket'}; at most {settings.max_clients:,}, "
        f"{settings.max_clients_per_user:,} of a user",
        f"quotas   {rate_text(settings.quota or None)} a client, {rate_text(settings.user_quota or None)} a user",
    ]


def run(settings: "BrokerConfig", configure_again) -> None:
    """Serves until a signal ends it. configure_again: what the configuration is when it is to be read again."""
    from ..broker import Broker
    from ..broker.hardening import harden, notes_on_limits

    asked = set()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _: asked.add(signum))
    notes = harden()
    with Broker(settings) as broker:
        stats = broker.stats()
        for source in stats.sources:
            serial = f", serial {source.serial}" if source.serial else ""
            say(f"source {source.uri}: {source.name}{serial}; {source.label}; start-up test passed")
        ring_bytes = settings.rules(broker.metered)["ring_bytes"]
        for note in [*notes, *broker.notes, *notes_on_limits(settings.max_clients, ring_bytes)]:
            say(f"note: {note}")
        say(f"serving {stats.label} bits at {stats.socket}")
        serve_until(broker, asked, configure_again)
    say("stopped; every buffer was zeroed")


def serve_until(broker: "Broker", asked: set[int], configure_again) -> None:
    """Turns until a signal that ends the broker is in `asked`; SIGHUP there has it reload."""
    names = [s.uri for s in broker.sources]
    health = [""] * len(names)
    while not asked & {signal.SIGTERM, signal.SIGINT}:
        if signal.SIGHUP in asked:
            asked.discard(signal.SIGHUP)
            try:
                broker.reload(configure_again(), lambda text: say(f"reopened: {text}"))
                say("configuration read again")
            except (EverettError, OSError) as error:
                say(f"error: the configuration stays as it was: {error}")
        for event in broker.turn(TURN_S):
            say(in_words(event, names))
        for i, status in enumerate(broker.stats().sources):
            line = f"source {status.uri}: {status.state}, {status.failure or status.health}"
            if health[i] and line != health[i]:
                say(line)
            health[i] = line


def in_words(event, sources: list[str]) -> str:
    """A line for an event of the server."""
    who = f"client {event.client} (pid {event.pid}, uid {event.uid}, gid {event.gid})"
    if event.kind == "connected":
        return f"{who} connected: {event.text}"
    if event.kind == "disconnected":
        return f"{who} is gone after {event.bytes:,} bytes: {event.text}"
    if event.kind == "refused":
        return f"refused pid {event.pid}, uid {event.uid}, gid {event.gid}: {event.text}"
    if event.kind == "destroyed":
        return f"health alarm: {event.bytes:,} unread bytes of clients were destroyed"
    what = {"ended": "has stopped", "reopened": "starts again", "source_used": "is the one that serves"}[event.kind]
    return f"source {sources[int(event.text)]} {what}"


def say(text: str) -> None:
    """A line of the log: UTC, and what a name in it may not steer."""
    stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    sys.stdout.write(f"{stamp} {printable(text)}\n")
    sys.stdout.flush()
