"""What the quantis-pcie driver does with emulated cards; run by tests/test_quantis_pcie.py in a preloaded process."""

import errno
import gc
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from devices.kernel_double import GONE, HANG, IO_ERROR, WELL, ZERO_READ, KernelDouble, stream
from processes import in_forked_child
from source_checks import RAW_PER_BLOCK, UNIT, blocks, cut, nothing_left, take_until_end, wait_until

from everett_cuda import source
from everett_cuda.drivers import (
    DeviceFault,
    DeviceLost,
    TransportError,
    attached,
    char_node,
    driver_of,
    open_driver,
    parse_uri,
)
from everett_cuda.errors import HealthAlarm, SourceError, Starved
from everett_cuda.source import Source

gc.collect()
gc.freeze()  # what has been imported lasts; `nothing_left` collects garbage around each test
KiB, MiB = 1024, 1 << 20
SEED = 7
# Where a card's bytes begin that are not thrown away: the driver's own start-up bytes, then the first read.
CHIP_START, CHIP_SAMPLE_START, MODULE_START = 64 * KiB + MiB, 16809984 + MiB, 64 * KiB


@pytest.fixture
def kernel():
    double = KernelDouble(Path(os.environ["KERNEL_DOUBLE"]))
    double.clear()
    with nothing_left():
        yield double
    double.clear()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 1.0)


def read(driver, n, timeout_s=10.0):
    out, at, deadline = bytearray(n), 0, time.monotonic() + timeout_s
    while at < n:
        assert time.monotonic() < deadline
        at += driver.readinto(memoryview(out)[at:], 0.2)
    return bytes(out)


def examine(text):
    uri = parse_uri(text)
    return driver_of(uri).examine(uri)


def verdicts(text):
    return {f.check: f.verdict for f in examine(text)}


def segment(start, n=4 * MiB):
    return blocks(stream(SEED, start, n))


# --- found and named ---


def test_cards_are_listed_and_their_uris_open_them(kernel):
    kernel.chip_card(0)
    kernel.chip_card(1, chips=2, serial="2101ABC040M", pci="0000:05:00.0")
    kernel.module_card(2, modules=0b1)
    kernel.module_card(3, serial="M 7/7", pci="0000:06:00.0")
    kernel.foreign("qrandom4")
    rows, _ = attached()
    assert [(r.uri, r.serial, r.rate_bytes_per_s, r.kind, r.state) for r in rows] == [
        ("quantis-pcie:2101ABC240M", "2101ABC240M", 30e6, "quantum", "ready"),
        ("quantis-pcie:2101ABC040M", "2101ABC040M", 5e6, "quantum", "ready"),
        ("quantis-pcie:2", "", 5e5, "quantum", "ready"),  # two module cards: the class does not say which is which
        ("quantis-pcie:3", "", 2e6, "quantum", "ready"),  # a serial number with a blank is none
    ]
    for row in rows:
        driver = open_driver(row.uri)
        assert (driver.serial, driver.rate_bytes_per_s, driver.kind) == (row.serial, row.rate_bytes_per_s, "quantum")
        assert attached()[0][rows.index(row)].state == "in use by this process"
        driver.close()


def test_a_card_is_chosen_by_number_path_serial_and_pci_address(kernel):
    kernel.chip_card(0)
    for rest in ("", "0", "/dev/qrandom0", "2101ABC240M", "0000:03:00.0"):
        driver = open_driver(f"quantis-pcie:{rest}")
        assert driver.serial == "2101ABC240M"
        driver.close()
    with pytest.raises(SourceError, match=r"no such Quantis card \(there are: quantis-pcie:2101ABC240M \(ready\)\)"):
        open_driver("quantis-pcie:OTHER")
    with pytest.raises(SourceError, match="cannot open /dev/qrandom1: No such file"):
        open_driver("quantis-pcie:1")
    kernel.chip_card(1, serial="2102ABC240M", pci="0000:05:00.0")
    with pytest.raises(SourceError, match="2 cards are there; name one of quantis-pcie:2101ABC240M .*2102ABC240M"):
        open_driver("quantis-pcie:")


