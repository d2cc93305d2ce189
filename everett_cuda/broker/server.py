"""The broker's sources, its socket and its C++ server, put together; operations look at `stats()` and call `reload()`."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction

from .. import _C
from ..drivers import broker_wire as wire
from ..errors import EverettError, SourceError
from ..source import Source
from ..source_status import SourceStatus, label
from .config import BrokerConfig
from .listening import Listener

RETRY_S = 5.0  # between two attempts to open a source that broke
COUNTS_S = 10.0  # how old the counts may be that clients are told


@dataclass(frozen=True)
class BrokerStats:
    """A broker at one moment. counts: clients, connections, refused, dropped, bytes, destroyed_bytes, draws, throttled,
    since the start. supply: flowing, ended or alarm. turns: of the service thread, for a watchdog."""

    socket: str
    started_utc: str
    kind: str
    label: str
    supply: str
    why: str
    sources: tuple[SourceStatus, ...]
    clients: tuple["_C.ClientFacts", ...]
    counts: dict[str, int]
    events_lost: int
    turns: int


class Broker:
    """A running broker. Opening it runs the start-up test of each source; then it serves until `close`.

    Call `turn` again and again from one thread: it opens sources again that broke, tells clients how things are, and
    returns what there is to log.
    """

    def __init__(self, config: BrokerConfig):
        """Raises what `Source.open` raises, and SourceError: kinds that may not be mixed, or a socket that is taken."""
        self.config = config
        self.sources: list[Source] = []
        self._server: _C.BrokerServer | None = None
        self._listener: Listener | None = None
        self._reopening: dict[int, threading.Thread] = {}
        self._retry_at: dict[int, float] = {}
        self._alarms_seen: list[int] = []
        self._last_alarm: tuple[int, int] | None = None  # source, number
        self._told: tuple = ()
        self._told_at = 0.0
        self.started_utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._instance = os.urandom(16)
        try:
            self._listener = Listener(config.socket, config.group)  # first: a second broker should not touch the devices
            for uri in config.sources:
                self.sources.append(Source.open(uri))
            self.metered = any(s.driver.metered for s in self.sources)
            self.kind = self._weakest_kind()
            self._alarms_seen = [0] * len(self.sources)
            rings = [s.ring for s in self.sources]
            self._server = _C.BrokerServer(
                self._listener.fileno(), rings, self.serves().pack(), **config.rules(self.metered)
            )
            self._tell()
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> list[str]:
        """What the operator should know about the socket."""
        return self._listener.notes

    def _weakest_kind(self) -> str:
        kinds = {s.driver.kind for s in self.sources}
        if len(kinds) > 1 and not self.config.mix_kinds:
            named = ", ".join(f"{s.uri} ({label(s.driver.kind)})" for s in self.sources)
            raise SourceError(
                f"these sources are of different kinds: {named}. Serve them by two brokers, or allow it by --mix-kinds: "
                "then all bits count as the weakest kind"
            )
        return max(kinds, key=wire.KINDS.index)

    def serves(self) -> wire.Serves:
        """What clients are told that they get: of several sources the weakest kind and the lowest claim."""
        statuses = [s.status() for s in self.sources]
        drivers = [s.driver for s in self.sources]
        claim = min((d.min_entropy for d in drivers), key=lambda m: m.bits_per_byte)
        return wire.Serves(
            kind=self.kind,
            instance=self._instance,
            min_entropy=Fraction(claim.bits_per_byte),
            min_entropy_origin=claim.origin,
            name=" + ".join(s.name for s in statuses),
            serial=" + ".join(s.serial or "no serial number" for s in statuses),
            conditioner=statuses[0].conditioner,
            uris=" ".join(s.uri for s in statuses),
            raw_bytes_per_block=max(s.raw_bytes_per_block for s in statuses),
            conditioned=any(d.conditioned for d in drivers),
            loop=any(d.loop for d in drivers),
        )

    # --- running ---

    def turn(self, timeout_s: float) -> list["_C.BrokerEvent"]:
        """Waits up to timeout_s for events, oldest first; looks after the sources."""
        events = self._server.events(1024, timeout_s)
        self._retry()
        self._tell()
        return events

    def _retry(self) -> None:
        """A device that broke is opened again; an alarm needs an operator, and a recording that ended is over."""
        now = time.monotonic()
        for i, source in enumerate(self.sources):
            if source.status().state == "failed" and now >= self._retry_at.get(i, 0):
                self._retry_at[i] = now + RETRY_S
                self._reopen(i)

    def _reopen(self, i: int, done: Callable[[str], None] = lambda text: None) -> None:
        running = self._reopening.get(i)
        if running is not None and running.is_alive():
            return

        def run():
            source = self.sources[i]
            try:
                source.reopen()
                done(f"{source.uri} flows again")
            except EverettError as error:  # its status says why
                done(str(error))

        self._reopening[i] = threading.Thread(target=run, name=f"everett reopen {self.sources[i].uri}", daemon=True)
        self._reopening[i].start()

    def reload(self, config: BrokerConfig, done: Callable[[str], None] = lambda text: None) -> None:
        """New rules for clients, and every source that has stopped is opened again (an operator's answer to an alarm).

        Sources, socket and the size of rings stay: SourceError when the new configuration names others. done: hears of
        each source that was opened again, or could not be; on another thread.
        """
        fixed = ("sources", "socket", "group", "mix_kinds", "ring_bytes", "metrics", "log")
        changed = [name for name in fixed if getattr(config, name) != getattr(self.config, name)]
        if changed:
            raise SourceError(f"{', '.join(changed)} cannot change while the broker runs; start it anew")
        self._server.set_rules(**config.rules(self.metered))
        self.config = config
        for i, source in enumerate(self.sources):
            if source.status().state in ("alarm", "failed", "exhausted"):
                self._reopen(i, done)

    def _tell(self) -> None:
        """Tells clients how things are when it has changed, and the counts now and then."""
        statuses = [s.status() for s in self.sources]
        for i, status in enumerate(statuses):
            if len(status.alarms) > self._alarms_seen[i]:
                self._alarms_seen[i] = len(status.alarms)
                self._last_alarm = (i, len(status.alarms) - 1)
        how = self._how(statuses)
        told = (how.why, how.alarms, how.last_flags, how.transient_alarms)
        now = time.monotonic()
        if told == self._told and now - self._told_at < COUNTS_S:
            return
        self._told, self._told_at = told, now
        self._server.set_serves(self.serves().pack())
        self._server.announce(how.pack())

    def _how(self, statuses: list[SourceStatus]) -> wire.How:
        stopped = [f"{s.uri}: {s.failure or s.health if s.state in ('failed', 'alarm') else s.state}" for s in statuses
                   if s.state not in ("flowing",)]  # fmt: skip
        last = {}
        if self._last_alarm is not None:
            i, number = self._last_alarm
            alarm = statuses[i].alarms[number]
            last = dict(
                last_test=_C.TESTS.index(alarm.test),
                last_flags=1 | 2 * alarm.startup | 4 * alarm.permanent,
                last_offset=alarm.offset,
                last_value=alarm.value,
                last_cutoff=alarm.cutoff,
                last_said=alarm.said,
                last_source=statuses[i].uri,
            )
        return wire.How(
            why="; ".join(stopped),
            alarms=tuple(sum(s.alarm_counts[test] for s in statuses) for test in _C.TESTS),
            raw_bytes=sum(s.raw_bytes_in for s in statuses),
            transient_alarms=sum(s.transient_alarms for s in statuses),
            transport_errors=sum(s.transport_errors for s in statuses),
            **last,
        )

    def stats(self) -> BrokerStats:
        """A snapshot for metrics and watchdogs. Cheap: no device is asked."""
        server = self._server
        statuses = tuple(s.status() for s in self.sources)
        return BrokerStats(
            socket=str(self._listener.path),
            started_utc=self.started_utc,
            kind=self.kind,
            label=label(self.kind, any(s.loop for s in statuses)),
            supply=server.supply.name,
            why=self._told[0] if self._told else "",
            sources=statuses,
            clients=tuple(server.clients),
            counts=server.counts,
            events_lost=server.events_lost,
            turns=server.turns,
        )

    def tick(self) -> int:
        """Makes the service thread turn; returns its turns so far, by which a watchdog sees that it lives."""
        self._server.tick()
        return self._server.turns

    def close(self) -> None:
        """Ends all connections, destroys what was not handed out, gives the devices and the socket back. Twice is fine."""
        if self._server is not None:
            self._server.stop()
            self._server = None
        for source in self.sources:
            source.close()
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *_) -> None:
        self.close()
