"""quantis-usb: over an emulated bus in this process, read through pyusb ("python") and through C++ ("native")."""

import ctypes
import errno
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from devices import quantis_usb_native as native
from devices.quantis_usb import QuantisUsb
from devices.quantis_usb_native import NativeBus, NativeQuantis
from devices.seeded_bytes import Seeded, seeded_bytes
from devices.usb_bus import UsbBus
from processes import in_forked_child
from source_checks import UNIT, blocks, take_until_end, wait_until
from usb.backend import libusb1
from usb.core import USBError

from everett_cuda import _C, drivers, source
from everett_cuda.drivers import DeviceBusy, DeviceFault, DeviceLost, TransportError, open_driver, parse_uri
from everett_cuda.drivers.permission import holders, in_words, udev_rule, udev_rules
from everett_cuda.drivers.usb import find
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError
from everett_cuda.source import Source

SERIAL = "1000231A410"
DISCARDED = 4096  # thrown away each time that reading begins
KIND_OF_READER = {"python": "_PythonReader", "native": "_NativeReader"}


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory):
    missing = native.why_not()
    if missing:
        pytest.skip(f"the C endpoint of the emulated Quantis cannot be built: {missing}")
    return native.build(tmp_path_factory.mktemp("endpoint"))


@pytest.fixture(params=["python", "native"])
def plug_in(request):
    """plug_in(serial, ...) → a device on a bus that pyusb sees; its stream is that of seed 7 from its start."""
    library = request.getfixturevalue("endpoint") if request.param == "native" else None
    bus = UsbBus() if library is None else NativeBus(library)

    def plug(serial=SERIAL, seed=7, **more):
        device = QuantisUsb(Seeded(seed), serial, **more) if library is None else NativeQuantis(seed, serial=serial, **more)
        device.bus = bus
        bus.gadgets.append(device)
        return device

    plug.kind = request.param
    with bus.plugged_into_pyusb():
        yield plug
    assert bus.open_handles == 0, "a device was left open"


@pytest.fixture
def plug_python():
    """As plug_in, for what does not depend on how the data is read."""
    bus = UsbBus()

    def plug(serial=SERIAL, generator=None, **more):
        device = QuantisUsb(generator or Seeded(7), serial, **more)
        device.bus = bus
        bus.gadgets.append(device)
        return device

    with bus.plugged_into_pyusb():
        yield plug
    assert bus.open_handles == 0, "a device was left open"


def read(driver, n, cut=1 << 30, timeout_s=0.2):
    """Exactly n bytes, by reads of at most `cut`."""
    out, at = bytearray(n), 0
    deadline = time.monotonic() + 20
    while at < n:
        at += driver.readinto(memoryview(out)[at : min(n, at + cut)], timeout_s)
        assert time.monotonic() < deadline
    return bytes(out)


def one(driver, n=512):
    buffer = bytearray(n)
    return driver.readinto(memoryview(buffer), 0.2)


@pytest.fixture
def opened(plug_in):
    """(device, driver): one that is plugged in and open."""
    device = plug_in()
    driver = open_driver("quantis-usb:")
    yield device, driver
    driver.close()


# --- published ---


def test_emulated_bytes_are_splitmix64():
    # Vigna's splitmix64 for the seed 1234567, as published with many implementations.
    words = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    assert seeded_bytes(1234567, 0, 40) == b"".join(w.to_bytes(8, "little") for w in words)
    assert seeded_bytes(1234567, 13, 11) == seeded_bytes(1234567, 0, 24)[13:]


# --- bytes ---


@pytest.mark.parametrize("transfer, cut", [("512", 512), ("512", 700), ("512", 100_000), ("4KiB", 999), ("64KiB", 65536)])
def test_bytes_are_those_of_the_device_in_order(plug_in, transfer, cut):
    device = plug_in()
    driver = open_driver(f"quantis-usb:?transfer={transfer}")
    first = max(DISCARDED, int(driver.details["transfer"].split()[0]))
    assert read(driver, 300_000, cut) == seeded_bytes(7, first, 300_000)
    assert type(driver._reader).__name__ == KIND_OF_READER[plug_in.kind]
    driver.close()
    assert device.served >= first + 300_000


def test_what_the_device_declares(opened):
    _, driver = opened
    assert (driver.kind, driver.serial, driver.conditioned, driver.bit_order) == ("quantum", SERIAL, False, "msb_first")
    assert str(driver.min_entropy) == "4 bits a byte (assumed)" and driver.rate_bytes_per_s == 500_000
    assert driver.details["board version"] == "0x20008" and driver.details["modules"] == "1 (mask 0x1)"
    assert driver.details["transfer"] == "512 bytes (one packet)"


