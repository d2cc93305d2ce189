"""Drivers: URIs, the registry, recordings, and the simulated device with its faults."""

import importlib.metadata
import os
import time
from fractions import Fraction

import numpy as np
import pytest

from everett_cuda import drivers
from everett_cuda.drivers import Attached, DeviceLost, Driver, EndOfRecording, TransportError, open_driver, parse_uri, uri
from everett_cuda.drivers.sim import FIFO_BYTES, SimulatedDriver
from everett_cuda.errors import BadParameter, SourceError, SourceExhausted, UnknownScheme


def read(driver, n, timeout_s=1.0):
    """Exactly n bytes by as many reads as it takes."""
    out = bytearray(n)
    at = 0
    while at < n:
        got = driver.readinto(memoryview(out)[at:], timeout_s)
        assert 0 <= got <= n - at
        at += got
    return bytes(out)


# --- URIs ---


@pytest.mark.parametrize(
    "text, scheme, rest, given",
    [
        ("replay:/a/b.bin", "replay", "/a/b.bin", {}),
        ("replay:/a b/c%3Fd.bin?loop=1&h=6.5", "replay", "/a b/c?d.bin", {"loop": "1", "h": "6.5"}),
        ("sim:seed=7,fault=stuck@1MiB+slow@2MiB", "sim", "", {"seed": "7", "fault": "stuck@1MiB+slow@2MiB"}),
        ("sim:seed=7?h=8", "sim", "", {"seed": "7", "h": "8"}),
        ("sim:", "sim", "", {}),
        ("quantis-usb:A1B2", "quantis-usb", "A1B2", {}),
        ("auto", "auto", "", {}),
        ("auto:?h=4", "auto", "", {"h": "4"}),
        ("replay:./seed=7.bin", "replay", "./seed=7.bin", {}),
    ],
)
def test_uris_are_cut_into_their_parts(text, scheme, rest, given):
    parsed = uri.parse_uri(text)
    assert (parsed.text, parsed.scheme, parsed.rest, parsed.given) == (text, scheme, rest, given)