def test_without_a_card_the_error_says_what_to_do(kernel):
    with pytest.raises(SourceError, match=r"there are: none\). `lspci -d 1e89:`"):
        open_driver("quantis-pcie:")
    kernel.pci_card("0000:03:00.0", 0x1E89, 3)
    with pytest.raises(SourceError, match="PCIe-240M at PCI 0000:03:00.0 has no driver bound to it; it needs"):
        open_driver("quantis-pcie:")
    kernel.pci_card("0000:03:00.0", 0x1E89, 3, "vfio-pci")
    with pytest.raises(SourceError, match="has vfio-pci bound to it"):
        open_driver("quantis-pcie:")


def test_auto_takes_a_card(kernel):
    kernel.chip_card(0)
    kernel.hwrng("virtio_rng.0")
    driver = open_driver("auto")
    assert (driver.kind, driver.serial) == ("quantum", "2101ABC240M")
    driver.close()


# --- what a card says of itself ---


@pytest.mark.parametrize(
    "mode, conditioned, words",
    [(0, True, "RNG (processed in the card)"), (1, False, "SAMPLE (unprocessed)")],
)
def test_a_chip_card_says_its_mode_versions_and_chips(kernel, mode, conditioned, words):
    kernel.chip_card(0, chips=2, mode=mode)
    driver = open_driver("quantis-pcie:0?h=5.5")
    assert (driver.conditioned, driver.rate_bytes_per_s, str(driver.min_entropy)) == (
        conditioned, 5e6, "5.5 bits a byte (claimed by user)",
    )  # fmt: skip
    assert driver.details == {
        "driver": "quantis_chip_pcie 20.2", "board": "PCB 1, firmware 2.3.4", "modules": "0 and 1 work", "mode": words,
        "proof": "quantis_chip_pcie device 240:32 on PCI 0000:03:00.0",
    }  # fmt: skip
    driver.close()


def test_a_module_card_of_2010_has_no_serial_number_but_an_address(kernel):
    card = kernel.module_card(0)
    driver = open_driver("quantis-pcie:0")
    assert (driver.serial, driver.conditioned, driver.rate_bytes_per_s) == ("0000:04:00.0", False, 2e6)
    assert driver.details["board"] == "core 0x0a0b0c0d" and driver.details["driver"] == "quantis_pci 2.0"
    assert "/proc/qrandom" in driver.details["proof"] and "AIS-31 start-up test" not in driver.details
    assert card.state.requests[12] == 1  # asked, and answered ENOTTY
    driver.close()
    (kernel.root / "proc/qrandom").unlink()
    open_driver("quantis-pcie:0").close()  # a later driver may not have it


@pytest.mark.parametrize("serial", [b"", b"\xff" * 11, b"\x01\x02"])
def test_a_serial_number_that_is_no_text_is_none(kernel, serial):
    card = kernel.chip_card(0)
    card.state.serial = serial
    driver = open_driver("quantis-pcie:0")
    assert driver.serial == "0000:03:00.0"
    driver.close()


def test_an_unknown_mode_is_refused(kernel):
    kernel.chip_card(0, mode=2)
    with pytest.raises(SourceError, match="in mode 2; known are 0"):
        open_driver("quantis-pcie:0")


# --- bytes ---


@pytest.mark.parametrize(
    "make, start, rate",
    [
        (lambda k: k.chip_card(0), CHIP_START, None),
        (lambda k: k.chip_card(0, chips=2, mode=1), CHIP_SAMPLE_START, None),
        (lambda k: k.module_card(0), MODULE_START, None),
        (lambda k: k.module_card(0, serial="M1", bytes_per_s=2e6), MODULE_START, None),
    ],
    ids=["240M", "40M SAMPLE", "modules", "later modules, paced"],
)
def test_bytes_are_the_cards_after_the_first_read(kernel, make, start, rate):
    card = make(kernel)
    driver = open_driver("quantis-pcie:0")
    assert read(driver, 300_001) == stream(SEED, start, 300_001)
    driver.close()
    state = card.state
    assert state.zero_reads == 0
    assert state.first_read == (MiB if state.kind == 3 else 64 * KiB)
    assert state.smallest_read >= 16 * KiB and state.smallest_read % KiB == 0