def test_status_is_asked_every_64_kib_and_not_every_packet(opened):
    device, driver = opened
    start = time.monotonic()
    before = device.requests.count(0x13)
    read(driver, 1 << 20)
    asked = device.requests.count(0x13) - before
    assert 16 <= asked <= 18 + (time.monotonic() - start) / 0.1
    assert device.requests.count(0x17) >= asked


def test_status_is_asked_again_after_100_ms(plug_python):
    device = plug_python()
    driver = open_driver("quantis-usb:")
    one(driver)
    before = device.requests.count(0x13)
    one(driver)
    assert device.requests.count(0x13) == before
    time.sleep(0.11)
    one(driver)
    assert device.requests.count(0x13) == before + 1
    driver.close()


def test_four_modules_are_four_times_as_fast(plug_python):
    plug_python(modules=0b1111)
    driver = open_driver("quantis-usb:")
    assert driver.rate_bytes_per_s == 2_000_000 and driver.details["modules"] == "4 (mask 0xf)"
    driver.close()


def test_old_firmware_without_rate_and_flag(plug_python):
    device = plug_python()
    device.unknown_requests = {0x16, 0x17}
    driver = open_driver("quantis-usb:")
    assert driver.rate_bytes_per_s == 500_000 and driver.details["rate"] == "4 Mbit/s (assumed)"
    assert driver.details["AIS-31 start-up test"] == "unknown to this firmware"
    before = device.requests.count(0x17)
    read(driver, 200_000)
    driver.startup_passed()
    assert device.requests.count(0x17) == before
    driver.close()


# --- which device ---


def test_devices_are_listed_without_a_byte_being_read(plug_in):
    first, second, third = plug_in("A 1?", port=1), plug_in("", port=2), plug_in("C3", port=3)
    third.forbidden = True
    devices, looked_for = drivers.attached()
    rows = [d for d in devices if d.uri.startswith("quantis-usb:")]
    # A device that may not be opened cannot tell its serial number here; on a real system sysfs does.
    assert [(d.uri, d.serial, d.state) for d in rows] == [
        ("quantis-usb:A%201%3F", "A 1?", "ready"),
        ("quantis-usb:path=99-2", "", "ready"),
        ("quantis-usb:path=99-3", "", "no permission"),
    ]
    assert {d.kind for d in rows} == {"quantum"} and first.served == second.served == 0
    assert any("Quantis USB" in line for line in looked_for)
    for row in rows[:2]:
        driver = open_driver(row.uri)
        assert driver.serial == row.serial
        driver.close()


def test_the_device_is_named_when_there_are_several_or_none(plug_python):
    with pytest.raises(SourceError, match=r"no such Quantis USB is attached .*attached: none"):
        open_driver("quantis-usb:")
    plug_python("A", port=1), plug_python("B", port=2)
    with pytest.raises(SourceError, match="2 are attached; name one of quantis-usb:A, quantis-usb:B"):
        open_driver("quantis-usb:")
    with pytest.raises(SourceError, match="attached: quantis-usb:A, quantis-usb:B"):
        open_driver("quantis-usb:C")
    for uri, serial in (("quantis-usb:B", "B"), ("quantis-usb:path=99-1", "A"), ("quantis-usb:B?h=6.5", "B")):
        driver = open_driver(uri)
        assert driver.serial == serial and (uri[-1] != "5" or str(driver.min_entropy) == "6.5 bits a byte (claimed by user)")
        driver.close()


def test_auto_takes_it(plug_python):
    plug_python("A")
    driver = open_driver("auto:?h=5")
    assert driver.scheme == "quantis-usb" and str(driver.min_entropy) == "5 bits a byte (claimed by user)"
    driver.close()


@pytest.mark.parametrize("transfer", ["0", "128KiB", "fast", "-1"])
def test_malformed_transfers_are_refused(transfer):
    with pytest.raises(BadParameter, match="auto, or 512 to 64KiB|a size in bytes"):
        open_driver(f"quantis-usb:?transfer={transfer}")


def test_transfers_are_whole_packets(plug_python):
    device = plug_python()
    with pytest.raises(BadParameter, match="transfer=1000 is no multiple of 512"):
        open_driver("quantis-usb:transfer=1000")
    device.packet_bytes = 64  # at full speed
    driver = open_driver("quantis-usb:")
    assert driver.details["transfer"] == "64 bytes (one packet)" and "full speed" in driver.details["USB"]
    assert read(driver, 10_000) == seeded_bytes(7, DISCARDED, 10_000)
    driver.close()


# --- transfers larger than a packet ---


