"""The source of a replay: the keys and direct words of a journal, each given again to the draw that it was recorded for.

It stands where a `Source` stands. Every draw, step and take is compared with its record; the first that differs raises
`ReplayMismatch`, and so does everything after it.
"""

import collections
import json
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import _C, environment, journal_file, keys
from .errors import EverettError, ForkedError, JournalError, ReplayMismatch
from .journal_file import (
    CLOSE,
    DRAW,
    DROP,
    GROUP,
    KEY,
    LOAD,
    REPLAY_REPORT_VARIABLE,
    STATE,
    STEP,
    USE,
    WORDS,
    JournalReader,
    Record,
)
from .source_status import SourceStatus

_AHEAD = 256  # records handed to the script at a time
_PIECE = 1 << 26  # bytes of direct words after which the writer begins another record


class Replay:
    """What ev.journal returns in a replayed program: it has a Journal's surface, and writes nothing."""

    def __init__(self, source: "ReplayedSource"):
        self._source = source
        self.path = source.path
        self.encrypted = source.encrypted

    @property
    def records(self) -> int:
        """Records of the journal that were compared so far."""
        return self._source.seen

    def close(self) -> None:
        """The recorded program closed its journal here: ReplayMismatch if the journal holds more."""
        self._source.finish()

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()


@dataclass(frozen=True)
class RecordedDriver:
    """What is left of the driver that was recorded: what it said of itself, for who asks which device is behind a source."""

    name: str
    serial: str
    kind: str = "replayed"
    scheme: str = "journal"


