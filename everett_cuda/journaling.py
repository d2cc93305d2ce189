"""`ev.journal(FILE)`: from there on every key and every direct word is in a file before it is used, for `everett replay`.

What stands in the file: docs/journal.md. With a journal there is no forward secrecy: who reads it knows every key.
"""

import atexit
import datetime
import json
import os
import secrets
import threading
from pathlib import Path

import torch

from . import _C, environment, followers, journal_file, keys, session
from .errors import ForkedError, JournalError
from .replayed_source import Replay, ReplayedSource

_current: "Journal | None" = None
_lock = threading.RLock()


class Journal:
    """A journal that is being written. Made by `ev.journal`; close it, or use it in a `with`. At exit it is closed too.

    path: the file, or the segment. encrypted: whether its records are.
    """

    def __init__(self, path: Path, key: bytes | None, segment: int, continues: dict | None):
        self.path = path
        self.encrypted = key is not None
        self.segment = segment
        self._key = None if key is None else bytes(key)
        self._source = session.current_source()
        before = keys.counters()
        header, file_key, header_hash = self._header(before, continues)
        descriptor = _create(path)
        try:
            try:
                self._writer = _C.Journal(descriptor, header, file_key, header_hash)
            except RuntimeError as error:
                raise JournalError(f"{path}: {error}; no draw was made") from None
            for device, state in _generator_states():
                if not self._append(journal_file.STATE, device, data=state):
                    raise self._error("unrecorded")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        _sync_folder(path)
        self._draws_before = before["draws"]
        self._is_open = True
        keys.watch(self._writer, f"the journal {path} is being written, and its header names its source", self._error)
        self._source.witness = self

    def _header(self, before: dict, continues: dict | None) -> tuple[bytes, bytes | None, bytes]:
        salt = secrets.token_bytes(32)
        header = journal_file.encode_header(
            {
                **environment.facts(self._source.status()),
                "started_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
                "segment": self.segment,
                "continues": continues,
                "draws_before": before["draws"],
                "steps_before": before["boundaries"],
                "encryption": journal_file.ENCRYPTED if self.encrypted else journal_file.IN_CLEAR,
                "salt": salt.hex(),
            }
        )
        file_key = journal_file.file_key(self._key, salt) if self.encrypted else None
        return header, file_key, journal_file.header_hash(header)

    def _append(self, type_: int, device: int = -1, ticket: int = 0, count: int = 0, data: bytes = b"") -> bool:
        number = count.to_bytes(8, "little") + bytes(8)
        head = journal_file.Record(0, type_, device=device, ticket=ticket, number=number).head
        return self._writer.append(head, data)

    # --- direct words: a DirectWitness (source.py) ---------------------------------------------------------------------

    def record_words(self, words: memoryview, device: int, store: int) -> None:
        if not self._writer.words(words, device, store):
            raise self._error("unrecorded")

    def record_use(self, granules: int, device: int, store: int) -> None:
        self._record_store(journal_file.USE, granules, device, store)

    def record_drop(self, device: int, store: int) -> None:
        self._record_store(journal_file.DROP, 0, device, store)

    def _record_store(self, type_: int, count: int, device: int, store: int) -> None:
        number = count.to_bytes(16, "little")
        if not self._writer.append(journal_file.Record(0, type_, store=store, device=device, number=number).head, b""):
            raise self._error("unrecorded")

    def _error(self, reason: str) -> Exception:
        if self._writer.forked:
            return ForkedError(
                f"{self.path} is written by the parent of this process, which was forked from it; a child opens a source "
                "of its own, and a journal of its own"
            )
        why = self._writer.failure or "it is closed"
        return JournalError(
            f"{self.path}: {why}. The key or words of this draw were destroyed, not used, and nothing is drawn while the "
            "journal cannot be written. Make room and go on from a checkpoint, or close the journal to go on without one."
        )

    # --- what the user sees -------------------------------------------------------------------------------------------

    @property
    def records(self) -> int:
        """Records in the file."""
        return self._writer.records

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return self._writer.bytes

    @property
    def position(self) -> dict:
        """{"path", "records", "segment", "encrypted"} of this moment, for a checkpoint."""
        return {
            "path": str(self.path.absolute()),
            "records": self.records,
            "segment": self.segment,
            "encrypted": self.encrypted,
        }

    def close(self) -> None:
        """Writes the closing record and makes the file durable; draws go on unrecorded. A second time: does nothing.

        JournalError when the file could not be finished; what it holds up to there stays readable.
        """
        self._close({"why": "closed"})

    def _close(self, why: dict) -> None:
        global _current
        with _lock:
            if not self._is_open or self._writer.forked:
                return
            self._is_open = False
            keys.unwatch()
            self._source.witness = None
            if _current is self:
                _current = None
            if not self._writer.close(json.dumps(why)):
                raise JournalError(
                    f"{self.path}: {self._writer.failure}. It has no closing record; what is in it stays readable."
                )

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<journal {self.path}, {self.records} records{'' if self._is_open else ', closed'}>"

    # --- continuing ---------------------------------------------------------------------------------------------------

    def continue_from(self, counters: dict, checkpoint: dict) -> "Journal":
        """Counters were loaded from a checkpoint. A segment without a draw goes on with them; else the next one begins, so
        that tickets rise within a file. Returns the one that is written now."""
        global _current
        journal, before = self, keys.counters()
        if before["draws"] != self._draws_before:
            path, segment = next_segment(self.path, self.segment)
            position = self.position
            self._close({"why": "continued from a checkpoint", "next": path.name})
            _current = journal = Journal(path, self._key, segment, position)
        keys.continue_from(counters)
        journal._draws_before = counters["draws"]
        text = json.dumps(checkpoint, sort_keys=True).encode()
        if not journal._append(journal_file.LOAD, ticket=counters["draws"], count=counters["boundaries"], data=text):
            raise journal._error("unrecorded")
        return journal


