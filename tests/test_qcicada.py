"""QCicada over an emulated wire: its protocol, its modes, what a source makes of it, and everything that can break."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest
from devices.qcicada import CAPACITY, RAW_NOISE, RAW_SAMPLES, SHA, QCicada
from source_checks import RAW_PER_BLOCK, UNIT, blocks, cut, nothing_left, take_until_end, wait_until

from everett_cuda import source
from everett_cuda.drivers import (
    attached,
    driver_of,
    open_driver,
    parse_uri,
    qcicada,
    qcicada_protocol,
    serial_port,
)
from everett_cuda.drivers.contract import DeviceLost, TransportError
from everett_cuda.drivers.qcicada_finding import identify
from everett_cuda.drivers.qcicada_protocol import Config, Info, Refused, Statistics, Status
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError, StartupTestFailed, Starved
from everett_cuda.source import Source


def read(driver, n, timeout_s=1.0):
    """Exactly n bytes by as many reads as it takes."""
    out, deadline = bytearray(), time.monotonic() + 20
    while len(out) < n:
        assert time.monotonic() < deadline
        buffer = bytearray(n - len(out))
        out += buffer[: driver.readinto(memoryview(buffer), timeout_s)]
    return bytes(out)


def take_until(opened, true):
    """Takes, so that the device is read from, until something is so."""
    out, deadline = b"", time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        try:
            out += opened.take(320, timeout_s=0.1)
        except Starved:
            pass
    return out


@pytest.fixture
def device(tmp_path):
    with QCicada(tmp_path / "ttyUSB0") as device:
        yield device


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """Devices behind udev's names, as discovery sees them: plugged(usb serial, ...) -> QCicada."""
    monkeypatch.setattr(serial_port, "BY_ID", tmp_path / "by-id")
    (tmp_path / "by-id").mkdir()
    devices = []

    def plug(usb_serial="DK0HFP4T", **more):
        name = f"usb-Crypta_Labs_QCicada_{usb_serial}-if00-port0"
        devices.append(QCicada(tmp_path / "by-id" / name, **more).plug())
        return devices[-1]

    yield plug
    for device in devices:
        device.unplug()


def uri(device, query=""):
    return f"qcicada:{device.path}{query}"


# --- protocol: vectors of qcicada 0.2.2 and layouts of the vendor's cmdctrl_types.h ---


def test_status_is_read_as_published():
    assert Status.parse(bytes.fromhex("0140340000")) == Status(Status.HEALTHY, 13376)
    assert str(Status(0x01, 0)) == "ok"
    assert str(Status(0x05, 0)) == "supply voltage low"
    failed = (f"{test} test failed" for test in ("bit count", "repetition count", "adaptive proportion"))
    assert str(Status(0xE1, 0)) == ", ".join(failed)
    assert str(Status(0x03, 0)) == "start-up test in progress" and str(Status(0x00, 0)) == "not initialized"
    assert [f for f in range(256) if Status(f, 0).starting] == [0x00, 0x02, 0x03]


def test_config_is_read_and_written_as_published():
    raw = bytes.fromhex("00 0000803f 03 04 40 c001 0008")
    config = Config.parse(raw)
    assert config == Config(0, 1.0, Config.STARTUP_TEST | Config.AUTO_CALIBRATION, 4, 64, 448, 2048)
    assert config.pack() == raw and config.tests_off == ["repetition count", "adaptive proportion"]
    assert config.with_post_processing(2).pack() == b"\x02" + raw[1:]
    assert Config.parse(raw[:5] + b"\x23" + raw[6:]).repaired().pack() == raw[:5] + b"\x0f" + raw[6:]


def test_statistics_and_identification_are_read_as_published():
    statistics = Statistics.parse(bytes.fromhex("4013000000000000 00000000 01000000 02000000 58890100 0002 00003642"))
    assert statistics == Statistics(4928, 0, 1, 2, 100_696, 512, 45.5)
    strings = b"QC0000000217".ljust(24, b"\0") + b"CICADA-QRNG-1.1".ljust(24, b"\0")
    info = Info.parse(bytes.fromhex("0c000100 0e000500") + strings)
    assert info == Info(0x1000C, 0x5000E, "QC0000000217", "CICADA-QRNG-1.1")
    assert Info.version(info.firmware_version) == "5.14"
    for serial in (b"../../etc", b"", b"a b", b"\xff", b"0\n"):
        with pytest.raises(TransportError, match="no readable serial number"):
            Info.parse(bytes(8) + serial.ljust(24, b"\0") + strings[24:])