def test_auto_measures_larger_transfers(plug_python):
    device = plug_python()
    driver = open_driver("quantis-usb:transfer=auto")
    size = int(driver.details["transfer"].split()[0])
    assert size > 512 and "fastest when measured" in driver.details["transfer"]
    begun = device.served  # what was measured is not used
    assert read(driver, 100_000) == seeded_bytes(7, begun + max(size, DISCARDED), 100_000)
    driver.close()


def test_auto_stays_with_packets_where_larger_transfers_come_short(plug_python):
    device = plug_python(one_packet=True)
    driver = open_driver("quantis-usb:transfer=auto")
    assert driver.details["transfer"] == "512 bytes (the fastest when measured)"
    begun = device.served
    assert read(driver, 10_000) == seeded_bytes(7, begun + DISCARDED, 10_000)
    driver.close()


@pytest.mark.parametrize("kind", ["short", "overflow", "stall"])
def test_larger_transfers_fall_back_to_packets_in_mid_flow(plug_in, kind):
    device = plug_in()
    driver = open_driver("quantis-usb:transfer=16KiB")
    assert read(driver, 20_000) == seeded_bytes(7, 16384, 20_000)
    device.fault(kind, device.served)
    with pytest.raises(TransportError):
        read(driver, 200_000)
    assert driver.details["transfer"] == "512 bytes (one packet, since 16384 bytes failed)"
    begun = device.served
    assert read(driver, 50_000) == seeded_bytes(7, begun + DISCARDED, 50_000)
    driver.close()


def test_a_failed_packet_changes_nothing_about_transfers(opened):
    device, driver = opened
    device.fault("short", 20_000)
    with pytest.raises(TransportError):
        read(driver, 200_000)
    assert driver.details["transfer"] == "512 bytes (one packet)"


# --- what goes wrong ---


@pytest.mark.parametrize(
    "kind, words", [("short", "short"), ("stall", "Broken pipe|EPIPE"), ("overflow", "too large|EOVERFLOW"),
                    ("io", "Input/output|EIO")]
)  # fmt: skip
def test_failed_transfers_lose_their_bytes_and_the_device_goes_on(opened, kind, words):
    device, driver = opened
    device.fault(kind, 30_000)
    whole = seeded_bytes(7, DISCARDED, 30_000)
    out = bytearray()
    buffer = bytearray(1000)
    with pytest.raises(TransportError, match=words) as caught:
        while True:
            n = driver.readinto(memoryview(buffer), 0.2)
            out += buffer[:n]
    assert not isinstance(caught.value, DeviceLost)
    assert whole.startswith(out)
    begun = device.served
    assert read(driver, 20_000) == seeded_bytes(7, begun + DISCARDED, 20_000)


def test_a_transfer_cut_by_its_time_is_dropped_whole(endpoint):
    device = NativeQuantis(7)
    with NativeBus(endpoint, device).plugged_into_pyusb():
        driver = open_driver("quantis-usb:")
        device.fault("late", 10_240)
        with pytest.raises(TransportError, match="short"):
            read(driver, 100_000)
        begun = device.served
        assert begun == 10_240 + 256
        assert read(driver, 1000) == seeded_bytes(7, begun + DISCARDED, 1000)
        driver.close()


def test_silence_is_no_error_and_loses_nothing(opened):
    device, driver = opened
    first = read(driver, 10_000)
    device.fault("silence", device.served)
    rest, quiet = bytearray(), 0
    buffer = bytearray(65536)
    while quiet < 2:
        start = time.monotonic()
        n = driver.readinto(memoryview(buffer), 0.05)
        assert time.monotonic() - start < 0.5
        rest += buffer[:n]
        quiet = quiet + 1 if n == 0 else 0
    device.speak()
    rest += read(driver, 10_000)
    assert first + rest == seeded_bytes(7, DISCARDED, len(first + rest))


@pytest.mark.parametrize("how", ["in a transfer", "between reads"])
def test_unplugging_is_a_lost_device(opened, how):
    device, driver = opened
    read(driver, 10_000)
    if how == "in a transfer":
        device.fault("unplug", device.served + 5000)
    else:
        device.unplug()
    with pytest.raises(DeviceLost, match="is gone"):
        read(driver, 200_000)
    assert device.bus.open_handles == 0
    with pytest.raises(DeviceLost, match="is not attached"):
        one(driver)
    start = time.monotonic()
    with pytest.raises(DeviceLost, match=f"Quantis USB {SERIAL} is not attached"):
        driver.reconnect(0.15)
    assert time.monotonic() - start < 1


