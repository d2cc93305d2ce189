"""Serial ports: found by what they say of themselves, opened by one process only, read exactly or not at all.

pyserial finds and sets up the port; reading and writing are done here on its file descriptor, because pyserial's own
wait uses select(2), which fails once a training process has more than 1,023 files open, and its errors do not tell an
unplugged device from a lost byte. A tty whose device was unplugged polls as hung up, reads as EIO or as nothing at all,
and refuses every ioctl (termios.error, which is no OSError).
"""

import errno
import fcntl
import grp
import os
import select
import stat
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import DeviceNotFound, SourceError
from . import permission
from .contract import DeviceBusy, DeviceLost, Finding, TransportError, require
from .permission import holders, in_words

serial = require("serial", "serial", "pyserial")
list_ports = require("serial.tools.list_ports", "serial", "pyserial")

BY_ID = Path("/dev/serial/by-id")
# What a tty answers once its device is gone: EIO (hung up), ENXIO and ENODEV (no such device behind the node), and
# EBADF from a descriptor that another thread closed.
_GONE = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBADF}
_FTDI = 0x0403
# Daemons that open serial ports by themselves: they take bytes, or send commands that a generator does not understand.
_MEDDLERS = {
    "ModemManager": 'mark the port with ENV{ID_MM_DEVICE_IGNORE}="1" in a udev rule, or stop it',
    "rngd": "stop it: each byte goes to one of the two",
    "brltty": "stop it: it takes FTDI ports for braille displays",
}


@dataclass(frozen=True, order=True)
class Port:
    """One serial port that is present. vid, pid: its USB identity, None for a port that is not USB or does not say.

    product, manufacturer and serial are the USB strings; "" where there are none.
    """

    device: str
    vid: int | None = None
    pid: int | None = None
    serial: str = ""
    product: str = ""
    manufacturer: str = ""


def ports(*, ids: frozenset[tuple[int, int]] | set[tuple[int, int]] = frozenset(), text: str = "") -> list[Port]:
    """The ports whose (vid, pid) is in `ids` or whose product, manufacturer, serial or udev name contains `text`.

    Without both, all ports. Nothing is opened. udev's names under /dev/serial/by-id serve where sysfs does not tell,
    as in a container. Letter case does not matter, and a blank matches udev's underscore.
    """
    found: dict[str, Port] = {}
    for info in list_ports.comports():
        strings = (info.serial_number, info.product, info.manufacturer)
        found[info.device] = Port(info.device, info.vid, info.pid, *(s or "" for s in strings))
    names: dict[str, str] = {}
    for link in sorted(BY_ID.iterdir()) if BY_ID.is_dir() else ():
        device = os.path.realpath(link)
        names[device] = link.name
        if not found.get(device, Port(device)).product and os.path.exists(device):
            known = found.get(device, Port(device))
            product, serial_number = _from_udev_name(link.name)
            found[device] = Port(device, known.vid, known.pid, known.serial or serial_number, product)
    wanted = text.lower()

    def matches(port: Port) -> bool:
        words = (port.product, port.manufacturer, port.serial, names.get(port.device, "").replace("_", " "))
        return (port.vid, port.pid) in ids or (wanted != "" and any(wanted in word.lower() for word in words))

    return sorted(p for p in found.values() if matches(p) or not (ids or text))


def _from_udev_name(name: str) -> tuple[str, str]:
    """(product with its maker, serial) of a by-id name: `usb-MAKER_PRODUCT_SERIAL-if00-port0`."""
    middle = name.partition("-")[2].rpartition("-if")[0] or name
    product, _, serial_number = middle.rpartition("_")
    return product.replace("_", " "), serial_number


