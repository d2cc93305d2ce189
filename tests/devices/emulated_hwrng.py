"""What the hwrng and chaoskey drivers do with emulated devices; run by tests/test_hwrng.py in a preloaded process."""

import os
import subprocess
import threading
import time

import pytest
from devices.emulated import SEED, read, verdicts
from devices.kernel_double import GONE, HANG, IO_ERROR, WELL, stream
from processes import in_forked_child
from source_checks import RAW_PER_BLOCK, UNIT, blocks, cut, nothing_left, take_until_end, wait_until

from everett_cuda.drivers import DeviceLost, attached, char_node, open_driver
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError
from everett_cuda.source import Source

START = 64  # the first read, of 64 bytes, is thrown away


def row_of(scheme):
    return next((row for row in attached()[0] if row.uri.startswith(scheme)), None)


# --- hwrng: what is behind it ---


@pytest.mark.parametrize(
    "name, kind, what",
    [
        ("virtio_rng.0", "simulated", "the host's generator"),
        ("tpm-rng-0", "electronic", "a TPM"),
        ("smccc_trng", "electronic", "the CPU's firmware"),
        ("ChaosKey-hw-1.0-sw-1.6.7-00CAFE", "electronic", "a ChaosKey"),
        ("s2q000-rng", "electronic", "ID Quantique S2Q000"),
        ("s2q000-rng-2", "electronic", "does not know"),
        ("mtk-rng", "electronic", "does not know"),
    ],
)
def test_the_current_source_is_named_and_never_quantum_unasked(kernel, name, kind, what):
    kernel.hwrng(name, available=f"{name} other none")
    driver = open_driver("hwrng:?h=2")
    assert (driver.kind, driver.serial, driver.conditioned) == (kind, name, True)
    assert what in driver.name and str(driver.min_entropy) == "2 bits a byte (claimed by user)"
    assert driver.details == {
        "source": name, "available": f"{name} other", "chosen by": "the kernel",
        "quality": "1024 of 1024 (the kernel driver's claim)",
    }  # fmt: skip
    driver.close()
    assert driver.details["source at close"] == name
    row = row_of("hwrng")
    assert (row.uri, row.serial, row.kind, row.state) == ("hwrng:", name, kind, "ready")


@pytest.mark.parametrize("name", ["virtio_rng.0", "tpm-rng-0", "intel", "smccc_trng", "ChaosKey-1", "mtk-rng", "s2q000-x"])
def test_quantum_is_refused_where_it_is_not(kernel, name):
    kernel.hwrng(name)
    with pytest.raises(SourceError, match=f"quantum=1 was asked for, and the current source is {name} .*rng_current"):
        open_driver("hwrng:?quantum=1")
    assert verdicts("hwrng:?quantum=1")["kind"] == "fail"


def test_the_one_quantum_source_is_taken_by_request(kernel):
    kernel.hwrng("s2q000-rng")
    with Source.open("hwrng:?quantum=1") as opened:
        assert (opened.status().label, opened.status().serial) == ("quantum", "s2q000-rng")
    with pytest.raises(SourceError, match="no quantum device was found"):
        open_driver("auto")


@pytest.mark.parametrize("current", ["none", ""])
def test_without_a_current_source_the_error_says_what_there_is(kernel, current):
    kernel.hwrng("x", available="tpm-rng-0 none")
    kernel.set_current(current)
    with pytest.raises(SourceError, match=r"no hardware generator in use \(available: tpm-rng-0\)"):
        open_driver("hwrng:")
    assert row_of("hwrng") is None and verdicts("hwrng:") == {"source": "fail"}


def test_without_hardware_generators_at_all(kernel):
    with pytest.raises(SourceError, match=r"available: none\)"):
        open_driver("hwrng:")
    assert row_of("hwrng") is None
    with pytest.raises(BadParameter, match="has one node"):
        open_driver("hwrng:/dev/hwrng1")


