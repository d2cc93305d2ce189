"""The source: a driver, a thread that pumps its raw bytes through the pipeline, and the ring that bits are drawn from.

Python runs only around the driver's `readinto`; units, health tests, conditioner and ring are C++ without the GIL.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from . import _C, conditioner, health
from .drivers import DeviceFault, DeviceLost, Driver, EndOfRecording, TransportError, open_driver, parse_uri
from .errors import EverettError, ForkedError, HealthAlarm, SourceError, SourceExhausted, StartupTestFailed, Starved
from .source_status import AlarmReport, SourceStatus, label

RING_BYTES = 1 << 20
# What is unread at the close is destroyed. Of a source that is paid for, 40 kB are lost so at H = 4, and not 2.6 MB.
RING_BYTES_METERED = 1 << 14
STARTUP_BYTES = 4096
STARTUP_BYTES_METERED = 1024
READ_TIMEOUT_S = 0.2
# A device that lost its connection, or gives nothing, is waited for this long before the source counts as failed.
PATIENCE_S = 60.0
PATIENCE_AT_OPEN_S = 10.0
RECONNECT_SLICE_S = 0.5  # a close has to wait this long at most for a driver that looks for its device

_ENDED_STATE = {"ended": "exhausted", "failed": "failed", "alarm": "alarm", "closed": "closed"}


class DirectWitness(Protocol):
    """A journal: told of direct words before anybody sees them, with their place (`Source.take_into`). If it raises, the
    words are destroyed. Keys do not come this way: the keyring takes them from the ring and has a witness of its own."""

    def record_words(self, words: memoryview, device: int, store: int) -> None: ...

    def record_use(self, granules: int, device: int, store: int) -> None: ...

    def record_drop(self, device: int, store: int) -> None: ...


class Source:
    """An open source of conditioned bits. Open one with `Source.open(uri)`; close it, or use it in a `with`.

    `ring` is the C++ ring that keys and direct words are drawn from; it stays the same object over `reopen`. `witness`,
    where one is set, is told of direct words before anybody sees them.
    """

    witness: DirectWitness | None = None

    def __init__(self, uri: str, connect: Callable[[], Driver], ring_bytes: int | None = None):
        """Opens what `connect` returns; `Source.open` is the usual way in. Errors as there."""
        self.uri = uri
        self._connect = connect
        self._lifecycle = threading.RLock()
        self._stopping = threading.Event()
        self._end: str | None = None  # why the flow ended: a key of _ENDED_STATE
        self._failure = ""
        self._faults: list[str] = []  # what the device said, one for each alarm that it raised itself
        self._reconnections = 0
        self._thread: threading.Thread | None = None
        self._feed: _C.Feed | None = None
        self._final: SourceStatus | None = None
        self.driver = driver = connect()
        try:
            condition = parse_uri(uri).given.get("condition", "sha256")
            if condition == "none" and not driver.full_entropy:
                raise SourceError(
                    f"{uri}: condition=none is for a source that declares full entropy, and {driver.name} declares "
                    f"{driver.min_entropy}; leave it out"
                )
            claim = driver.min_entropy.bits_per_byte
            try:
                cutoffs = health.cutoffs(claim)
            except ValueError as error:
                raise SourceError(f"{uri}: {error}") from None
            hash_, self._conditioner = conditioner.choose(condition)
            self.ring = _C.Ring(ring_bytes or (RING_BYTES_METERED if driver.metered else RING_BYTES))
            self._pipeline = _C.Pipeline(
                self.ring,
                cutoffs,
                # Keys the fingerprints of the duplicate test only: units must not be recognizable from outside.
                fingerprint_key=os.urandom(16),
                block_bytes=32 if condition == "none" else health.raw_bytes_per_block(claim),
                bit_order=driver.bit_order,
                startup_bytes=STARTUP_BYTES_METERED if driver.metered else STARTUP_BYTES,
                hash=hash_,
            )
            self._start()
        except BaseException:
            driver.close()
            raise
        atexit.register(self.close)

    @classmethod
    def open(cls, uri: str, ring_bytes: int | None = None) -> "Source":
        """Opens the source that `uri` names and runs its start-up test; when this returns, bits flow.

        A broker's source is a `BrokerSource`, whose ring has the broker's size. ring_bytes: capacity of
        the ring, a power of two; None: 1 MiB, or 16 KiB for a metered source. Raises UnknownScheme, BadParameter,
        SourceError, SourceExhausted (a recording too short for the start-up test) or StartupTestFailed; then nothing is left
        open.
        """
        if ring_bytes is not None and (ring_bytes < 16384 or ring_bytes & (ring_bytes - 1)):
            raise ValueError(f"ring_bytes must be a power of two, at least 16384, not {ring_bytes}")
        driver = open_driver(uri)
        if driver.ring is not None:
            from .broker_source import BrokerSource

            return BrokerSource(uri, driver)
        first = [driver]
        return cls(uri, lambda: first.pop() if first else open_driver(uri), ring_bytes)

    # --- flow -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Runs the start-up test in this thread, then starts the pump. On an error nothing is left running."""
        private = self.driver.kind not in ("recorded", "simulated")
        self._feed = feed = _C.Feed(self._pipeline, self.driver.chunk_bytes, lock=private)
        try:
            self._startup_test(memoryview(feed.buffer))
        except BaseException:
            self.ring.end(_C.Take.failed)
            feed.stop()
            raise
        self._stopping.clear()
        self._end = None
        self._thread = threading.Thread(target=self._pump, name=f"everett pump {self.uri}", daemon=True)
        self._thread.start()

    def _startup_test(self, buffer: memoryview) -> None:
        pipeline, driver = self._pipeline, self.driver
        passes = driver.passes
        last_byte = time.monotonic()
        while pipeline.flow == _C.Flow.starting:
            missing = pipeline.startup_bytes - pipeline.counts["raw_held"]
            n = 0
            try:
                n = driver.readinto(buffer[: min(missing, len(buffer))], READ_TIMEOUT_S)
                if driver.passes != passes:  # a loop asked for: what comes again is no duplicate
                    passes = driver.passes
                    pipeline.forget_units()
                pipeline.push(buffer[:n], time.monotonic())
            except EndOfRecording as error:
                used = pipeline.counts["raw_in"]
                raise SourceExhausted(
                    f"{self.uri}: exhausted in the start-up test: {used} bytes used, and the test takes "
                    f"{pipeline.startup_bytes}; give a longer recording"
                ) from error
            except DeviceFault as fault:
                self._device_alarm(fault)
            except DeviceLost:
                raise
            except TransportError:
                pipeline.transport_error()
            now = time.monotonic()
            last_byte = now if n else last_byte
            if now - last_byte > PATIENCE_AT_OPEN_S:
                raise SourceError(
                    f"{self.uri}: {driver.name} gave no bytes for {PATIENCE_AT_OPEN_S:g} s in the start-up test; check "
                    "its connection"
                )
        if pipeline.flow == _C.Flow.stopped:
            raise StartupTestFailed(
                f"{self._last_alarm()} in the start-up test of {pipeline.startup_bytes} raw bytes; nothing was handed "
                "out. Check the device, then open it again to repeat the test."
            )
        driver.startup_passed()

    def _pump(self) -> None:
        """The thread: reads until the flow ends, and says why it ended."""
        try:
            end = self._pump_until_end()
        except Exception as error:  # whatever broke, takes must answer, not wait for ever
            self._failure = f"{self.uri}: {error}"
            end = "failed"
        self._end = end
        if end in ("ended", "failed"):
            self.ring.end(getattr(_C.Take, end))

    def _pump_until_end(self) -> str:
        driver, feed, pipeline = self.driver, self._feed, self._pipeline
        passes = driver.passes
        last_byte = time.monotonic()
        errors = 0  # transport errors running
        proven = True  # the start-up test has passed since the last interruption
        while not self._stopping.is_set():
            try:
                if not proven and pipeline.flow == _C.Flow.flowing:
                    proven = True
                    driver.startup_passed()
                n = driver.readinto(memoryview(feed.buffer), READ_TIMEOUT_S)
            except EndOfRecording:
                return "ended" if feed.drain() else self._stopped()
            except DeviceFault as fault:
                proven = False
                if not (feed.drain() and self._device_alarm(fault)):
                    return self._stopped()
                continue
            except TransportError as error:
                proven = False
                if not feed.drain():
                    return self._stopped()
                pipeline.transport_error()
                if time.monotonic() - last_byte > PATIENCE_S:
                    raise SourceError(f"no bytes for {PATIENCE_S:g} s: {error}") from error
                if isinstance(error, DeviceLost):
                    self._reconnect(error)
                self._stopping.wait(min(0.01 * 2 ** min(errors, 7), 1.0))
                errors += 1
                continue
            now = time.monotonic()
            if n == 0:
                if now - last_byte > PATIENCE_S:
                    raise SourceError(f"{driver.name} gave no bytes for {PATIENCE_S:g} s")
                continue
            if driver.passes != passes:  # as in the start-up test
                passes = driver.passes
                feed.drain()
                pipeline.forget_units()
            if not feed.submit(n, now):
                if pipeline.flow == _C.Flow.stopped:
                    pipeline.push(memoryview(feed.buffer)[:n], now)  # counts and destroys what was read meanwhile
                return self._stopped()
            errors = 0
            last_byte = time.monotonic()  # submit may have waited long for room in the ring
        return "closed"

    def _device_alarm(self, fault: DeviceFault) -> bool:
        self._faults.append(str(fault))  # before the alarm can be seen
        return self._pipeline.device_alarm(fault.status, fault.expected, time.monotonic())

    def _stopped(self) -> str:
        return "alarm" if self._pipeline.flow == _C.Flow.stopped else "closed"

    def _reconnect(self, lost: DeviceLost) -> None:
        """Returns once the driver has its device again, or the source is being closed; SourceError after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._stopping.is_set():
            try:
                self.driver.reconnect(RECONNECT_SLICE_S)
                self._reconnections += 1
                return
            except DeviceLost as error:
                if time.monotonic() > deadline:
                    raise SourceError(f"{lost}; waited {PATIENCE_S:g} s for it: {error}") from error
            except SourceError as error:
                raise SourceError(f"{lost}; {error}") from error

    # --- draws ------------------------------------------------------------------------------------------------------

    def take(self, n: int, timeout_s: float | None = None) -> bytes:
        """n conditioned bytes, never handed out before. Waits up to timeout_s seconds (None: as long as it takes).

        More bytes than the ring holds come in pieces; pieces taken before an error are destroyed. Raises Starved
        (time-out), SourceExhausted, HealthAlarm, SourceError (closed, or broken) or ForkedError.
        """
        out = bytearray(n)
        self.take_into(memoryview(out), timeout_s)
        taken = bytes(out)
        out[:] = bytes(n)
        return taken

    def direct_words(self, n: int, timeout_s: float | None = None) -> np.ndarray:
        """n direct (conditioned, unexpanded) 64-bit words; shape (n,), dtype uint64. Waits and raises as `take`."""
        words = np.empty(n, dtype=np.dtype("<u8"))
        self.take_into(memoryview(words.view(np.uint8)), timeout_s)
        return words

    def take_into(self, out: memoryview, timeout_s: float | None = None, place: tuple[int, int] = (-1, 0)) -> None:
        """Fills a contiguous, writable buffer of bytes, or zeroes it. Waits and raises as `take`.

        place: what they are for: (-1, 0) the host, (i, 1) the pool of GPU i, (i, 2) its lane for captured graphs.
        """
        if timeout_s is not None and not timeout_s >= 0:
            raise ValueError(f"timeout_s must be None or at least 0, not {timeout_s}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for at in range(0, len(out), self.ring.capacity):
            left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            got = _C.Take.empty
            try:
                got = self.ring.take_into(out[at : at + self.ring.capacity], left)
            finally:  # also when Ctrl-C ends the wait: nothing half-written
                if got != _C.Take.ok:
                    out[:] = bytes(len(out))
            if got != _C.Take.ok:
                raise self.error_for(got, len(out), timeout_s)
        self._tell_of(out, place)

    def _tell_of(self, taken: memoryview, place: tuple[int, int]) -> None:
        if self.witness is not None and len(taken):
            try:
                self.witness.record_words(taken, *place)
            except BaseException:
                taken[:] = bytes(len(taken))
                raise

    def outage(self) -> str:
        """Why no bits can come now, where more is known than that none came; empty otherwise."""
        return ""

    # What a GPU's store of words asks and tells, so that a journal can record it and a replay answer.

    def take_slab(self, memory: memoryview, n: int, timeout_s: float | None, place: tuple[int, int]) -> int:
        """The next n bytes of a store, into the beginning of `memory`. (A replay gives as many as were recorded.)"""
        self.take_into(memory[:n], timeout_s, place)
        return n

    def take_ahead(self, memory: memoryview, place: tuple[int, int]) -> bool:
        """Fills `memory` whole at once, or leaves it and answers False."""
        if self.ring.take_into(memory, 0.0) != _C.Take.ok:
            return False
        self._tell_of(memory, place)
        return True

    def use_words(self, granules: int, place: tuple[int, int]) -> None:
        """An op is about to use words of a store."""
        if self.witness is not None:
            self.witness.record_use(granules, *place)

    def must_drop_words(self, place: tuple[int, int]) -> bool:
        """Whether unused words of a store have to be destroyed for a reason that only a replay knows."""
        return False

    def drop_words(self, place: tuple[int, int]) -> None:
        """The unused words of a store were destroyed."""
        if self.witness is not None:
            self.witness.record_drop(*place)

    def error_for(self, answer: _C.Take, asked: int, timeout_s: float | None = None) -> EverettError:
        """The exception that a ring's answer other than `ok` stands for; asked: the bytes asked for."""
        if answer == _C.Take.forked:
            return ForkedError(
                f"{self.uri} was opened by the parent of this process; a forked child must open a source of its own, "
                "or draw in the parent"
            )
        if answer == _C.Take.closed:
            return SourceError(f"{self.uri} is closed; open it again")
        if answer == _C.Take.alarm:
            return HealthAlarm(
                f"{self._last_alarm()}; output stopped. Check the device, then reopen the source to repeat the start-up "
                "test."
            )
        counts = self._pipeline.counts
        unread = self.ring.unread
        if answer == _C.Take.ended:
            return SourceExhausted(
                f"{self.uri} is exhausted: {counts['raw_in']} bytes used, of which the last {counts['raw_held']} could "
                f"not be proven; {asked} bytes were asked for and {unread} are left. Give a longer recording, or "
                "loop=1 to begin again (then bits repeat, and every status says so)."
            )
        if answer == _C.Take.failed:
            why = self._failure or f"{self.uri} broke"
            return SourceError(f"{why}; {asked} bytes were asked for, {unread} are left")
        within = "at once" if timeout_s is None else f"within {timeout_s:g} s"
        return Starved(
            f"{self.uri} gave no {asked} bytes {within} ({unread} are there, {counts['raw_in']} raw "
            "bytes have come in); wait longer, draw less, or use a faster source"
        )

    # --- life -------------------------------------------------------------------------------------------------------

    def reopen(self) -> None:
        """An operator's answer to a permanent alarm, or to a device that broke: starts over with the start-up test.

        A device is opened again. A recording or a simulation goes on where it stopped: opened again, it would give the
        same bits twice. Counts go on and alarms stay listed. Raises as `open`, and SourceError when the source still
        flows, is closed, or another device answers.
        """
        self._refuse_in_child()
        with self._lifecycle:
            if self._final is not None:
                raise self.error_for(_C.Take.closed, 0)
            if self._end is None and self._pipeline.flow != _C.Flow.stopped:
                raise SourceError(f"{self.uri} has not stopped, so there is nothing to reopen")
            self._halt()
            try:
                if self.driver.kind not in ("recorded", "simulated"):
                    self._replace_driver()
                self._pipeline.reopen()
                self.ring.reopen()
                self._start()
            except BaseException as error:
                self._failure = str(error)
                self._end = {StartupTestFailed: "alarm", SourceExhausted: "ended"}.get(type(error), "failed")
                self.ring.end(getattr(_C.Take, self._end))
                raise

    def _replace_driver(self) -> None:
        before = self.driver
        before.close()
        self.driver = self._connect()
        if self.driver.serial != before.serial:
            raise SourceError(f"{self.uri} is another device now: {self.driver.serial}, not {before.serial}; open it anew")

    def _halt(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._feed.stop()

    def close(self) -> None:
        """Stops the pump, gives the device back and destroys what was not handed out. May be called more than once.

        Waiting takes answer that the source is closed. In a forked child it does nothing: the device is the parent's.
        """
        if self.ring.forked:
            return
        with self._lifecycle:
            if self._final is not None:
                return
            self.ring.end(_C.Take.closed)
            self._halt()
            self.driver.close()
            self.ring.destroy_unread()
            self._end = "closed"
            self._final = self._status()
            self._feed = None
            self._pipeline.transport_error()  # destroys what is held back
        atexit.unregister(self.close)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- status -----------------------------------------------------------------------------------------------------

    def _refuse_in_child(self) -> None:
        if self.ring.forked:
            raise self.error_for(_C.Take.forked, 0)

    def _last_alarm(self) -> str:
        alarms = AlarmReport.all_of(self._pipeline.alarms, self._faults)
        return f"{alarms[-1]} on {self.uri}" if alarms else f"health alarm on {self.uri}"

    @property
    def startup_bytes(self) -> int:
        """How many raw bytes a start-up test takes."""
        return self._pipeline.startup_bytes

    def responses_from(self, start: int) -> list:
        """As `Driver.responses_from`."""
        return self.driver.responses_from(start)

    def status(self) -> SourceStatus:
        """What the source is and has done; of the moment of closing once it is closed. ForkedError in a child."""
        self._refuse_in_child()
        return self._final or self._status()

    def _status(self) -> SourceStatus:
        driver, ring = self.driver, self.ring
        # In this order, because bits flow meanwhile: what was drawn is then never more than what was put into the ring,
        # and that never more than came of the raw bytes.
        handed_out, destroyed, unread = ring.bytes_out, ring.bytes_destroyed, ring.unread
        put_in = ring.bytes_in
        counts = self._pipeline.counts
        # The thread may not have noticed yet that the pipeline stopped.
        flow = {_C.Flow.starting: "starting", _C.Flow.flowing: "flowing", _C.Flow.stopped: "alarm"}[self._pipeline.flow]
        return SourceStatus(
            uri=self.uri,
            name=driver.name,
            serial=driver.serial,
            kind=driver.kind,
            label=label(driver.kind, driver.loop),
            state=_ENDED_STATE.get(self._end, flow),
            failure=self._failure,
            min_entropy=float(driver.min_entropy.bits_per_byte),
            min_entropy_origin=driver.min_entropy.origin,
            device_conditions=driver.conditioned,
            device=dict(driver.details),
            conditioner=self._conditioner,
            raw_bytes_per_block=self._pipeline.block_bytes,
            alarms=AlarmReport.all_of(self._pipeline.alarms, self._faults),
            alarm_counts=counts["alarms"],
            transient_alarms=counts["transients"],
            transport_errors=counts["transport_errors"],
            startup_tests=counts["startups"],
            reconnections=self._reconnections,
            raw_bytes_in=counts["raw_in"],
            raw_bytes_held_back=counts["raw_held"],
            raw_bytes_dropped=counts["raw_dropped"],
            conditioned_bytes_out=put_in,
            bytes_handed_out=handed_out,
            bytes_destroyed=destroyed,
            ring_bytes=ring.capacity,
            ring_unread=unread,
            ring_locked=ring.locked,
            loop=driver.loop,
            passes=driver.passes,
        )