def open_port(device: str, baudrate: int, timeout_s: float) -> "serial.Serial":
    """Opens a port (8N1, raw, no flow control) for this process alone; SourceError says why not and what to do.

    The port is locked twice: flock(2), which other users of pyserial respect, and TIOCEXCL, which makes the kernel
    refuse any later open by a process that is not root. One that had it open before is named and refused too: two
    readers of a tty get every other byte. timeout_s is pyserial's own, for what is not read through this module.
    """
    try:
        if not stat.S_ISCHR(os.stat(device).st_mode):
            raise SourceError(f"{device} is not a serial port (no character device); name one such as /dev/ttyUSB0")
        port = serial.Serial(device, baudrate, timeout=timeout_s, write_timeout=timeout_s, exclusive=True)
    except (OSError, termios.error) as error:
        kind = _KINDS.get(_number(error), SourceError)
        raise kind(_why_not_opened(device, error)) from error
    try:
        fcntl.ioctl(port.fd, termios.TIOCEXCL)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):  # a tty that does not know it has the other lock
            port.close()
            raise SourceError(f"{device} went away while it was opened: {error}; check its cable") from error
    # A child of this process that was forked with the port open holds it too, and never reads from it.
    others = [(pid, name) for pid, name in holders(device, own=1) if not _is_child(pid)]
    if others:
        close_port(port)
        raise DeviceBusy(f"{device} is in use by {in_words(others)}; close that first")
    return port


def close_port(port: "serial.Serial") -> None:
    """Gives the port back, even if a forked child has inherited it: both locks belong to the open file, not to us.

    Errors of a device that is gone are of no interest any more. May be called twice.
    """
    if port.fd is not None:
        try:
            fcntl.flock(port.fd, fcntl.LOCK_UN)
            fcntl.ioctl(port.fd, termios.TIOCNXCL)
        except OSError:
            pass
    port.close()


_KINDS = {errno.ENOENT: DeviceNotFound, errno.EBUSY: DeviceBusy, errno.EAGAIN: DeviceBusy}


def _number(error: Exception) -> int | None:
    return error.args[0] if error.args and isinstance(error.args[0], int) else None


def _why_not_opened(device: str, error: Exception) -> str:
    code = _number(error)
    if code == errno.ENOENT:
        return f"{device} does not exist; connect the device, and check that `dmesg` shows a new tty"
    if code == errno.EACCES:
        return f"{device}: no permission; {permission_hint(device)}"
    if code in (errno.EBUSY, errno.EAGAIN):
        who = in_words(holders(device)) or "a process of another user"
        return f"{device} is in use by {who}; close that first"
    if lost(error):
        return f"{device} answers as if nothing were connected ({error}); check its cable"
    return f"{device} cannot be opened as a serial port: {error}"


def permission_hint(device: str) -> str:
    """What gives the present user a port: the packaged udev rule where one names the device, else the node's group."""
    real = os.path.realpath(device)
    port = next((p for p in ports() if p.device == real), Port(real))
    if port.vid is not None:
        identity = f"{port.vid:04x}", f"{port.pid:04x}"
        # FTDI's identities are everybody's: there, a rule is for this device only if it names its strings.
        ftdi = (identity[0], port.product), (identity[0], port.manufacturer), (*identity, port.serial)
        for words in ftdi if port.vid == _FTDI else (identity,):
            try:
                return permission.permission_hint(*words)
            except LookupError:
                continue
    try:
        group = grp.getgrgid(os.stat(device).st_gid).gr_name
    except (OSError, KeyError):
        group = "dialout"
    if group == "root":
        return "its node belongs to root alone; a udev rule has to give it a group (see docs/devices.md)"
    return f"join its group with `sudo usermod -aG {group} $USER`, then log in again"


# --- reading and writing ---


def read_some(port: "serial.Serial", buffer: memoryview, timeout_s: float) -> int:
    """Fills the front of `buffer` with what is there, waiting up to timeout_s for the first byte; returns how many.

    0 after a time-out. Raises DeviceLost when the device is gone, or for good once `port.cancel_read()` was called (by
    a thread that is about to close), and TransportError when another process took the bytes.
    """
    fd, cancelled = port.fd, port.pipe_abort_read_r
    if fd is None:
        raise DeviceLost(f"{port.port} is closed")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(cancelled, select.POLLIN)
    try:
        events = dict(poll.poll(max(0.0, timeout_s) * 1000))
        if not events:
            return 0
        if cancelled in events:  # the byte stays in the pipe
            raise DeviceLost(f"{port.port} is being closed")
        got = os.readv(fd, [buffer]) if events[fd] & (select.POLLIN | select.POLLHUP) else 0
    except BlockingIOError:
        return 0
    except OSError as error:
        raise _as_transport(port, error) from error
    if got == 0 and events[fd] & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
        raise DeviceLost(f"{port.port} hung up: the device is gone")
    if got == 0:
        raise TransportError(f"{port.port} had bytes and gave none: another process reads from it; close that one")
    return got


