"""swiftrng: the command protocol over a pty; what its status byte leads to; and what a source makes of its failures."""

import os
import re
import time

import pytest
from devices.swiftrng import BLOCK, SwiftRng, SwiftRngUsb
from devices.usb_bus import UsbBus
from processes import in_forked_child
from serial.tools import list_ports
from serial.tools.list_ports_common import ListPortInfo
from source_checks import UNIT, blocks, check_close_ends_a_read, cut, nothing_left, take_until_end, wait_until

from everett_cuda import source
from everett_cuda.drivers import (
    DeviceFault,
    TransportError,
    attached,
    driver_of,
    open_driver,
    parse_uri,
    swiftrng_wire,
)
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError
from everett_cuda.source import Source


@pytest.fixture(autouse=True)
def bus():
    """The emulated USB, empty: this machine's own is not looked at."""
    with UsbBus().plugged_into_pyusb() as empty:
        yield empty
        assert empty.open_handles == 0, "a device was opened and not closed"


@pytest.fixture
def usb(monkeypatch):
    """pyserial's list of ports: the emulated devices that are plugged in, with the USB serial number each shows."""
    serials = {}

    def comports(*_):
        found = []
        for device, serial in serials.items():
            if device.path.exists():
                info = ListPortInfo(os.path.realpath(device.path), skip_link_detection=True)
                info.vid, info.pid, info.serial_number, info.product = 0x3975, 0x0002, serial, "SwiftRNG"
                found.append(info)
        return found

    monkeypatch.setattr(list_ports, "comports", comports)
    return serials


@pytest.fixture
def device(tmp_path, usb):
    with SwiftRng(tmp_path / "usb-TectroLabs_SwiftRNG-if00") as plugged:
        usb[plugged] = "FD1"
        yield plugged


def read(driver, n):
    out = bytearray(n)
    at = 0
    while at < n:
        at += driver.readinto(memoryview(out)[at:], 1.0)
    return bytes(out)


# --- protocol ---


