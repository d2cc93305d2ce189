"""`everett doctor`: what it finds on good devices, bad ones, missing ones, recordings and simulations."""

import json
import random

import numpy as np
import pytest
import sidecars
from commands import everett

from everett_cuda.cli import examination, tap
from everett_cuda.drivers import open_driver
from everett_cuda.entropy_estimate import estimate
from everett_cuda.source import Source

FIELDS = {
    "uri", "name", "serial", "kind", "label", "device", "findings", "rate_bytes_per_s", "nominal_rate_bytes_per_s",
    "raw_bytes_tested", "alarms", "transport_errors", "min_entropy", "verdict", "next_step", "exit_code",
}  # fmt: skip

SAMPLES = 12_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Samples for which the estimators take half a second, not ten; slow devices are waited for 1 s, not 10."""
    monkeypatch.setattr(tap, "SAMPLES", SAMPLES)
    monkeypatch.setattr(examination, "COLLECT_S", 1.0)


def doctor(*arguments):
    """(the JSON report, findings by what was looked at)."""
    result = everett("doctor", *arguments, "--json", "--seconds", "0.2")
    report = json.loads(result.stdout)
    assert set(report) == FIELDS and report["exit_code"] == result.exit_code
    return report, {f["check"]: f for f in report["findings"]}


def recording(path, data: bytes) -> str:
    path.write_bytes(data)
    return f"replay:{path}"


# --- devices ---


def test_a_good_device_is_usable(roof):
    roof.put({"serial": "7"})
    report, found = doctor("lamp:7")
    assert [f["check"] for f in report["findings"]] == [
        "found", "permission", "opens", "kind", "firmware", "mode", "start-up test", "rate", "health tests", "min-entropy",
    ]  # fmt: skip
    assert {f["verdict"] for f in report["findings"]} == {"ok"}
    assert (report["verdict"], report["exit_code"], report["label"]) == ("usable", 0, "quantum")
    assert report["next_step"] == 'ev.open("lamp:7"), or EVERETT_SOURCE=lamp:7'
    assert report["device"] == {"firmware": "1.7", "mode": "raw"}
    assert report["nominal_rate_bytes_per_s"] == 1e6 and report["rate_bytes_per_s"] > 0
    entropy = report["min_entropy"]
    assert entropy["samples"] == SAMPLES and entropy["claimed"] == entropy["assessed"] == 4 < entropy["estimated"]
    assert [line.split()[0] for line in roof.log()] == ["opened", "closed"]  # opened once, given back


def test_the_estimates_are_of_the_first_raw_bytes(roof):
    roof.put({"serial": "7"})
    report, _ = doctor("lamp:7")
    twister = random.Random("7")
    raw = np.frombuffer(b"".join(twister.randbytes(4096) for _ in range(8))[:SAMPLES], dtype=np.uint8)
    want = estimate(raw)
    got = report["min_entropy"]
    assert got["estimated"] == want.min_entropy
    assert got["estimates"]["lag, bytes"] == want.symbols["lag"]
    assert got["estimates"]["markov, bits"] == 8 * want.bits["markov"]


def test_bytes_that_a_tap_saw_are_destroyed(monkeypatch):
    sample = tap.Sample()
    with Source("sim:seed=7", lambda: tap.Tap(open_driver("sim:seed=7"), sample)) as source:
        while not sample.full:
            assert source.ring.discard(1 << 16, 1.0)
    assert bytes(sample.raw) == open_driver("sim:seed=7").bytes_at(0, SAMPLES).tobytes()
    assert source.ring.all_zero()
    sample.destroy()
    assert bytes(sample.raw) == bytes(SAMPLES)


def test_bits_of_devices_that_make_the_low_bit_first_are_estimated_in_that_order(tmp_path):
    data = np.random.default_rng(1).bytes(11_000)
    report, _ = doctor(f"replay:{sidecars.recording(tmp_path / 'r.bin', data, bit_order='lsb_first')}")
    turned = np.packbits(np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little"))
    want, other = estimate(turned).bits["collision"], estimate(np.frombuffer(data, dtype=np.uint8)).bits["collision"]
    assert report["min_entropy"]["estimates"]["collision, bits"] == 8 * want != 8 * other


@pytest.mark.parametrize(
    "lamp, uri, code, check, said",
    [
        (None, "lamp:7", 3, "found", "no lamp 7"),
        ({"serial": "8"}, "lamp:7", 3, "found", "no lamp 7"),
        ({"serial": "7", "state": "in use by rngd (pid 71)"}, "lamp:7", 1, "permission", "rngd (pid 71)"),
        ({"serial": "7", "trouble": "stuck"}, "lamp:7", 4, "start-up test", "repetition count (bits)"),
        ({"serial": "7", "trouble": "stuck", "at": 20_000}, "lamp:7", 4, "health tests", "repetition count (bits)"),
        ({"serial": "7", "trouble": "fault"}, "lamp:7", 4, "start-up test", "device status 0x2 instead of 0x3"),
        ({"serial": "7", "trouble": "fault", "at": 20_000}, "lamp:7", 4, "health tests", "device status"),
        ({"serial": "7", "trouble": "lost"}, "lamp:7", 1, "opens", "fell off the roof"),
        ({"serial": "7", "trouble": "lost", "at": 20_000}, "lamp:7", 1, "flow", "fell off the roof"),
    ],
)
def test_what_stands_in_the_way_is_named(roof, lamp, uri, code, check, said):
    roof.put(*([lamp] if lamp else []))
    report, found = doctor(uri)
    bad = [f for f in report["findings"] if f["verdict"] == "fail"]
    assert [f["check"] for f in bad] == [check] and said in bad[0]["text"]
    assert report["exit_code"] == code and report["verdict"].startswith(str(examination.VERDICTS[code]))
    assert report["min_entropy"]["estimates"] is None  # no verdict on bytes of a device that cannot be used
    opened = [line.split()[0] for line in roof.log()]
    assert opened == ([] if check in ("found", "permission") else ["opened", "closed"])


def test_a_device_that_goes_silent_is_noticed_at_the_rate(roof):
    roof.put({"serial": "7", "trouble": "silent", "at": 5000})
    report, found = doctor("lamp:7")
    assert found["rate"]["verdict"] == "fail" and report["exit_code"] == 1


def test_lost_transfers_and_slowness_are_notes(roof):
    roof.put({"serial": "7", "trouble": "short", "at": 16384})
    report, found = doctor("lamp:7")
    assert report["transport_errors"] == 1 and found["transport"]["verdict"] == "note" and report["exit_code"] == 0


def test_a_device_that_conditions_is_told_what_that_means(roof):
    roof.put({"serial": "7", "conditioned": True})
    assert doctor("lamp:7")[1]["conditioning"]["verdict"] == "note"


def test_auto_takes_the_first_quantum_device_that_is_ready(roof):
    roof.put(
        {"serial": "5", "kind": "electronic"}, {"serial": "6", "state": "no permission"}, {"serial": "7"}, {"serial": "8"}
    )
    report, found = doctor()
    assert report["uri"] == "lamp:7" and "2 more" in found["auto"]["text"] and report["exit_code"] == 0
    roof.put({"serial": "5", "kind": "electronic", "name": "hot lamp"})
    report, found = doctor("auto")
    assert report["exit_code"] == 3 and "lamp: lamps on the roof" in found["source"]["text"]
    assert "lamp:5: hot lamp, electronic" in found["source"]["text"]


def test_a_source_that_costs_money_is_read_as_little_as_can_be(roof):
    roof.put({"serial": "7"})
    report, found = doctor("paidlamp:7")
    assert report["exit_code"] == 0 and report["rate_bytes_per_s"] is None
    assert "rate" not in found and "1,024" in found["start-up test"]["text"]
    assert int(roof.log()[-1].split()[2]) <= 65536


# --- what is not a device ---


def test_a_simulation_is_usable_and_never_called_quantum():
    result = everett("doctor", "sim:seed=7", "--seconds", "0.2")
    assert result.exit_code == 0
    assert "verdict: usable, NOT QUANTUM (simulated)" in result.stdout
    assert "note kind            NOT QUANTUM (simulated)" in result.stdout


def test_a_slow_source_is_estimated_from_what_came_in_time(monkeypatch):
    monkeypatch.setattr(tap, "SAMPLES", 1_000_000)
    report, found = doctor("sim:seed=7,rate=100kbit/s")
    samples = report["min_entropy"]["samples"]
    assert 10_000 < samples < 1_000_000
    assert f"from {samples:,} raw bytes" in found["min-entropy"]["text"]
    assert "asks for 1,000,000" in found["min-entropy"]["text"]


def test_a_recording_is_examined_to_its_end(tmp_path, shared_data):
    report, found = doctor(f"replay:{shared_data / 'quantum' / 'ibm-fez-raw-48kB.bin'}")
    assert report["exit_code"] == 0 and report["label"] == "NOT QUANTUM NOW (recorded)"
    assert found["recording"]["text"] == "48,000 bytes" and found["sidecar"]["verdict"] == "note"
    assert report["raw_bytes_tested"] == 48_000


def test_too_few_bytes_are_not_estimated(tmp_path):
    report, found = doctor(recording(tmp_path / "r.bin", random.Random(1).randbytes(9_000)))
    assert found["min-entropy"]["verdict"] == "note" and "too few" in found["min-entropy"]["text"]
    assert report["min_entropy"]["estimated"] is None is report["min_entropy"]["assessed"]
    report, found = doctor(recording(tmp_path / "r.bin", random.Random(1).randbytes(4_000)))
    assert report["exit_code"] == 1 and "4000 bytes used" in found["opens"]["text"]


# --- claims ---


@pytest.fixture
def three_and_a_half_bits(tmp_path):
    """Bytes that take 12 values: log2(12) = 3.58 bits, under the assumed 4, and good enough for every health test."""
    values = np.array([0x0F, 0x17, 0x1B, 0x27, 0x33, 0x39, 0x4D, 0x56, 0x6A, 0x8E, 0xB4, 0xD8], dtype=np.uint8)
    data = values[np.random.default_rng(5).integers(0, 12, 40_000)]
    return recording(tmp_path / "r.bin", data.tobytes())


def test_an_estimate_lowers_a_claim_that_does_not_hold(three_and_a_half_bits):
    report, found = doctor(three_and_a_half_bits)
    entropy = report["min_entropy"]
    assert entropy["claimed"] == 4 and 1.5 < entropy["estimated"] < 3.58 and entropy["assessed"] == entropy["estimated"]
    assert report["exit_code"] == 1 and found["min-entropy"]["verdict"] == "fail"
    assert "does not hold" in found["min-entropy"]["text"]
    h = report["next_step"].removeprefix("open it with h=")
    assert 0 <= entropy["estimated"] - float(h) < 0.0101  # rounded down, not up


def test_an_estimate_never_raises_a_claim(three_and_a_half_bits):
    report, found = doctor(three_and_a_half_bits + "?h=2")
    assert report["min_entropy"]["assessed"] == 2 < report["min_entropy"]["estimated"]
    assert report["exit_code"] == 0 and found["min-entropy"]["verdict"] == "ok"


def test_a_claim_above_what_perfect_bytes_reach_is_lowered_with_a_note(tmp_path):
    report, found = doctor(recording(tmp_path / "r.bin", np.random.default_rng(3).bytes(40_000)) + "?h=8")
    assert report["min_entropy"]["assessed"] == report["min_entropy"]["estimated"] < 8
    assert report["exit_code"] == 0 and found["min-entropy"]["verdict"] == "note"


@pytest.mark.parametrize("n, least", examination.PERFECT[3:])
def test_perfect_bytes_are_estimated_above_the_committed_level(n, least):
    assert estimate(np.frombuffer(np.random.default_rng(99).bytes(n), dtype=np.uint8)).min_entropy > least


# --- words ---


def test_the_report_in_words(roof):
    roof.put({"serial": "7", "state": "no permission"})
    result = everett("doctor", "lamp:7")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "ok   found           7",
        "fail permission      no permission",
        "                     next: ask the janitor",
        "verdict: not usable",
        "next:    ask the janitor",
    ]