def next_segment(path: Path, segment: int = 0) -> tuple[Path, int]:
    """The first free name after `path`, which is segment number `segment`: run.evj, run.1.evj, run.2.evj, ..."""
    stem = path.stem.removesuffix(f".{segment}") if segment else path.stem
    while True:
        segment += 1
        free = path.with_name(f"{stem}.{segment}{path.suffix}")
        if not os.path.lexists(free):
            return free, segment


def _create(path: Path) -> int:
    """A new file, 0600; never one that is there: a journal is not written on, and a link is not followed."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_APPEND, 0o600)
    except FileExistsError:
        raise JournalError(
            f"{path} exists, and a journal is never written on: give another name, or resume=True for the next segment "
            f"({next_segment(path)[0].name})"
        ) from None
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; no journal was begun") from None


def _sync_folder(path: Path) -> None:
    """Makes the file's name durable; its records are by their own thread."""
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _generator_states() -> list[tuple[int, bytes]]:
    """Of torch's default generators, so that an unseeded run can be replayed: (-1 or the GPU's index, state)."""
    states = [(-1, torch.get_rng_state())]
    states += [(i, torch.cuda.get_rng_state(i)) for i in range(torch.cuda.device_count())]
    return [(device, state.numpy().tobytes()) for device, state in states]


def journal(path: str | os.PathLike, key: bytes | None = None, *, resume: bool = False) -> "Journal | Replay":
    """Records every key and direct word of this process in a new file from now on, each before it is used.

    path: must not exist; "{rank}" in it becomes this process's rank. With resume=True and an existing file, the next free
    segment is written: run.1.evj beside run.evj. key: encrypts the records with AES-256-GCM; at least 16 bytes of a random
    key (not a password). Without one, whoever reads the file knows every key. torch's generator states are recorded too.

    Call it after ev.open and before the first draw: what was drawn before is in no journal. In a program that is being
    replayed (`everett replay`) it writes nothing: the replay begins there.

    Raises JournalError: the file exists or cannot be made, a journal is being written already, or encryption is not
    available here (no libcrypto). Once a record cannot be written (disk full), every draw raises JournalError.
    """
    if key is not None:
        journal_file.check_key(key)
    source = session.current_source()
    if isinstance(source, ReplayedSource):
        return source.begin()
    file, segment = Path(str(path).replace("{rank}", str(environment.rank_and_world_size()[0]))), 0
    if resume and os.path.lexists(file):
        file, segment = next_segment(file)
    return begin(file, key, segment, None)


def begin(path: Path, key: bytes | None, segment: int, continues: dict | None) -> Journal:
    """Segment number `segment` of a journal; continues: the position of the one that it goes on from."""
    global _current
    if key is not None and not _C.aes_gcm_available():
        raise JournalError("encryption is not available: no libcrypto with AES-256-GCM was found; install OpenSSL")
    with _lock:
        if (now := current()) is not None:
            raise JournalError(f"the journal {now.path} is being written already; close it first")
        _current = Journal(path, key, segment, continues)
        return _current


def current() -> Journal | None:
    """The journal that this process writes."""
    return None if _current is None or _current._writer.forked else _current


class _Follower:
    """Closes the journal with its source, and raises at a step's end, not only at the next draw, when it broke."""

    def end_step(self, by_optimizer: bool) -> None:
        now = current()
        if now is not None and now._writer.failure:
            raise now._error("unrecorded")

    def forget(self) -> None:
        if (now := current()) is not None:
            now._close({"why": "the source was closed"})

    def status(self) -> str:
        now = current()
        if now is None:
            return ""
        state = f"BROKEN: {now._writer.failure}" if now._writer.failure else f"{now.records:,} records, {now.bytes:,} bytes"
        return f"journal:      {now.path}, {state}, {'encrypted' if now.encrypted else 'in clear'}"


followers.follow(_Follower())


@atexit.register
def _close_at_exit() -> None:
    if (now := current()) is not None:
        now._close({"why": "the program ended"})
