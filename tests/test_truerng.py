"""truerng: found, knocked, opened and read over a pty; what is refused; and what a source makes of its failures."""

import os
import re
import time

import pytest
from devices.truerng import TrueRNG
from devices.usb_bus import UsbBus
from processes import in_forked_child
from serial.tools import list_ports
from serial.tools.list_ports_common import ListPortInfo
from source_checks import UNIT, blocks, check_close_ends_a_read, cut, nothing_left, take_until_end, wait_until

from everett_cuda import source
from everett_cuda.drivers import attached, driver_of, open_driver, parse_uri, truerng
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError
from everett_cuda.source import Source

V3, PRO, PRO_V2, OTHER = (0x04D8, 0xF5FE), (0x16D0, 0x0AA0), (0x04D8, 0xEBB5), (0x0403, 0x6001)
FIRST_BYTES = 1024  # thrown away at each opening


@pytest.fixture(autouse=True)
def bus():
    """The emulated USB, empty: this machine's own is not looked at."""
    with UsbBus().plugged_into_pyusb() as empty:
        yield empty


@pytest.fixture
def usb(monkeypatch):
    """pyserial's list of ports, with the USB identity that each emulated device has: {device: ((vid, pid), serial)}."""
    identities = {}

    def comports(*_):
        found = []
        for device, (ids, serial) in identities.items():
            if device.path.exists():
                info = ListPortInfo(os.path.realpath(device.path), skip_link_detection=True)
                (info.vid, info.pid), info.serial_number, info.product = ids, serial, "TrueRNG"
                found.append(info)
        return found

    monkeypatch.setattr(list_ports, "comports", comports)
    return identities


@pytest.fixture
def quick_knock(monkeypatch):
    monkeypatch.setattr(truerng, "_MODE_CHANGE_S", 0.1)


@pytest.fixture
def device(tmp_path, usb):
    with TrueRNG(tmp_path / "usb-TrueRNG-if00") as plugged:
        usb[plugged] = (V3, "T1")
        yield plugged


def read(driver, n):
    out = bytearray(n)
    at = 0
    while at < n:
        at += driver.readinto(memoryview(out)[at:], 1.0)
    return bytes(out)


# --- bytes ---


def test_bytes_are_those_of_the_device_in_order_from_the_1025th(device):
    driver = open_driver(f"truerng:{device.path}")
    got = read(driver, 100_000)
    driver.close()
    assert got == bytes(device.sent[FIRST_BYTES : FIRST_BYTES + 100_000])
    assert (driver.kind, driver.conditioned, driver.serial) == ("electronic", True, "T1")
    assert str(driver.min_entropy) == "4 bits a byte (assumed)" and driver.rate_bytes_per_s == 50_000


def test_what_stood_in_its_packets_from_the_last_opening_is_not_read(device):
    first = open_driver("truerng:")
    read(first, 4096)
    first.close()
    wait_until(lambda: not device.streaming)
    left = device.stale
    second = open_driver("truerng:")
    got = read(second, 4096)
    second.close()
    assert device.sent.startswith(left) and len(left) == 64
    assert got == bytes(device.sent[FIRST_BYTES : FIRST_BYTES + 4096]) and left not in got


def test_it_streams_only_while_it_is_open(device):
    driver = open_driver("truerng:")
    assert device.dtr
    driver.close()
    wait_until(lambda: not device.dtr)


def test_a_silent_device_gives_nothing_within_the_time(device):
    driver = open_driver("truerng:")
    device.silent = True
    buffer = memoryview(bytearray(4096))
    while driver.readinto(buffer, 0.05):
        pass
    start = time.monotonic()
    assert driver.readinto(buffer, 0.1) == 0 and 0.09 < time.monotonic() - start < 1.0
    driver.close()


def test_the_source_hands_out_the_hashes_of_its_bytes(device):
    with Source.open("truerng:") as opened:
        out = opened.take(32_000)
        status = opened.status()
    assert cut(out) == blocks(bytes(device.sent[FIRST_BYTES:]))[:1000]
    assert status.label == "NOT QUANTUM (electronic)" and status.alarms == ()
    assert "total-failure only (device output is conditioned)" in status.health
    assert "mode as it was left" in str(status)


# --- modes ---


@pytest.mark.parametrize("mode, left_in", [("normal", "debug"), ("rng2", "normal")])
def test_the_knock_sets_the_mode_of_a_pro(device, usb, quick_knock, mode, left_in):
    usb[device] = (PRO, "P1")
    device.mode = left_in
    driver = open_driver(f"truerng:?mode={mode}")
    assert device.mode == mode and driver.details["mode"] == f"{mode} (set at opening)" and driver.conditioned
    assert device.openings == 5
    driver.close()


