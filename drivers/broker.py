"""`broker:` or `broker:/path/to.sock`: bits of a device that an `everett serve` process owns, shared with others.

The bits were tested and conditioned by the broker, so this driver has no raw bytes: it brings a `ring`, memory that it
shares with the broker alone (csrc/broker_ring.h). Kind, serial number and min-entropy are what the broker says of its
device. When the broker goes, draws follow the starvation policy, and this driver looks for the next one without end; one
that serves another kind ends the source.
"""

import os
import threading
import time
import warnings
import weakref
from pathlib import Path

from .. import _C
from ..errors import SourceError
from . import broker_wire as wire
from .broker_connection import DEFAULT_PATH, Connection, check_path, user_name
from .contract import Attached, DeviceLost, Driver, Finding, MinEntropy
from .uri import SourceURI

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_LOOK_S = 0.5  # a close is noticed at least so fast


class BrokerDriver(Driver):
    """See the module. A daemon thread listens to the broker; `how` is what it said last."""

    scheme = "broker"
    looks_for = f"an entropy broker (`everett serve`) at {DEFAULT_PATH}"
    conditioned = False

    def __init__(self, path: Path):
        self.path = path
        self.reconnections = 0
        self.how = wire.How()
        self.outage = ""  # why no bits can come now
        self.failed = False  # nor ever again
        self._closed = threading.Event()
        connection = Connection(path, shared=True)
        self.ring_bytes = connection.ring_bytes
        try:
            self.ring = _C.BrokerRing(self.ring_bytes)
        except ValueError as error:
            connection.close()
            raise SourceError(f"broker: {path}: {error}") from error
        self._take_over(connection)
        self._thread = threading.Thread(target=_listen, args=(weakref.ref(self), self._closed), daemon=True)
        self._thread.name = f"everett broker {path}"
        self._thread.start()
        _open.add(self)

    @classmethod
    def open(cls, uri: SourceURI) -> "BrokerDriver":
        values = uri.parameters({})
        if values:
            raise SourceError(f"{uri.text!r}: a broker's bits are conditioned already, so {', '.join(values)} means nothing")
        return cls(path_of(uri))

    @classmethod
    def attached(cls) -> list[Attached]:
        return [_row(DEFAULT_PATH)] if os.path.lexists(DEFAULT_PATH) else []

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        path = path_of(uri)
        return list(_findings(path))

    @property
    def connected(self) -> bool:
        """Whether a broker is there now."""
        return self._connection is not None

    # --- the connection ---

    def _take_over(self, connection: Connection) -> None:
        try:
            if connection.ring_bytes != self.ring_bytes:
                raise SourceError(f"broker: {self.path} has rings of another size now; open the source anew")
            self.ring.attach(*connection.take_descriptors())
        except (SourceError, RuntimeError, ValueError) as error:
            connection.close()
            raise error if isinstance(error, SourceError) else SourceError(f"broker: {self.path}: {error}") from error
        self._connection = connection
        self.serves = serves = connection.serves
        self.kind = serves.kind
        self.name = f"{serves.name}, by the broker at {self.path}"
        self.serial = serves.serial
        self.min_entropy = MinEntropy(serves.min_entropy, serves.min_entropy_origin)
        self.conditioned = serves.conditioned
        self.loop = serves.loop
        self.details = {
            "broker": f"{self.path} (pid {connection.pid}, user {user_name(connection.uid)})",
            "client": str(connection.client),
            "it serves": serves.uris,
            "reconnections": str(self.reconnections),
        }

    def listen_once(self) -> None:
        """One turn of the thread: a message, or one attempt to find the broker again."""
        connection = self._connection
        if connection is None:
            return self._look_for_it()
        try:
            message = connection.receive(_LOOK_S)
            if message is not None and message.type == wire.STATE:
                self.how = wire.How.unpack(message.rest)
                self.outage = self.how.why
        except (SourceError, wire.Malformed) as error:
            connection.close()
            self._connection = None
            self._pause_s = _FIRST_PAUSE_S
            self._gone_at = time.monotonic()
            if not self._closed.is_set():
                self.outage = f"the broker is gone ({error})"
                warnings.warn(
                    f"everett: {self.outage}; draws follow on_starved until it is back at {self.path}", stacklevel=2
                )

    def _look_for_it(self) -> None:
        if self._closed.wait(self._pause_s):
            return
        try:
            connection = Connection(self.path, shared=True)
        except SourceError as error:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self.outage = f"the broker is gone for {time.monotonic() - self._gone_at:.0f} s: {error}"
            return
        if connection.serves.kind != self.kind:
            connection.close()
            raise SourceError(
                f"broker: {self.path} serves {connection.serves.kind} bits now, and this source was opened for {self.kind} "
                "ones; open the source anew"
            )
        self.reconnections += 1
        self._take_over(connection)
        self.outage = ""

    def fail(self, error: Exception) -> None:
        """No bits come any more, and why."""
        self.outage, self.failed = str(error), True
        self.ring.end(_C.Take.failed)

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        raise SourceError(f"{self.name} gives conditioned bits only; raw bytes are recorded where the device is")

    def close(self) -> None:
        if self.ring.forked:
            return self.leave_to_parent()
        self._closed.set()
        self.ring.end(_C.Take.closed)
        _open.discard(self)
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * _LOOK_S)
        if self._connection is not None:
            self._connection.close()
        self.ring.detach()

    def leave_to_parent(self) -> None:
        """In a forked child: gives up the copy of the connection, so that the parent's death is seen."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _listen(driver_ref: "weakref.ref[BrokerDriver]", closed: threading.Event) -> None:
    while not closed.is_set() and (driver := driver_ref()) is not None:
        try:
            driver.listen_once()
        except Exception as error:  # whatever broke, takes must answer
            driver.fail(error)
            return
        del driver


_open: "weakref.WeakSet[BrokerDriver]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [driver.leave_to_parent() for driver in list(_open)])


def path_of(uri: SourceURI) -> Path:
    """Where the URI's broker listens."""
    return Path(uri.rest) if uri.rest else DEFAULT_PATH