def test_commands_go_out_as_published(device):
    link, info = identify(str(device.path))
    assert info.serial == device.serial and link.status() == Status(1, CAPACITY) and link.statistics().speed == 100_696
    assert link.config().pack() == bytes.fromhex("00 00003642 0f 04 40 c001 0008")
    assert link.set_config(link.config().with_post_processing(1)).flags == 1 and device.config[0] == RAW_NOISE
    status, data = link.one_shot(8192)
    assert status.flags == 1 and data == device.sent == device.stream(SHA, 0, 8192)
    for n in (0, CAPACITY + 1):
        with pytest.raises(Refused, match="refused command 0x04"):
            link.one_shot(n)
    link.start_continuous()
    assert len(serial_port.read_exact(link.port, 10_000, 5.0)) == 10_000
    assert link.resynchronize().serial == device.serial and link.reset().flags == 1
    assert set(device.commands) == {1, 4, 5, 7, 8, 9, 10, 11}
    serial_port.close_port(link.port)


# --- modes ---


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
@pytest.mark.parametrize("post, number", [("sha", SHA), ("raw-noise", RAW_NOISE), ("raw-samples", RAW_SAMPLES)])
def test_each_mode_gives_the_bytes_that_the_device_made_in_it_since_the_opening(device, mode, post, number):
    driver = open_driver(uri(device, f"?mode={mode}&post={post}"))
    before = CAPACITY if number != SHA else 0  # made in the old mode
    raw = read(driver, 30_000)
    driver.close()
    assert raw == bytes(device.sent[CAPACITY:])[:30_000]
    assert raw == device.stream(number, CAPACITY - before, 30_000)
    assert (driver.kind, driver.serial, driver.conditioned) == ("quantum", "QC0000000217", post == "sha")
    assert str(driver.min_entropy) == "4 bits a byte (assumed)" and driver.rate_bytes_per_s == 12_500
    assert (driver.details["post-processing"], driver.details["mode"]) == (post, mode)
    assert driver.details["firmware"] == "5.14" and driver.details["device health"] == "ok"


def test_a_device_that_was_left_streaming_is_stopped_and_its_bytes_are_dropped(tmp_path):
    with QCicada(tmp_path / "tty", streaming=True) as device:
        driver = open_driver(uri(device))
        before = len(device.sent)
        assert read(driver, 10_000) == bytes(device.sent[before:])[:10_000]
        driver.close()


def test_parameters_and_claims(device):
    driver = open_driver(uri(device, "?h=6&bits=lsb"))
    assert str(driver.min_entropy) == "6 bits a byte (claimed by user)" and driver.bit_order == "lsb_first"
    driver.close()
    for query, message in (
        ("post=md5", "one of sha, raw-noise, raw-samples"),
        ("mode=x", "oneshot, continuous"),
        ("bits=x", "msb, lsb"),
        ("root=x", "give attest=1 with it"),
        ("speed=1", "unknown"),
    ):
        with pytest.raises(BadParameter, match=message):
            open_driver(uri(device, f"?{query}"))
    close = open_driver(uri(device))  # nothing was left open by the refused ones
    close.close()


def test_reads_wait_for_a_slow_generator_and_answer_in_time(device):
    driver = open_driver(uri(device))
    device.allowance = 0
    read(driver, CAPACITY)
    start = time.monotonic()
    assert driver.readinto(memoryview(bytearray(100)), 0.1) == 0
    assert 0.09 <= time.monotonic() - start < 2
    device.allowance = 100
    assert driver.readinto(memoryview(bytearray(8192)), 0.1) == 100  # fewer, rather than none
    driver.close()


def test_a_stream_is_interrupted_for_the_health_flags_and_repeats_nothing(device, monkeypatch):
    monkeypatch.setattr(qcicada, "CHECK_BYTES", 5000)
    driver = open_driver(uri(device, "?mode=continuous"))
    at, checks = CAPACITY, device.commands.count(1)
    for _ in range(60):
        piece = read(driver, 500)
        found = bytes(device.sent).find(piece, at)  # later than all before it, bytes under way at a check left out
        assert found >= at
        at = found + len(piece)
    assert device.commands.count(1) >= checks + 5
    assert device.commands.count(0x12) == 0
    driver.close()


