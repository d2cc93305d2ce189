"""A ledger that is being written: sources and alarms as they are seen, counts at intervals and steps, signed as it goes.

Append-only: the file is created for its owner alone and never opened for writing again. Every line is one write(2), so a
kill leaves whole lines and at most one torn one: "unfinished, consistent to line N". With a key, each line of counts is
followed by a signature, so that a killed run's ledger is signed up to its last interval.
"""

import atexit
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..drivers.spend import now_utc
from ..errors import LedgerError
from ..source import Source
from ..source_status import AlarmReport
from . import records
from .chain import Chain
from .signature import Signer, load_signer
from .summary import Summary

# How soon an alarm, a change of state or a web response is in the ledger. A look at a source takes about 20 us.
LOOK_S = 1.0


class Subject(Protocol):
    """What a ledger is about: the draws and settings of a process, or of a server, which has no draws. ranks: whose device
    stands behind which rank; empty where there is one process."""

    def sources(self) -> list[Source]: ...

    def draws(self) -> Mapping[str, int]: ...

    def settings(self) -> Mapping: ...

    def ranks(self) -> Mapping: ...


@dataclass
class _Watched:
    """A source, and what of it is in the ledger already."""

    number: int
    source: Source
    state: str
    alarms: set[AlarmReport] = field(default_factory=set)
    responses: int = 0
    attested: str = ""


