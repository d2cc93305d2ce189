"""A broker's socket: a path that one broker at a time has, that clients trust, and that vanishes with it."""

import fcntl
import grp
import os
import socket
from pathlib import Path

from ..drivers.broker_connection import check_path
from ..errors import SourceError


class Listener:
    """A listening SOCK_SEQPACKET socket at `path`, mode 0660. A lock beside it tells a living broker from a dead one's
    socket, which is replaced. notes: what should be known, in words."""

    def __init__(self, path: Path, group: str):
        """Raises SourceError: another broker serves there, the path is none that clients would trust, or may not be used."""
        self.path = Path(os.path.abspath(path))
        self.notes: list[str] = []
        self._socket: socket.socket | None = None
        if len(os.fsencode(self.path)) > 107:
            raise SourceError(f"{self.path} is too long for the address of a socket (107 bytes); choose a shorter path")
        try:
            if not self.path.parent.exists():
                self.path.parent.mkdir(mode=0o755)
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be served at: {error.strerror} ({error.filename})") from error
        try:
            self._take_lock()
            self._bind(group)
            check_path(self.path)
        except OSError as error:
            self.close()
            raise SourceError(f"{self.path} cannot be served at: {error}") from error
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise SourceError(
                f"another broker (pid {pid}) serves at {self.path}; stop it, or choose another --socket"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _bind(self, group: str) -> None:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        if self.path.is_socket():
            self.path.unlink()  # of a broker that died: we have the lock
        before = os.umask(0o777)  # nobody may connect before its mode and group are set
        try:
            listening.bind(os.fspath(self.path))
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(before)
        self._socket = listening
        if group:
            try:
                os.chown(self.path, -1, grp.getgrnam(group).gr_gid)
            except KeyError:
                self.notes.append(f"there is no group {group}: only this user (and root) may use the socket; make it with "
                                  f"`groupadd --system {group}`, or choose another by `group`")  # fmt: skip
            except PermissionError:
                self.notes.append(f"this user is not in the group {group}, so the socket keeps its own group")
        os.chmod(self.path, 0o660)
        listening.listen(512)

    def fileno(self) -> int:
        """The listening descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Removes the socket and gives up the lock, whose file stays: removing it would let two brokers have one each."""
        if self._socket is not None:
            self.path.unlink(missing_ok=True)
            self._socket.close()
            self._socket = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