def test_without_a_mode_nothing_is_knocked(device, usb):
    usb[device] = (PRO, "P1")
    device.mode = "rng2"
    open_driver("truerng:P1").close()
    assert device.mode == "rng2" and device.openings == 1


def test_unwhitened_bytes_need_a_claim_and_are_not_called_conditioned(device, usb, quick_knock):
    usb[device] = (PRO_V2, "P2")
    with pytest.raises(BadParameter, match="needs h="):
        open_driver("truerng:?mode=unwhitened")
    driver = open_driver("truerng:?mode=unwhitened&h=2")
    assert device.mode == "unwhitened" and not driver.conditioned and driver.min_entropy.bits_per_byte == 2
    driver.close()


def test_modes_that_are_not_plain_bytes_are_no_modes(device):
    for mode in ("raw", "debug", "300", ""):
        with pytest.raises(BadParameter, match="mode"):
            open_driver(f"truerng:?mode={mode}")
    with pytest.raises(BadParameter, match="TrueRNG has one mode only"):
        open_driver("truerng:?mode=normal")


@pytest.mark.parametrize(
    "left_in, words",
    [("millivolts", "sends text"), ("debug", "sends text"), ("raw text", "sends text"), ("raw", "raw binary mode")],
)
def test_a_device_left_in_a_mode_without_plain_bytes_is_refused(device, usb, left_in, words):
    usb[device] = (PRO, "P1")
    device.mode = left_in
    with pytest.raises(SourceError, match=f"{words}.*set mode=normal"):
        open_driver("truerng:")


# --- which one ---


def test_attached_devices_are_listed_with_their_models(device, usb, tmp_path):
    with TrueRNG(tmp_path / "second") as second:
        usb[second] = (PRO, "P1")
        rows = [row for row in attached()[0] if row.uri.startswith("truerng:")]
    assert sorted((r.uri, r.name, r.kind, r.rate_bytes_per_s, r.state) for r in rows) == [
        ("truerng:P1", "TrueRNGpro", "electronic", None, "ready"),
        ("truerng:T1", "TrueRNG", "electronic", 50_000.0, "ready"),
    ]


def test_auto_never_takes_it(device):
    with pytest.raises(SourceError, match="(?s)no quantum device was found.*truerng: TrueRNG on a USB serial port"):
        open_driver("auto")


def test_one_of_several_must_be_named(device, usb, tmp_path):
    with TrueRNG(tmp_path / "second", seed=2) as second:
        usb[second] = (V3, "T2")
        with pytest.raises(SourceError, match="could mean any of 2 devices; name one: truerng:T. or truerng:T."):
            open_driver("truerng:")
        driver = open_driver("truerng:T2")
        assert driver.serial == "T2" and read(driver, 5000) == bytes(second.sent[FIRST_BYTES : FIRST_BYTES + 5000])
        driver.close()
        with pytest.raises(SourceError, match=r"no such device is attached \(there: truerng:T1, truerng:T2\)"):
            open_driver("truerng:T3")


def test_a_port_that_does_not_show_what_it_is_needs_to_be_asked_for(device, usb):
    del usb[device]
    with pytest.raises(SourceError, match="does not show that it is a TrueRNG .*unproven=1"):
        open_driver(f"truerng:{device.path}")
    driver = open_driver(f"truerng:{device.path}?unproven=1")
    assert driver.details["identity"] == "unproven" and "unproven" in driver.name
    driver.close()
    usb[device] = (OTHER, "F1")
    with pytest.raises(SourceError, match="USB identity: 0403:6001"):
        open_driver(f"truerng:{device.path}")
    for rest, words in (("", "no device was found"), ("/dev/ttyNONE?unproven=1", "does not exist")):
        with pytest.raises(SourceError, match=words):
            open_driver(f"truerng:{rest}")
    with pytest.raises(SourceError, match="not a serial port"):
        open_driver("truerng:/etc/hostname?unproven=1")


def test_the_doctor_finds_what_stands_in_the_way(device, usb):
    def findings(text):
        uri = parse_uri(text)
        return [(f.check, f.verdict) for f in driver_of(uri).examine(uri)]

    assert findings("truerng:")[:3] == [("device", "ok"), ("port", "ok"), ("permission", "ok")]
    assert findings("truerng:T9") == [("device", "fail")]
    usb[device] = (OTHER, "F1")
    assert findings(f"truerng:{device.path}") == [("device", "fail")]
    assert not device.dtr and device.openings == 0  # nothing was opened


