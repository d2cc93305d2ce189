"""The process's source: opened, closed and reported on here; `keys` draws from it, and `noise` its direct words."""

import os
import threading
from dataclasses import dataclass

from . import _C, followers, keys
from .broker_source import BrokerSource
from .errors import SourceNotOpen
from .source import Source
from .source_status import SourceStatus

_source: Source | None = None
_lock = threading.RLock()


def open(uri: str | None = None) -> Source:
    """Opens the source that `uri` names, runs its start-up test and draws all keys from it from now on.

    uri: for example "auto" (a real local quantum device), "replay:FILE" (a recording), "sim:seed=7" (simulated); None
    takes the environment variable EVERETT_SOURCE, or "auto". A source that was open before is closed first.
    Raises SourceError (UnknownScheme, BadParameter, SourceExhausted) or StartupTestFailed; then no source is open.
    """
    global _source
    uri = uri if uri is not None else os.environ.get("EVERETT_SOURCE", "auto")
    with _lock:
        if _source is not None:
            _source.close()
            _source = None
        try:
            source = Source.open(uri)
        except BaseException:
            keys.detach()
            raise
        keys.attach(source.ring, lambda why: _account_of(source, why))
        _source = source
        keys.step()  # from here on no draw finds a key of the source before, though its recomputations still do
        return source


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
            _source.close()  # first: a thread that waits for bits, and holds what `detach` needs, is woken by it
            _source = None
        keys.detach()


def current_source() -> Source:
    """The open source. Raises SourceNotOpen when there is none and EVERETT_SOURCE names none."""
    if _source is None:
        keys._open_from_environment()
    if _source is None:
        raise SourceNotOpen('no source is open. Call ev.open("auto") or ev.open(URI), or set EVERETT_SOURCE=URI.')
    return _source


@dataclass(frozen=True)
class Status:
    """The source, what became of the draws (`keys.counters`), the settings of the keys, and a line for each thing that
    GPUs hold."""

    source: SourceStatus | None
    draws: dict[str, int]
    settings: dict
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.source is None:
            return "source:       none open"
        d, s = self.draws, self.settings
        lines = (
            f"{self.source}\n"
            f"keys:         {d['fresh']:,} fresh, {d['stretched']:,} stretched, {d['shared']:,} shared, "
            f"{d['reused']:,} reused, {d['replayed']:,} replayed\n"
            f"settings:     freshness {s['freshness']}, on_starved {s['on_starved']} (max_stretch {s['max_stretch']:,})"
        )
        return "\n".join([lines, *self.gpus])


def status() -> Status:
    """What bits this process uses and where they come from; print it. ForkedError in a child of the opener."""
    source = None if _source is None else _source.status()
    return Status(source, keys.counters(), keys.settings(), followers.status())
