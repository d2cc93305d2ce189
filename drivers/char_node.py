"""What drivers of character devices share: a node opened without being fooled, locked, read ahead, lost and found again.

The kernel drivers behind these nodes block in read(2) for seconds, know no time-out and cannot be polled; so a thread
without Python reads (`_C.ReadAhead`, csrc/read_ahead.h), and here its bytes are taken with a time-out. A thread that
hangs in the kernel is left behind at the close: it ends, and gives its descriptor and its lock back, with its read.
"""

import abc
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from .. import _C
from ..errors import DeviceNotFound, SourceError
from .contract import DeviceBusy, DeviceLost, Driver, TransportError
from .permission import holders, in_words, permission_hint

ANSWER_S = 5.0  # open(2) and ioctl(2) wait for the read of whoever uses the card, at most this long
CLOSE_S = 1.0  # the longest wait for a read at a close
LOOK_EVERY_S = 0.05
_GONE = (errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN)
# Majors whose nodes are never a device: the kernel's own generator, /dev/zero and the like.
_MEMORY_MAJOR = 1
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ReadPlan:
    """How a node is read: one read asks for slot_bytes, the first one (thrown away) for first_read_bytes.

    checks: (ioctl request, bits that count, what they must be), asked after check_bytes or check_s. lock: the bytes are
    worth a share of RLIMIT_MEMLOCK.
    """

    slot_bytes: int
    slots: int
    first_read_bytes: int
    checks: tuple[tuple[int, int, int], ...] = ()
    check_bytes: int = 0
    check_s: float = 0.0
    lock: bool = True


