"""What tests of drivers ask of a source: which bits may have come out, how it ended, and that nothing is left behind."""

import gc
import hashlib
import os
import threading
import time
from contextlib import contextmanager

import pytest

from everett_cuda.drivers import DeviceLost, Driver, TransportError
from everett_cuda.errors import EverettError, Starved
from everett_cuda.source import Source

RAW_PER_BLOCK = 80  # at 4 bits a byte
UNIT = 512


def blocks(raw: bytes, n: int = RAW_PER_BLOCK) -> list[bytes]:
    """The conditioned blocks of one uninterrupted run of raw bytes."""
    return [hashlib.sha256(raw[i : i + n]).digest() for i in range(0, len(raw) - n + 1, n)]


def cut(out: bytes) -> list[bytes]:
    """Conditioned bytes in blocks of 32."""
    return [out[i : i + 32] for i in range(0, len(out), 32)]


def take_until_end(opened: Source, timeout_s: float = 10.0) -> tuple[bytes, EverettError]:
    """Everything until the source ends, and the error that ended it; one that flows on for 3 * timeout_s is a failure."""
    out, deadline = bytearray(), time.monotonic() + 3 * timeout_s
    while True:
        assert time.monotonic() < deadline, f"the source still flows after {3 * timeout_s} s"
        try:
            out += opened.take(32, timeout_s)
        except Starved:
            raise AssertionError(f"the source neither gave bits nor ended in {timeout_s} s") from None
        except EverettError as error:
            return bytes(out), error


def wait_until(true, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def check_close_ends_a_read(driver: Driver) -> None:
    """A read of another thread, which waits, ends with DeviceLost when the driver is closed; so does every later use. The
    device must be silent. Closes twice."""
    ended = []

    def reader():
        try:
            while True:
                driver.readinto(memoryview(bytearray(4096)), 0.2)
        except TransportError as error:
            ended.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    time.sleep(0.3)
    driver.close()
    driver.close()
    thread.join(1.0)
    assert not thread.is_alive() and isinstance(ended[0], DeviceLost)
    for use in (lambda: driver.readinto(memoryview(bytearray(10)), 0.1), lambda: driver.reconnect(0.2)):
        with pytest.raises(DeviceLost, match="closed"):
            use()


@contextmanager
def nothing_left(threads_too: bool = True):
    """No open file and no thread more after the `with` than before."""

    def held():
        gc.collect()
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd)]
        return sorted(names), threads_too and sorted(t.name for t in threading.enumerate())

    before = held()
    yield
    deadline = time.monotonic() + 5
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() == before


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
