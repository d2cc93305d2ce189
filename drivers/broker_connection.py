"""A checked connection to an entropy broker: who serves at a path, what it serves, and its messages.

Whoever can put a socket where a client looks for one could hand it bits of their choice. So the path must be one that only
its owner can change, and the process behind it must belong to root, to this user, or to the owner of the socket's folder.
"""

import array
import os
import pwd
import select
import socket
import stat
import struct
import time
from pathlib import Path

from ..errors import BadParameter, DeviceNotFound, SourceError
from . import broker_wire as wire
from .contract import DeviceLost

DEFAULT_PATH = Path("/run/everett/everett.sock")
ANSWER_S = 5.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def check_path(path: Path) -> os.stat_result:
    """What stat says of the socket's folder; SourceError for a path that others than its owner can change.

    The folder itself may not be writable for group or world, sticky or not. A folder above it may when it is sticky (/tmp),
    as long as what lies in it belongs to root or to this user.
    """
    folder = Path(os.path.realpath(path.parent))
    try:
        about = os.lstat(path)
        if not stat.S_ISSOCK(about.st_mode):
            raise SourceError(f"broker: {path} is no socket; name the one that `everett serve --socket PATH` made")
        own = os.stat(folder)
        inner = own
        for outer in folder.parents:
            seen = os.stat(outer)
            if seen.st_mode & 0o022 and not (seen.st_mode & stat.S_ISVTX and inner.st_uid in (0, os.geteuid())):
                raise _unsafe(path, outer)
            inner = seen
    except FileNotFoundError as error:
        raise DeviceNotFound(f"broker: no broker at {path}: {error.strerror}; start one with `everett serve URI`") from error
    except OSError as error:
        raise SourceError(f"broker: {path}: {error.strerror}") from error
    if own.st_mode & 0o022:
        raise _unsafe(path, folder)
    return own


def _unsafe(path: Path, folder: Path) -> SourceError:
    return SourceError(
        f"broker: {path} is refused: others can write to {folder}, so anybody could serve bits there; give the broker a "
        f"folder of its own (mode 0755, such as {DEFAULT_PATH.parent})"
    )


def user_name(uid: int) -> str:
    """`everett`, or the number of a user without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Connection:
    """One connection, greeted. serves: a `broker_wire.Serves`; descriptors: (memfd, eventfd), the caller's to close, or ()
    without shared memory; pid, uid: the broker's."""

    def __init__(self, path: Path, shared: bool):
        """Raises DeviceNotFound (nobody serves there), DeviceLost (gone before it answered) or SourceError (refused)."""
        self.path = path
        self.descriptors: tuple[int, ...] = ()
        self._tag = 0
        folder = check_path(path)
        if len(os.fsencode(path)) > 107:
            raise BadParameter(f"broker: {path} is too long for the address of a socket (107 bytes)")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._connect(folder.st_uid)
            self._greet(shared)
        except BaseException:
            self.close()
            raise

    def _connect(self, folder_owner: int) -> None:
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.connect(os.fspath(self.path))
        except PermissionError as error:
            raise SourceError(
                f"broker: no permission for {self.path}; join its group with `sudo usermod -aG everett $USER`, log in again"
            ) from error
        except ConnectionRefusedError as error:
            raise DeviceNotFound(f"broker: nobody serves at {self.path} any more; start `everett serve URI`") from error
        except OSError as error:
            raise DeviceLost(f"broker: {self.path}: {error}") from error
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(credentials)
        if self.uid not in (0, os.geteuid(), folder_owner):
            raise SourceError(
                f"broker: {self.path} is served by user {user_name(self.uid)} (pid {self.pid}), neither root, nor you, "
                f"nor the owner of its folder ({user_name(folder_owner)}): an impostor; nothing was taken from it"
            )

    def _greet(self, shared: bool) -> None:
        self._send(wire.message(wire.HELLO, int(shared), 0))
        answer = self.receive(ANSWER_S)
        if answer is None:
            raise SourceError(f"broker: {self.path} has not answered for {ANSWER_S:g} s; look at its log")
        if answer.type != wire.WELCOME:
            raise self._wrong(f"type {answer.type} instead of a welcome")
        self.client, self.ring_bytes, self.supply = answer.numbers
        if bool(self.ring_bytes) != shared or len(self.descriptors) != (2 if shared else 0):
            raise self._wrong("a welcome without what was asked for")
        try:
            self.serves = wire.Serves.unpack(answer.rest)
        except wire.Malformed as error:
            raise self._wrong(str(error)) from error

    def _wrong(self, what: str) -> SourceError:
        return SourceError(f"broker: {self.path} does not speak the broker's protocol: {what}")

    def _send(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except BrokenPipeError:
            pass  # what it said before it closed can still be read
        except OSError as error:
            raise DeviceLost(f"broker: {self.path} is gone: {error}") from error

    def fileno(self) -> int:
        """For select; -1 when closed."""
        return self._socket.fileno()

    def receive(self, timeout_s: float) -> "wire.Message | None":
        """The next message, None after timeout_s; DeviceLost when the broker is gone, SourceError when it refuses us."""
        try:
            waiter = select.poll()
            waiter.register(self._socket, select.POLLIN)
            if not waiter.poll(1e3 * timeout_s):
                return None
        except ValueError as error:  # closed by another thread
            raise DeviceLost(f"broker: {self.path} was closed") from error
        try:
            packet, control, flags, _ = self._socket.recvmsg(wire.MOST_BYTES, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise DeviceLost(f"broker: {self.path} is gone: {error}") from error
        received = array.array("i")
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
        if self.descriptors:  # only a welcome has some
            for fd in received:
                os.close(fd)
        else:
            self.descriptors = tuple(received)
        if not packet:
            raise DeviceLost(f"broker: {self.path} has closed the connection")
        try:
            answer = wire.parse(packet)
        except wire.Malformed as error:
            raise self._wrong(str(error)) from error
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise self._wrong("a message that is too long")
        if answer.type == wire.REFUSED:
            raise SourceError(f"broker: {self.path} refuses: {answer.rest.decode('utf-8', 'replace')}")
        return answer

    def draw(self, n: int, timeout_s: float) -> bytes | None:
        """n conditioned bytes by request and reply (n: a multiple of 32, at most 2,048), or None when none came in time.

        Then the connection is of no use any more: the bytes may still come, and belong to nobody. Raises as `receive`.
        """
        if n % wire.BLOCK or not 0 < n <= wire.MOST_DRAW:
            raise ValueError(f"n: a multiple of 32 up to 2048, got {n}")
        self._tag = (self._tag + 1) & 0xFFFFFFFF
        self._send(wire.message(wire.DRAW, n, self._tag))
        deadline = time.monotonic() + timeout_s
        while (answer := self.receive(max(0.0, deadline - time.monotonic()))) is not None:
            if answer.type != wire.BYTES:
                continue
            if answer.numbers != (n, self._tag) or len(answer.rest) != n:
                raise self._wrong("an answer to another question")
            return answer.rest
        return None

    def close(self) -> None:
        """May be called twice. The broker zeroes what is left."""
        self._socket.close()
        for fd in self.descriptors:
            if fd >= 0:
                os.close(fd)
        self.descriptors = ()

    def take_descriptors(self) -> tuple[int, ...]:
        """`descriptors`, which are the caller's from now on."""
        taken, self.descriptors = self.descriptors, (-1,) * len(self.descriptors)
        return taken
