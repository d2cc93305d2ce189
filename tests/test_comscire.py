"""comscire: the real pyftdi over an emulated FTDI chip with a generator behind it; models; faults through the source."""

import os
import pty
import subprocess
import time

import numpy as np
import pytest
import usb.util
from devices.comscire import DELIMITER, START, STATUS, STOP, ComScire, FtdiChip
from devices.usb_bus import UsbBus
from serial.tools import list_ports
from serial.tools.list_ports_common import ListPortInfo
from source_checks import UNIT, blocks, check_close_ends_a_read, cut, nothing_left, take_until_end, wait_until

from everett_cuda import source
from everett_cuda.drivers import DeviceFault, TransportError, attached, driver_of, open_driver, parse_uri
from everett_cuda.drivers.comscire_models import model_of
from everett_cuda.drivers.ftdi_pipe import payload
from everett_cuda.drivers.permission import udev_rule
from everett_cuda.drivers.usb import find
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError
from everett_cuda.source import Source


@pytest.fixture
def bus():
    with UsbBus().plugged_into_pyusb() as empty:
        yield empty
        assert empty.open_handles == 0, "a device was opened and not closed"


@pytest.fixture
def device(bus):
    bus.gadgets.append(ComScire())
    return bus.gadgets[0]


def read(driver, n):
    out = bytearray(n)
    at = 0
    while at < n:
        at += driver.readinto(memoryview(out)[at:], 1.0)
    return bytes(out)


# --- packets ---


@pytest.mark.parametrize("packet", [64, 512])
@pytest.mark.parametrize("n", [0, 2, 3, 63, 64, 66, 511, 512, 1023, 4096, 8192])
def test_the_modem_status_of_every_packet_is_cut_out(packet, n):
    raw = np.arange(n, dtype=np.uint32).astype(np.uint8)
    if n % packet == 1:
        with pytest.raises(TransportError, match="one byte"):
            payload(raw, packet)
        return
    pieces = [raw[i : i + packet] for i in range(0, n, packet)]
    data, status = payload(raw, packet)
    assert data.tobytes() == b"".join(p[2:].tobytes() for p in pieces)
    assert status == (int(np.bitwise_or.reduce([p[1] for p in pieces])) if n else 0)


@pytest.mark.parametrize("packet", [64, 512])
def test_a_packet_without_its_whole_status_is_refused(packet):
    with pytest.raises(TransportError, match="without its modem status"):
        payload(np.zeros(packet + 1, dtype=np.uint8), packet)


# --- the stream ---


@pytest.mark.parametrize("serial, query", [
    ("QWR40123", ""), ("QWR40123", "?transfer=512"), ("QWR40123", "?transfer=64KiB&latency=2"), ("QWR4M001", ""),
    ("QWR20001", ""), ("QWR30001", ""), ("QWR70001", ""), ("QWR80001", ""), ("QWR10001", ""),
])  # fmt: skip
def test_bytes_are_those_of_the_stream_from_its_257th(bus, serial, query):
    device = ComScire(serial)
    bus.gadgets.append(device)
    driver = open_driver(f"comscire:{serial}{query}")
    got = b"".join(read(driver, n) for n in (1, 61, 4096, 5, 50_000))
    driver.close()
    (run,) = device.runs
    assert got == bytes(run[: len(got)]) and len(got) == 54_163
    if serial[3] in "78":
        assert (device.bit_mode, device.flow_control) == (0x40, 0x01)


def test_what_a_killed_program_left_behind_is_not_read(device):
    device.leave_streaming()
    driver = open_driver("comscire:")
    got = read(driver, 10_000)
    driver.close()
    assert len(device.runs) == 2 and got == bytes(device.runs[1][:10_000])


@pytest.mark.parametrize("deaf", [1, 2, 3])
def test_commands_that_are_not_heard_are_repeated(device, deaf):
    device.leave_streaming()
    device.deaf = deaf
    driver = open_driver("comscire:?latency=2")
    assert read(driver, 1000) == bytes(device.runs[1][:1000])
    driver.close()