def test_a_node_of_another_device_is_a_look_alike(kernel):
    kernel.hwrng("mtk-rng").state.minor = 8
    with pytest.raises(SourceError, match=r"not the kernel's hardware generator \(device 10:183\): it is a look-alike"):
        open_driver("hwrng:")
    os.rename(kernel.root / "dev/hwrng", kernel.root / "dev/hwrng-real")
    (kernel.root / "dev/hwrng").symlink_to("hwrng-real")
    with pytest.raises(SourceError, match="symbolic link"):
        open_driver("hwrng:")


# --- hwrng: bytes ---


def test_bits_are_the_hashes_of_the_devices_bytes(kernel):
    device = kernel.hwrng("mtk-rng")
    with Source.open("hwrng:") as opened:
        got = cut(opened.take(32_000, timeout_s=10))
        status = opened.status()
    assert got == blocks(stream(SEED, START, 200_000))[:1000]
    assert (status.label, status.health) == (
        "NOT QUANTUM (electronic)", "ok; total-failure only (device output is conditioned)",
    )  # fmt: skip
    assert (device.state.first_read, device.state.largest_read, device.state.zero_reads) == (64, 512, 0)


def test_a_slow_source_gives_what_it_has(kernel):
    kernel.hwrng("tpm-rng-0", bytes_per_s=4000.0)
    driver = open_driver("hwrng:")
    sizes = set()
    out = bytearray(1500)
    at = 0
    while at < 1024:
        n = driver.readinto(memoryview(out)[at:], 0.05)
        sizes.add(n)
        at += n
    assert sizes == {0, 512} and bytes(out[:at]) == stream(SEED, START, at)
    driver.close()


def test_a_change_of_source_is_refused_and_none_of_its_bytes_are_used(kernel):
    device = kernel.hwrng("mtk-rng", bytes_per_s=200_000.0)
    opened = Source.open("hwrng:")
    out = opened.take(3200, timeout_s=10)
    kernel.set_current("virtio_rng.0")  # another source's name ...
    device.state.seed = SEED + 50  # ... and its bytes, also those of a read that had begun before
    more, error = take_until_end(opened)
    assert "current source is virtio_rng.0 now, not mtk-rng" in str(error)
    got, ours = cut(out + more), blocks(stream(SEED, START, 4 << 20))
    assert got == ours[: len(got)]
    with pytest.raises(SourceError, match="another device now: virtio_rng.0, not mtk-rng"):
        opened.reopen()
    opened.close()
    assert opened.status().device["source at close"] == "virtio_rng.0"


def test_bytes_that_come_while_another_source_is_current_are_destroyed(kernel):
    device = kernel.hwrng("mtk-rng")
    driver = open_driver("hwrng:")
    read(driver, 64 * 512)
    device.break_at(HANG, device.state.offset + 100_000)
    read(driver, 90_000)
    buffer, got, errors = bytearray(1 << 20), [], []

    def reads():
        try:
            while True:  # what was read before the hang; then the one that waits for what comes after the change
                got.append(driver.readinto(memoryview(buffer), 5.0))
                buffer[:] = bytes(len(buffer))
        except SourceError as error:
            errors.append(error)

    thread = threading.Thread(target=reads)
    thread.start()
    time.sleep(0.2)  # it waits inside a readinto
    before = len(got)
    kernel.set_current("virtio_rng.0")
    device.state.fault = WELL
    thread.join(5.0)
    assert "virtio_rng.0 now, not mtk-rng" in str(errors)
    assert len(got) == before and buffer == bytes(len(buffer))
    driver.close()


def test_a_source_that_is_taken_away_is_waited_for(kernel):
    device = kernel.hwrng("ChaosKey-1", bytes_per_s=200_000.0)
    with Source.open("hwrng:") as opened:
        opened.take(320, timeout_s=10)
        kernel.set_current("none")
        wait_until(lambda: opened.status().transport_errors == 1)
        time.sleep(0.2)
        kernel.set_current("ChaosKey-1")
        before = opened.status().raw_bytes_in
        wait_until(lambda: opened.status().raw_bytes_in > before + 8192)
        assert opened.status().state == "flowing" and opened.status().alarms == ()
        # Gone, and the kernel turns to another one by itself.
        kernel.set_current("none")
        device.break_at(GONE)
        wait_until(lambda: opened.status().transport_errors >= 2)
        kernel.set_current("tpm-rng-0")
        _, error = take_until_end(opened)
        assert "current source is tpm-rng-0 now, not ChaosKey-1" in str(error)