class ReplayedSource:
    """Stands where a `Source` stands (`ev.current_source`), with a ring that stays empty: keys go to the keyring by a
    `_C.Script`, direct words come from here."""

    def __init__(self, path: str | os.PathLike, key: bytes | None = None, allow_versions: bool = False):
        self.ring = _C.Ring(1 << 14)
        self.witness = None
        self._key = key
        self._allow_versions = allow_versions
        self._lock = threading.RLock()
        self._over = ""  # why nothing more comes
        self._differs = ""  # the first difference: a program may catch the error and go on, but not end well
        self.seen_before = 0  # records of segments before this one
        self._open(path)
        self.uri = f"journal:{self.path}"
        self.driver = RecordedDriver(self.header["source"]["name"], self.header["source"]["serial"])
        self.label = f"NOT FRESH QUANTUM (replayed journal of {self.header['source']['label']})"
        self.handed_out = 0

    def _open(self, path: str | os.PathLike) -> None:
        path = str(path).replace("{rank}", str(environment.rank_and_world_size()[0]))
        self._reader = JournalReader(path, self._key)
        self._records = iter(self._reader)
        self._next: Record | None = next(self._records, None)  # with a wrong key it raises here
        self.path, self.header, self.encrypted = self._reader.path, self._reader.header, self._reader.encrypted
        self.begun = False
        self._begin_script()

    def _begin_script(self) -> None:
        self.script = _C.Script()
        self._steps: collections.deque[Record] = collections.deque()  # ends of steps that the script has
        self._steps_given = 0
        self._words: dict[tuple[int, int], collections.deque] = collections.defaultdict(collections.deque)
        self._words_seen = 0

    def attach(self) -> None:
        """Once the keyring has this source's ring: draws are compared, and refused until `begin`."""
        keys.watch(self.script, "", self._error, self._more)

    # --- the beginning ------------------------------------------------------------------------------------------------

    def begin(self) -> Replay:
        """Compares versions, restores torch's generators as they were recorded, and lets draws through. Again, before the
        first draw: restores the generators again. Raises JournalError for a program or machine that cannot replay."""
        with self._lock:
            self.refuse_if_over()
            if self.begun and (self.script.seen or self._words_seen):
                raise ReplayMismatch(
                    f"the program begins a second journal, but {self.path} has begun already, and one journal is replayed "
                    "at a time: replay the other by itself, from where the program begins it"
                )
            if not self.begun:
                self._compare_environment()
                self._begin_script()  # anew: steps before the journal began are not in it
                self.attach()
                self._states = []
                while self._next is not None and self._next.type == STATE:
                    self._states.append(self._next)
                    self._advance()
            for state in self._states:
                _restore(state)
            self.begun = True
            return Replay(self)

    def _compare_environment(self) -> None:
        try:
            forbidden, versions, notes = environment.differences(self.header, environment.facts(self.status()))
        except ValueError as error:
            raise JournalError(f"{self.path}: its header says too little to replay it: {error}") from None
        if versions and not self._allow_versions:
            forbidden += [
                f"{line} (allow it with --allow-versions: masks are the same if all draws are)" for line in versions
            ]
        elif versions:
            notes = versions + notes
        if forbidden:
            raise JournalError(f"{self.path} cannot be replayed here:\n" + "\n".join(forbidden))
        if notes:
            warnings.warn(
                f"{self.path} was recorded elsewhere: masks will be the same, but torch's own arithmetic may round "
                "otherwise. " + "; ".join(notes),
                stacklevel=4,
            )

    def load(self, counts: dict[str, int]) -> None:
        """The program loads a checkpoint: what comes next in the journal, or in its next segment, must be just that."""
        with self._lock:
            if not self.begun:
                self.begin()
            self.refuse_if_over()
            if self._hands_out():
                self._more()  # ends of steps that no draw has asked for yet
            if not self.complete:
                raise ReplayMismatch(
                    f"{self.path}: the program loads a checkpoint after {self.seen} records that were compared, but the "
                    "recorded one drew more before it did"
                )
            following = json.loads(self._next.data).get("next") if self._next and self._next.type == CLOSE else None
            self.seen_before, self._words_seen = self.seen, 0
            if following:
                self._reader.close()
                self._open(self.path.with_name(following))
                self.begin()
            record = self._next
            if (
                record is None
                or record.type != LOAD
                or (record.ticket, record.count) != (counts["draws"], counts["boundaries"])
            ):
                index = self._reader.records if record is None else record.index
                asked = f"the loading of a checkpoint of draw {counts['draws']}, step {counts['boundaries']}"
                raise self._mismatch(index, record, asked)
            self._advance()
            self.seen_before += 1
            self._begin_script()
            self.attach()
            keys.continue_from(counts)

    # --- records ------------------------------------------------------------------------------------------------------

    def _advance(self) -> Record | None:
        """The record at hand; the one after it is at hand then."""
        record, self._next = self._next, next(self._records, None)
        return record

    def _more(self) -> None:
        """Hands records on, to the end of a step at most when there are enough. Called by draws, without the keyring's
        mutex."""
        with self._lock:
            self._refuse_unless_begun()
            for _ in range(_AHEAD):
                record = self._next
                if record is None or record.type in (CLOSE, LOAD, STATE):
                    return self.script.end(self._reader.records if record is None else record.index)
                if record.type in (WORDS, USE, DROP):
                    self._words[record.device, record.store].append((self._steps_given, record))
                else:
                    if record.type == STEP:
                        self._steps_given += 1
                        self._steps.append(record)
                    self.script.add(record.index, record.head + (record.data if record.type in (KEY, GROUP) else b""))
                self._advance()

    def _error(self, reason: str) -> Exception:
        """Of a draw or step that differs."""
        index, expected, asked_step, asked, drawn_known = self.script.difference
        if asked_step:
            asked_text = "the end of a step"
        else:
            asked_text = _asked(Record.from_body(0, _whole(asked)), drawn_known)
        return self._mismatch(index, None if expected is None else Record.from_body(index, _whole(expected)), asked_text)

    def _mismatch(self, index: int, expected: Record | None, asked: str) -> ReplayMismatch:
        if expected is None:
            recorded = f"nothing: the journal ends there ({self._end()})"
        else:
            recorded = str(expected)
        self._over = self._over or f"record {index} of {self.path} differs"
        self._differs = self._differs or (
            f"record {index} of {self.path}: recorded was {recorded}; the program asked for {asked}. It is not the program "
            "that was recorded: its code, its data, its seeds or its order of draws differ."
        )
        return ReplayMismatch(self._differs)

    def _end(self) -> str:
        if self._next is None:
            return self._reader.end
        if self._next.type == CLOSE:
            return json.loads(self._next.data or b"{}").get("why", "closed")
        return str(self._next)

    def end_step(self) -> None:
        """The program ended a step: raises ReplayMismatch if the journal's step had more in it."""
        if self._differs:
            raise ReplayMismatch(self._differs)
        if not self.begun or self._over:
            return
        if self._steps_given < self.script.step and self._hands_out():
            self._more()
        while len(self._steps) > max(0, self._steps_given - self.script.step):
            self._steps.popleft()
        if self.script.difference is not None:
            raise self._error("differs")
        for queue in self._words.values():
            if queue and queue[0][0] < self.script.step:
                raise self._mismatch(queue[0][1].index, queue[0][1], "the end of a step")

    # --- the interface of a Source ------------------------------------------------------------------------------------

    def take_into(self, out: memoryview, timeout_s: float | None = None, place: tuple[int, int] = (-1, 0)) -> None:
        """As `Source.take_into`: the words that were recorded for this place, which must be as many."""
        if not len(out):
            return
        asked = f"{len(out)} bytes of direct words for {_place(place)}"
        done = 0
        with self._lock:
            self._refuse_unless_begun()
            while done < len(out):
                record = self._next_words(place, asked)
                if len(record.data) != min(len(out) - done, _PIECE):
                    out[:] = bytes(len(out))
                    raise self._mismatch(record.index, record, asked)
                out[done : done + len(record.data)] = record.data
                done += len(record.data)
            self.handed_out += len(out)

    def _at_hand(self, place: tuple[int, int]) -> Record | None:
        """The next record of this place in the present step, left where it is."""
        queue, step = self._words[place], self.script.step
        while not queue and self._steps_given <= step and self._hands_out():
            self._more()
        return queue[0][1] if queue and queue[0][0] == step else None

    def _next_words(self, place: tuple[int, int], asked: str, type_: int = WORDS) -> Record:
        record, step = self._at_hand(place), self.script.step
        if record is not None and record.type == type_:
            self._words_seen += 1
            return self._words[place].popleft()[1]
        if record is not None:
            raise self._mismatch(record.index, record, asked)
        if self._steps_given > step:
            ends = self._steps[step - self._steps_given]  # of the present step: the words that come are of a later one
            raise self._mismatch(ends.index, ends, asked)
        raise self._mismatch(self._reader.records if self._next is None else self._next.index, None, asked)

    def _hands_out(self) -> bool:
        return self._next is not None and self._next.type in (KEY, DRAW, STEP, WORDS, USE, DROP, GROUP)

    def take_slab(self, memory: memoryview, n: int, timeout_s: float | None, place: tuple[int, int]) -> int:
        """As `Source.take_slab`, but as many bytes as were recorded: stores of words are filled ahead of need, as time
        allows, and their odd ends depend on it."""
        with self._lock:
            self._refuse_unless_begun()
            asked = f"up to {len(memory)} bytes of direct words for {_place(place)}"
            record = self._next_words(place, asked)
            if len(record.data) > len(memory):
                raise self._mismatch(record.index, record, asked)
            memory[: len(record.data)] = record.data
            self.handed_out += len(record.data)
            return len(record.data)

    def take_ahead(self, memory: memoryview, place: tuple[int, int]) -> bool:
        """As `Source.take_ahead`: never; what was taken ahead comes by `take_slab`."""
        return False

    def use_words(self, granules: int, place: tuple[int, int]) -> None:
        """As `Source.use_words`: compares the op with its record."""
        with self._lock:
            self._refuse_unless_begun()
            asked = f"{granules} granules of direct words for an op on {_place(place)}"
            record = self._next_words(place, asked, USE)
            if record.count != granules:
                raise self._mismatch(record.index, record, asked)

    def must_drop_words(self, place: tuple[int, int]) -> bool:
        """As `Source.must_drop_words`: an alarm destroyed them in the recorded run."""
        with self._lock:
            self._refuse_unless_begun()
            record = self._at_hand(place)
            return record is not None and record.type == DROP

    def drop_words(self, place: tuple[int, int]) -> None:
        """As `Source.drop_words`."""
        if self.must_drop_words(place):
            self._next_words(place, "", DROP)

    def take(self, n: int, timeout_s: float | None = None) -> bytes:
        """As `Source.take`."""
        out = bytearray(n)
        self.take_into(memoryview(out), timeout_s)
        return bytes(out)

    def direct_words(self, n: int, timeout_s: float | None = None) -> np.ndarray:
        """As `Source.direct_words`."""
        words = np.empty(n, dtype=np.dtype("<u8"))
        self.take_into(memoryview(words.view(np.uint8)), timeout_s)
        return words

    def error_for(self, answer: "_C.Take", asked: int, timeout_s: float | None = None) -> EverettError:
        """As `Source.error_for`."""
        if answer == _C.Take.forked:
            return ForkedError(f"{self.uri} is replayed by the parent of this process; a forked child has no part in it")
        return JournalError(f"{self.uri}: the replay is over ({self._over or 'closed'}); nothing more can be drawn")

    def outage(self) -> str:
        """As `Source.outage`: none."""
        return ""

    def responses_from(self, start: int) -> list:
        """As `Source.responses_from`: no service was asked."""
        return []

    def reopen(self) -> None:
        """There is no device."""
        raise JournalError(f"{self.uri} is a journal: there is nothing to reopen")

    def _refuse_unless_begun(self) -> None:
        self.refuse_if_over()
        if not self.begun:
            raise ReplayMismatch(
                f"a draw before the program called ev.journal(...): {self.path} begins with that call and has no key for it"
            )

    def refuse_if_over(self) -> None:
        """JournalError once the replay has ended, ForkedError in a child."""
        if self.ring.forked:
            raise self.error_for(_C.Take.forked, 0)
        if self._differs:
            raise ReplayMismatch(self._differs)
        if self._over:
            raise self.error_for(_C.Take.closed, 0)

    @property
    def seen(self) -> int:
        """Records that were compared: draws, steps and takes."""
        return self.seen_before + self.script.seen + self._words_seen

    @property
    def complete(self) -> bool:
        """Whether the program asked for everything that the journal holds."""
        left = self.script.waiting or any(self._words.values()) or self._hands_out()
        return self.begun and not left and self.script.difference is None

    def finish(self) -> None:
        """Nothing more is replayed. ReplayMismatch if the journal holds something that the program did not ask for."""
        with self._lock:
            if self._differs:
                raise ReplayMismatch(self._differs)
            if self._over or self.ring.forked:
                return
            complete, seen = self.complete, self.seen
            self._over = "the program closed its journal"
            self._report(complete)
            self._reader.close()
            if self.begun and not complete:
                raise ReplayMismatch(
                    f"{self.path} holds more than the program asked for: it closed its journal after {seen} records that "
                    "were compared. It is not the program that was recorded, or it ended early."
                )

    def close(self) -> None:
        """Ends the replay without a complaint; draws then raise."""
        with self._lock:
            if not self._over and not self.ring.forked:
                complete = self.complete if self.begun else False
                self._over = "it was closed"
                self._report(complete)
                self._reader.close()
        self.ring.end(_C.Take.closed)

    def _report(self, complete: bool) -> None:
        """For `everett replay`, which waits for the program: a file in the folder that it made."""
        folder = os.environ.get(REPLAY_REPORT_VARIABLE)
        if folder and Path(folder).is_dir():
            said = {"journal": str(self.path), "compared": self.seen, "complete": complete, "end": self._end()}
            (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(said))

    def status(self) -> SourceStatus:
        """As `Source.status`: what is replayed, never called quantum."""
        if self.ring.forked:
            raise self.error_for(_C.Take.forked, 0)
        source = self.header["source"]
        return SourceStatus(
            uri=self.uri,
            name=f"journal of {source['name']}, recorded {self.header['started_utc']}",
            serial=source["serial"],
            kind="replayed",
            label=self.label,
            state="closed" if self._over else "flowing",
            failure=self._over,
            min_entropy=float(source["min_entropy"]),
            min_entropy_origin=f"{source['min_entropy_origin']}, when it was recorded",
            device_conditions=False,
            device={"compared": f"{self.seen:,} records"},
            conditioner=source["conditioner"],
            raw_bytes_per_block=0,
            alarms=(),
            alarm_counts={},
            transient_alarms=0,
            transport_errors=0,
            raw_bytes_in=0,
            raw_bytes_held_back=0,
            raw_bytes_dropped=0,
            conditioned_bytes_out=0,
            bytes_handed_out=self.handed_out,
            bytes_destroyed=0,
            ring_bytes=self.ring.capacity,
            ring_unread=0,
            ring_locked=self.ring.locked,
            loop=False,
            passes=0,
        )


def _whole(head: bytes) -> bytes:
    """A head that stands for its record in an error: the data of a key, which is not shown, as zeros."""
    return head + bytes(32 if head[0] in (KEY, GROUP) else 0)


def _asked(record: Record, drawn_known: bool) -> str:
    """A draw in the words of its record, though it got no ticket, and perhaps not far enough to know how it gets its key."""
    if record.type == journal_file.GROUP:
        return "another key for it"
    text = str(record).split(": ", 1)[1]
    if drawn_known:
        return text
    return text.replace("a fresh key", "a key", 1) if record.family > 1 else "a draw" + text.removeprefix("fresh")


def _place(place: tuple[int, int]) -> str:
    device, store = place
    return "the CPU" if device == -1 else f"cuda:{device} ({journal_file.STORES[store]})"


def _restore(state: Record) -> None:
    tensor = torch.frombuffer(bytearray(state.data), dtype=torch.uint8)
    if state.device == -1:
        torch.set_rng_state(tensor)
    elif state.device < torch.cuda.device_count():
        torch.cuda.set_rng_state(tensor, state.device)
    else:
        raise JournalError(f"the journal has a generator state of cuda:{state.device}, which is not here")
