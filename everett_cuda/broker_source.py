"""A source whose bits come from a broker: it draws from memory shared with the broker, and pumps and tests nothing itself.

The broker has run health tests and conditioner over the raw bytes once, for all its clients. What it says of them is shown
here as the broker's word; only what was drawn is counted here.
"""

import atexit
import threading
import time

from . import _C
from .drivers import Driver
from .drivers import broker_wire as wire
from .errors import EverettError, ForkedError, HealthAlarm, SourceError, SourceExhausted, Starved
from .source import Source
from .source_status import AlarmReport, SourceStatus, label

WORDS_S = 0.5


class BrokerSource(Source):
    """See the module. `Source.open("broker:")` gives one; it follows its broker through restarts."""

    def __init__(self, uri: str, driver: Driver):
        """driver: a `BrokerDriver`, open. Nothing of a `Source` that pumps is set up."""
        self.uri = uri
        self.driver = driver
        self.ring = driver.ring
        self.witness = None
        self._lifecycle = threading.RLock()
        self._final: SourceStatus | None = None
        atexit.register(self.close)

    def outage(self) -> str:
        """Why no bits can come now; empty while they can."""
        return self.driver.outage

    def error_for(self, answer: _C.Take, asked: int, timeout_s: float | None = None) -> EverettError:
        if answer == _C.Take.forked:
            return ForkedError(
                f"{self.uri} was opened by the parent of this process; a forked child is another client of the broker: "
                "draw through ev.*, which connects by itself, or open a source here"
            )
        if answer == _C.Take.closed:
            return SourceError(f"{self.uri} is closed; open it again")
        if answer == _C.Take.alarm:
            deadline = time.monotonic() + WORDS_S  # what it was follows the alarm itself
            while not self._alarms() and time.monotonic() < deadline:
                time.sleep(0.005)
            alarm = next(reversed(self._alarms()), "health alarm")
            return HealthAlarm(
                f"{alarm} on {self.driver.how.last_source or self.driver.serial or self.driver.name}, says the broker at "
                f"{self.driver.path}; output stopped. Check the device, then have the broker open it again: "
                "`systemctl reload everett`, or SIGHUP."
            )
        unread = self.ring.unread
        if answer == _C.Take.ended:
            return SourceExhausted(
                f"{self.uri}: what the broker serves ({self.driver.serves.uris}) is exhausted; {asked} bytes were asked for "
                f"and {unread} are left. Give the broker a longer recording"
            )
        if answer == _C.Take.failed:
            return SourceError(
                f"{self.driver.outage or self.uri + ' broke'}; {asked} bytes were asked for, {unread} are left"
            )
        within = "at once" if timeout_s is None else f"within {timeout_s:g} s"
        why = self.outage() or "its clients share what its device gives"
        return Starved(f"{self.uri} gave no {asked} bytes {within} ({unread} are there): {why}; wait longer or draw less")

    def reopen(self) -> None:
        """SourceError: a device that stopped is opened again at the broker, and then flows here by itself."""
        raise SourceError(
            f"{self.uri}: the device is the broker's; have the broker open it again: `systemctl reload everett`, or SIGHUP"
        )

    def close(self) -> None:
        """Leaves the broker; what was not drawn is destroyed. May be called twice; in a forked child it does nothing."""
        if self.ring.forked:
            return
        with self._lifecycle:
            if self._final is not None:
                return
            self.driver.close()
            self._final = self._status()
        atexit.unregister(self.close)

    def _alarms(self) -> tuple[AlarmReport, ...]:
        how = self.driver.how
        if not how.last_flags:
            return ()
        flags = how.last_flags
        test = _C.TESTS[how.last_test] if how.last_test < len(_C.TESTS) else f"test {how.last_test}"
        said = (how.last_offset, how.last_value, how.last_cutoff, bool(flags & 2), bool(flags & 4), how.last_said)
        return (AlarmReport(test, *said),)

    def _state(self) -> str:
        answer = self.ring.take_into(bytearray(0), 0.0)  # of nothing: only whether it is stopped
        if answer in (_C.Take.alarm, _C.Take.closed):
            return answer.name
        if self.driver.failed:
            return "failed"
        if not self.driver.connected:
            return "reconnecting"
        return "exhausted" if self.ring.supply == _C.Supply.ended and self.ring.unread < wire.BLOCK else "flowing"

    def _status(self) -> SourceStatus:
        driver, ring, how = self.driver, self.ring, self.driver.how
        handed_out, destroyed, unread = ring.bytes_out, ring.bytes_destroyed, ring.unread
        return SourceStatus(
            uri=self.uri,
            name=driver.name,
            serial=driver.serial,
            kind=driver.kind,
            label=label(driver.kind, driver.loop),
            state=self._state(),
            failure=driver.outage,
            min_entropy=float(driver.min_entropy.bits_per_byte),
            min_entropy_origin=driver.min_entropy.origin,
            device_conditions=driver.conditioned,
            device=dict(driver.details),
            conditioner=f"by the broker: {driver.serves.conditioner}",
            raw_bytes_per_block=driver.serves.raw_bytes_per_block,
            alarms=self._alarms(),
            alarm_counts=dict(zip(_C.TESTS, how.alarms, strict=True)),
            transient_alarms=how.transient_alarms,
            transport_errors=how.transport_errors,
            raw_bytes_in=how.raw_bytes,
            raw_bytes_held_back=0,
            raw_bytes_dropped=0,
            conditioned_bytes_out=ring.bytes_in,
            bytes_handed_out=handed_out,
            bytes_destroyed=destroyed,
            ring_bytes=driver.ring_bytes,
            ring_unread=unread,
            ring_locked=ring.locked,
            loop=driver.loop,
            passes=0,
            by_broker=True,
        )