# --- faults, through the source ---


def test_pulled_out_in_the_middle_of_a_read_and_plugged_in_again(device, usb):
    with Source.open(f"truerng:{device.path}") as opened:
        first = opened.take(3200)
        device.unplug()
        before = bytes(device.sent)
        wait_until(lambda: opened.status().transport_errors == 1)
        rest = opened.take(opened.ring.unread) if opened.ring.unread else b""
        with device:
            again = opened.take(32_000, timeout_s=10)
            after = bytes(device.sent)
            assert opened.status().alarms == () and opened.status().state == "flowing"
    allowed = blocks(before[FIRST_BYTES:])
    assert cut(first + rest) == allowed[: len(first + rest) // 32]
    assert cut(again) == blocks(after[FIRST_BYTES:])[:1000]  # a new start-up test, on bytes of the new opening


def test_another_device_in_its_place_is_refused(device, usb, tmp_path):
    with Source.open(f"truerng:{device.path}") as opened:
        device.unplug()
        usb.clear()
        with TrueRNG(device.path, seed=9) as other:
            usb[other] = (V3, "T2")
            out, error = take_until_end(opened)
            assert "another device now: serial 'T2', not 'T1'" in str(error)
            assert opened.status().state == "failed"
    assert set(cut(out)) <= set(blocks(bytes(device.sent[FIRST_BYTES:])))


def test_a_device_named_by_its_serial_is_waited_for_though_another_is_there(device, usb, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 0.5)
    with TrueRNG(tmp_path / "second", seed=2) as second, Source.open("truerng:T1") as opened:
        usb[second] = (V3, "T2")
        device.unplug()
        _, error = take_until_end(opened)
        assert "waited 0.5 s for it" in str(error) and "there: truerng:T2" in str(error)
        assert second.openings == 0


@pytest.mark.parametrize("fault, alarm", [("stuck", "repetition count"), ("biased", "adaptive proportion")])
def test_no_byte_of_a_bad_unit_nor_of_the_one_before_is_handed_out(device, fault, alarm):
    with Source.open("truerng:") as opened:
        good = opened.take(6400)
        device.noise.fault = fault
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and not isinstance(error, SourceError)
        first, last = opened.status().alarms[0], opened.status().alarms[-1]
        assert last.permanent and last.startup
        if fault == "stuck":
            assert alarm in first.test
    raw = bytes(device.sent[FIRST_BYTES:])
    proven = raw[: max(first.offset // UNIT - 1, 0) * UNIT]
    assert cut(good + out) == blocks(proven)[: len(good + out) // 32]
    device.noise.fault = ""


def test_a_long_stall_ends_the_source_and_reopening_starts_it_again(device):
    with pytest.MonkeyPatch.context() as patience, Source.open("truerng:") as opened:
        patience.setattr(source, "PATIENCE_S", 0.4)
        device.silent = True
        start = time.monotonic()
        out, error = take_until_end(opened)
        assert time.monotonic() - start < 0.4 + 1.0  # an answer within a second of the time-out
        assert "gave no bytes for 0.4 s" in str(error)
        assert cut(out) == blocks(bytes(device.sent[FIRST_BYTES:]))[: len(out) // 32]
        device.silent = False
        patience.undo()
        opened.reopen()
        assert len(opened.take(320, timeout_s=10)) == 320


def test_a_second_process_is_refused_with_the_name_of_the_first(device):
    driver = open_driver("truerng:")

    def second():
        try:
            open_driver("truerng:")
        except SourceError as error:
            return error

    answer = in_forked_child(second)
    assert re.search(rf"{device.path.resolve()} is in use by .*\(pid {os.getpid()}\)", answer), answer
    assert len(read(driver, 10_000)) == 10_000  # the first is not disturbed
    driver.close()


def test_closing_ends_a_read_of_another_thread_and_may_be_done_twice(device):
    driver = open_driver("truerng:")
    device.silent = True
    check_close_ends_a_read(driver)


def test_two_hundred_openings_leave_nothing_behind(device):
    with nothing_left():
        for k in range(200):
            driver = open_driver("truerng:")
            if k % 20 == 0:
                read(driver, 100)
            driver.close()
    device.mode = "debug"
    with nothing_left():
        for _ in range(5):
            with pytest.raises(SourceError):
                open_driver("truerng:")