def test_a_start_that_is_not_heard_is_an_error_and_tried_again(device):
    driver = open_driver("comscire:?latency=2")
    device.silent = True
    with pytest.raises(TransportError, match="did not begin its stream"):
        read(driver, 1)
    device.silent = False
    assert read(driver, 1000) == bytes(device.runs[-1][:1000])
    driver.close()


def test_what_never_comes_into_step_is_refused(device, monkeypatch):
    monkeypatch.setattr("everett_cuda.drivers.comscire.SYNCHRONIZE_S", 0.3)
    device.deaf = 10_000
    with nothing_left(), pytest.raises(SourceError, match="gave no delimiter within 0.3 s"):
        open_driver("comscire:?latency=2")


def test_the_device_is_asked_for_its_statistics_between_streams(device):
    driver = open_driver("comscire:?status=1&latency=2")
    assert device.asked == [STOP, DELIMITER, DELIMITER, 0xC0]
    read(driver, 1000)
    assert device.asked[4:] == [STOP, DELIMITER, STATUS, START]
    time.sleep(1.05)
    read(driver, 1000)  # what came of the first stream and was not read is dropped
    got = read(driver, 1000)
    assert device.asked[8:] == [STOP, DELIMITER, STATUS, START] and len(device.runs) == 2
    assert got == bytes(device.runs[1][1000:2000])
    driver.close()
    assert device.asked[12:] == [STOP]
    assert driver.details["its statistics"] == "good (status 0x0009)"


def test_bad_statistics_are_a_fault_of_the_device(device):
    driver = open_driver("comscire:?latency=2")
    device.bad_statistics = True
    with pytest.raises(DeviceFault, match="its own statistics are bad") as caught:
        read(driver, 1)
    assert (caught.value.status, caught.value.expected) == (4, 0)
    assert read(driver, 1000) == bytes(device.runs[-1][:1000])  # cleared, and good since
    driver.close()


@pytest.mark.parametrize("status, words", [(0x64, "0x64"), (0x68, "0x68"), (0x70, "0x70"), (0xE0, "0xe0")])
def test_errors_on_the_line_drop_the_transfer(device, status, words):
    driver = open_driver("comscire:?transfer=512&latency=2")
    read(driver, 100)
    device.line_status = status
    with pytest.raises(TransportError, match=f"errors on its line, status {words}"):
        read(driver, 2000)
    assert read(driver, 1000) == bytes(device.runs[1][:1000])
    driver.close()


def test_an_overrun_is_no_error(device):
    driver = open_driver("comscire:?transfer=512&latency=2")
    read(driver, 496)
    device.line_status = 0x62
    assert read(driver, 2000) == bytes(device.runs[0][496:2496])
    driver.close()


def test_a_stalled_endpoint_is_cleared_and_the_stream_started_anew(device):
    driver = open_driver("comscire:?latency=2")
    read(driver, 100)
    device.halted = True
    with pytest.raises(TransportError, match="reading failed: Broken pipe"):
        read(driver, 100_000)
    assert read(driver, 1000) == bytes(device.runs[1][:1000])
    driver.close()


def test_nothing_that_a_library_does_gives_the_device_back(device):
    found = find({(0x0403, 0x6001)})
    (claimed,) = found
    claimed.claim(1, 0)
    lent = claimed.lend()
    lent.set_configuration()
    usb.util.claim_interface(lent, 0)
    usb.util.dispose_resources(lent)  # what pyusb does at the end of a process, a forked child's too
    with pytest.raises(SourceError, match="is in use by"):
        open_driver("comscire:")
    claimed.close()
    open_driver("comscire:").close()


def test_a_silent_generator_gives_nothing_in_the_time_and_is_started_anew_after_five_seconds(device, monkeypatch):
    monkeypatch.setattr("everett_cuda.drivers.comscire._SILENCE_S", 0.3)
    driver = open_driver("comscire:?latency=5")
    read(driver, 1000)
    device.silent = True
    buffer = memoryview(bytearray(65536))
    start = time.monotonic()
    while driver.readinto(buffer, 0.1):
        pass
    with pytest.raises(TransportError, match="gave nothing for 0.3 s"):
        while True:
            driver.readinto(buffer, 0.1)
    assert time.monotonic() - start < 2.0
    device.silent = False
    assert read(driver, 1000) == bytes(device.runs[-1][:1000])
    driver.close()