def test_failed_reads_and_long_stalls(kernel, impatient):
    device = kernel.hwrng("mtk-rng", bytes_per_s=200_000.0)
    with Source.open("hwrng:") as opened:
        device.break_at(IO_ERROR, times=1)
        wait_until(lambda: opened.status().transport_errors == 1)
        opened.take(3200, timeout_s=10)
        device.break_at(HANG)
        start = time.monotonic()
        _, error = take_until_end(opened)
        assert "gave no bytes for 1 s" in str(error) and time.monotonic() - start < 3
        device.state.fault = WELL


@pytest.mark.parametrize("fault", ["stuck_at", "biased_at"])
def test_total_failure_alarms_and_neither_its_unit_nor_the_one_before_comes_out(kernel, fault):
    kernel.hwrng("mtk-rng", **{fault: START + 300_000})
    with Source.open("hwrng:") as opened:
        out, error = take_until_end(opened)
        alarms = opened.status().alarms
    assert isinstance(error, HealthAlarm) and alarms[0].offset >= 300_000
    got = cut(out)
    assert got == blocks(stream(SEED, START, 300_000))[: len(got)]
    assert len(got) * RAW_PER_BLOCK <= (alarms[0].offset // UNIT - 1) * UNIT


def test_a_second_opening_is_refused_and_rngd_is_a_note(kernel):
    kernel.hwrng("mtk-rng")
    driver = open_driver("hwrng:")
    said = in_forked_child(lambda: open_driver("hwrng:"))
    assert f"/dev/hwrng is in use by " in said and f"(pid {os.getpid()})" in said  # noqa: F541
    driver.close()
    rngd = subprocess.Popen(["sleep", "60"], stdin=open(kernel.root / "dev/hwrng", "rb"))  # noqa: SIM115
    try:
        assert verdicts("hwrng:") == {
            "source": "ok", "node": "ok", "permission": "ok", "other process": "note", "kernel thread": "note",
        }  # fmt: skip
        assert row_of("hwrng").state == f"in use by sleep (pid {rngd.pid})"
    finally:
        rngd.kill()
        rngd.wait()
    assert verdicts("hwrng:")["other process"] == "ok"


def test_without_permission_the_error_has_the_udev_rule(kernel):
    kernel.hwrng("mtk-rng")
    kernel.chaoskey(0)
    for name in ("hwrng", "chaoskey0"):
        (kernel.root / "dev" / name).chmod(0o600 if os.getuid() == 0 else 0)

    def as_nobody():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        assert {row.state for row in attached()[0]} == {"no permission"}
        said = []
        for text in ("hwrng:", "chaoskey:"):
            assert verdicts(text)["permission"] == "fail"
            try:
                open_driver(text)
            except SourceError as error:
                said.append(str(error))
        return said

    said = in_forked_child(as_nobody)
    assert said.count("no permission; run") == 2 and 'KERNEL=="hw_random"' in said and '=="1d50"' in said


def test_nothing_is_left_after_many_openings(kernel):
    kernel.hwrng("mtk-rng")
    kernel.chaoskey(0)
    with nothing_left():
        for _ in range(100):
            for text in ("hwrng:", "chaoskey:"):
                driver = open_driver(text)
                read(driver, 100)
                driver.close()
                driver.close()


# --- chaoskey ---


def test_keys_are_listed_chosen_and_read(kernel):
    kernel.chaoskey(0, "00CAFE")
    kernel.chaoskey(1, "ALEA1", ids=(0x12D8, 0x0001))
    kernel.chaoskey(2, "X", ids=(0x1234, 0x5678))  # another driver's device of that name
    rows = [row for row in attached()[0] if row.uri.startswith("chaoskey")]
    assert [(r.uri, r.name, r.kind, r.rate_bytes_per_s, r.state) for r in rows] == [
        ("chaoskey:00CAFE", "ChaosKey", "electronic", 1.25e6, "ready"),
        ("chaoskey:ALEA1", "Araneus Alea", "electronic", 12_500.0, "ready"),
    ]
    for rest, serial in (("00CAFE", "00CAFE"), ("/dev/chaoskey1", "ALEA1")):
        driver = open_driver(f"chaoskey:{rest}")
        assert (driver.serial, driver.kind, driver.conditioned) == (serial, "electronic", True)
        assert read(driver, 2000) == stream(SEED, START, 2000)
        driver.close()
    with pytest.raises(SourceError, match="2 are there; name one of chaoskey:00CAFE, chaoskey:ALEA1"):
        open_driver("chaoskey:")
    for rest in ("/dev/chaoskey2", "NONE", "/dev/qrandom0"):
        with pytest.raises(SourceError, match="no such ChaosKey"):
            open_driver(f"chaoskey:{rest}")
    assert verdicts("chaoskey:00CAFE") == {"device": "ok", "node": "ok", "permission": "ok", "other process": "ok"}
    assert verdicts("chaoskey:") == {"device": "fail"}


def test_a_node_that_is_not_its_keys_is_a_look_alike(kernel):
    kernel.chaoskey(0).state.minor = 5
    with pytest.raises(SourceError, match="/dev/chaoskey0 is a look-alike"):
        open_driver("chaoskey:")


def test_where_there_is_hwrng_only_it_is_read_as_long_as_a_chaoskey_is_behind_it(kernel):
    kernel.hwrng("ChaosKey-hw-1.0-00CAFE")
    driver = open_driver("chaoskey:?h=3")
    assert driver.scheme == "hwrng" and driver.kind == "electronic" and float(driver.min_entropy.bits_per_byte) == 3
    assert read(driver, 1000) == stream(SEED, START, 1000)
    kernel.set_current("tpm-rng-0")
    with pytest.raises(SourceError, match="tpm-rng-0 now"):
        read(driver, 1 << 20)
    driver.close()
    with pytest.raises(SourceError, match="no such ChaosKey"):
        open_driver("chaoskey:")


def test_an_unplugged_key_resumes_under_another_number(kernel):
    key = kernel.chaoskey(0, bytes_per_s=1e6)
    with Source.open("chaoskey:") as opened:
        out = opened.take(3200, timeout_s=10)
        key.unplug()
        wait_until(lambda: opened.status().transport_errors == 1)
        kernel.chaoskey(4, seed=SEED + 100)
        out += opened.take(640_000, timeout_s=20)
        assert opened.status().device == {"node": "/dev/chaoskey4"} and opened.status().alarms == ()
    got, old, new = cut(out), blocks(stream(SEED, START, 4 << 20)), blocks(stream(SEED + 100, START, 4 << 20))
    k = next(i for i, block in enumerate(got) if block not in old)
    assert got[:k] == old[:k] and got[k:] == new[: len(got) - k]


def test_another_key_in_its_place_is_refused_by_name(kernel, impatient):
    key = kernel.chaoskey(0, bytes_per_s=1e6)
    with Source.open("chaoskey:") as opened:
        key.unplug()
        wait_until(lambda: opened.status().transport_errors == 1)
        kernel.chaoskey(0, "00BEEF")
        _, error = take_until_end(opened)
        assert "where 00CAFE was there is now 00BEEF, another device" in str(error)


def test_keys_that_cannot_be_told_apart_or_stay_away_do_not_resume(kernel, monkeypatch):
    monkeypatch.setattr(char_node, "LOOK_EVERY_S", 0.01)
    for serial, error, words in (("", SourceError, "without serial number"), ("00CAFE", DeviceLost, "is not there")):
        key = kernel.chaoskey(0, serial)
        driver = open_driver("chaoskey:")
        read(driver, 100)
        key.unplug()
        with pytest.raises(DeviceLost):
            read(driver, 1 << 20)
        with pytest.raises(error, match=words) as caught:
            driver.reconnect(0.1)
        assert type(caught.value) is error
        driver.close()
