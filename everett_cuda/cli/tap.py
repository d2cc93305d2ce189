"""A tap on an open driver: the commands that measure a source see its raw bytes on their way into the health tests.

Only for commands that destroy whatever their source makes (`doctor`, `monitor`): bytes that were looked at must not also
become keys. They draw with `Ring.discard`, so no byte that comes from a looked-at one ever reaches Python.
"""

from collections.abc import Callable

from ..drivers import Driver

SAMPLES = 1_000_000  # what SP 800-90B 3.1.1 asks for
COUNTED_BYTES = 65536


class Tap:
    """`driver` to whoever reads it; `listen` is given each read's raw bytes, on the thread that reads."""

    def __init__(self, driver: Driver, listen: Callable[[memoryview], None]):
        self._driver = driver
        self._listen = listen

    def __getattr__(self, name: str):
        return getattr(self._driver, name)

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        got = self._driver.readinto(buffer, timeout_s)
        if got:
            self._listen(buffer[:got])
        return got


class Sample:
    """The first raw bytes of a source, up to `SAMPLES`, for the entropy estimates."""

    def __init__(self):
        self.raw = bytearray()

    def __call__(self, raw: memoryview) -> None:
        self.raw += raw[: SAMPLES - len(self.raw)]

    def destroy(self) -> None:
        """Overwrites it."""
        self.raw[:] = bytes(len(self.raw))

    @property
    def full(self) -> bool:
        return len(self.raw) >= SAMPLES


class Histogram:
    """How often each byte value occurred among the first 64 KiB of each read: enough, and fast sources stay fast."""

    def __init__(self):
        import numpy as np

        self._np = np
        self.counts = np.zeros(256, dtype=np.int64)

    def __call__(self, raw: memoryview) -> None:
        np = self._np
        self.counts += np.bincount(np.frombuffer(raw[:COUNTED_BYTES], dtype=np.uint8), minlength=256)