def open_node(path: str, scheme: str, rule: str, follow: bool = False) -> int:
    """Opens a node for reading; a descriptor. Nothing is read. SourceError says what stands in the way.

    rule: the word that names the node's udev rule. follow: symbolic links are followed, which otherwise are refused.
    """
    # Not blocking, so that a pipe without a writer is seen for what it is instead of waited for.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno in _GONE:
            raise DeviceLost(f"{scheme}: {path} has no device behind it ({error.strerror})") from error
        if error.errno == errno.EACCES:
            why = f"no permission; {permission_hint(rule)}"
        elif error.errno == errno.EPERM:
            why = "this container is not allowed to use the device; give it the node (docker run --device)"
        elif error.errno == errno.ELOOP:
            why = "it is a symbolic link, which could be made to point to anything; name the node itself"
        else:
            why = error.strerror
        absent = error.errno == errno.ENOENT
        raise (DeviceNotFound if absent else SourceError)(f"{scheme}: cannot open {path}: {why}") from error
    try:
        about = os.fstat(fd)
        if stat.S_ISREG(about.st_mode):
            raise SourceError(f"{scheme}: {path} is a regular file, so it is a recording; open it with replay:{path}")
        if not (stat.S_ISCHR(about.st_mode) or stat.S_ISFIFO(about.st_mode)):
            raise SourceError(f"{scheme}: {path} is not a character device; name the device's node")
        if stat.S_ISCHR(about.st_mode) and os.major(about.st_rdev) == _MEMORY_MAJOR:
            raise SourceError(f"{scheme}: {path} is the kernel's own (device 1:{os.minor(about.st_rdev)}), no generator")
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_node(fd: int, path: str, scheme: str) -> None:
    """Takes the node for this process alone among those that lock it too; SourceError names who has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        others = holders(path, own=1)
        who = in_words(others) if others else "another process that this user may not see"
        raise DeviceBusy(f"{scheme}: {path} is in use by {who}; close that first, or use another device") from error


def answer_within(ask: Callable[[], Answer], what: str, discard: Callable[[Answer], object]) -> Answer:
    """What ask() returns or raises, or a SourceError after ANSWER_S. An answer that nobody waits for any more goes to
    discard()."""
    done, lock, box = threading.Event(), threading.Lock(), {}

    def run() -> None:
        try:
            came = {"answer": ask()}
        except BaseException as error:
            came = {"error": error}
        with lock:
            late = "late" in box
            box.update(came)
        if late and "answer" in came:
            discard(came["answer"])
        done.set()

    threading.Thread(target=run, name=f"everett ask {what}", daemon=True).start()
    try:
        done.wait(ANSWER_S)
    except BaseException:  # Ctrl-C
        with lock:
            box["late"] = True
        if "answer" in box:
            discard(box["answer"])
        raise
    with lock:
        if not box:
            box["late"] = True
            raise SourceError(
                f"{what} has not answered for {ANSWER_S:g} s: its kernel driver waits for the hardware. Look at `dmesg`; "
                "unload and load its kernel module, or start the machine anew"
            )
    if "error" in box:
        raise box["error"]
    return box["answer"]


class NodeDriver(Driver):
    """A driver of a node. A subclass opens one in `_connect`, and sets `_fd`, `_path` and `_plan`, before it reads."""

    name = "character device"

    def __init__(self):
        self._owner = os.getpid()
        self._fd: int | None = None
        self._path = ""
        self._plan: ReadPlan | None = None
        self._reader: _C.ReadAhead | None = None
        self._closed = threading.Event()
        self._changing = threading.RLock()  # held while a reader begins or ends

    # --- what a subclass says ---

    @abc.abstractmethod
    def _look(self) -> str:
        """Connects to the lost device if it is there again, or says why not; SourceError when it never can be."""

    def _deviation(self, check: int, answer: int) -> SourceError:
        """What it means that this check of the plan was answered so."""
        raise NotImplementedError  # a plan without checks has no deviations

    def _still_there(self) -> bool:
        """Whether the node that was opened is still the device's: some drivers answer EIO for a card that is gone."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:
            return False

    # --- reading ---

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        reader = self._reader or self._begin()
        got = reader.take_into(buffer, timeout_s)
        if got == 0 and (halted := reader.halted).why != _C.Halt.running:
            raise self._broken_off(halted)
        return got

    def _begin(self) -> _C.ReadAhead:
        with self._changing:
            if self._closed.is_set() or self._fd is None:
                raise self._gone()
            plan = self._plan
            try:
                self._reader = _C.ReadAhead(
                    self._fd, slot_bytes=plan.slot_bytes, slots=plan.slots, first_read_bytes=plan.first_read_bytes,
                    checks=plan.checks, check_bytes=plan.check_bytes, check_s=plan.check_s, lock=plan.lock,
                )  # fmt: skip
            except RuntimeError as error:  # no descriptor or no thread is to be had
                raise SourceError(f"{self.name} cannot be read: {error}") from error
            return self._reader

    def _gone(self) -> DeviceLost:
        if os.getpid() != self._owner:
            return DeviceLost(f"{self.name} belongs to the process that this one was forked from")
        return DeviceLost(f"{self.name} {'was closed' if self._closed.is_set() else 'is not there'}")

    def _broken_off(self, halted: _C.Halted) -> SourceError:
        """The reading has ended by itself, and what it had read is dropped: what to raise."""
        with self._changing:
            if self._closed.is_set() or halted.why == _C.Halt.closed:
                return self._gone()
            self._stop_reading()
            if halted.why == _C.Halt.deviation:
                return self._deviation(halted.check, halted.answer)
            if halted.why == _C.Halt.end_of_file:
                if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                    return DeviceLost(f"{self.name}: nobody writes to it any more")
                return TransportError(f"{self.name} answered a read with no bytes")
            what = f"{errno.errorcode.get(halted.code, halted.code)}: {os.strerror(halted.code)}"
            if halted.code in _GONE or not self._still_there():
                self._let_go()
                return DeviceLost(f"{self.name} is gone ({what})")
            return TransportError(f"{self.name}: a read failed ({what}); the bytes before it were dropped")

    def _say(self, **words: str) -> None:
        """Changes what `details` says, as a whole: other threads read it."""
        self.details = MappingProxyType({**self.details, **{name.replace("_", " "): w for name, w in words.items()}})

    # --- loss and end ---

    def _stop_reading(self) -> bool:
        """False when the thread is still inside a read."""
        reader, self._reader = self._reader, None
        return reader is None or reader.close(CLOSE_S)

    def _let_go(self) -> None:
        with self._changing:
            ended = self._stop_reading()
            fd, self._fd = self._fd, None
            if fd is None:
                return
            # Closing would not do: a forked child may hold a copy of the descriptor, and with it the lock. The child's own
            # close must leave the parent its lock.
            if ended and os.getpid() == self._owner:
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def reconnect(self, timeout_s: float) -> None:
        self._let_go()
        deadline = time.monotonic() + timeout_s
        while not self._closed.is_set():
            with self._changing:
                why = "is being closed" if self._closed.is_set() else self._look()
                if self._fd is not None:
                    return
            if time.monotonic() >= deadline:
                raise DeviceLost(f"{self.name} {why}")
            self._closed.wait(LOOK_EVERY_S)
        raise self._gone()

    def close(self) -> None:
        self._closed.set()
        self._let_go()
