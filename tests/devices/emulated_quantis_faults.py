"""Emulated Quantis cards that fail, hang, or are unplugged; run by test_quantis_pcie.py."""

import errno
import os
import time

import pytest
from devices.emulated import CHIP_START, MODULE_START, SEED, KiB, MiB, read, segment
from devices.kernel_double import GONE, HANG, IO_ERROR, WELL, ZERO_READ, stream
from source_checks import RAW_PER_BLOCK, UNIT, blocks, cut, take_until_end, wait_until

from everett_cuda.drivers import DeviceLost, TransportError, attached, char_node, open_driver
from everett_cuda.errors import HealthAlarm, SourceError, Starved
from everett_cuda.source import Source

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