def test_bits_are_the_hashes_of_the_cards_bytes(kernel):
    kernel.chip_card(0)
    with Source.open("quantis-pcie:0") as opened:
        got = cut(opened.take(320_000))
        status = opened.status()
    assert got == segment(CHIP_START)[: len(got)]
    assert (status.label, status.serial, status.device_conditions) == ("quantum", "2101ABC240M", True)
    assert status.health == "ok; total-failure only (device output is conditioned)"


def test_the_chip_cards_log_flooding_question_is_asked_once(kernel):
    card = kernel.chip_card(0)
    driver = open_driver("quantis-pcie:0")
    read(driver, 4 * MiB)
    driver.close()
    assert card.state.requests[2] == 1 and card.state.requests[8] >= 4 and card.state.requests[15] >= 4


# --- modules, modes and flags ---


def test_a_dead_module_is_refused_at_opening_unless_it_is_accepted(kernel):
    kernel.module_card(0, status=0b0111)
    with pytest.raises(DeviceFault, match=r"of modules 0 to 3, 3 failed \(status 0x7\).*modules=0x7 goes on") as caught:
        open_driver("quantis-pcie:0")
    assert (caught.value.status, caught.value.expected) == (0b0111, 0b1111)
    driver = open_driver("quantis-pcie:0?modules=0x7")
    assert (driver.rate_bytes_per_s, driver.details["modules"]) == (1.5e6, "0 to 2 work of 0 to 3")
    driver.close()
    for text in ("0", "0x1000", "x", "-1"):
        with pytest.raises(SourceError, match="modules=.*malformed"):
            open_driver(f"quantis-pcie:0?modules={text}")


def test_a_missing_chip_is_seen_though_the_card_does_not_list_it(kernel):
    kernel.chip_card(0, mask=0x7FF, status=0x7FF)
    with pytest.raises(DeviceFault, match="11 failed"):
        open_driver("quantis-pcie:0")


def test_a_card_without_modules_is_refused(kernel):
    kernel.module_card(0, modules=0)
    with pytest.raises(SourceError, match="has no modules"):
        open_driver("quantis-pcie:0")


@pytest.mark.parametrize(
    "status, bits", [(0x7FF, 0x7FF), (0x0, 0x0), (0x00100FFF, 0x00100FFF), (0xFFFFFFFF, 0xFFF00FFF)],
    ids=["chip gone", "not ready", "packet error in a raw word", "-1"],
)  # fmt: skip
def test_a_chip_that_fails_is_an_alarm_and_nothing_of_its_time_comes_out(kernel, status, bits):
    card = kernel.chip_card(0)
    with Source.open("quantis-pcie:0") as opened:
        out = opened.take(64 * KiB)
        card.state.status = status
        start = time.monotonic()
        more, error = take_until_end(opened)
        assert time.monotonic() - start < 5 and isinstance(error, HealthAlarm)
        alarms = opened.status().alarms
        assert [a.test for a in alarms] == ["device status"] * 2 and alarms[-1].permanent
        assert (alarms[0].value, alarms[0].cutoff) == (bits, 0xFFF)
        assert "wanted, status" in opened.status().device["modules"]
    got = cut(out + more)
    assert got == segment(CHIP_START, 8 * MiB)[: len(got)]
    assert len(got) * RAW_PER_BLOCK <= alarms[0].offset


def test_a_module_that_comes_back_is_a_transient_alarm(kernel):
    card = kernel.module_card(0, bytes_per_s=2e6)
    with Source.open("quantis-pcie:0") as opened:
        card.state.status = 0b1011
        wait_until(lambda: opened.status().alarms)
        card.state.status = 0b1111
        wait_until(lambda: opened.status().state == "flowing" and opened.status().transient_alarms == 1)
        opened.take(64 * KiB, timeout_s=10)
        assert not opened.status().alarms[0].permanent


