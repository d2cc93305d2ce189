"""Health tests: cutoffs, one input for each alarm, and both fast passes against the one-sample-at-a-time reference."""

import subprocess
import sys
from fractions import Fraction

import alarm_inputs
import numpy as np
import pytest
from alarm_inputs import CUTOFFS, good_bytes

from everett_cuda import _C, health
from everett_cuda.reference import health as reference

KEY = bytes(range(16))
PASSES = [pytest.param(False, id="portable"), pytest.param(True, id="avx2")]


def make(avx2=None, cutoffs=CUTOFFS, bit_order="msb_first"):
    if avx2 and not _C.has_avx2():
        pytest.skip("this CPU has no AVX2")
    return _C.Health(cutoffs, bit_order, KEY, avx2)


def scanned(tests, raw, offset=0):
    passed, alarm = tests.scan(raw, offset)
    return passed, alarm and (alarm.test, alarm.offset, alarm.value, alarm.cutoff)


# --- cutoffs: published values first ---


@pytest.mark.parametrize(
    "h, window, alpha, printed",
    [("1", 1024, 20, 589), ("0.8", 1024, 20, 664), ("1", 512, 20, 311), ("2", 512, 20, 177), ("4", 512, 20, 62),
     ("8", 512, 20, 13), ("1", 512, 30, 325)],
)  # fmt: skip
def test_proportion_formula_gives_the_published_values(h, window, alpha, printed):
    # SP 800-90B's table and jitterentropy's first entry, which use W where the corrected formula has W - 1.
    assert health._smallest_count(window, Fraction(h), alpha) == printed


@pytest.mark.parametrize(
    "h, window, alpha, corrected",
    [(1, 1024, 20, 590), (0.98, 1024, 40, 633), (0.9, 1024, 40, 662), (0.5, 1024, 30, 810), (8, 512, 30, 17), (7.9, 512, 30, 18)],
)
def test_corrected_proportion_cutoffs(h, window, alpha, corrected):
    assert health.proportion_cutoff(h, window, alpha) == corrected


@pytest.mark.parametrize("h, window", [("7.1", 512), ("0.93", 512), ("0.8875", 1024), ("0.065", 1024), ("3.7", 512)])
def test_cutoffs_match_floating_point_of_60_digits(h, window):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(80):
        p, n, alpha = mpmath.mpf(2) ** -mpmath.mpf(h), window - 1, mpmath.mpf(2) ** -60
        tail, j = mpmath.mpf(0), n + 1
        while tail <= alpha:
            j -= 1
            tail += mpmath.binomial(n, j) * p**j * (1 - p) ** (n - j)
    assert health.proportion_cutoff(h, window) == 1 + j + 1


def test_table_check_passes_and_notices_a_change(monkeypatch):
    done = subprocess.run([sys.executable, "-m", "everett_cuda.health", "--check"], capture_output=True, text=True)
    assert (done.returncode, "32 cutoffs" in done.stdout) == (0, True), done.stdout + done.stderr
    monkeypatch.setitem(health.TABLE, 4, health.Cutoffs(16, 92, 121, 846))
    assert health.check_table() == ["H=4: committed (16, 92, 121, 846), computed (16, 92, 121, 847)"]
    assert health._main(["--check"]) == 1


def test_decimal_claims_are_taken_exactly():
    assert health.raw_bytes_per_block(4) == 80 and health.raw_bytes_per_block(8) == 40
    assert health.raw_bytes_per_block("3.2") == health.raw_bytes_per_block(3.2) == 100  # 320 / the nearest double is 99.99...
    assert health.repetition_cutoff("0.6") == 101


@pytest.mark.parametrize("h", [0, -1, 8.001, "9", 0.4999, 0.5, 0.1])
def test_untestable_claims_are_refused(h):
    with pytest.raises(ValueError, match="too low to be tested|outside"):
        health.cutoffs(h)


# --- fingerprint ---


@pytest.mark.parametrize(
    "n, digest",
    [(0, "a3817f04ba25a8e66df67214c7550293"), (1, "da87c1d86b99af44347659119b22fc45"),
     (8, "3b62a9ba6258f5610f83e264f31497b4"), (63, "5150d1772f50834a503e069a973fbd7c")],
)  # fmt: skip
def test_siphash_128_published_vectors(n, digest):
    assert _C.siphash128(bytes(range(16)), bytes(range(n))).hex() == digest