def test_the_same_device_connects_again_and_another_is_refused(plug_in):
    device = plug_in("A", port=4)
    driver = open_driver("quantis-usb:A")
    one(driver)
    device.unplug()
    with pytest.raises(DeviceLost):
        read(driver, 100_000)
    elsewhere = plug_in("B", seed=8, port=5)
    with pytest.raises(DeviceLost, match=r"A is not attached \(but quantis-usb:B\)"):
        driver.reconnect(0.0)
    in_place = plug_in("C", seed=9, port=4)
    with pytest.raises(SourceError, match="where Quantis USB A was there is now C, .*open quantis-usb:C") as caught:
        driver.reconnect(1.0)
    assert not isinstance(caught.value, DeviceLost)
    in_place.unplug()
    device.forbidden = True  # the kernel has it, udev has not given permission yet
    device.plug()
    with pytest.raises(DeviceLost, match="is attached, but: .*no permission|is not attached"):
        driver.reconnect(0.15)
    threading.Timer(0.1, lambda: setattr(device, "forbidden", False)).start()
    driver.reconnect(5.0)
    begun = device.served
    assert read(driver, 5000) == seeded_bytes(7, begun + DISCARDED, 5000)
    assert elsewhere.served == in_place.served == 0
    driver.close()


def test_a_device_without_serial_is_known_by_its_port(plug_python):
    device = plug_python("", port=2)
    driver = open_driver("quantis-usb:")
    device.unplug()
    with pytest.raises(DeviceLost):
        one(driver)
    other = plug_python("", port=3)
    with pytest.raises(DeviceLost, match="not attached .but quantis-usb:path=99-3"):
        driver.reconnect(0.0)
    device.plug()
    driver.reconnect(1.0)
    assert one(driver) == 512 and other.served == 0
    driver.close()


def test_a_missing_module_is_a_fault(opened):
    device, driver = opened
    read(driver, 1000)
    device.status = 0
    with pytest.raises(DeviceFault, match="disabled or has failed") as caught:
        read(driver, 300_000)
    assert (caught.value.status, caught.value.expected) == (0, 1)
    with pytest.raises(DeviceFault):  # no byte until the board says that it is well
        one(driver)
    device.status = 1
    begun = device.served
    assert read(driver, 1000) == seeded_bytes(7, begun + DISCARDED, 1000)


def test_one_dead_module_of_four_is_a_fault_and_a_bit_beyond_the_mask_is_none(plug_python):
    device = plug_python(modules=0b1111)
    device.status = 0b10111
    with pytest.raises(DeviceFault) as caught:
        open_driver("quantis-usb:")
    assert (caught.value.status, caught.value.expected) == (0b0111, 0b1111)
    device.status = 0b11111
    open_driver("quantis-usb:").close()
    device.mask = 0
    with pytest.raises(SourceError, match="has no module"):
        open_driver("quantis-usb:")


def test_the_ais31_flag_asks_for_the_startup_test_once(opened):
    device, driver = opened
    for _ in range(2):
        device.ais31 = 1
        with pytest.raises(TransportError, match="AIS-31") as caught:
            read(driver, 300_000)
        assert not isinstance(caught.value, DeviceLost)
        read(driver, 300_000)  # it asks no second time while the test runs
        assert device.ais31 == 1 and device.requests.count(0x18) == 0
        driver.startup_passed()
        assert device.ais31 == 0 and driver.details["AIS-31 start-up test"] == "passed"
        assert device.requests.count(0x18) == 1
        device.requests.clear()
        read(driver, 300_000)
        driver.startup_passed()
        assert device.requests.count(0x18) == 0


def test_an_ais31_flag_at_opening_is_answered_by_the_test_that_runs_anyway(plug_python):
    device = plug_python()
    device.ais31 = 1
    with Source.open("quantis-usb:") as opened:
        opened.take(32)
        assert device.ais31 == 0 and opened.status().transport_errors == 0
        assert opened.status().device["AIS-31 start-up test"] == "passed"


def test_an_ais31_flag_that_stays_set_does_not_ask_without_end(plug_python):
    device = plug_python()
    device.ais31_sticks = True
    with Source.open("quantis-usb:") as opened:
        device.ais31 = 1
        deadline = time.monotonic() + 10
        while "stays set" not in opened.status().device["AIS-31 start-up test"]:
            opened.take(32768)
            assert time.monotonic() < deadline
        opened.take(1 << 19)
        assert opened.status().transport_errors == 1


