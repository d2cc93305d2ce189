"""A USB serial device on a pseudo-terminal: plugged in under a path of its own, pulled out, plugged in again.

A pty is no modem: TIOCMGET and TIOCMBIS answer ENOTTY, so DTR itself cannot be seen. But Linux raises DTR when a tty is
opened and drops it at the last close, and the master of a pty does see that: it polls as hung up while nobody has the
other side open. `dtr` is that. The line speed is seen too: both sides of a pty share their termios. And the master is in
packet mode (tty_ioctl(4), TIOCPKT), which tells it when the host throws away what has come in.
"""

import errno
import fcntl
import os
import pty
import select
import struct
import termios
import threading
import tty
from pathlib import Path


class PtyDevice:
    """Subclasses say in `serve` what the device does while it is plugged in; it runs in a thread of its own."""

    def __init__(self, path: Path):
        self.path = path  # as /dev/serial/by-id/...: stays the same over a replug, while the tty behind it may not
        self.master = -1
        # Whether the host has opened the port and emptied its input. What is sent before is lost or not, by chance.
        self.ready = False
        self._unplugged = threading.Event()
        self._thread: threading.Thread | None = None

    def plug(self) -> "PtyDevice":
        """The device appears at `path`."""
        self.master, slave = pty.openpty()
        tty.setraw(slave)
        os.set_blocking(self.master, False)
        fcntl.ioctl(self.master, termios.TIOCPKT, struct.pack("i", 1))
        self.path.symlink_to(os.ttyname(slave))
        os.close(slave)
        self._unplugged.clear()
        self._thread = threading.Thread(target=self._serve, name="emulated device", daemon=True)
        self._thread.start()
        return self

    def unplug(self) -> None:
        """The device is gone, whatever it was doing: its tty hangs up."""
        self._unplugged.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "PtyDevice":
        return self.plug()

    def __exit__(self, *_) -> None:
        self.unplug()

    def _serve(self) -> None:
        try:
            while not self._unplugged.is_set():
                self.serve()
        finally:
            self.path.unlink(missing_ok=True)
            os.close(self.master)

    def pull(self) -> None:
        """As `unplug`, by the device's own thread: its cable comes off at exactly this byte."""
        self._unplugged.set()

    def idle(self) -> None:
        """Called again and again while the host does not take what is sent."""

    def serve(self) -> None:
        """One turn of the device, of about 10 ms at most."""
        raise NotImplementedError

    # --- what subclasses use ---

    @property
    def dtr(self) -> bool:
        """Whether the host has the port open."""
        poll = select.poll()
        poll.register(self.master, 0)
        return not poll.poll(0)

    @property
    def speed(self) -> int:
        """The line speed that the host has set, as a constant of termios."""
        return termios.tcgetattr(self.master)[4]

    def rest(self, seconds: float) -> None:
        """Waits, or less when the device is being unplugged."""
        self._unplugged.wait(seconds)

    def receive(self, seconds: float) -> bytes:
        """What the host has sent; waits up to `seconds` for it. Keeps `ready` up to date."""
        poll = select.poll()
        poll.register(self.master, select.POLLIN | select.POLLPRI)
        events = dict(poll.poll(seconds * 1000)).get(self.master, 0)
        if events & select.POLLHUP:  # the host has closed the port; what it sent before is still there
            self.ready = False
        if not events & (select.POLLIN | select.POLLPRI):
            self.rest(seconds if events else 0)
            return b""
        try:
            packet = os.read(self.master, 4096)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno == errno.EIO:  # it has closed the port meanwhile
                self.rest(seconds)
                return b""
            raise
        if packet[0] & termios.TIOCPKT_FLUSHREAD:
            self.ready = True
        return packet[1:] if packet[0] == termios.TIOCPKT_DATA else b""

    def send(self, data: bytes) -> int:
        """Sends as USB does, when the host takes it; returns how much went before the port closed or the cable."""
        at = 0
        while at < len(data) and self.dtr and not self._unplugged.is_set():
            try:
                at += os.write(self.master, data[at : at + 4096])
            except BlockingIOError:
                self.idle()
                self.rest(0.001)
        return at
