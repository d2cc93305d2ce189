"""What the tests with emulated devices share: their kernel, bytes of a driver, the doctor's verdicts."""

import gc
import os
import time
from pathlib import Path

import pytest
from devices.kernel_double import KernelDouble, stream
from devices.usb_bus import UsbBus
from source_checks import blocks, nothing_left

from everett_cuda import source
from everett_cuda.drivers import attached, driver_of, parse_uri

attached()  # pyusb's own libusb context is made at the first search, and stays as long as the process
gc.collect()
gc.freeze()  # what has been imported lasts; `nothing_left` collects garbage around each test
KiB, MiB = 1024, 1 << 20
SEED = 7
# Where a card's bytes begin that are not thrown away: after the driver's own start-up bytes and the first read.
CHIP_START, CHIP_SAMPLE_START, MODULE_START = 64 * KiB + MiB, 16809984 + MiB, 64 * KiB


@pytest.fixture
def kernel():
    """The kernel double that this process was started with, without devices; nothing may be left open behind a test."""
    double = KernelDouble(Path(os.environ["KERNEL_DOUBLE"]))
    double.clear()
    # Without this machine's own USB: pyusb keeps the first libusb context, and its open files, for good.
    with UsbBus().plugged_into_pyusb(), nothing_left():
        yield double
    double.clear()


@pytest.fixture
def impatient(monkeypatch):
    """Sources wait for one second."""
    monkeypatch.setattr(source, "PATIENCE_S", 1.0)


def read(driver, n, timeout_s=10.0):
    """n bytes by as many reads as it takes."""
    out, at, deadline = bytearray(n), 0, time.monotonic() + timeout_s
    while at < n:
        assert time.monotonic() < deadline
        at += driver.readinto(memoryview(out)[at:], 0.2)
    return bytes(out)


def examine(text):
    """The doctor's findings."""
    uri = parse_uri(text)
    return driver_of(uri).examine(uri)


def verdicts(text):
    """check → verdict."""
    return {f.check: f.verdict for f in examine(text)}


def segment(start, n=4 * MiB):
    """The conditioned blocks of a device's bytes from `start` on."""
    return blocks(stream(SEED, start, n))