class Ledger:
    """A ledger that is open; `ev.ledger(path)` is the usual way to one. Use it in a `with`, or close it.

    Methods may be called from any thread. In a forked child they do nothing: the ledger is the parent's.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        subject: Subject,
        key: str | os.PathLike | None = None,
        interval_s: float = 60.0,
        every_steps: int | None = None,
    ):
        """Creates `path` and writes the first record. key: a private key's file, to sign with. interval_s: seconds between
        counts. every_steps: counts after so many steps, too. Raises LedgerError, ValueError; then there is no new file."""
        if not 0 < interval_s < float("inf"):
            raise ValueError(f"interval_s: seconds above 0, got {interval_s!r}")
        if every_steps is not None and (
            isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1
        ):
            raise ValueError(f"every_steps: a whole number from 1 on, or None, got {every_steps!r}")
        self.path = Path(os.path.abspath(path))
        self._subject = subject
        self._signer: Signer | None = None
        if key is not None:
            self._signer = load_signer(key, self.path.parent, Path.cwd())
        self._every_steps = every_steps
        self._interval_s = interval_s
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._began = time.monotonic()
        self._chain = Chain()
        self._failure = ""
        self._watched: list[_Watched] = []
        self._ranks: Mapping = {}
        self._n_sources = self._keyring = self._steps = 0
        self._summary = Summary(str(self.path))
        self._stopping = threading.Event()
        self._size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags, 0o600)
        except FileExistsError:
            raise LedgerError(f"{self.path} exists, and a ledger is never written over; name a new file") from None
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be made: {error.strerror}; name another place") from None
        try:
            signed_by = self._signer.public if self._signer else None
            self._add(records.begin(subject.settings(), interval_s, every_steps, signed_by))
            for source in subject.sources():
                self._watch(source)
            _sync_folder(self.path.parent)
        except BaseException:
            os.close(self._fd)
            self.path.unlink(missing_ok=True)
            raise
        self._thread = threading.Thread(target=self._look_on, name=f"everett ledger {self.path.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- writing ----------------------------------------------------------------------------------------------------

    def _add(self, record: Mapping) -> None:
        """Writes one record; LedgerError when it cannot be, and from then on."""
        if self._failure:
            raise LedgerError(self._failure)
        milliseconds = int(1000 * (time.monotonic() - self._began))
        line = self._chain.line({**record, "utc": now_utc(), "ms": milliseconds})
        try:
            if os.write(self._fd, line + b"\n") != len(line) + 1:
                raise OSError("the disk is full")
        except OSError as error:
            os.ftruncate(self._fd, self._size)  # of a line that did not fit, nothing stays
            self._failure = (
                f"{self.path} cannot be written ({error}): it is consistent to line {self._chain.n}, and nothing is "
                "recorded any more. Free some space, then close it and open another ledger."
            )
            raise LedgerError(self._failure) from None
        self._size += len(line) + 1
        self._chain = self._chain.moved(line)
        self._summary.add({**record, "n": self._chain.n - 1})

    def _sign(self) -> None:
        if self._signer is not None:
            signature = self._signer.sign(self._chain.head)
            self._add({"type": "signature", "key": self._signer.public, "signature": signature})

    def _count(self, why: str) -> None:
        ranks = self._subject.ranks()
        if ranks != self._ranks:
            self._add({"type": "provenance", "ranks": ranks})
            self._ranks = ranks
        draws = self._subject.draws()  # first: keys that were drawn are then among the bytes handed out
        sources = {w.number: w.source.status() for w in self._watched}
        self._add(records.counts(why, self._steps, self._keyring, draws, sources, self._subject.settings()))
        self._sign()

    def _watch(self, source: Source) -> None:
        self._n_sources += 1
        status = source.status()
        self._add(records.source(self._n_sources, source, status))
        watched = _Watched(self._n_sources, source, status.state)
        self._watched.append(watched)
        self._look_at(watched)

    def _look_at(self, watched: _Watched) -> None:
        """Writes what is new of one source."""
        status, number = watched.source.status(), watched.number
        new = [] if status.kind == "replayed" else watched.source.responses_from(watched.responses)
        if new:
            self._add(records.responses(number, new))
            watched.responses += len(new)
        attestation = records.attestation(number, status)
        if attestation is not None and attestation["signature"] != watched.attested:
            self._add(attestation)
            watched.attested = attestation["signature"]
        for report in status.alarms:  # of a broker's source, the last alarm only
            if report not in watched.alarms:
                self._add(records.alarm(number, report))
                watched.alarms.add(report)
        if status.state != watched.state:
            self._add(records.state(number, status))
            watched.state = status.state

    def _look_on(self) -> None:
        """The thread: looks at the sources every second, counts every `interval_s`, and brings it to the disk."""
        due = time.monotonic() + self._interval_s
        while not self._stopping.wait(min(LOOK_S, self._interval_s)):
            with self._lock:
                size = self._size
                self._attempt(self._look_at_all)
                if time.monotonic() >= due:
                    due += self._interval_s
                    self._attempt(lambda: self._count("interval"))
                if self._failure:
                    return
                if self._size != size:
                    self._attempt(lambda: os.fdatasync(self._fd))

    def _look_at_all(self) -> None:
        for watched in self._watched:
            self._look_at(watched)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Does what must not raise here; what it raises is told now, at the next step and at the close."""
        before = self._failure
        try:
            write()
        except Exception as error:
            self._failure = self._failure or f"{self.path}: {error}"
            if not before:
                warnings.warn(f"the ledger has failed: {self._failure}", RuntimeWarning, stacklevel=2)

    # --- what it hears of -------------------------------------------------------------------------------------------

    @property
    def _elsewhere(self) -> bool:
        return os.getpid() != self._pid

    def opened(self, source: Source) -> None:
        """A source was opened."""
        if not self._elsewhere:
            with self._lock:
                self._attempt(lambda: self._watch(source))

    def closed(self, source: Source) -> None:
        """A source was closed; its last counts are written, and those of the keys that came of it."""
        if self._elsewhere:
            return
        with self._lock:
            self._attempt(self._look_at_all)
            self._attempt(lambda: self._count("source closed"))
            self._watched = [w for w in self._watched if w.source is not source]

    def refused(self, uri: str, error: BaseException) -> None:
        """A source could not be opened."""
        if not self._elsewhere:
            with self._lock:
                self._attempt(lambda: self._add(records.refused(uri, error)))

    def end_step(self, by_optimizer: bool) -> None:
        """A step has ended. LedgerError when the ledger has failed: a run that was to be recorded stops here."""
        if self._elsewhere:
            return
        with self._lock:
            self._steps += 1
            if self._every_steps and self._steps % self._every_steps == 0:
                self._attempt(lambda: self._count("steps"))
            if self._failure:
                raise LedgerError(self._failure)

    def forget(self) -> None:
        """The keys are forgotten: draws are counted from 0 again."""
        if not self._elsewhere:
            with self._lock:
                self._keyring += 1

    def status(self) -> str:
        """One line for `ev.status()`."""
        if self._elsewhere:
            return ""
        signed = "signed" if self._signer else "not signed"
        return f"ledger:       {self.path}, " + (
            f"FAILED: {self._failure}" if self._failure else f"{self._chain.n} lines, {signed}"
        )

    # --- for users --------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Writes the counts of now, signed if there is a key. LedgerError when they cannot be written."""
        if not self._elsewhere:
            with self._lock:
                self._look_at_all()
                self._count("asked for")

    def summary(self) -> Summary:
        """What the ledger says so far, with the counts of now."""
        with self._lock:
            draws = self._subject.draws()
            sources = {w.number: w.source.status() for w in self._watched}
            now = records.counts("", self._steps, self._keyring, draws, sources, self._subject.settings())
            return self._summary.with_counts(now, self._failure)

    def close(self) -> None:
        """Writes the last counts and the end, signs them, and closes the file. May be called twice.

        Raises LedgerError when the ledger has failed; the file is closed then too.
        """
        if self._elsewhere or self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        atexit.unregister(self.close)
        with self._lock:
            try:
                self._look_at_all()
                self._count("end")
                self._add({"type": "end"})
                self._sign()
                os.fdatasync(self._fd)
            finally:
                os.close(self._fd)
                self._failure = self._failure or f"{self.path} is closed; open another ledger"

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except LedgerError:
            if kind is None:  # else what has stopped the run is told, and not this
                raise


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