def test_a_paced_generator_keeps_its_rate(bus):
    device = ComScire(rate=500_000)
    bus.gadgets.append(device)
    driver = open_driver("comscire:")
    read(driver, 1000)
    start = time.monotonic()
    got = read(driver, 100_000)
    assert time.monotonic() - start >= 0.19
    assert got == bytes(device.runs[0][1000:101_000])
    driver.close()


# --- models ---


@pytest.mark.parametrize("serial, words", [
    ("QWR4A001", "MED100K, .*bias 36 times"), ("QWR4B001", "MED100Kx3, .*62 times"), ("QWR4C001", "MED1Kx3, .*320 times"),
    ("QWR4D001", "MED100Kx4, .*72 times"), ("QWR4E001", "MED100Kx8, .*101 times"),
    ("QWR4P001", "MED100KP, .*purely pseudo-random"), ("QWR4Z001", "letter Z may mean .*unlisted=1"),
    ("QWR90001", "no known ComScire"),
])  # fmt: skip
def test_models_that_are_no_sources_are_refused_by_name(bus, serial, words):
    bus.gadgets.append(ComScire(serial))
    with pytest.raises(SourceError, match=words):
        open_driver(f"comscire:{serial}")
    if not serial.startswith("QWR4Z"):
        with pytest.raises(SourceError, match=words):
            open_driver(f"comscire:{serial}?unlisted=1")
    (row,) = (r for r in attached()[0] if r.serial == serial)
    assert row.state.startswith("refused: ")
    uri = parse_uri(f"comscire:{serial}")
    assert [(f.check, f.verdict) for f in driver_of(uri).examine(uri)] == [("cable", "ok"), ("model", "fail")]
    assert bus.gadgets[0].asked == []


@pytest.mark.parametrize("serial, name, bit_s, conditioned", [
    ("QWR40123", "PQ4000KU", 4e6, True), ("QWR4M001", "PQ4000KM", 4e6, False), ("QWR4R001", "MED100KR", 1e5, False),
    ("QWR4X001", "MED100KX", 1e5, True), ("QWR50001", "PQ32MU", 32e6, True), ("QWR70001", "PQ128MU", 128e6, False),
])  # fmt: skip
def test_models_have_their_rates_and_say_whether_they_process(bus, serial, name, bit_s, conditioned):
    bus.gadgets.append(ComScire(serial))
    driver = open_driver("comscire:")
    assert (driver.name, driver.serial, driver.kind) == (f"ComScire {name}", serial, "electronic")
    assert (driver.rate_bytes_per_s, driver.conditioned) == (bit_s / 8, conditioned)
    assert (driver.bit_order, str(driver.min_entropy)) == ("msb_first", "4 bits a byte (assumed)")
    driver.close()


def test_what_is_not_known_is_configuration(device):
    driver = open_driver("comscire:?bits=lsb&conditioned=0&latency=7&transfer=4KiB&h=6&status=0")
    assert (driver.bit_order, driver.conditioned, device.latency_ms) == ("lsb_first", False, 7)
    assert driver.details["transfer"] == "4096 bytes" and float(driver.min_entropy.bits_per_byte) == 6
    driver.close()
    for query in ("bits=big", "latency=0", "latency=256", "transfer=256", "transfer=1MiB", "status=x", "mode=1"):
        with pytest.raises(BadParameter, match=query.partition("=")[0]):
            open_driver(f"comscire:?{query}")
    assert model_of("QWR4Z001", unlisted=True).name == "PQ4000KU"


# --- which one ---


