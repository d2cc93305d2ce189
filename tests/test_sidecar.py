"""`replay:FILE` and its sidecar: what it takes from one, and that one which does not match is an error."""

import json
import os
from fractions import Fraction

import pytest
from sidecars import recording, sidecar_of

from everett_cuda.drivers import open_driver, replay, sidecar
from everett_cuda.errors import BadParameter, SourceError

DATA = bytes(range(256)) * 40


def test_what_is_written_is_what_is_read(tmp_path):
    path = recording(tmp_path / "r.bin", DATA, gaps=[512, 1024])
    assert sidecar.path_of(path) == tmp_path / "r.bin.json"
    assert sidecar.read(path) == sidecar_of(DATA, gaps=[512, 1024])
    assert sidecar.read(tmp_path / "other.bin") is None


def test_a_recording_takes_bit_order_and_conditioning_from_it_and_stays_recorded(tmp_path):
    path = recording(tmp_path / "r.bin", DATA, bit_order="lsb_first", conditioned=True)
    driver = open_driver(f"replay:{path}")
    assert (driver.kind, driver.bit_order, driver.conditioned) == ("recorded", "lsb_first", True)
    assert driver.name == f"recording {path}, recorded from roof lamp serial 7"
    assert driver.details == {
        "recorded from": "roof lamp serial 7 (lamp:, kind quantum)",
        "recorded at": "2025-01-02T03:04:05.678+00:00",
        "gaps": "0",
        "SHA-256": "checked",
    }
    buffer = bytearray(len(DATA))
    assert driver.readinto(memoryview(buffer), 1.0) == len(DATA) and buffer == DATA  # from its start
    driver.close()
    path.with_name("r.bin.json").unlink()
    plain = open_driver(f"replay:{path}")
    assert (plain.bit_order, plain.conditioned, plain.details) == ("msb_first", False, {})
    plain.close()


@pytest.mark.parametrize(
    "claim, query, want",
    [
        (2.5, "", "2.5 bits a byte (when recorded: assumed)"),
        (7.5, "", "4 bits a byte (assumed)"),  # a file's word raises nothing
        (2.5, "?h=6", "6 bits a byte (claimed by user)"),
    ],
)
def test_its_claim_may_lower_the_assumed_one(tmp_path, claim, query, want):
    driver = open_driver(f"replay:{recording(tmp_path / 'r.bin', DATA, min_entropy=claim)}{query}")
    assert str(driver.min_entropy) == want
    driver.close()


def test_a_claim_is_exactly_the_decimal_that_is_written(tmp_path):
    driver = open_driver(f"replay:{recording(tmp_path / 'r.bin', DATA, min_entropy=0.7)}")
    assert driver.min_entropy.bits_per_byte == Fraction(7, 10)
    driver.close()


# --- what does not match ---


@pytest.mark.parametrize("change", [b"", DATA[:-1], DATA + b"x"])
def test_another_size_is_refused(tmp_path, change):
    path = recording(tmp_path / "r.bin", DATA)
    path.write_bytes(change)
    with pytest.raises(SourceError, match=r"it says 10240 bytes, and .*r.bin has|is empty: 0 bytes"):
        open_driver(f"replay:{path}?hash=0")


def test_other_bytes_of_the_same_size_are_refused(tmp_path):
    path = recording(tmp_path / "r.bin", DATA)
    path.write_bytes(b"\1" + DATA[1:])
    for query in ("", "?hash=1"):
        with pytest.raises(SourceError, match=r"r.bin.json does not belong .* it says sha256 [0-9a-f]{64}, and"):
            open_driver(f"replay:{path}{query}")
    driver = open_driver(f"replay:{path}?hash=0")
    assert driver.details["SHA-256"] == "not checked (hash=1 does)"
    driver.close()
    with pytest.raises(BadParameter, match="hash=2"):
        open_driver(f"replay:{path}?hash=2")


def test_long_recordings_are_hashed_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "HASHED_UNASKED_BYTES", len(DATA) - 1)
    path = recording(tmp_path / "r.bin", DATA, sha256="0" * 64)
    driver = open_driver(f"replay:{path}")
    assert driver.details["SHA-256"].startswith("not checked")
    driver.close()
    with pytest.raises(SourceError, match="it says sha256 000"):
        open_driver(f"replay:{path}?hash=1")


@pytest.mark.parametrize(
    "field, value",
    [
        ("uri", 7), ("kind", "divine"), ("details", {"firmware": 3}), ("details", []), ("bytes", "10240"),
        ("bytes", True), ("bytes", -1), ("sha256", "AB" * 32), ("sha256", "ab"), ("min_entropy", 0), ("min_entropy", 8.5),
        ("min_entropy", float("nan")), ("min_entropy", "4"), ("bit_order", "middle"), ("conditioned", 0), ("gaps", [-1]),
        ("gaps", None), ("serial", None),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(tmp_path, field, value):
    path = recording(tmp_path / "r.bin", DATA)
    about = json.loads(sidecar_of(DATA).to_json())
    sidecar.path_of(path).write_text(json.dumps({**about, field: value}))
    with pytest.raises(SourceError, match=f"r.bin.json does not belong .* its field '{field}' is"):
        open_driver(f"replay:{path}")


@pytest.mark.parametrize("field", [*json.loads(sidecar_of(b"").to_json())])
def test_a_field_that_is_missing_is_refused(tmp_path, field):
    path = recording(tmp_path / "r.bin", DATA)
    about = json.loads(sidecar_of(DATA).to_json())
    del about[field]
    sidecar.path_of(path).write_text(json.dumps(about))
    with pytest.raises(SourceError, match=f"its {'format' if field == 'format' else f'field .{field}.'} is"):
        open_driver(f"replay:{path}")


@pytest.mark.parametrize(
    "text, why",
    [
        (b"", "Expecting value"),
        (b"[1]", "its format is not"),
        (b'{"model": "x"}', "its format is not 'everett recording 1'"),
        (b"{\xff}", "decode"),
        (b"[" * 100_000, "recursion"),
        (b" " * (2 << 20), "more than 1048576 bytes"),
    ],
)
def test_what_is_no_sidecar_is_refused(tmp_path, text, why):
    path = recording(tmp_path / "r.bin", DATA)
    sidecar.path_of(path).write_bytes(text)
    with pytest.raises(SourceError, match=f"{why}.*move the sidecar away"):
        open_driver(f"replay:{path}")


def test_a_sidecar_that_cannot_be_read_is_not_passed_over(tmp_path):
    path = tmp_path / "r.bin"
    path.write_bytes(DATA)
    sidecar.path_of(path).mkdir()
    with pytest.raises(SourceError, match="Is a directory"):
        open_driver(f"replay:{path}")
    sidecar.path_of(path).rmdir()
    os.mkfifo(sidecar.path_of(path))
    with pytest.raises(SourceError, match="not a regular file"):
        open_driver(f"replay:{path}")
    sidecar.path_of(path).unlink()
    sidecar.path_of(path).symlink_to(path.with_name("loop"))
    path.with_name("loop").symlink_to(sidecar.path_of(path))
    with pytest.raises(SourceError, match="symbolic links"):
        open_driver(f"replay:{path}")


def test_refusals_leave_no_descriptor_open(tmp_path):
    path = recording(tmp_path / "r.bin", DATA, sha256="0" * 64)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with pytest.raises(SourceError):
            open_driver(f"replay:{path}")
    assert len(os.listdir("/proc/self/fd")) == before