# --- refusals ---


def test_generate_on_error_is_refused_and_repaired_by_request(tmp_path):
    with QCicada(tmp_path / "tty", tests=0x2F) as device:
        for post in ("sha", "raw-noise", "raw-samples"):
            with pytest.raises(SourceError, match=r"go on delivering when its tests fail .*repair=1"):
                open_driver(uri(device, f"?post={post}"))
        assert device.config[2] == 0x2F and 8 not in device.commands
        open_driver(uri(device, "?repair=1")).close()
        assert device.config[2] == 0x0F
        open_driver(uri(device)).close()


def test_a_hash_that_nobody_watches_is_refused(tmp_path):
    with QCicada(tmp_path / "tty", tests=0x06) as device:
        with pytest.raises(SourceError, match="its start-up, adaptive proportion test is off, and nobody else sees"):
            open_driver(uri(device))
        driver = open_driver(uri(device, "?post=raw-noise"))  # the four tests here see these bytes
        assert driver.details["device tests off"] == "start-up, adaptive proportion"
        driver.close()
        driver = open_driver(uri(device, "?repair=1"))
        assert driver.details["device tests off"] == "none" and device.config[:3] == [SHA, 45.5, 0x0F]
        driver.close()


def test_strangers_are_refused(tmp_path):
    with QCicada(tmp_path / "tty") as device:
        device.mute = True
        with pytest.raises(SourceError, match="does not answer as a QCicada does"):
            open_driver(uri(device))
    with QCicada(tmp_path / "tty", serial="../x") as device, pytest.raises(SourceError, match="no readable serial"):
        open_driver(uri(device))
    with pytest.raises(SourceError, match="does not exist"):
        open_driver(f"qcicada:{tmp_path}/none")


def test_the_devices_own_startup_test_is_waited_for(tmp_path, monkeypatch):
    with QCicada(tmp_path / "tty", starting_s=0.3) as device:
        driver = open_driver(uri(device))
        assert read(driver, 100)
        driver.close()
        open_driver(uri(device, "?reset=1")).close()
        assert 10 in device.commands
        monkeypatch.setattr(qcicada, "STARTING_S", 0.1)
        with pytest.raises(SourceError, match=r"still starting \(its own start-up test\) after 0.1 s"):
            open_driver(uri(device, "?reset=1"))


