"""`ev.ledger`: the ledger of this process, or a summary of what it would say."""

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict

from .. import followers, keys, session
from ..errors import EverettError, LedgerError
from ..source import Source
from . import records
from .summary import Summary
from .writer import Ledger


class _Run:
    """This process as a ledger's subject."""

    def sources(self) -> list[Source]:
        source = session._source
        return [] if source is None else [source]

    def draws(self) -> Mapping[str, int]:
        return keys.counters()

    def settings(self) -> Mapping:
        return keys.settings()

    def ranks(self) -> Mapping:
        # A policy of several ranks exists only where the module that makes them was imported.
        distributed = sys.modules.get("everett_cuda.distributed")
        try:
            provenance = distributed.provenance() if distributed is not None else ()
        except EverettError:  # no policy is in force
            provenance = ()
        return {str(p.rank): {"said": str(p), **records.plain(asdict(p))} for p in provenance}


class _RunLedger(Ledger):
    """A ledger that hears of this process's sources and steps for as long as it is open."""

    def close(self) -> None:
        if self in session.watchers:
            session.watchers.remove(self)
            followers.unfollow(self)
        super().close()


_lock = threading.Lock()


def ledger(
    path: str | os.PathLike | None = None,
    key: str | os.PathLike | None = None,
    interval_s: float = 60.0,
    every_steps: int | None = None,
) -> Ledger | Summary:
    """With a path: begins the ledger of this process there, and returns it; use it in a `with`, or close it.

    Without: a `Summary` of the run so far, which prints itself: sources, health, bytes, keys. It needs no file.

    path: a new file (`run.evl`). key: a file that `everett ledger keygen` made, to sign with; not in the folder of the
    run or of the ledger. interval_s: seconds between counts (they are also written at the close). every_steps: counts
    after so many steps, too. It may be opened before the source. One ledger at a time.
    Raises LedgerError (the file exists or cannot be made, the key cannot be used, a ledger is open), ValueError, and
    SourceError when `key` is given and the extra `sign` is missing. A ledger that cannot be written any more (a full
    disk) raises LedgerError at the next step.
    """
    if path is None:
        if key is not None:
            raise ValueError("ledger(key=...) signs a file, so it needs a path; ledger() alone only sums up")
        return _summary()
    with _lock:
        if (open_ := _open()) is not None:
            raise LedgerError(f"{open_.path} is being written; close it before another is opened")
        with session._lock:  # no source is opened or closed between what the ledger finds and what it hears
            new = _RunLedger(path, _Run(), key, interval_s, every_steps)
            session.watchers.append(new)
            followers.follow(new)
    return new


def _open() -> Ledger | None:
    return next((w for w in session.watchers if isinstance(w, _RunLedger) and not w._elsewhere), None)


def _summary() -> Summary:
    if (open_ := _open()) is not None:
        return open_.summary()
    run, summary = _Run(), Summary("")
    statuses = {}
    for number, source in enumerate(run.sources(), 1):
        statuses[number] = status = source.status()
        summary.add(records.source(number, source, status))
        for report in status.alarms:
            summary.add(records.alarm(number, report))
    summary.add(records.counts("", 0, 0, run.draws(), statuses, run.settings()))
    return summary