def read_exact(port: "serial.Serial", n: int, timeout_s: float) -> bytes:
    """Exactly n bytes within timeout_s, or TransportError: the bytes that did come are dropped. DeviceLost if gone."""
    out = bytearray(n)
    at, deadline = 0, time.monotonic() + timeout_s
    while at < n:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TransportError(f"{port.port} gave {at} of {n} bytes in {timeout_s:g} s; they were dropped")
        at += read_some(port, memoryview(out)[at:], left)
    return bytes(out)


def write_all(port: "serial.Serial", data: bytes, timeout_s: float) -> None:
    """Sends all of `data` within timeout_s, or raises TransportError or DeviceLost."""
    at, deadline = 0, time.monotonic() + timeout_s
    if port.fd is None:
        raise DeviceLost(f"{port.port} is closed")
    poll = select.poll()
    poll.register(port.fd, select.POLLOUT)
    while at < len(data):
        try:
            events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not events:
                raise TransportError(f"{port.port} took {at} of {len(data)} bytes in {timeout_s:g} s")
            at += os.write(port.fd, data[at:])
        except BlockingIOError:
            continue
        except OSError as error:
            raise _as_transport(port, error) from error


def drain(port: "serial.Serial", quiet_s: float, limit_s: float) -> int:
    """Reads and drops what arrives until nothing came for quiet_s; returns how many bytes that were.

    TransportError when bytes still come after limit_s; DeviceLost if the device is gone.
    """
    junk, dropped = bytearray(65536), 0
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        got = read_some(port, memoryview(junk), quiet_s)
        if got == 0:
            return dropped
        dropped += got
    raise TransportError(f"{port.port} does not fall silent: {dropped} bytes came in {limit_s:g} s")


def lost(error: BaseException | None) -> bool:
    """Whether an error of pyserial, of the kernel or of this module says that the device is gone.

    pyserial wraps some errors in a SerialException without their number, so what they came from is looked at too.
    """
    while error is not None:
        if isinstance(error, DeviceLost) or (error.args and error.args[0] in _GONE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _as_transport(port: "serial.Serial", error: OSError) -> TransportError:
    if lost(error):
        return DeviceLost(f"{port.port} is gone ({error})")
    return TransportError(f"{port.port}: {error}; its bytes were dropped")


# --- who else ---


def state(device: str) -> str:
    """A port in few words, without opening it: "ready", "no permission" or "in use by NAME (pid N)"."""
    others = holders(device)
    if others:
        return f"in use by {in_words(others)}"
    return "ready" if os.access(device, os.R_OK | os.W_OK) else "no permission"


def meddlers() -> list[tuple[int, str]]:
    """(pid, name) of running daemons that are known to open serial ports by themselves; visible to every user."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
        except OSError:  # it has ended
            continue
        if name in _MEDDLERS:
            found.append((int(process.name), name))
    return sorted(found)


def _is_child(pid: int) -> bool:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
        if pid == os.getpid():
            return True
    return False


def examine_port(device: str) -> list[Finding]:
    """For the doctor: is the port there, may it be opened, who else has it, who might take it. Opens nothing."""
    try:
        mode = os.stat(device).st_mode
    except OSError as error:
        step = "connect the device; `dmesg` must show a new tty (ftdi_sio or cdc_acm)"
        return [Finding("port", "fail", f"{device}: {error.strerror}", step, absent=True)]
    if not stat.S_ISCHR(mode):
        return [Finding("port", "fail", f"{device} is not a character device", "name a port such as /dev/ttyUSB0")]
    findings = [Finding("port", "ok", f"{device} is there")]
    if not os.access(device, os.R_OK | os.W_OK):
        text = f"{device} may not be read and written by this user"
        return [*findings, Finding("permission", "fail", text, permission_hint(device))]
    findings.append(Finding("permission", "ok", "this user may read and write it"))
    others = holders(device)
    if others:
        return [*findings, Finding("other process", "fail", f"{in_words(others)} has it open", "close that first")]
    findings.append(Finding("other process", "ok", "no other process that can be seen has it open"))
    for pid, name in meddlers():
        findings.append(Finding("daemon", "note", f"{name} (pid {pid}) runs and may open the port", _MEDDLERS[name]))
    return findings
