"""Emulated Quantis cards: found and named, what they say, bytes, modules, modes and flags; run by test_quantis_pcie.py."""

import time

import pytest
from devices.emulated import CHIP_SAMPLE_START, CHIP_START, MODULE_START, SEED, KiB, MiB, read, segment
from devices.kernel_double import stream
from source_checks import RAW_PER_BLOCK, cut, take_until_end, wait_until

from everett_cuda.drivers import DeviceFault, attached, open_driver
from everett_cuda.errors import HealthAlarm, SourceError
from everett_cuda.source import Source

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
        assert opened.status().device["modules"] == "0 to 3 work"


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


def test_an_ais31_flag_that_stays_set_does_not_stop_the_flow(kernel):
    card = kernel.module_card(0, serial="M1", ais31=2)
    with Source.open("quantis-pcie:0") as opened:
        opened.take(64 * KiB, timeout_s=10)
        assert opened.status().device["AIS-31 start-up test"] == "passed, but the card's flag stays set"
        assert opened.status().transport_errors == 0 and card.state.requests[11] == 1
