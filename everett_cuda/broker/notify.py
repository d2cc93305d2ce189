"""What systemd is told of a service (sd_notify(3)): that it is ready, that it lives, that it stops.

A datagram to the socket in NOTIFY_SOCKET, a path or, beginning with @, an abstract name. Without that variable (no
systemd) nothing is sent. A message that cannot be sent is no reason to stop serving: systemd then acts by its time-outs.
"""

import os
import socket
import time


class Notifier:
    """The service manager of this process, if there is one."""

    def __init__(self):
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = b"\0" + os.fsencode(path[1:]) if path.startswith("@") else os.fsencode(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if path else None
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        # Half of the time that systemd waits, as sd_watchdog_enabled(3) advises; 0: nobody waits.
        self.watchdog_s = int(microseconds) / 2e6 if mine and microseconds.isdigit() else 0.0
        self._due = 0.0

    def tell(self, **state: str | int) -> None:
        """Sends one message, such as tell(READY=1, STATUS="serving"). Control characters of a text are sent as spaces,
        because a line feed would begin another variable."""
        if self._socket is None:
            return
        lines = (f"{name}={''.join(c if c.isprintable() else ' ' for c in str(value))}" for name, value in state.items())
        try:
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), socket.MSG_DONTWAIT, self._address)
        except OSError:
            pass

    def lives(self) -> None:
        """Call it from a loop that goes round while all is well: tells the watchdog when it is time."""
        now = time.monotonic()
        if self.watchdog_s and now >= self._due:
            self._due = now + self.watchdog_s
            self.tell(WATCHDOG=1)

    def close(self) -> None:
        """Gives the socket up. May be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