def test_a_claimed_device_and_a_forbidden_one_are_explained(plug_in):
    device = plug_in()
    with_it = open_driver("quantis-usb:")
    with pytest.raises(SourceError, match="is in use by .*; stop that first"):
        open_driver("quantis-usb:")
    assert one(with_it) == 512  # not disturbed
    with_it.close()
    device.forbidden = True
    with pytest.raises(SourceError, match="no such Quantis USB"):  # here its serial cannot be read either
        open_driver(f"quantis-usb:{SERIAL}")
    with pytest.raises(SourceError, match="no permission to open /dev/bus/usb/099/002; .*--install-udev") as caught:
        open_driver("quantis-usb:")
    assert udev_rule("0aba", "0102") in str(caught.value)


def test_what_only_has_the_ids_of_a_quantis_is_not_used(plug_python, monkeypatch):
    device = plug_python()
    original = device.bus.get_endpoint_descriptor

    def other_endpoint(*where):
        described = original(*where)
        described.bEndpointAddress = 0x81
        return described

    monkeypatch.setattr(device.bus, "get_endpoint_descriptor", other_endpoint)
    with pytest.raises(SourceError, match="not its one endpoint"):
        open_driver("quantis-usb:")
    assert device.requests == []


def test_errors_are_told_by_their_number_whatever_the_backend_calls_them(plug_python):
    device = plug_python()
    (found,) = find({(0x0ABA, 0x0102)})
    expected = {errno.ENODEV: DeviceLost, errno.ESHUTDOWN: DeviceLost, errno.EIO: TransportError, None: TransportError,
                errno.EACCES: SourceError, errno.EPERM: SourceError, errno.EBUSY: DeviceBusy}  # fmt: skip
    for number, kind in expected.items():
        assert type(found.explained(USBError("words", -1, number), "reading")) is kind
    found.close()
    found.close()
    assert device.served == 0


# --- the end ---


def test_close_may_be_called_twice_and_ends_reads_in_other_threads(plug_in):
    device = plug_in()
    driver = open_driver("quantis-usb:")
    read(driver, 1000)
    device.silence()
    errors = []

    def reads():
        try:
            while True:
                driver.readinto(memoryview(bytearray(1 << 20)), 5.0)
        except SourceError as error:
            errors.append(error)

    readers = [threading.Thread(target=reads) for _ in range(2)]
    for reader in readers:
        reader.start()
    time.sleep(0.05)
    start = time.monotonic()
    driver.close()
    driver.close()
    for reader in readers:
        reader.join(5)
        assert not reader.is_alive()
    assert time.monotonic() - start < 2
    assert [type(e) for e in errors] == [DeviceLost] * 2 and "was closed" in str(errors[0])
    with pytest.raises(DeviceLost, match="was closed"):
        driver.reconnect(1.0)
    driver.startup_passed()  # nothing is asked of a device that was given back


def held():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def assert_held(expected):
    """A joined thread may take a moment more to leave the kernel's list."""
    deadline = time.monotonic() + 10
    while held() > expected and time.monotonic() < deadline:
        time.sleep(0.01)
    files, tasks = held()
    assert files == expected[0] and tasks <= expected[1]


def test_200_cycles_leave_no_thread_no_file_and_no_handle(plug_in):
    device = plug_in()
    before, threads = held(), threading.enumerate()
    for k in range(200):
        driver = open_driver("quantis-usb:")
        if k % 2:
            one(driver)
        if k % 50 == 3:
            device.unplug()
            with pytest.raises(DeviceLost):
                read(driver, 100_000)
            device.plug()
        driver.close()
        assert device.bus.open_handles == 0
    assert threading.enumerate() == threads
    assert_held(before)


def test_a_forked_child_reads_nothing_and_does_not_disturb(endpoint):
    device = NativeQuantis(7)
    with NativeBus(endpoint, device).plugged_into_pyusb():
        driver = open_driver("quantis-usb:")
        first = read(driver, 10_000)

        def child():
            with pytest.raises(SourceError, match="stopped"):
                one(driver)
            return "refused"

        assert in_forked_child(child) == "refused"
        assert first + read(driver, 10_000) == seeded_bytes(7, DISCARDED, 20_000)
        driver.close()


# --- the reader in C++ ---


def native_reader(library, device, **more):
    transfer = ctypes.cast(ctypes.CDLL(str(library)).bulk_transfer, ctypes.c_void_p).value
    arguments = dict(bulk_transfer=transfer, handle=ctypes.addressof(device.data), endpoint=0x86, transfer_bytes=512,
                     timeout_ms=20, discard_bytes=0, ahead_bytes=8192)  # fmt: skip
    return _C.UsbReader(**{**arguments, **more})