def test_only_ftdi_chips_with_its_serial_numbers_are_taken(bus):
    class OtherFtdi(FtdiChip):
        name = "USB serial cable"

    bus.gadgets += [OtherFtdi("A50285BI", 0x6001, port=2), ComScire("QWR40001", port=3), ComScire("QWR50002", port=4)]
    rows = [(r.uri, r.name, r.state) for r in attached()[0] if r.uri.startswith("comscire")]
    assert rows == [("comscire:QWR40001", "ComScire PQ4000KU", "ready"), ("comscire:QWR50002", "ComScire PQ32MU", "ready")]
    with pytest.raises(SourceError, match="could mean any of 2 devices; name one: comscire:QWR40001 or comscire:QWR50002"):
        open_driver("comscire:")
    for uri in ("comscire:QWR50002", "comscire:path=99-4"):
        driver = open_driver(uri)
        assert driver.serial == "QWR50002"
        driver.close()
    for uri in ("comscire:A50285BI", "comscire:QWR49999", "comscire:path=1-1"):
        with pytest.raises(SourceError, match=r"no such device is attached \(there: comscire:QWR40001"):
            open_driver(uri)
    with pytest.raises(SourceError, match="(?s)no quantum device was found.*comscire: ComScire generators"):
        open_driver("auto")


def test_without_permission_the_rule_is_named(device):
    # Without sysfs its serial number may not be asked for either, so it is any FTDI chip; with it (tested with the
    # Quantis, which is found in the same way) the error of opening it comes.
    device.forbidden = True
    with pytest.raises(SourceError, match="no such device"):
        open_driver("comscire:")
    rule = udev_rule("0403", "6001")
    assert 'ATTR{serial}=="QWR*"' in rule and 'GROUP="everett"' in rule and rule == udev_rule("0403", "6014")
    for ids in (("1fc9", "8110"), ("1fc9", "8111"), ("3975", "0004"), ("04d8", "ebb5"), ("16d0", "0aa0")):
        assert 'MODE="0660", GROUP="everett"' in udev_rule(*ids)
    with pytest.raises(LookupError):
        udev_rule("3975", "0005")


def test_the_kernels_serial_driver_is_detached_but_not_by_the_doctor(device):
    device.kernel_driver = True
    uri = parse_uri("comscire:")
    findings = driver_of(uri).examine(uri)
    assert [(f.check, f.verdict) for f in findings[2:]] == [("permission", "ok"), ("kernel driver", "note")]
    assert device.kernel_driver and "unbind" in findings[-1].next_step
    driver = open_driver("comscire:")
    assert not device.kernel_driver and len(read(driver, 100)) == 100
    driver.close()
    assert [(f.check, f.verdict) for f in driver_of(uri).examine(uri)][2:] == [("permission", "ok"), ("other process", "ok")]


def test_somebody_who_reads_through_the_kernels_driver_is_named_and_left_in_peace(device, monkeypatch):
    master, slave = pty.openpty()
    port = ListPortInfo(os.ttyname(slave))
    port.vid, port.pid, port.serial_number = 0x0403, 0x6001, device.serial
    monkeypatch.setattr(list_ports, "comports", lambda *_: [port])
    device.kernel_driver = True
    reader = subprocess.Popen(["sleep", "60"], stdin=slave)
    os.close(slave)
    try:
        with pytest.raises(SourceError, match=rf"in use by sleep \(pid {reader.pid}\) as {port.device}"):
            open_driver("comscire:")
        uri = parse_uri("comscire:")
        last = driver_of(uri).examine(uri)[-1]
        assert (last.check, last.verdict) == ("other process", "fail") and f"sleep (pid {reader.pid})" in last.text
        assert device.kernel_driver
    finally:
        reader.kill()
        reader.wait()
        os.close(master)
    open_driver("comscire:").close()


def test_a_second_opening_is_refused_and_does_not_disturb_the_first(device):
    driver = open_driver("comscire:")
    first = read(driver, 10_000)
    asked = list(device.asked)
    with pytest.raises(SourceError, match="is in use by"):
        open_driver("comscire:")
    uri = parse_uri("comscire:")
    last = driver_of(uri).examine(uri)[-1]
    assert (last.check, last.verdict) == ("other process", "fail") and "in use by" in last.text
    assert first + read(driver, 10_000) == bytes(device.runs[0][:20_000]) and device.asked == asked
    driver.close()
    device.busy = True
    with pytest.raises(SourceError, match="in use by a process of another user"):
        open_driver("comscire:")