def test_two_processes_cannot_open_one_device(device):
    code = f"""
import sys
import serial
port = serial.Serial({str(device.path)!r}, 1_000_000, exclusive=True)
print("open", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "open\n"
    with pytest.raises(SourceError, match=rf"in use by \S+ \(pid {child.pid}\)"):
        open_driver(uri(device))
    child.communicate(timeout=20)
    with Source.open(uri(device)):
        with pytest.raises(SourceError, match="in use by this process"):
            open_driver(uri(device))
    open_driver(uri(device)).close()


# --- discovery ---


def test_devices_are_found_by_name_and_opened_by_either_serial_number(plugged):
    assert qcicada.QCicadaDriver.attached() == []
    with pytest.raises(SourceError, match="no device was found; it looks for a USB serial port whose strings name"):
        open_driver("qcicada:")
    plugged()
    (found,) = qcicada.QCicadaDriver.attached()
    assert (found.uri, found.name, found.serial) == ("qcicada:DK0HFP4T", "Crypta Labs QCicada", "DK0HFP4T")
    assert found.kind == "quantum"
    assert found.state == "ready" and found.rate_bytes_per_s == 12_500
    plugged("DK1", serial="QC0000000300")
    for rest, serial in (("DK0HFP4T", "QC0000000217"), ("QC0000000300", "QC0000000300"), ("DK1", "QC0000000300")):
        driver = open_driver(f"qcicada:{rest}")
        assert driver.serial == serial
        driver.close()
    with Source.open("qcicada:QC0000000217"), pytest.raises(SourceError, match=r"\(.* is in use by this process"):
        open_driver("qcicada:QC0000000217")
    with pytest.raises(SourceError, match="could mean any of 2 devices; name one: qcicada:DK0HFP4T or qcicada:DK1"):
        open_driver("qcicada:")
    with pytest.raises(SourceError, match=r"no device with this serial number answers \(QC\d+ is on .*; QC\d+ is on"):
        open_driver("qcicada:QC9")


def test_auto_takes_it(plugged):
    plugged()
    driver = open_driver("auto:?h=6")
    assert (driver.serial, driver.kind, driver.min_entropy.bits_per_byte) == ("QC0000000217", "quantum", 6)
    driver.close()
    assert any(line.startswith("qcicada: a USB serial port") for line in attached()[1])


# --- through a source ---


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_bits_are_the_hashes_of_what_the_device_made_after_the_opening(device, mode):
    with Source.open(uri(device, f"?mode={mode}")) as opened:
        out = opened.take(20_000, timeout_s=20)
        status = opened.status()
    assert out == b"".join(blocks(device.sent[CAPACITY:]))[:20_000]
    assert status.label == "quantum" and "total-failure only (device output is conditioned)" in status.health
    assert status.transport_errors == 0 and status.alarms == () and status.device["hardware"] == "CICADA-QRNG-1.1"


def places(out, device):
    """Where in `device.sent` the 80 bytes behind each block of `out` are; no two share a byte, and none goes back.

    A stream is interrupted for the health flags, which drops bytes: the block that spans such a gap is not found.
    """
    at, sent = {}, bytes(device.sent)
    for i in range(CAPACITY, len(sent) - RAW_PER_BLOCK + 1):
        at[hashlib.sha256(sent[i : i + RAW_PER_BLOCK]).digest()] = i
    found = [at[block] for block in cut(out) if block in at]
    assert len(cut(out)) - len(found) <= device.interrupted
    assert all(b >= a + RAW_PER_BLOCK for a, b in zip(found, found[1:], strict=False))
    return found


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
@pytest.mark.parametrize("fault, test", [("stuck_at", "repetition count"), ("bias_at", "adaptive proportion")])
def test_failing_bytes_stop_everything_before_they_are_handed_out(device, mode, fault, test):
    setattr(device, fault, CAPACITY + 60_001)
    with Source.open(uri(device, f"?mode={mode}&post=raw-noise")) as opened:
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and test in str(error)
        alarm = opened.status().alarms[0]
    assert 60_001 <= alarm.offset < 60_001 + 1024
    unit = alarm.offset // UNIT * UNIT
    assert len(out) > 0 and b"".join(blocks(device.sent[CAPACITY : CAPACITY + unit - UNIT])).startswith(out)


@pytest.mark.parametrize("fault", ["flags", "flags_at_start"])
def test_a_health_flag_that_stays_is_a_permanent_alarm(device, fault):
    with Source.open(uri(device)) as opened:
        opened.take(32, timeout_s=20)
        setattr(device, fault, 0x41)
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and "device status 0x41 instead of 0x1" in str(error)
        assert [(a.test, a.startup, a.permanent) for a in opened.status().alarms] == [
            ("device status", False, False), ("device status", True, True)
        ]  # fmt: skip
        with pytest.raises(StartupTestFailed, match="device status 0x41"):
            opened.reopen()
        device.flags = 0x01
        opened.reopen()
        assert len(opened.take(3200, timeout_s=20)) == 3200
    with pytest.raises(StartupTestFailed, match="device status 0x9 instead of 0x1"):
        device.flags = 0x09
        Source.open(uri(device))


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_a_health_flag_that_goes_is_a_transient_alarm(device, mode, monkeypatch):
    monkeypatch.setattr(qcicada, "CHECK_BYTES", 5000)
    with Source.open(uri(device, f"?mode={mode}"), ring_bytes=16384) as opened:
        out = opened.take(3200, timeout_s=20)
        device.flags_once = 0x81
        out += take_until(opened, lambda: opened.status().alarms)
        out += opened.take(32_000, timeout_s=20)
        status = opened.status()
    assert [(a.test, a.value, a.permanent) for a in status.alarms] == [("device status", 0x81, False)]
    assert status.transient_alarms == 1 and places(out, device)


def test_a_stream_that_falls_silent_is_asked_why(device):
    with Source.open(uri(device, "?mode=continuous")) as opened:
        device.flags = 0x21
        start = time.monotonic()
        _, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and "device status 0x21" in str(error)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "fault, value",
    [("refuse", 1), ("truncate", 100), ("truncate", 0), ("garbage", b"\x00\xff"), ("garbage", b"\x12")],
)
def test_bytes_of_a_failed_transfer_are_dropped_and_the_flow_goes_on(device, fault, value):
    with Source.open(uri(device), ring_bytes=16384) as opened:
        out = opened.take(3200, timeout_s=20)
        setattr(device, fault, value)
        out += take_until(opened, lambda: opened.status().transport_errors)
        out += opened.take(32_000, timeout_s=20)
        status = opened.status()
    assert status.alarms == () and status.raw_bytes_dropped > 0
    assert places(out, device)
    assert status.raw_bytes_in <= len(device.sent) - CAPACITY


def test_a_slow_line_is_no_error(device):
    device.delay_s = 0.01
    with Source.open(uri(device)) as opened:
        assert opened.take(3200, timeout_s=30) == b"".join(blocks(device.sent[CAPACITY:]))[:3200]
        assert opened.status().transport_errors == 0


@pytest.mark.parametrize("starting_s", [0.0, 0.4])
@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_a_device_that_restarts_by_itself_is_configured_again(device, mode, starting_s, monkeypatch):
    monkeypatch.setattr(qcicada, "LOOK_S", 0.0)
    driver = open_driver(uri(device, f"?mode={mode}&post=raw-noise"))
    read(driver, 5000)
    wrong = CAPACITY  # what it had made in the wrong mode before the opening
    device.starting_s = starting_s
    device.restart()
    out, errors = b"", []
    while not errors or len(out) < 30_000:
        assert len(out) < 3_000_000
        try:
            out += read(driver, 512)
        except TransportError as error:
            errors.append(str(error))
    driver.close()
    assert len(errors) == 1 and ("restarted by itself" in errors[0] or "lost its configuration" in errors[0])
    assert device.config[0] == RAW_NOISE
    made = device.stream(SHA, wrong, 10 * CAPACITY)
    assert not [i for i in range(0, len(made), 16) if made[i : i + 16] in out]


# --- unplugged, silent, shared ---


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_unplugged_in_the_middle_of_a_read_and_plugged_in_again(device, mode):
    with Source.open(uri(device, f"?mode={mode}"), ring_bytes=16384) as opened:
        out = opened.take(3200, timeout_s=20)
        device.unplug_after = 3001
        out += take_until(opened, lambda: not os.path.lexists(device.path))
        gone_at = len(device.sent)
        device.plug()
        out += opened.take(32_000, timeout_s=20)
        status = opened.status()
    assert status.transport_errors >= 1 and status.alarms == () and status.state == "flowing"
    found = places(out, device)
    # Nothing of the unit before the loss nor after it, and nothing that the device held when it was plugged in again.
    assert not [i for i in found if gone_at - UNIT - RAW_PER_BLOCK < i < gone_at + CAPACITY]
    assert found[-1] > gone_at


def test_a_device_that_comes_back_unwell_is_an_alarm(device):
    with Source.open(uri(device), ring_bytes=16384) as opened:
        device.unplug_after = 3001
        take_until(opened, lambda: not os.path.lexists(device.path))
        device.flags = 0x09
        device.plug()
        error = take_until_end(opened)[1]
        assert isinstance(error, HealthAlarm) and "device status 0x9" in str(error)


def test_another_device_in_its_place_is_refused(device):
    with Source.open(uri(device), ring_bytes=16384) as opened:
        device.unplug_after = 3001
        take_until(opened, lambda: not os.path.lexists(device.path))
        device.plug(serial="QC0000000300")
        error = take_until_end(opened)[1]
        assert "QC0000000300 answers on" in str(error) and "in place of QC0000000217; open it anew" in str(error)
        assert opened.status().state == "failed"


def test_a_device_that_comes_back_under_another_name_is_found(plugged):
    device = plugged()
    with Source.open("qcicada:QC0000000217", ring_bytes=16384) as opened:
        before = opened.status().device["port"]
        device.unplug_after = 3001
        take_until(opened, lambda: not os.path.lexists(device.path))
        other = os.openpty()  # takes the old number
        device.plug()
        assert len(opened.take(32_000, timeout_s=20)) == 32_000
        assert opened.status().device["port"] not in (before, device.path)
        for fd in other:
            os.close(fd)


def test_an_unplugged_device_is_given_up_after_the_patience(device, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 0.5)
    with Source.open(uri(device)) as opened:
        device.unplug()
        start = time.monotonic()
        error = take_until_end(opened)[1]
        assert isinstance(error, SourceError) and "QC0000000217 is not back" in str(error)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_a_device_that_answers_nothing_any_more_is_given_up(device, mode, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 1.0)
    with Source.open(uri(device, f"?mode={mode}")) as opened:
        device.mute = True
        start = time.monotonic()
        error = take_until_end(opened)[1]
        assert isinstance(error, SourceError) and "for 1 s" in str(error)
        assert time.monotonic() - start < 10


def test_a_stall_that_ends_in_time_is_no_error_for_readers(device):
    with Source.open(uri(device), ring_bytes=16384) as opened:
        out = opened.take(3200, timeout_s=20)
        device.mute = True
        out += take_until(opened, lambda: opened.status().transport_errors)
        device.mute = False
        out += opened.take(32_000, timeout_s=20)
    assert places(out, device)


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_closing_twice_and_while_another_thread_reads(device, mode):
    driver = open_driver(uri(device, f"?mode={mode}"))
    device.allowance = 0
    ended = []

    def reader():
        try:
            while True:
                driver.readinto(memoryview(bytearray(8192)), 30.0)
        except DeviceLost as error:
            ended.append(str(error))

    thread = threading.Thread(target=reader)
    thread.start()
    time.sleep(0.3)
    driver.close()
    driver.close()
    thread.join(10)
    assert len(ended) == 1 and "was closed" in ended[0]
    with pytest.raises(DeviceLost, match="was closed"):
        driver.reconnect(0.5)
    open_driver(uri(device)).close()
    wait_until(lambda: device.commands[-1] == 5)  # STOP, so that it does not stream to nobody


def test_two_hundred_cycles_leave_no_thread_and_no_descriptor(device, monkeypatch):
    monkeypatch.setattr(qcicada_protocol, "QUIET_S", 0.005)  # no FTDI chip here
    with nothing_left():
        for k in range(200):
            device.allowance = 0  # nothing to be dropped at the opening, which takes time
            driver = open_driver(uri(device, ("", "?mode=continuous")[k % 2]))
            device.allowance = 10
            read(driver, 10)
            driver.close()
        for query in ("?root=x", "?attest=1&root=/none", "?attest=1&root=/dev/null"):
            with pytest.raises(SourceError):
                open_driver(uri(device, query))


# --- the doctor ---


def examine(text):
    parsed = parse_uri(text)
    return driver_of(parsed).examine(parsed)


def test_a_healthy_device_is_examined_to_its_end(device):
    device.failures = [2, 0, 1]
    findings = examine(uri(device))
    assert [f.check for f in findings] == [
        "device", "port", "permission", "other process", "firmware", "configuration", "mode", "statistics",
        "device health",
    ]  # fmt: skip
    assert not [f for f in findings if f.verdict == "fail"] and "firmware 5.14" in findings[4].text
    assert "failed 3 times" in findings[7].text
    open_driver(uri(device)).close()  # it was given back


def test_a_device_is_examined_by_its_own_serial_number(plugged):
    plugged()
    assert [f.check for f in examine("qcicada:QC0000000217?post=raw-noise")] == [
        "firmware", "configuration", "mode", "device health"
    ]  # fmt: skip
    plugged("DK1", serial="QC0000000300")
    assert "QC0000000300" in examine("qcicada:QC0000000300")[0].text
    assert examine("qcicada:QC9")[-1].verdict == "fail"


def test_the_first_thing_in_the_way_is_the_last_finding(device, plugged):
    def last(text):
        *ok, failed = examine(text)
        assert failed.verdict == "fail" and failed.next_step and not [f for f in ok if f.verdict == "fail"]
        return failed.check, failed.text

    assert last("qcicada:")[0] == "device"
    assert last("qcicada:/dev/ttyUSB99")[0] == "port" and last("qcicada:QC1")[0] == "answer"
    with Source.open(uri(device)):
        check, text = last(uri(device))
        assert check == "other process" and "this process has it open" in text
    device.flags = 0x05
    assert last(uri(device)) == ("device health", "supply voltage low")
    device.config[2] |= 0x20
    assert last(uri(device))[0] == "configuration" and "generate on error" in last(uri(device))[1]
    device.mute = True
    assert last(uri(device))[0] == "answer"