# --- one input for each alarm ---


@pytest.mark.parametrize("avx2", PASSES)
@pytest.mark.parametrize("make_input", alarm_inputs.ALL, ids=lambda f: f.__name__)
def test_each_alarm_has_an_input_that_only_it_sees(make_input, avx2):
    case = make_input()
    assert list(reference.alarms(case.raw, CUTOFFS)) == [case.test]  # no other test would fire, even alone
    passed, alarm = scanned(make(avx2), case.raw)
    assert alarm[:2] == (case.test, case.offset)
    assert passed == case.offset // 512


@pytest.mark.parametrize("avx2", PASSES)
def test_stuck_byte_is_named_by_its_first_alarm(avx2):
    # A dead device satisfies four tests; at 121 bits the bit run is complete in the sixteenth byte, as is the byte run.
    raw = good_bytes(8192)
    raw[5000 - 1] = 0xFF
    raw[5000:] = 0
    assert scanned(make(avx2), raw)[1] == ("repetition count (bits)", 5015, 121, 121)
    raw[5000:] = 0x55
    assert scanned(make(avx2), raw)[1] == ("repetition count (bytes)", 5015, 16, 16)


# --- both passes against the reference ---


def _patchwork(rng):
    """Units of good bytes with runs, near-runs, bias and copies sprinkled in, some beyond a cutoff and some just below."""
    raw = good_bytes(512 * int(rng.integers(2, 9)), int(rng.integers(1 << 30)))
    for _ in range(int(rng.integers(0, 4))):
        n = int(rng.choice([2, 13, 14, 15, 16, 17, 40, 130, 512]))
        at = int(rng.integers(0, len(raw)))
        piece = raw[at : at + n]
        match int(rng.integers(0, 6)):
            case 0:
                piece[:] = rng.choice([0, 255, 0x55, 0x0F, 0x80, 0x01])
            case 1:
                piece &= good_bytes(len(piece), at) & good_bytes(len(piece), at + 1)
            case 2:
                piece[:: int(rng.integers(1, 6))] = raw[at // 512 * 512]
            case 3:
                unit = int(rng.integers(0, len(raw) // 512))
                raw[:512] = raw[unit * 512 : (unit + 1) * 512] if unit else raw[:512]
            case 4:
                piece |= rng.choice([0xF0, 0xFE, 0x7F], size=len(piece)).astype(np.uint8)
            case 5:
                raw[at // 512 * 512 :][:512] &= 0x11  # seven of eight bits are 0, in short runs
    return raw.tobytes()


@pytest.mark.parametrize("bit_order", ["msb_first", "lsb_first"])
@pytest.mark.parametrize("avx2", PASSES)
def test_scan_equals_reference_however_it_is_cut(avx2, bit_order):
    rng = np.random.default_rng(20 + avx2)
    verdicts = set()
    for _ in range(150):
        raw = _patchwork(rng)
        cutoffs = health.cutoffs(int(rng.integers(1, 9)))
        expected = reference.first_alarm(raw, cutoffs, bit_order)
        verdicts.add(expected and expected[0])
        tests = make(avx2, cutoffs, bit_order)
        at, alarm = 0, None
        while at < len(raw) and alarm is None:
            n = 512 * int(rng.integers(1, 5))
            passed, alarm = scanned(tests, raw[at : at + n], at)
            at += passed * 512
        assert alarm == expected
        assert at == (len(raw) if expected is None else expected[1] // 512 * 512)
    assert verdicts == {None, *reference.ORDER}  # the patchwork reaches every verdict


@pytest.mark.parametrize("avx2", PASSES)
@pytest.mark.parametrize("value", [0x00, 0xFF, 0x5A])
def test_runs_at_every_place_around_a_unit_edge(avx2, value):
    # A run of cutoff - 1 passes and one of cutoff alarms, wherever it lies; its neighbours' bits join the bit run.
    for at in range(512 - 18, 512 + 3):
        for n in (14, 15, 16):
            raw = good_bytes(1536, at)
            raw[at : at + n] = value
            for before, after in ((0x01, 0x80), (0x80, 0x01), (0xFE, 0x7F), (0x0F, 0xF0)):
                raw[at - 1], raw[at + n] = before, after
                assert scanned(make(avx2), raw)[1] == reference.first_alarm(raw.tobytes(), CUTOFFS)


@pytest.mark.parametrize("avx2", PASSES)
def test_long_bit_run_may_end_in_a_unit_without_solid_bytes(avx2):
    raw = good_bytes(1024)
    raw[512 - 16] = 0xFF
    raw[512 - 15 : 512] = 0  # 120 zero bits lead out of the unit
    raw[512] = 0b01111111
    assert scanned(make(avx2), raw)[1] == ("repetition count (bits)", 512, 121, 121)
    raw[512] = 0b11111110
    assert scanned(make(avx2), raw) == (2, None)
    assert scanned(make(avx2, bit_order="lsb_first"), raw)[1] == ("repetition count (bits)", 512, 121, 121)


# --- duplicates ---


def test_duplicates_are_seen_up_to_65536_units_back_and_no_further():
    raw = good_bytes(512 * 65538)
    tests = make()
    assert scanned(tests, raw[: 512 * 65536]) == (65536, None)
    unit_0, unit_1 = raw[:512].tobytes(), raw[512:1024].tobytes()
    # Unit 0 lies 65,536 back: still seen. It alarmed and is not remembered again, so the next unit takes its place ...
    assert scanned(tests, unit_0) == (0, ("duplicate unit", 511, 65536, 65536))
    assert scanned(tests, raw[512 * 65536 : 512 * 65537]) == (1, None)
    # ... and it has left the history; unit 1 lies 65,536 back.
    assert scanned(tests, unit_0) == (1, None)
    assert scanned(tests, raw[1024:1536].tobytes())[1][2] == 65536
    assert scanned(tests, unit_1) == (1, None)


def test_forgotten_units_may_come_again():
    tests, raw = make(), good_bytes(4096)
    assert scanned(tests, raw) == (8, None)
    assert scanned(tests, raw)[1][0] == "duplicate unit"
    tests.forget_units()
    assert scanned(tests, raw) == (8, None)
    assert scanned(tests, raw[512:1024])[1] == ("duplicate unit", 511, 7, 65536)


def test_a_unit_that_alarmed_is_not_remembered():
    raw = good_bytes(512)
    raw[100:120] = 0x77
    tests = make()
    assert scanned(tests, raw)[1][0] == scanned(tests, raw)[1][0] == "repetition count (bytes)"


def test_sequence_breaks_end_runs():
    raw = good_bytes(1024)
    raw[504:520] = 0x77
    tests = make()
    assert scanned(tests, raw)[1] == ("repetition count (bytes)", 519, 16, 16)
    tests = make()
    tests.scan(raw[:512])
    tests.break_sequence()
    assert scanned(tests, raw[512:]) == (1, None)


# --- real recordings and good input ---


def test_good_bytes_raise_no_alarm():
    for h in (8, 4, 1):
        assert scanned(make(cutoffs=health.cutoffs(h)), good_bytes(16 << 20)) == (32768, None)


@pytest.mark.parametrize("name", ["humboldt-photon-1MiB.bin", "ibm-fez-raw-48kB.bin"])
def test_recorded_quantum_bits_raise_no_alarm(shared_data, name):
    raw = (shared_data / "quantum" / name).read_bytes()
    units = len(raw) // 512
    for order in ("msb_first", "lsb_first"):
        assert scanned(make(bit_order=order), raw[: units * 512]) == (units, None)


def test_biased_bytes_alarm(shared_data):
    raw = (shared_data / "sp800_90b" / "biased-random-bytes.bin").read_bytes()[:51200]
    passed, alarm = scanned(make(), raw)
    assert alarm == reference.first_alarm(raw, CUTOFFS)
    assert alarm is not None and passed == alarm[1] // 512


# --- misuse ---


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="whole units"):
        make().scan(bytes(511))
    with pytest.raises(ValueError, match="bit_order"):
        make(bit_order="big")
    with pytest.raises(ValueError, match="16 bytes"):
        _C.Health(CUTOFFS, "msb_first", b"short")
    for wrong in (health.Cutoffs(1, 92, 121, 847), health.Cutoffs(16, 512, 121, 847), health.Cutoffs(16, 92, 22, 847),
                  health.Cutoffs(16, 92, 121, 1024)):  # fmt: skip
        with pytest.raises(ValueError, match="cutoffs"):
            make(cutoffs=wrong)