def test_a_change_of_mode_ends_the_source(kernel):
    card = kernel.chip_card(0)
    with Source.open("quantis-pcie:0") as opened:
        opened.take(1000)
        card.state.mode = 1  # what a reset by another program does
        _, error = take_until_end(opened)
        assert "was put from mode RNG into SAMPLE" in str(error) and not isinstance(error, HealthAlarm)
        opened.reopen()
        assert opened.status().device["mode"] == "SAMPLE (unprocessed)"


def test_an_ais31_flag_is_answered_by_the_start_up_test(kernel):
    card = kernel.module_card(0, serial="M1", ais31=1)
    with Source.open("quantis-pcie:0") as opened:
        opened.take(1000)
        assert card.state.ais31 == 0 and opened.status().device["AIS-31 start-up test"] == "passed"
        errors = opened.status().transport_errors
        card.state.ais31 = 1
        while opened.status().transport_errors == errors:
            opened.take(4 * KiB, timeout_s=10)
        wait_until(lambda: card.state.ais31 == 0)
        opened.take(64 * KiB, timeout_s=10)
        assert opened.status().alarms == () and opened.status().transport_errors == errors + 1


# --- reads that fail ---


@pytest.mark.parametrize("fault, word", [(IO_ERROR, "EIO"), (ZERO_READ, "no bytes")])
def test_a_failed_read_drops_its_bytes_and_starts_over(kernel, fault, word):
    card = kernel.module_card(0)
    slot, at = 16 * KiB, MODULE_START + 200_000
    card.break_at(fault, at, times=1)
    broken = MODULE_START + (at - MODULE_START) // slot * slot
    lost = slot if fault == IO_ERROR else 0
    after = broken + lost + 64 * KiB
    driver = open_driver("quantis-pcie:0")
    got = 0
    with pytest.raises(TransportError, match=word) as caught:
        while True:
            n = driver.readinto(memoryview(bytearray(4 * KiB)), 1.0)
            got += n
    assert not isinstance(caught.value, DeviceLost) and got <= broken - MODULE_START
    assert read(driver, 10_000) == stream(SEED, after, 10_000)
    driver.close()