def test_reader_reads_ahead_no_further_than_its_queue(endpoint):
    device = NativeQuantis(3)
    reader = native_reader(endpoint, device)
    deadline = time.monotonic() + 5
    while device.served < 8192 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert device.served == 8192 and device.data.running == 0
    out = bytearray(10_000)
    assert reader.take(out, 8192, 1.0) == (8192, 0)
    assert out[:8192] == seeded_bytes(3, 0, 8192)
    reader.stop()
    reader.stop()
    assert reader.take(out, 1, 1.0) == (0, _C.UsbReader.STOPPED)


def test_reader_asks_for_no_more_than_can_be_there(endpoint):
    device = NativeQuantis(3)
    reader = native_reader(endpoint, device, ahead_bytes=0)  # two transfers
    out, got = bytearray(1 << 16), 0
    while got < 50_000:
        n, status = reader.take(memoryview(out)[got : got + 777], 1 << 20, 5.0)
        assert n > 0 and status == 0
        got += n
    assert out[:got] == seeded_bytes(3, 0, got)
    reader.stop()


def test_reader_waits_no_longer_than_its_time_and_gives_what_is_there(endpoint):
    device = NativeQuantis(3)
    device.fault("silence", 1024)
    reader = native_reader(endpoint, device)
    out = bytearray(8192)
    start = time.monotonic()
    assert reader.take(out, 8192, 0.1) == (1024, 0)
    assert reader.take(out, 1, 0.0) == (0, 0)
    assert 0.1 <= time.monotonic() - start < 1
    device.speak()
    assert reader.take(out, 8192, 5.0) == (8192, 0) and out == seeded_bytes(3, 1024, 8192)
    reader.stop()


@pytest.mark.parametrize(
    "kind, status", [("short", 1), ("stall", -9), ("overflow", -8), ("io", -1), ("unplug", -4), ("late", 1)]
)
def test_reader_ends_with_the_first_failure_and_destroys_what_waits(endpoint, kind, status):
    device = NativeQuantis(3)
    device.fault(kind, 4096)
    reader = native_reader(endpoint, device)
    deadline = time.monotonic() + 5
    out = bytearray(512)
    answer = (0, 0)
    while answer == (0, 0) or answer[1] == 0 and time.monotonic() < deadline:
        answer = reader.take(out, 1, 0.1)
    assert answer == (0, status)
    calls = device.data.calls
    assert reader.take(out, 1, 0.1) == (0, status) and device.data.calls == calls
    reader.stop()


def test_reader_refuses_what_cannot_be_meant(endpoint):
    device = NativeQuantis(3)
    for wrong in ({"bulk_transfer": 0}, {"handle": 0}, {"endpoint": 0x06}, {"transfer_bytes": 0}, {"timeout_ms": 0},
                  {"ahead_bytes": 1 << 40}):  # fmt: skip
        with pytest.raises(ValueError):
            native_reader(endpoint, device, **wrong)
    reader = native_reader(endpoint, device)
    with pytest.raises(ValueError):
        reader.take(bytearray(10), 1, float("nan"))
    with pytest.raises((ValueError, BufferError)):
        reader.take(bytes(10), 1, 1.0)
    del reader  # ends its thread
    assert device.data.running == 0


# --- through the source ---

def hashes(raw):
    return b"".join(blocks(raw))


def test_bits_are_the_hashes_of_the_devices_bytes(plug_in):
    plug_in()
    with Source.open("quantis-usb:") as opened:
        out = opened.take(100_000, timeout_s=20)
        status = opened.status()
    assert out == hashes(seeded_bytes(7, DISCARDED, 300_000))[:100_000]
    assert (status.kind, status.serial, status.health, status.transport_errors) == ("quantum", SERIAL, "ok", 0)