@pytest.mark.parametrize("n", [1, 4096, BLOCK, BLOCK + 1, 50_000])
def test_bytes_are_those_of_the_answers_without_their_status(device, n):
    driver = open_driver("swiftrng:")
    assert read(driver, n) == bytes(device.firmware.sent[:n])
    driver.close()
    assert device.firmware.asked == "vmsd" + "x" * -(-n // BLOCK)  # nothing is asked before it is needed


def test_what_the_device_says_of_itself_is_shown(device):
    driver = open_driver("swiftrng:FD1")
    assert (driver.serial, driver.kind, driver.conditioned) == ("SWRNG-012345-A1", "electronic", False)
    assert dict(driver.details) == {
        "model": "SwiftPro", "firmware": "2.1", "port": os.path.realpath(device.path), "corrector": "none inside",
        "output": "both sources, combined", "failed answers": "0",
    }  # fmt: skip
    driver.close()


@pytest.mark.parametrize("source_number, command", [(1, "<"), (2, ">")])
def test_one_noise_source_alone_is_read_by_request(device, source_number, command):
    device.firmware.firmware = "V3.0"
    driver = open_driver(f"swiftrng:?source={source_number}&h=2.5")
    expected = type(device)(device.path, seed=1).firmware.source_noise[command].make(20_000)
    assert read(driver, 20_000) == expected and device.firmware.asked == "vmsd" + 2 * command
    assert not driver.conditioned and float(driver.min_entropy.bits_per_byte) == 2.5
    driver.close()


def test_firmware_3_corrects_inside_and_firmware_1_has_no_diagnostics(device):
    device.firmware.firmware = "V3.1"
    with Source.open("swiftrng:") as opened:
        assert "total-failure only (device output is conditioned)" in opened.status().health
        assert "corrector Lacharme, inside" in str(opened.status())
    device.firmware.firmware, device.firmware.asked = "V1.2", ""
    open_driver("swiftrng:").close()
    assert device.firmware.asked == "vms"


def test_what_it_was_left_with_is_drained_before_anything_is_asked(device):
    device.left_over = b"\x77" * 9000
    driver = open_driver("swiftrng:")
    assert read(driver, 1000) == bytes(device.firmware.sent[:1000])
    driver.close()


def test_an_answer_that_lacks_a_byte_is_dropped(device):
    driver = open_driver("swiftrng:")
    read(driver, BLOCK)
    device.firmware.lose = 1
    start = time.monotonic()
    with pytest.raises(TransportError, match=f"gave {BLOCK} of {BLOCK + 1} bytes in 2 s"):
        while True:
            assert driver.readinto(memoryview(bytearray(BLOCK)), 0.2) == 0
    assert time.monotonic() - start < 3.0
    assert read(driver, BLOCK) == bytes(device.firmware.sent[BLOCK:])
    driver.close()


@pytest.mark.parametrize("status", [0, 0x55])
@pytest.mark.parametrize("late", [False, True])
def test_bytes_beyond_an_answer_mean_that_its_status_cannot_be_believed(device, status, late):
    driver = open_driver("swiftrng:")
    device.firmware.status = status
    setattr(device.firmware, "late" if late else "surplus", b"\x66" * 3)
    # With a good status the block is taken, and before the next is asked for it shows.
    words = "sent bytes unasked" if late and status == 0 else "out of step"
    with pytest.raises(TransportError, match=words) as caught:
        read(driver, BLOCK)
        assert device.late_sent.wait(10)
        read(driver, 1)
    assert not isinstance(caught.value, DeviceFault)
    device.firmware.status = 0
    device.firmware.sent.clear()
    assert read(driver, BLOCK) == bytes(device.firmware.sent)
    driver.close()


def test_a_bad_status_is_a_fault_of_the_device_and_its_block_is_dropped(device):
    driver = open_driver("swiftrng:")
    device.firmware.status = 0x0B
    with pytest.raises(DeviceFault, match="reports a failure of its noise sources, status 0x0b") as caught:
        read(driver, 1)
    assert (caught.value.status, caught.value.expected) == (0x0B, 0)
    assert driver.details["failed answers"] == "1"
    device.firmware.status = 0
    assert read(driver, BLOCK) == bytes(device.firmware.sent)
    driver.close()


# --- which one ---


def test_what_does_not_answer_as_a_swiftrng_is_refused(device):
    for spoil, words in (
        ({"firmware": "AT\r\n"}, "firmware 'AT.*', which no SwiftRNG says"),
        ({"firmware": "V2.1", "diagnostics": 4}, "command 'd' failed with status 0x04"),
        ({"diagnostics": 0, "model": "\xff" * 8}, "with no text"),
    ):
        for name, value in spoil.items():
            setattr(device.firmware, name, value)
        with nothing_left(), pytest.raises(SourceError, match=words):
            open_driver("swiftrng:")
    device.silent = True
    with pytest.MonkeyPatch.context() as short, pytest.raises(SourceError, match="does not answer as a SwiftRNG"):
        short.setattr("everett_cuda.drivers.swiftrng._ANSWER_S", 0.1)
        open_driver("swiftrng:")
    for rest in ("?source=3", "?source=", "?mode=1"):
        with pytest.raises(BadParameter):
            open_driver(f"swiftrng:{rest}")


def test_attached_devices_are_listed_and_examined_without_being_opened(device, usb, tmp_path):
    with SwiftRng(tmp_path / "second") as second:
        usb[second] = "FD2"
        rows = [(r.uri, r.name, r.kind, r.state) for r in attached()[0] if r.uri.startswith("swiftrng:")]
        assert sorted(rows) == [("swiftrng:FD1", "SwiftRNG", "electronic", "ready"),
                                ("swiftrng:FD2", "SwiftRNG", "electronic", "ready")]  # fmt: skip
        with pytest.raises(SourceError, match="could mean any of 2 devices; name one: swiftrng:FD"):
            open_driver("swiftrng:")
        uri = parse_uri("swiftrng:FD2")
        verdicts = [(f.check, f.verdict) for f in driver_of(uri).examine(uri)]
        assert verdicts[:3] == [("device", "ok"), ("port", "ok"), ("permission", "ok")]
        uri = parse_uri("swiftrng:FD3")
        assert [(f.check, f.verdict) for f in driver_of(uri).examine(uri)] == [("device", "fail")]
        assert device.firmware.asked == second.firmware.asked == ""


# --- faults, through the source ---


def test_the_source_hands_out_the_hashes_of_its_bytes(device):
    with Source.open("swiftrng:") as opened:
        out = opened.take(32_000)
        assert opened.status().label == "NOT QUANTUM (electronic)" and opened.status().health == "ok"
    assert cut(out) == blocks(bytes(device.firmware.sent))[:1000]


def test_pulled_out_inside_an_answer_and_plugged_in_again(device):
    with Source.open(f"swiftrng:{device.path}") as opened:
        first = opened.take(32_000)
        device.cut_at = 5000
        wait_until(lambda: opened.status().transport_errors == 1)
        before = bytes(device.firmware.sent)
        device.firmware.sent.clear()
        rest = opened.take(opened.ring.unread)
        with device:
            again = opened.take(32_000, timeout_s=10)
            assert opened.status().alarms == () and opened.status().state == "flowing"
    out = cut(first + rest)
    # The answer that was cut off counts as sent by the device; none of its 5,000 bytes got through.
    assert out == blocks(before[: len(before) - BLOCK])[: len(out)]
    assert cut(again) == blocks(bytes(device.firmware.sent))[:1000]


def test_another_device_in_its_place_is_refused(device, usb):
    with Source.open(f"swiftrng:{device.path}") as opened:
        device.unplug()
        with SwiftRng(device.path, serial="SWRNG-999999-A1", seed=5) as other:
            _, error = take_until_end(opened)
            assert "another SwiftRNG now: SWRNG-999999-A1, not SWRNG-012345-A1" in str(error)
            assert opened.status().state == "failed" and "x" not in other.firmware.asked


def test_a_bad_status_is_an_alarm_and_the_second_is_permanent(device):
    with Source.open("swiftrng:") as opened:
        good = opened.take(3200)
        good_raw = bytes(device.firmware.sent)
        device.firmware.status = 3
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and "device status 0x3 instead of 0x0" in str(error)
        assert [a.permanent for a in opened.status().alarms] == [False, True]
        assert int(opened.status().device["failed answers"]) >= 2
    sent = bytes(device.firmware.sent)
    assert sent.startswith(good_raw) and cut(good + out) == blocks(sent)[: len(good + out) // 32]


@pytest.mark.parametrize("fault", ["stuck", "biased"])
def test_no_byte_of_a_bad_unit_nor_of_the_one_before_is_handed_out(device, fault):
    with Source.open("swiftrng:") as opened:
        good = opened.take(6400)
        device.firmware.noise.fault = fault
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and opened.status().alarms[-1].permanent
        first = opened.status().alarms[0]
    raw = bytes(device.firmware.sent)
    assert cut(good + out) == blocks(raw[: max(first.offset // UNIT - 1, 0) * UNIT])[: len(good + out) // 32]


def test_a_long_stall_ends_the_source(device):
    with pytest.MonkeyPatch.context() as patience, Source.open("swiftrng:") as opened:
        patience.setattr(source, "PATIENCE_S", 0.5)
        device.silent = True
        start = time.monotonic()
        out, error = take_until_end(opened)
        assert "for 0.5 s" in str(error) and time.monotonic() - start < 4.0
        assert cut(out) == blocks(bytes(device.firmware.sent))[: len(out) // 32]
        device.silent = False
        patience.undo()
        opened.reopen()
        assert len(opened.take(320, timeout_s=10)) == 320


def test_a_second_process_is_refused_with_the_name_of_the_first(device):
    driver = open_driver("swiftrng:")

    def second():
        try:
            open_driver("swiftrng:")
        except SourceError as error:
            return error

    answer = in_forked_child(second)
    assert re.search(rf"{device.path.resolve()} is in use by .*\(pid {os.getpid()}\)", answer), answer
    assert read(driver, 20_000) == bytes(device.firmware.sent[:20_000])
    driver.close()


def test_closing_ends_a_read_of_another_thread_and_may_be_done_twice(device):
    driver = open_driver("swiftrng:")
    device.silent = True
    check_close_ends_a_read(driver)


def test_two_hundred_openings_leave_nothing_behind(device, monkeypatch):
    monkeypatch.setattr(swiftrng_wire, "_QUIET_S", 0.002)
    with nothing_left():
        for k in range(200):
            driver = open_driver("swiftrng:")
            if k % 20 == 0:
                read(driver, 100)
            driver.close()


# --- the first model, by libusb ---


@pytest.fixture
def first_model(bus, usb):
    bus.gadgets.append(SwiftRngUsb(firmware="V1.2"))
    return bus.gadgets[0]


def test_the_first_model_speaks_the_same_protocol_on_usb(first_model):
    (row,) = (r for r in attached()[0] if r.uri.startswith("swiftrng:"))
    assert (row.uri, row.name, row.kind, row.state) == ("swiftrng:usb:99-1", "SwiftRNG", "electronic", "ready")
    first_model.left_over = b"\x77" * 40_000
    for uri in ("swiftrng:", row.uri):
        first_model.firmware.sent.clear()
        driver = open_driver(uri)
        assert read(driver, 50_000) == bytes(first_model.firmware.sent[:50_000])
        assert (driver.serial, driver.conditioned) == ("SWRNG-012345-A1", False)
        driver.close()
    assert first_model.firmware.asked == "vmsxxxx" * 2
    with pytest.raises(SourceError, match="no such device is attached .there: swiftrng:usb:99-1"):
        open_driver("swiftrng:usb:99-2")


def test_out_of_step_on_usb_is_no_fault_of_the_device(first_model):
    driver = open_driver("swiftrng:")
    first_model.firmware.surplus, first_model.firmware.status = b"\x66" * 3, 0x55
    with pytest.raises(TransportError, match="out of step") as caught:
        read(driver, 1)
    assert not isinstance(caught.value, DeviceFault)
    first_model.halted = True
    with pytest.raises(TransportError, match="Broken pipe"):
        read(driver, 1)
    first_model.firmware.status = 9
    with pytest.raises(DeviceFault):
        read(driver, 1)
    driver.close()


def test_the_first_model_unplugged_inside_an_answer_and_plugged_in_again(bus, first_model):
    with Source.open("swiftrng:") as opened:
        first = opened.take(32_000)
        first_model.cut_at = 5000
        wait_until(lambda: opened.status().transport_errors == 1)
        before = bytes(first_model.firmware.sent)
        first_model.firmware.sent.clear()
        rest = opened.take(opened.ring.unread)
        first_model.plug()
        again = opened.take(32_000, timeout_s=10)
        assert cut(again) == blocks(bytes(first_model.firmware.sent))[:1000]
        first_model.unplug()
        bus.gadgets[:] = [SwiftRngUsb(serial="SWRNG-999999-A1", firmware="V1.2")]
        assert "another SwiftRNG now: SWRNG-999999-A1, not SWRNG-012345-A1" in str(take_until_end(opened)[1])
    assert cut(first + rest) == blocks(before[: len(before) - BLOCK])[: len(first + rest) // 32]


def test_the_first_model_is_refused_to_a_second_opening_and_examined(first_model):
    def verdicts():
        uri = parse_uri("swiftrng:")
        return [(f.check, f.verdict) for f in driver_of(uri).examine(uri)]

    assert verdicts() == [("device", "ok"), ("permission", "ok"), ("other process", "ok")]
    driver = open_driver("swiftrng:")
    with pytest.raises(SourceError, match="is in use by"):
        open_driver("swiftrng:")
    assert verdicts()[2:] == [("other process", "fail")]
    assert read(driver, 100) == bytes(first_model.firmware.sent[:100])
    driver.close()
    first_model.forbidden = True
    assert verdicts() == [("device", "ok"), ("permission", "fail")]
    with pytest.raises(SourceError, match="no permission .*1fc9.*8110"):
        open_driver("swiftrng:")