# --- faults, through the source ---


def test_the_source_hands_out_the_hashes_of_its_bytes(device):
    with Source.open("comscire:?latency=2") as opened:
        out = opened.take(64_000)
        status = opened.status()
    assert cut(out) == blocks(bytes(device.runs[0]))[:2000]
    assert status.label == "NOT QUANTUM (electronic)" and status.alarms == () and "PQ4000KU" in str(status)


def test_unplugged_in_the_middle_of_a_read_and_plugged_in_again(device):
    with Source.open("comscire:?latency=2") as opened:
        first = opened.take(3200)
        device.unplug_after = 20_000
        wait_until(lambda: opened.status().transport_errors >= 1)
        before = opened.take(opened.ring.unread)
        device.plug()
        device.kernel_driver = True  # ftdi_sio is there first, each time
        again = opened.take(32_000, timeout_s=10)
        assert opened.status().alarms == () and opened.status().state == "flowing"
    out = cut(first + before)
    assert out == blocks(bytes(device.runs[0]))[: len(out)]
    assert cut(again) == blocks(bytes(device.runs[-1]))[:1000] and len(device.runs) >= 2


def test_another_device_at_its_place_is_refused(bus, device):
    with Source.open("comscire:?latency=2") as opened:
        device.unplug()
        other = ComScire("QWR40999", seed=5)
        bus.gadgets.append(other)
        out, error = take_until_end(opened)
        assert "where QWR40123 was there is now QWR40999" in str(error) and opened.status().state == "failed"
        assert other.asked == []
    assert cut(out) == blocks(bytes(device.runs[0]))[: len(out) // 32]


def test_another_device_elsewhere_is_not_taken_for_it(bus, device, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 0.3)
    other = ComScire("QWR40999", port=7)
    with Source.open("comscire:QWR40123?latency=2") as opened:
        bus.gadgets.append(other)
        device.unplug()
        assert "waited 0.3 s for it" in str(take_until_end(opened)[1]) and other.asked == []


@pytest.mark.parametrize("fault", ["stuck", "biased"])
def test_no_byte_of_a_bad_unit_nor_of_the_one_before_is_handed_out(device, fault):
    with Source.open("comscire:?latency=2") as opened:
        good = opened.take(6400)
        device.noise.fault = fault
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and opened.status().alarms[-1].permanent
        first = opened.status().alarms[0]
    raw = bytes(device.runs[0])
    assert cut(good + out) == blocks(raw[: max(first.offset // UNIT - 1, 0) * UNIT])[: len(good + out) // 32]


def test_bad_statistics_that_last_are_a_permanent_alarm(device):
    with Source.open("comscire:?latency=2&status=1") as opened:
        device.bad_statistics = device.bad_again = True
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and "device status 0x4 instead of 0x0" in str(error)
        assert [a.permanent for a in opened.status().alarms] == [False, True]
    assert cut(out) == blocks(bytes(device.runs[0]))[: len(out) // 32]


def test_a_long_stall_ends_the_source(device):
    with pytest.MonkeyPatch.context() as patience, Source.open("comscire:?latency=2") as opened:
        patience.setattr(source, "PATIENCE_S", 0.4)
        device.silent = True
        start = time.monotonic()
        out, error = take_until_end(opened)
        assert "gave no bytes for 0.4 s" in str(error) and time.monotonic() - start < 3.0
        device.silent = False
        patience.undo()
        opened.reopen()
        assert len(opened.take(320, timeout_s=10)) == 320


def test_closing_ends_a_read_of_another_thread_and_may_be_done_twice(device):
    driver = open_driver("comscire:?latency=5")
    read(driver, 1)
    device.silent = True
    check_close_ends_a_read(driver)


def test_two_hundred_openings_leave_nothing_behind(bus, device):
    with nothing_left():
        for k in range(200):
            driver = open_driver("comscire:?latency=1")
            if k % 20 == 0:
                read(driver, 100)
            driver.close()
            assert bus.open_handles == 0