@pytest.mark.parametrize(
    "fault, words", [({"stuck_at": 400_001}, "repetition count"), ({"biased_from": 400_001}, "adaptive proportion")]
)
def test_a_device_that_goes_bad_is_stopped_and_nothing_unproven_leaves(plug_python, fault, words):
    plug_python(generator=Seeded(7, **fault))
    with Source.open("quantis-usb:", ring_bytes=16384) as opened:
        out, error = take_until_end(opened, 20)
        status = opened.status()
    assert isinstance(error, HealthAlarm) and words in str(error) and SERIAL not in str(error)
    first = status.alarms[0]
    assert 400_001 - DISCARDED <= first.offset < 400_001 - DISCARDED + 2 * UNIT and words in first.test
    proven = seeded_bytes(7, DISCARDED, (first.offset // UNIT - 1) * UNIT)
    assert hashes(proven).startswith(out) and len(out) > 10_000
    assert [a.permanent for a in status.alarms] == [False, True]  # the start-up test after it failed as well


def test_a_device_that_is_bad_from_the_start_never_gives_a_bit(plug_python):
    plug_python(generator=Seeded(7, stuck_at=0))
    with pytest.raises(HealthAlarm, match="in the start-up test"):
        Source.open("quantis-usb:")


def pieces(out):
    return [out[i : i + 32] for i in range(0, len(out), 32)]


@pytest.mark.parametrize("kind", ["short", "stall", "io", "overflow"])
def test_after_a_failed_transfer_the_startup_test_runs_and_the_flow_goes_on(plug_in, kind):
    device = plug_in()
    device.fault(kind, 100_352)
    with Source.open("quantis-usb:") as opened:
        out = opened.take(200_000, timeout_s=20)
        status = opened.status()
    assert status.transport_errors == 1 and status.alarms == () and status.raw_bytes_dropped > 0
    # Before: whole, but for what was held back or lay in the queue. After: whatever was made from the next reading on.
    before = hashes(seeded_bytes(7, DISCARDED, 100_352 - DISCARDED))
    kept = os.path.commonprefix([out, before])
    assert len(kept) % 32 == 0 and 0 < len(kept) <= len(before)
    begun = 100_352 + (256 if kind == "short" else 0) + DISCARDED
    assert out[len(kept) :] == hashes(seeded_bytes(7, begun, 600_000))[: len(out) - len(kept)]


def test_replugged_it_resumes_after_a_new_startup_test(plug_in):
    device = plug_in()
    device.fault("unplug", 100_352)
    with Source.open("quantis-usb:") as opened:
        wait_until(lambda: opened.status().transport_errors == 1)
        device.plug()
        begun = device.served
        out = opened.take(200_000, timeout_s=20)
        status = opened.status()
    assert status.transport_errors == 1 and status.state == "flowing" and status.serial == SERIAL
    before = hashes(seeded_bytes(7, DISCARDED, 100_352 - DISCARDED))
    kept = os.path.commonprefix([out, before])
    assert out[len(kept) :] == hashes(seeded_bytes(7, begun + DISCARDED, 600_000))[: len(out) - len(kept)]


def test_replaced_by_another_it_is_refused(plug_in):
    device = plug_in("A", port=2)
    device.fault("unplug", 100_352)
    with Source.open("quantis-usb:") as opened:
        wait_until(lambda: opened.status().transport_errors == 1)
        other = plug_in("B", port=2)
        start = time.monotonic()
        out, error = take_until_end(opened, 20)
        assert time.monotonic() - start < 2 and opened.status().state == "failed"
    assert type(error) is SourceError and "where Quantis USB A was there is now B" in str(error)
    assert other.served == 0
    assert hashes(seeded_bytes(7, DISCARDED, 100_352 - DISCARDED)).startswith(out)


def test_unplugged_for_good_ends_the_source_in_time(plug_in, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 0.3)
    device = plug_in()
    with Source.open("quantis-usb:") as opened:
        device.unplug()
        start = time.monotonic()
        error = take_until_end(opened, 20)[1]
        assert time.monotonic() - start < 0.3 + 0.5 + 1  # patience, and a slice of looking for it
    assert type(error) is SourceError and "is gone" in str(error) and "waited 0.3 s" in str(error)


def test_a_long_stall_ends_the_source_and_a_short_one_does_not(plug_in, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 1.0)
    device = plug_in()
    with Source.open("quantis-usb:", ring_bytes=16384) as opened:
        opened.take(1000, timeout_s=20)
        device.silence()
        time.sleep(0.4)
        device.speak()
        out = opened.take(100_000, timeout_s=20)
        assert opened.status().transport_errors == 0
        device.silence()
        rest, error = take_until_end(opened, 20)
        assert "gave no bytes for 1 s" in str(error) and type(error) is SourceError
    assert hashes(seeded_bytes(7, DISCARDED, 4_000_000))[1000:].startswith(out + rest)


def test_a_module_that_fails_for_a_moment_is_a_transient_alarm_and_for_longer_a_permanent_one(plug_in):
    device = plug_in()
    with Source.open("quantis-usb:", ring_bytes=16384) as opened:
        opened.take(32)
        device.status = 0
        opened.ring.discard(1 << 20, 0.05)
        wait_until(lambda: len(opened.status().alarms) == 1 or opened.ring.discard(4096, 0.01) < 0)
        device.status = 1
        opened.take(100_000, timeout_s=20)
        status = opened.status()
        assert [(a.test, a.value, a.cutoff, a.permanent) for a in status.alarms] == [("device status", 0, 1, False)]
        device.status = 0
        error = take_until_end(opened, 20)[1]
        assert isinstance(error, HealthAlarm) and "device status 0x0 instead of 0x1" in str(error)
        assert opened.status().alarms[-1].permanent


def test_a_flag_in_mid_flow_runs_the_startup_test_and_is_cleared(plug_in):
    device = plug_in()
    with Source.open("quantis-usb:", ring_bytes=16384) as opened:
        opened.take(32)
        device.ais31 = 1
        wait_until(lambda: device.ais31 == 0 or opened.ring.discard(4096, 0.01) < 0)
        status = opened.status()
        assert status.transport_errors == 1 and status.alarms == ()
        assert status.device["AIS-31 start-up test"] == "passed"


def test_sources_leave_nothing_behind(plug_in):
    device = plug_in()
    before, threads = held(), threading.enumerate()
    for k in range(20):
        device.fault(("short", "unplug", "stall")[k % 3], device.served + 150_000)
        with Source.open("quantis-usb:") as opened:
            opened.take(32, timeout_s=20)
            if k % 3 == 1:
                wait_until(lambda: opened.status().transport_errors == 1)  # noqa: B023
        device.plug()
    assert threading.enumerate() == threads
    assert_held(before)


# --- the doctor ---


def examined(uri="quantis-usb:"):
    parsed = parse_uri(uri)
    return [(f.check, f.verdict) for f in drivers.driver_of(parsed).examine(parsed)]


def test_doctor_goes_from_the_cable_to_the_modules(plug_python):
    assert examined() == [("cable", "fail")]
    device = plug_python()
    assert examined() == [(c, "ok") for c in ("cable", "permission", "other process", "firmware", "modules")]
    device.ais31 = 1
    device.power = 0
    device.packet_bytes = 64
    assert [c for c in examined() if c[1] != "ok"] == [(c, "note") for c in ("speed", "power", "AIS-31 flag")]
    device.status = 0
    assert examined()[-1] == ("modules", "fail")
    device.unknown_requests = {0x10}
    assert examined()[-1] == ("firmware", "fail")
    device.busy = True
    assert examined()[-1] == ("other process", "fail")
    device.forbidden = True
    assert examined() == [("cable", "ok"), ("permission", "fail")]
    assert device.served == 0 and device.ais31 == 1
    with pytest.raises(BadParameter):
        examined("quantis-usb:?speed=1")


# --- permission ---


def test_udev_rules_name_every_device_and_let_only_a_group_in():
    text = udev_rules()
    rules = [line for line in text.splitlines() if line.startswith("SUBSYSTEM")]
    nodes = [rule for rule in rules if "MODE=" in rule]
    assert all('MODE="0660", GROUP="everett"' in rule for rule in nodes)
    assert not re.search(r'KERNEL=="(qrandom|\*)', text)
    for ids in ("0aba 0102", "1fc9 8110", "1fc9 8111", "3975 0001", "3975 0004", "04d8 f5fe", "04d8 ebb5", "16d0 0aa0",
                "1d50 60c6", "0403 6001", "0403 6014"):  # fmt: skip
        assert udev_rule(*ids.split()) in rules
    # FTDI's identity is everybody's: a string has to say whose chip it is.
    assert all(re.search(r'(serial}=="QWR|product}==|manufacturer}==)', rule) for rule in rules if "0403" in rule)
    assert {'SUBSYSTEM=="qrandom", MODE="0660", GROUP="everett"'} <= set(rules)
    for rule in rules:
        if 'SUBSYSTEM=="tty"' in rule:
            assert 'ENV{ID_MM_PORT_IGNORE}="1"' in rule
        for piece in rule.split(", "):
            assert re.fullmatch(r'[A-Z]+(\{[A-Za-z_]+\})?(==|=)"[^"]+"', piece), piece
    with pytest.raises(LookupError):
        udev_rule("dead", "beef")


def test_holders_of_a_file_are_named(tmp_path):
    node = tmp_path / "node"
    node.touch()
    assert holders(node) == [] == holders(tmp_path / "missing")
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", f"f = open({str(node)!r}); print(1, flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    child.stdout.readline()
    with node.open():
        (first, second) = sorted(holders(node), key=lambda h: h[0] == os.getpid())
        assert first[0] == child.pid and f"(pid {child.pid})" in in_words([first])
        assert in_words([second]) == "this process"
        assert holders(node, own=1) == [first]
    child.communicate(b"\n")
    assert holders(node) == []


def test_no_libusb_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(libusb1, "get_backend", lambda find_library=None: None)
    with pytest.raises(SourceError, match="no libusb-1.0 can be loaded; pip install libusb-package"):
        open_driver("quantis-usb:")
    devices, looked_for = drivers.attached()
    assert any(line.startswith("quantis-usb: not looked for: no libusb") for line in looked_for)
