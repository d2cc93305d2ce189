"""`ev.replay(FILE)` and `everett replay FILE -- python train.py`: a recorded program runs again on the keys of its journal.

While a process replays, ev.open opens no device and gives the `ReplayedSource`; the program's ev.journal(...) begins it.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import followers, session
from .journal_file import REPLAY_ALLOW_VERSIONS_VARIABLE, REPLAY_KEY_FILE_VARIABLE, REPLAY_VARIABLE, read_key_file
from .replayed_source import ReplayedSource

_current: ReplayedSource | None = None


def source_for_open() -> ReplayedSource | None:
    """What ev.open has to open in a process that replays; None in any other. JournalError once the replay is over."""
    global _current
    if _current is not None:
        _current.refuse_if_over()
        return _current
    path = session.environment_variable(REPLAY_VARIABLE)
    if not path:
        return None
    key_file = os.environ.get(REPLAY_KEY_FILE_VARIABLE)
    key = read_key_file(key_file) if key_file else None
    _current = ReplayedSource(path, key, os.environ.get(REPLAY_ALLOW_VERSIONS_VARIABLE) == "1")
    return _current


@contextmanager
def replay(path: str | os.PathLike, key: bytes | None = None, *, allow_versions: bool = False) -> Iterator[ReplayedSource]:
    """`with ev.replay("run.evj"): train()`: what runs inside draws the keys and direct words of the journal again.

    A source that is open is closed first. Inside, ev.open gives the replay, and ev.journal(...) begins it anew if nothing
    was drawn yet; torch's generators are set as they were when the journal was begun. What else the program depends on
    (weights, data, numpy's generators) must be as it was. key: of an encrypted journal. allow_versions: also with another
    version of torch or of this package.

    Raises JournalError (cannot be read, or not be replayed here), and ReplayMismatch at the first draw, step or take of
    direct words that differs from its record, or at the end when the journal holds more.
    """
    global _current
    source = ReplayedSource(path, key, allow_versions)
    session.close()
    _current = source
    try:
        session.open()
        source.begin()
        yield source
        source.finish()
    finally:
        _current = None
        session.close()


class _Follower:
    """Raises at a step's end, not only at the next draw, when the program differs."""

    def end_step(self, by_optimizer: bool) -> None:
        if _current is not None and not _current.ring.forked:
            _current.end_step()

    def forget(self) -> None:
        pass

    def status(self) -> str:
        return ""


followers.follow(_Follower())


@atexit.register
def _close_at_exit() -> None:
    if _current is not None:
        _current.close()
