"""quantis-usb: what the driver costs beside its device, which is emulated.

In process: the driver alone on an emulated bus that gives bytes at once, through pyusb and through the
reader in C++. Targets: 40 MB/s in packets of 512 bytes, 200 MB/s in 64 KiB. Paced: a device of 4 Mbit/s that holds four
packets, read by a source while the main thread spins in Python; target 95 % of its rate. On the wire: the real libusb
below both, against umockdev, whose round trips cost a millisecond; target 90 % of bare pyusb, in turns in one process.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import check, quantile_row, spin
from everett_cuda.drivers import open_driver
from everett_cuda.source import Source
from tests.devices import quantis_usb_native, quantis_usb_wire
from tests.devices.quantis_usb import QuantisUsb
from tests.devices.seeded_bytes import Seeded, seeded_bytes
from tests.devices.usb_bus import UsbBus

READ_BYTES = 32 << 20
DISCARDED_BYTES = 4096  # by quantis-usb, when it begins to read
REPEATS = 15
WINDOW_S = 2.0
RATE_BYTES_PER_S = 500_000
WIRE_BYTES = 128 << 10


def run(quick: bool = False) -> list[dict]:
    """All rows; parts whose emulation cannot be built here are left out, with a line that says why. quick: few repeats."""
    return [*_rows(3 if quick else REPEATS)]


def _rows(repeats: int) -> Iterator[dict]:
    yield from _in_process("through pyusb", UsbBus(QuantisUsb(Seeded(7))), repeats)
    with tempfile.TemporaryDirectory() as folder:
        missing = quantis_usb_native.why_not()
        if missing:
            print(f"left out: quantis-usb through C++: {missing}")
        else:
            library = quantis_usb_native.build(Path(folder))
            bus = quantis_usb_native.NativeBus(library, quantis_usb_native.NativeQuantis(7))
            yield from _in_process("through C++", bus, repeats)
            device = quantis_usb_native.NativeQuantis(7, rate_bytes_per_s=RATE_BYTES_PER_S)
            yield from _paced(quantis_usb_native.NativeBus(library, device), repeats)
        missing = quantis_usb_wire.why_not()
        if missing:
            print(f"left out: quantis-usb on the wire: {missing}")
        else:
            yield from _on_the_wire(Path(folder), repeats)


def _in_process(how: str, bus: UsbBus, repeats: int) -> Iterator[dict]:
    buffer = bytearray(65536)
    view = memoryview(buffer)
    with bus.plugged_into_pyusb():
        for transfer in ("512", "64KiB"):
            driver = open_driver(f"quantis-usb:transfer={transfer}")
            begun = bus.gadgets[0].served
            got = driver.readinto(view, 1.0)
            first = begun + max(DISCARDED_BYTES, int(driver.details["transfer"].split()[0]))
            check(got > 0 and buffer[:got] == seeded_bytes(7, first, got), "the device's bytes")
            rates = []
            for _ in range(repeats):
                done, start = 0, time.perf_counter()
                while done < READ_BYTES:
                    done += driver.readinto(view, 1.0)
                rates.append(done / (time.perf_counter() - start) / 1e6)
            driver.close()
            yield quantile_row("quantis_usb", "quantis-usb", f"in process, {how}, {transfer} a transfer", "MB/s", rates)


def _paced(bus: UsbBus, repeats: int) -> Iterator[dict]:
    """In turns with an idle main thread, which shows what the machine's other work takes."""
    percent = {"an idle": [], "a spinning": []}
    with bus.plugged_into_pyusb(), Source.open("quantis-usb:") as source:
        consumer = threading.Thread(target=source.ring.discard, args=(1 << 62, 2 * repeats * WINDOW_S + 1))
        consumer.start()
        for _ in range(repeats):
            for main_thread, values in percent.items():
                before, start = source.status().raw_bytes_in, time.perf_counter()
                (time.sleep if main_thread == "an idle" else spin)(WINDOW_S)
                rate = (source.status().raw_bytes_in - before) / (time.perf_counter() - start)
                values.append(100 * rate / RATE_BYTES_PER_S)
        consumer.join()
        check(source.status().transport_errors == 0 and not source.status().alarms, "no byte is lost or bad")
    for main_thread, values in percent.items():
        what = f"4 Mbit/s in packets beside {main_thread} main thread, of its rate"
        yield quantile_row("quantis_usb", "quantis-usb", what, "%", values)


_WIRE_SET_UP = """
import time, array
import libusb_package, usb.util
from usb.backend import libusb1
from everett_cuda.drivers import open_driver

def bare(transfer, n):
    device = libusb_package.find(idVendor=0x0aba)
    device.set_configuration()
    into = array.array("B", bytes(transfer))
    device.read(0x86, into, 1000)
    start, done = time.perf_counter(), 0
    while done < n:
        done += device.read(0x86, into, 1000)
    elapsed = time.perf_counter() - start
    usb.util.dispose_resources(device)
    return done / elapsed

def ours(transfer, n):
    driver, view = open_driver(f"quantis-usb:transfer={transfer}"), memoryview(bytearray(65536))
    driver.readinto(view[:1], 1.0)
    start, done = time.perf_counter(), 0
    while done < n:
        done += driver.readinto(view[: n - done], 1.0)
    elapsed = time.perf_counter() - start
    driver.close()
    return done / elapsed
"""


def _on_the_wire(folder: Path, repeats: int) -> Iterator[dict]:
    wire = quantis_usb_wire.Wire(quantis_usb_wire.build(folder))
    wire.tell("plug BENCH 7")
    client = quantis_usb_wire.Client(wire)
    client.do(_WIRE_SET_UP)
    for transfer, n in ((512, WIRE_BYTES), (16384, 16 * WIRE_BYTES)):
        rates = {"bare": [], "ours": []}
        for _ in range(repeats):
            for name, values in rates.items():
                values.append(client.ask(f"{name}({transfer}, {n})") / 1e6)
        percent = [100 * ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
        what = f"on the wire, {transfer} bytes a transfer"
        yield quantile_row("quantis_usb", "quantis-usb", what, "MB/s", rates["ours"])
        yield quantile_row("quantis_usb", "bare pyusb", what, "MB/s", rates["bare"])
        yield quantile_row("quantis_usb", "quantis-usb", f"{what}, of bare pyusb in turns", "%", percent)
    client.close()
    wire.close()