@pytest.mark.parametrize(
    "text",
    ["", "replay", "/dev/qrandom0", "Replay:x", "replay:x?loop", "replay:x?=1", "replay:x?h=", "replay:x?h=1&h=2",
     "sim:seed=1,,rate=1B/s", "replay:x?&"],
)  # fmt: skip
def test_malformed_uris_are_refused(text):
    with pytest.raises(BadParameter):
        uri.parse_uri(text)
    with pytest.raises(TypeError, match="named by a string"):
        uri.parse_uri(7)


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (uri.parse_size, {"0": 0, "4096": 4096, "1MiB": 1 << 20, "2kB": 2000}, ["", "-1", "1.5MiB", "1 MiB", "1XB"]),
        (uri.parse_rate, {"4Mbit/s": 5e5, "0.5MB/s": 5e5, "8bit/s": 1.0}, ["4", "4Mbit", "0B/s", "-1B/s", "1e3B/s"]),
        (uri.parse_flag, {"1": True, "0": False}, ["yes", "", "2"]),
        (uri.parse_count, {"0": 0, "18": 18}, ["-1", "1.0", "x", "9" * 20]),
        (uri.parse_min_entropy, {"4": 4, "7.1": Fraction(71, 10), "8.0": 8}, ["0", "8.1", "-1", "nan", "1e0", "4/1"]),
        (uri.parse_condition, {"none": "none", "sha256": "sha256"}, ["", "md5"]),
    ],
)
def test_parameter_values(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value
    for text in bad:
        with pytest.raises(ValueError):
            parse(text)


def test_unknown_and_malformed_parameters_are_named():
    with pytest.raises(BadParameter, match=r"unknown parameter 'lop' .* condition, h, hash, loop"):
        open_driver("replay:/x?lop=1")
    with pytest.raises(BadParameter, match=r"loop=yes .* malformed: it must be 1 or 0"):
        open_driver("replay:/x?loop=yes")
    with pytest.raises(BadParameter, match="h=9"):
        open_driver("sim:seed=1,h=9")
    with pytest.raises(BadParameter, match="takes parameters only"):
        open_driver("sim:fast")
    for fault in ("stuck", "broken@1", "stuck@", "stuck@x", "duplicate@100", "duplicate@0"):
        with pytest.raises(BadParameter, match="fault="):
            open_driver(f"sim:fault={fault}")


# --- registry ---


def test_unknown_scheme_lists_what_is_installed():
    with pytest.raises(UnknownScheme, match="no driver for quantis: .* replay:, sim:, .*and auto"):
        open_driver("quantis:1")


def test_auto_never_takes_a_recording_or_a_simulation():
    with pytest.raises(SourceError, match="(?s)auto: no quantum device was found; looked for.*replay:FILE.*sim:seed=7"):
        open_driver("auto")
    for scheme in ("replay", "sim"):
        assert drivers.driver_of(parse_uri(f"{scheme}:")).attached() == []


class Beacon(Driver):
    """A device of another package."""

    scheme = "beacon"
    looks_for = "a lamp on the roof"
    kind = "quantum"
    name = "beacon"
    present: list[str] = []

    def __init__(self, parsed):
        self.parsed = parsed
        parsed.parameters(self.parameters)

    open = classmethod(lambda cls, parsed: cls(parsed))
    attached = classmethod(lambda cls: [Attached(uri, "beacon", "7", cls.kind, None) for uri in cls.present])

    def readinto(self, buffer, timeout_s):
        raise DeviceLost("dark")

    def close(self):
        pass


class Dim(Beacon):
    kind = "electronic"


@pytest.fixture
def beacon(monkeypatch):
    entry = importlib.metadata.EntryPoint("beacon", f"{__name__}:Beacon", drivers.GROUP)
    broken = importlib.metadata.EntryPoint("broken", "no_such_module:X", drivers.GROUP)
    stranger = importlib.metadata.EntryPoint("stranger", "os:path", drivers.GROUP)
    thief = importlib.metadata.EntryPoint("sim", f"{__name__}:Beacon", drivers.GROUP)
    monkeypatch.setattr(drivers, "entry_points", lambda group: [entry, broken, stranger, thief])
    monkeypatch.setattr(Beacon, "present", [])
    return Beacon


def test_drivers_of_other_packages_are_found_by_entry_point(beacon):
    assert open_driver("beacon:north").parsed.rest == "north"
    assert isinstance(open_driver("sim:seed=1"), SimulatedDriver)  # a built-in scheme stays built in
    with pytest.raises(SourceError, match="broken: .*cannot be imported"):
        open_driver("broken:")
    with pytest.raises(SourceError, match="not a subclass"):
        open_driver("stranger:")


def test_auto_takes_a_real_device_and_passes_its_parameters_on(beacon, monkeypatch):
    with pytest.raises(SourceError, match="(?s)beacon: a lamp on the roof.*broken: not looked for"):
        open_driver("auto")
    beacon.present[:] = ["beacon:south"]
    assert open_driver("auto:?h=6").parsed.text == "beacon:south?h=6"
    monkeypatch.setattr(beacon, "kind", "electronic")
    with pytest.raises(SourceError, match="(?s)no quantum device was found; looked for.*a lamp on the roof"):
        open_driver("auto")


def test_auto_goes_on_to_the_next_device_and_names_those_that_failed(beacon):
    beacon.present[:] = ["beacon:?x=1", "beacon:west"]
    assert open_driver("auto").parsed.text == "beacon:west"
    beacon.present[:] = ["beacon:?x=1"]
    with pytest.raises(SourceError, match=r"(?s)none of the quantum devices .*beacon:\?x=1: unknown parameter 'x'"):
        open_driver("auto")


def test_a_device_that_turns_out_not_to_be_quantum_is_not_taken_by_auto(beacon, monkeypatch):
    beacon.present[:] = ["beacon:south"]
    monkeypatch.setattr(beacon, "open", classmethod(lambda cls, parsed: Dim(parsed)))
    with pytest.raises(SourceError, match="it is electronic, not quantum"):
        open_driver("auto")


# --- recordings ---


def test_replay_reads_a_file_once(tmp_path):
    path, data = tmp_path / "r.bin", os.urandom(100_000)
    path.write_bytes(data)
    driver = open_driver(f"replay:{path}")
    assert (driver.kind, driver.loop, str(driver.min_entropy)) == ("recorded", False, "4 bits a byte (assumed)")
    assert read(driver, 100_000) == data
    for _ in range(2):
        with pytest.raises(EndOfRecording):
            driver.readinto(memoryview(bytearray(10)), 1.0)
    driver.close()
    driver.close()
    with pytest.raises(SourceError, match="reading .* failed"):
        driver.readinto(memoryview(bytearray(10)), 1.0)


def test_replay_loops_only_by_request_and_counts(tmp_path):
    path, data = tmp_path / "r.bin", os.urandom(1000)
    path.write_bytes(data)
    driver = open_driver(f"replay:{path}?loop=1&h=7.5")
    assert driver.loop and str(driver.min_entropy) == "7.5 bits a byte (claimed by user)"
    buffer = bytearray(700)
    assert [driver.readinto(memoryview(buffer), 1.0) for _ in range(5)] == [700, 300, 700, 300, 700]
    assert driver.passes == 2 and bytes(buffer) == data[:700]
    driver.close()


def test_replay_refuses_what_is_no_recording(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for rest, message, error in (
        (tmp_path / "missing", "No such file", SourceError),
        (tmp_path, "Is a directory", SourceError),
        ("/dev/urandom", "not a regular file", SourceError),
        (tmp_path / "pipe", "not a regular file", SourceError),
        (tmp_path / "empty", "is empty: 0 bytes used", SourceExhausted),
        ("", "names no file", SourceError),
    ):
        with pytest.raises(error, match=message):
            open_driver(f"replay:{rest}")


# --- the simulated device ---


def test_sim_is_a_function_of_seed_and_offset():
    whole = read(open_driver("sim:seed=7"), 300_000)
    driver, rng, at = open_driver("sim:seed=7"), np.random.default_rng(1), 0
    while at < 250_000:
        n = int(rng.integers(1, 9000))
        assert read(driver, n) == whole[at : at + n]
        at += n
    assert read(open_driver("sim:seed=8"), 1000) != whole[:1000]
    # Philox4x64 with key 7 and counters 1, 2, ...: the same bytes from numpy's own sequence.
    assert np.random.Philox(key=7).random_raw(300_000 // 8).tobytes() == whole
    assert open_driver("sim:seed=7").kind == "simulated"


@pytest.mark.parametrize("cut", [1000, 4096, 100_000])
def test_sim_faults_begin_at_their_byte(cut):
    good = read(open_driver("sim:seed=3"), 200_000)

    def faulty(fault):
        driver, out = open_driver(f"sim:seed=3,fault={fault}"), b""
        while len(out) < 200_000:
            out += read(driver, min(cut, 200_000 - len(out)))
        return out

    assert faulty("stuck@100001") == good[:100_001] + bytes(99_999)
    assert faulty("duplicate@102400") == good[:102_400] + good[101_888:102_400] + good[102_912:]
    biased = faulty("biased@100001")
    assert biased[:100_001] == good[:100_001]
    ones = np.unpackbits(np.frombuffer(biased[100_001:], dtype=np.uint8)).mean()
    assert abs(ones - 1 / 8) < 0.005


def test_sim_unplugs_at_exactly_its_byte():
    driver = open_driver("sim:seed=3,fault=unplug@70001")
    assert read(driver, 70_001) == read(open_driver("sim:seed=3"), 70_001)
    for _ in range(2):
        with pytest.raises(DeviceLost, match="at byte 70001"):
            driver.readinto(memoryview(bytearray(10)), 1.0)
    with pytest.raises(SourceError, match="open the source anew"):
        driver.reconnect(1.0)


def test_sim_short_reads_lose_one_transfer_each():
    good = read(open_driver("sim:seed=3"), 10_000)
    driver = open_driver("sim:seed=3,fault=short@1000+short@3000")
    assert read(driver, 1000) == good[:1000]
    with pytest.raises(TransportError, match="short read at byte 1000, 512 bytes lost") as caught:
        driver.readinto(memoryview(bytearray(10)), 1.0)
    assert not isinstance(caught.value, DeviceLost)
    assert read(driver, 3000 - 1512) == good[1512:3000]
    with pytest.raises(TransportError, match="byte 3000"):
        driver.readinto(memoryview(bytearray(10)), 1.0)
    assert read(driver, 1000) == good[3512:4512]


def test_sim_paces_its_bytes():
    driver = open_driver("sim:rate=1MB/s")
    start = time.monotonic()
    read(driver, 100_000)
    assert time.monotonic() - start >= 0.095  # never faster than its rate
    time.sleep(0.2)  # a late reader finds a full buffer, not the 200,000 bytes that could have been made
    assert driver.readinto(memoryview(bytearray(1_000_000)), 0.0) <= FIFO_BYTES


def test_sim_slows_down_at_its_byte_and_answers_within_the_timeout():
    driver = open_driver("sim:fault=slow@10000")
    read(driver, 10_000)
    start = time.monotonic()
    assert driver.readinto(memoryview(bytearray(100_000)), 0.05) <= 2000 * (time.monotonic() - start) + 1
    read(driver, 200)
    assert time.monotonic() - start >= 0.1
    driver.close()
    with pytest.raises(DeviceLost, match="closed"):
        driver.readinto(memoryview(bytearray(10)), 1.0)