def _uri(path: Path) -> str:
    return "broker:" if path == DEFAULT_PATH else f"broker:{path}"


def look(path: Path) -> Connection:
    """A greeted connection without shared memory, to be closed; errors as `Connection`."""
    return Connection(path, shared=False)


def _row(path: Path) -> Attached:
    connection = look(path)
    connection.close()
    serves = connection.serves
    state = "ready" if connection.supply == wire.FLOWING else "its source has stopped"
    return Attached(_uri(path), f"{serves.name}, by a broker", serves.serial, serves.kind, None, state)


def _findings(path: Path):
    if not os.path.lexists(path):
        yield Finding("broker", "fail", f"nothing is at {path}", "start one with `everett serve URI`", absent=True)
        return
    try:
        check_path(path)
        yield Finding("path", "ok", f"only its owner can change {path}")
        connection = look(path)
    except SourceError as error:
        yield Finding("broker", "fail", str(error), "see `systemctl status everett` or the broker's log")
        return
    try:
        how = connection.receive(1.0)
    except (SourceError, DeviceLost):
        how = None
    connection.close()
    yield Finding("broker", "ok", f"pid {connection.pid}, user {user_name(connection.uid)}, serves {connection.serves.uris}")
    stopped = connection.supply != wire.FLOWING
    why = wire.How.unpack(how.rest).why if how is not None and how.type == wire.STATE else ""
    if stopped or why:
        step = "see the broker's log; `systemctl reload everett` opens a stopped source again"
        yield Finding("source", "fail" if stopped else "note", why or "its source has stopped", step)
    else:
        yield Finding("source", "ok", "flows")


def hint_for(scheme: str) -> str:
    """For who finds a device busy: that a broker serves one of this scheme, or that one could."""
    try:
        served = look(DEFAULT_PATH)
    except SourceError:
        return "Several processes share one device through `everett serve URI`: they open broker:"
    served.close()
    if any(uri.partition(":")[0] == scheme for uri in served.serves.uris.split()):
        return f"A broker serves {served.serves.name}: open broker: instead"
    return "The broker of this machine serves another device; have it serve this one as well (`everett serve URI URI`)"