def test_bits_around_a_failed_read_are_of_one_side_of_it(kernel):
    card = kernel.module_card(0)
    at = MODULE_START + 400_000
    card.break_at(IO_ERROR, at, times=1)
    with Source.open("quantis-pcie:0") as opened:
        got = cut(opened.take(320_000, timeout_s=20))
        assert opened.status().transport_errors == 1 and opened.status().alarms == ()
    before = segment(MODULE_START, 400_000)
    after = segment(MODULE_START + 400_000 // (16 * KiB) * 16 * KiB + 16 * KiB + 64 * KiB)
    k = next(i for i, block in enumerate(got) if block not in before)
    assert got[:k] == before[:k] and got[k:] == after[: len(got) - k]


def test_reads_that_keep_failing_end_the_source(kernel, impatient):
    card = kernel.module_card(0)
    with Source.open("quantis-pcie:0") as opened:
        card.break_at(IO_ERROR)
        start = time.monotonic()
        _, error = take_until_end(opened)
        assert "no bytes for 1 s" in str(error) and "EIO" in str(error) and time.monotonic() - start < 4


def test_a_card_whose_modules_are_all_dead_answers_eio(kernel, impatient):
    card = kernel.module_card(0)
    driver = open_driver("quantis-pcie:0")
    card.state.status = 0
    with pytest.raises(TransportError, match=errno.errorcode[errno.EIO]):
        driver.readinto(memoryview(bytearray(100)), 1.0)
    driver.close()


def test_bytes_that_a_driver_claims_and_did_not_write_are_zeros_and_alarm(kernel):
    kernel.chip_card(0, claims_more_at=CHIP_START + MiB)
    with Source.open("quantis-pcie:0") as opened:
        out, error = take_until_end(opened)
        assert isinstance(error, HealthAlarm) and opened.status().alarms[0].test == "repetition count (bits)"
        first = opened.status().alarms[0].offset
    assert cut(out) == segment(CHIP_START, MiB + 4 * KiB)[: len(cut(out))]
    assert len(cut(out)) * RAW_PER_BLOCK <= (first // UNIT - 1) * UNIT


@pytest.mark.parametrize("fault, test", [("stuck_at", "repetition count (bits)"), ("biased_at", None)])
def test_stuck_and_biased_bytes_alarm_and_neither_their_unit_nor_the_one_before_comes_out(kernel, fault, test):
    kernel.module_card(0, **{fault: MODULE_START + MiB})
    with Source.open("quantis-pcie:0") as opened:
        out, error = take_until_end(opened)
        alarms = opened.status().alarms
    assert isinstance(error, HealthAlarm) and alarms[0].offset >= MiB
    assert test in (None, alarms[0].test)
    got = cut(out)
    assert got == segment(MODULE_START, MiB)[: len(got)]
    assert len(got) * RAW_PER_BLOCK <= (alarms[0].offset // UNIT - 1) * UNIT


# --- hanging ---


def test_a_hanging_card_is_waited_for_and_then_given_up(kernel, impatient, monkeypatch):
    card = kernel.chip_card(0)
    descriptors = len(os.listdir("/proc/self/fd"))
    opened = Source.open("quantis-pcie:0")
    opened.take(1000)
    card.break_at(HANG)
    start = time.monotonic()
    _, error = take_until_end(opened)
    assert "gave no bytes for 1 s" in str(error) and time.monotonic() - start < 3
    start = time.monotonic()
    opened.close()  # the thread is inside the kernel: it is left behind, and holds the card
    assert time.monotonic() - start < char_node.CLOSE_S + 1
    assert len(os.listdir("/proc/self/fd")) > descriptors
    monkeypatch.setattr(char_node, "ANSWER_S", 0.3)
    with pytest.raises(SourceError, match="has not answered for 0.3 s: its kernel driver waits"):
        open_driver("quantis-pcie:0")
    assert "has not answered" in attached()[0][0].state or "in use" in attached()[0][0].state
    card.state.fault = WELL
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == descriptors)
    monkeypatch.setattr(char_node, "ANSWER_S", 5.0)
    open_driver("quantis-pcie:0").close()


def test_a_stall_that_ends_in_time_is_survived(kernel):
    card = kernel.chip_card(0)
    with Source.open("quantis-pcie:0") as opened:
        card.break_at(HANG, card.state.offset + 8 * MiB)
        got = []
        with pytest.raises(Starved):
            while True:
                got += cut(opened.take(32 * KiB, timeout_s=0.5))
        card.state.fault = WELL
        got += cut(opened.take(32 * KiB, timeout_s=20))
        assert opened.status().transport_errors == 0
    assert got == segment(CHIP_START, 16 * MiB)[: len(got)]


# --- unplugged ---


def test_an_unplugged_card_resumes_under_another_number_after_a_new_start_up_test(kernel):
    card = kernel.chip_card(0, bytes_per_s=20e6)
    with Source.open("quantis-pcie:0") as opened:
        out = opened.take(4000)
        card.unplug()
        wait_until(lambda: opened.status().transport_errors == 1)
        kernel.chip_card(3, pci="0000:07:00.0", seed=SEED + 100)
        out += opened.take(2 * MiB, timeout_s=20)
        status = opened.status()
        assert status.alarms == () and status.transport_errors == 1 and status.state == "flowing"
        assert "0000:07:00.0" in status.device["proof"]
    old, new = segment(CHIP_START), blocks(stream(SEED + 100, CHIP_START, 8 * MiB))
    got = cut(out)
    k = next(i for i, block in enumerate(got) if block not in old)
    assert got[:k] == old[:k] and got[k:] == new[: len(got) - k]


def test_an_unplugging_in_the_middle_of_a_read_loses_that_read(kernel, impatient):
    card = kernel.module_card(0, serial="M1")
    at = MODULE_START + 500_000
    opened = Source.open("quantis-pcie:0")
    card.break_at(GONE, at)
    out, error = take_until_end(opened)
    assert "is gone (ENODEV" in str(error) and "waited 1 s for it" in str(error)
    got = cut(out)
    assert got == segment(MODULE_START, 500_000)[: len(got)]
    opened.close()


@pytest.mark.parametrize("other", ["2999ZZZ240M", ""])
def test_another_card_in_its_place_is_refused_by_name(kernel, other):
    card = kernel.chip_card(0, bytes_per_s=20e6)
    with Source.open("quantis-pcie:0") as opened:
        opened.take(1000)
        card.unplug()
        wait_until(lambda: opened.status().transport_errors == 1)
        kernel.chip_card(0, serial=other)
        if not other:  # same address, and no serial number any more
            other = "0000:03:00.0"
        _, error = take_until_end(opened)
        assert f"where 2101ABC240M was there is now {other}, another card" in str(error)
        with pytest.raises(SourceError, match="another device now"):
            opened.reopen()


def test_another_card_in_another_place_is_not_ours(kernel, impatient):
    card = kernel.chip_card(0, bytes_per_s=20e6)
    kernel.chip_card(1, serial="2999ZZZ240M", pci="0000:05:00.0")
    with Source.open("quantis-pcie:0") as opened:
        opened.take(1000)
        card.unplug()
        _, error = take_until_end(opened)
        assert "waited 1 s for it" in str(error) and "is not there" in str(error)
    assert open_and_close("quantis-pcie:1") == "2999ZZZ240M"


def open_and_close(text):
    driver = open_driver(text)
    driver.close()
    return driver.serial


def test_a_card_without_serial_number_is_known_by_its_address(kernel):
    card = kernel.module_card(0)
    driver = open_driver("quantis-pcie:0")
    read(driver, 100)
    card.unplug()
    with pytest.raises(DeviceLost):
        read(driver, MiB)
    with pytest.raises(DeviceLost, match="is not there"):
        driver.reconnect(0.1)
    kernel.module_card(0, seed=SEED + 9)
    driver.reconnect(0.5)
    assert read(driver, 1000) == stream(SEED + 9, MODULE_START, 1000)
    driver.close()


def test_cards_that_cannot_be_told_apart_do_not_resume(kernel):
    card = kernel.module_card(0)
    kernel.module_card(1, pci="0000:05:00.0")
    driver = open_driver("quantis-pcie:0")
    read(driver, 100)
    card.unplug()
    with pytest.raises(DeviceLost):
        read(driver, MiB)
    with pytest.raises(SourceError, match="cannot be told apart") as caught:
        driver.reconnect(0.1)
    assert not isinstance(caught.value, DeviceLost)
    driver.close()


def test_a_card_that_comes_back_in_another_mode_or_with_a_dead_chip_does_not_resume(kernel):
    card = kernel.chip_card(0)
    driver = open_driver("quantis-pcie:0")
    read(driver, 100)
    card.unplug()
    with pytest.raises(DeviceLost):
        read(driver, 8 * MiB)
    again = kernel.chip_card(0, mask=0x7FF, status=0x7FF)
    with pytest.raises(DeviceLost, match="is there, but: .*11 failed"):
        driver.reconnect(0.1)
    again.unplug()
    kernel.chip_card(0, mode=1)
    with pytest.raises(SourceError, match="was put from mode RNG into SAMPLE") as caught:
        driver.reconnect(0.1)
    assert not isinstance(caught.value, DeviceLost)
    driver.close()


def test_a_driver_that_answers_eio_for_a_card_that_is_gone_has_lost_it(kernel):
    card = kernel.chip_card(0)
    driver = open_driver("quantis-pcie:0")
    read(driver, 100)
    card.forget()
    card.break_at(IO_ERROR)
    with pytest.raises(DeviceLost, match="is gone"):
        read(driver, 8 * MiB)
    driver.close()


# --- look-alikes ---


def look_alike(kernel, kind):
    node = kernel.root / "dev/qrandom0"
    if kind == "link":
        kernel.chip_card(1)
        node.symlink_to("qrandom1")
    elif kind == "pipe":
        os.mkfifo(node)
    elif kind == "daemon":
        kernel.foreign("qrandom0", "cuse")
    elif kind == "phone":
        kernel.foreign("qrandom0", "misc")
    elif kind == "class without card":
        kernel.foreign("qrandom0", "qrandom")
    elif kind == "no answers":
        kernel.pci_card("0000:04:00.0", 0x179A, 1)
        kernel.foreign("qrandom0", "qrandom")
    elif kind == "other major":
        kernel.module_card(1)
        kernel.foreign("qrandom0", "qrandom")
    elif kind == "unknown number":
        kernel.foreign("qrandom0", "cuse")
        (kernel.root / "sys/dev/char/235:0").unlink()


ALIKE = {
    "link": "it is a symbolic link",
    "pipe": "not a character device",
    "daemon": "under class cuse, not under",
    "phone": "under class misc",
    "class without card": "no card 179a:0001 is on the PCI bus",
    "no answers": r"does not answer .*requests 0 and 3 \(Inappropriate ioctl",
    "other major": "names 250 as the driver's major number, and the node's is 235",
    "unknown number": "under no class",
}


@pytest.mark.parametrize("kind", ALIKE)
def test_look_alikes_are_refused_and_never_listed(kernel, kind):
    look_alike(kernel, kind)
    with pytest.raises(SourceError, match=ALIKE[kind]):
        open_driver("quantis-pcie:0")
    found = examine("quantis-pcie:0")
    assert found[-1].verdict == "fail" and all(f.verdict != "fail" for f in found[:-1])
    states = {row.uri: row.state for row in attached()[0]}
    assert "proven" in states.get("quantis-pcie:0", "proven")


@pytest.mark.parametrize("kind", [k for k in ALIKE if k not in ("link", "pipe")])
def test_unproven_nodes_are_read_by_request_and_never_called_quantum(kernel, kind):
    look_alike(kernel, kind)
    with Source.open("quantis-pcie:0?unproven=1") as opened:
        opened.take(1000)
        status = opened.status()
    assert (status.kind, status.label) == ("simulated", "NOT QUANTUM (simulated)")
    assert status.name.startswith("unproven node /dev/qrandom0")
    assert status.device["proof"].startswith("none (unproven=1): ")
    assert verdicts("quantis-pcie:0?unproven=1")["proof"] == "note"


def test_a_link_to_a_real_card_is_followed_by_request_and_proven(kernel):
    look_alike(kernel, "link")
    driver = open_driver("quantis-pcie:0?unproven=1")
    assert (driver.kind, driver.serial) == ("quantum", "2101ABC240M")  # the proof is the descriptor's, not the name's
    driver.close()


def test_an_unproven_node_that_was_lost_is_not_taken_again(kernel, impatient):
    kernel.foreign("qrandom0")
    node = kernel.root / "dev/qrandom0"
    with Source.open("quantis-pcie:0?unproven=1") as opened:
        opened.take(1000)
        kernel._nodes[0].fault_at, kernel._nodes[0].fault = 0, GONE
        node.unlink()
        _, error = take_until_end(opened)
        assert "an unproven node cannot be told from another one" in str(error)


# --- others who use it ---


def test_a_second_process_is_refused_with_the_name_of_the_first(kernel):
    kernel.chip_card(0)
    says, opened = os.pipe()
    may_go, go = os.pipe()
    other = os.fork()
    if other == 0:
        os.close(go)
        open_driver("quantis-pcie:0")
        os.write(opened, b"open")
        os.read(may_go, 1)
        os._exit(0)
    try:
        assert os.read(says, 4) == b"open"
        with pytest.raises(SourceError, match=rf"/dev/qrandom0 is in use by .* \(pid {other}\)"):
            open_driver("quantis-pcie:0")
        assert f"(pid {other})" in attached()[0][0].state
        assert verdicts("quantis-pcie:0")["other process"] == "fail"
    finally:
        for fd in (go, may_go, says, opened):
            os.close(fd)
        os.waitpid(other, 0)
    open_driver("quantis-pcie:0").close()


def test_a_process_that_only_reads_along_is_a_note(kernel):
    kernel.chip_card(0)
    other = subprocess.Popen(["sleep", "60"], stdin=open(kernel.root / "dev/qrandom0", "rb"))  # noqa: SIM115
    try:
        found = {f.check: f for f in examine("quantis-pcie:0")}
        assert found["other process"].verdict == "note" and f"sleep (pid {other.pid})" in found["other process"].text
        assert list(found)[-1] == "modules"
    finally:
        other.kill()
        other.wait()


def test_a_forked_child_does_not_keep_the_card(kernel):
    kernel.chip_card(0)
    driver = open_driver("quantis-pcie:0")
    read(driver, 100)
    assert "forked from" in in_forked_child(lambda: driver.readinto(memoryview(bytearray(10)), 0.1))
    in_forked_child(driver.close)
    with pytest.raises(SourceError, match="in use by this process"):
        open_driver("quantis-pcie:0")
    assert len(read(driver, 100)) == 100
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        driver.close()
        open_driver("quantis-pcie:0").close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_without_permission_the_error_has_the_udev_rule(kernel):
    kernel.module_card(0)
    (kernel.root / "dev/qrandom0").chmod(0o600)
    if os.getuid() != 0:
        (kernel.root / "dev/qrandom0").chmod(0)

    def as_nobody():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        assert attached()[0][0].state == "no permission"
        assert verdicts("quantis-pcie:0") == {"card": "ok", "kernel driver": "ok", "node": "ok", "permission": "fail"}
        return open_driver("quantis-pcie:0")

    said = in_forked_child(as_nobody)
    assert "no permission; run `sudo everett doctor --install-udev`" in said and 'SUBSYSTEM=="qrandom"' in said


# --- the end ---


def test_close_twice_while_another_thread_reads(kernel):
    kernel.chip_card(0, bytes_per_s=1000)
    driver = open_driver("quantis-pcie:0")
    errors = []

    def reads():
        try:
            while True:
                driver.readinto(memoryview(bytearray(100)), 5.0)
        except SourceError as error:
            errors.append(error)

    thread = threading.Thread(target=reads)
    thread.start()
    time.sleep(0.1)
    driver.close()
    driver.close()
    thread.join(2.0)
    assert len(errors) == 1 and isinstance(errors[0], DeviceLost) and "was closed" in str(errors[0])
    for call in (lambda: driver.readinto(memoryview(bytearray(100)), 0.1), lambda: driver.reconnect(0.1)):
        with pytest.raises(DeviceLost, match="was closed"):
            call()
    kernel._nodes[0].bytes_per_s = 0  # lets the read return that the close had to leave behind


def test_nothing_is_left_after_many_openings(kernel):
    kernel.chip_card(0)
    with nothing_left():
        tasks = len(os.listdir("/proc/self/task"))
        for _ in range(200):
            driver = open_driver("quantis-pcie:0")
            while driver.readinto(memoryview(bytearray(100)), 1.0) == 0:
                pass
            driver.close()
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= tasks)


# --- the doctor ---


def test_the_doctor_finds_a_healthy_card(kernel):
    kernel.chip_card(0, mode=1)
    assert verdicts("quantis-pcie:") == dict.fromkeys(
        ("card", "kernel driver", "node", "permission", "other process", "proof", "firmware", "mode", "modules"), "ok"
    )


def test_the_doctor_stops_at_what_stands_in_the_way(kernel):
    assert verdicts("quantis-pcie:") == {"card": "fail"}
    kernel.pci_card("0000:03:00.0", 0x1E89, 3, "vfio-pci")
    last = examine("quantis-pcie:")[-1]
    assert (last.check, last.verdict) == ("kernel driver", "fail") and "quantis_chip_pcie" in last.next_step
    kernel.clear()
    card = kernel.chip_card(0)
    assert verdicts("quantis-pcie:7")["node"] == "fail"
    assert verdicts("quantis-pcie:")["mode"] == "note"
    card.state.status = 0x7FF
    last = examine("quantis-pcie:")[-1]
    assert (last.check, last.verdict) == ("modules", "fail") and "modules=0x7ff" in last.next_step
    assert examine("quantis-pcie:?modules=0x7ff")[-1].verdict == "ok"
    card.state.fault = HANG
