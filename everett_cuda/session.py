"""The process's source: opened, closed and reported on here; `keys` draws from it, and `noise` its direct words."""

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import Protocol

from . import _C, followers, keys
from .broker_source import BrokerSource
from .errors import JournalError, SourceNotOpen
from .source import Source
from .source_status import SourceStatus

_source: Source | None = None
_lock = threading.RLock()


class Watcher(Protocol):
    """A ledger: hears of every source of this process, before its keys are forgotten. It must not raise."""

    def opened(self, source: Source) -> None: ...

    def closed(self, source: Source) -> None: ...

    def refused(self, uri: str, error: BaseException) -> None: ...


watchers: list[Watcher] = []


def open(uri: str | None = None) -> Source:
    """Opens the source that `uri` names, runs its start-up test and draws all keys from it from now on.

    uri: for example "auto" (a real local quantum device), "replay:FILE" (a recording), "sim:seed=7" (simulated); None
    takes the environment variable EVERETT_SOURCE, or "auto". A source that was open before is closed first.
    Raises SourceError (UnknownScheme, BadParameter, SourceExhausted) or StartupTestFailed; then no source is open. While
    a journal is written: JournalError, because its header names the source.

    In a program that is replayed (`everett replay`) no device is opened, and the source is the journal whatever the URI.
    """
    global _source
    uri = uri if uri is not None else os.environ.get("EVERETT_SOURCE", "auto")
    with _lock:
        if by := keys.watched_by():
            raise JournalError(f"{by}; close the journal before another source is opened")
        replayed = _replayed_source()
        if replayed is not None and replayed is _source:
            return _source
        if _source is not None:
            _close(_source)
            _source = None
        try:
            source = replayed or Source.open(uri)
        except BaseException as error:
            for watcher in watchers:
                watcher.refused(uri, error)
            keys.detach()
            raise
        keys.attach(source.ring, lambda why: _account_of(source, why))
        _source = source
        for watcher in watchers:
            watcher.opened(source)
        keys.step()  # from here on no draw finds a key of the source before, though its recomputations still do
        if replayed is not None:
            replayed.attach()
        return source


def _replayed_source():
    from . import replaying  # here, because a replay closes the source that is open

    return replaying.source_for_open()


def environment_variable(name: str) -> str:
    """Its value; empty where it is not set, and in a set-uid program, whose caller chose it."""
    trusted = os.geteuid() == os.getuid() and os.getegid() == os.getgid()
    return os.environ.get(name, "") if trusted else ""


def _account_of(source: Source, why: str):
    """What `keys.attach` asks for."""
    return source.outage() or None if why == "starved" else source.error_for(getattr(_C.Take, why), 32)


def _after_fork() -> None:
    """A forked child of a broker's client is a client of its own, from its first draw on; nothing is shared."""
    global _source, _lock
    if isinstance(_source, BrokerSource):
        uri, _source, _lock = _source.uri, None, threading.RLock()
        keys.open_in_child(uri)


os.register_at_fork(after_in_child=_after_fork)


def close() -> None:
    """Closes the source and forgets its keys; bits that were not handed out are destroyed. Without one, does nothing."""
    global _source
    with _lock:
        if _source is not None:
            _close(_source)  # first: a thread that waits for bits, and holds what `detach` needs, is woken by it
            _source = None
        keys.detach()


def _close(source: Source) -> None:
    source.close()
    for watcher in watchers:
        watcher.closed(source)


def current_source() -> Source:
    """The open source. Raises SourceNotOpen when there is none and EVERETT_SOURCE names none."""
    if _source is None:
        keys._open_from_environment()
    if _source is None:
        raise SourceNotOpen('no source is open. Call ev.open("auto") or ev.open(URI), or set EVERETT_SOURCE=URI.')
    return _source


def open_source(from_environment: bool = False) -> Source | None:
    """The open source or None; from_environment: opens the one that EVERETT_SOURCE names, if any."""
    if from_environment and _source is None:
        with contextlib.suppress(SourceNotOpen):
            return current_source()
    return _source


@dataclass(frozen=True)
class Status:
    """The source, what became of the draws (`keys.counters`), the settings of the keys, and a line for each thing that
    GPUs hold, or that several processes share."""

    source: SourceStatus | None
    draws: dict[str, int]
    settings: dict
    followers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.source is None and not self.draws:
            return "source:       none open"
        source = "source:       none open in this process" if self.source is None else f"{self.source}"
        d, s = self.draws, self.settings
        as_recorded = "as recorded: " if self.source is not None and self.source.kind == "replayed" else ""
        lines = (
            f"{source}\n"
            f"keys:         {as_recorded}{d['fresh']:,} fresh, {d['stretched']:,} stretched, {d['shared']:,} shared, "
            f"{d['reused']:,} reused, {d['replayed']:,} replayed\n"
            f"settings:     freshness {s['freshness']}, on_starved {s['on_starved']} (max_stretch {s['max_stretch']:,})"
        )
        return "\n".join([lines, *self.followers])


def status() -> Status:
    """What bits this process uses and where they come from; print it. ForkedError in a child of the opener."""
    source = None if _source is None else _source.status()
    return Status(source, keys.counters(), keys.settings(), followers.status())
