"""`everett capture`: the bytes, the sidecar, and that nothing half-written is ever left."""

import hashlib
import json
import os
import resource
import stat
from datetime import datetime

import pytest
from commands import everett, everett_process

import everett_cuda as ev
from everett_cuda.cli import recording
from everett_cuda.drivers import open_driver
from everett_cuda.source import Source

FIELDS = {
    "format", "uri", "driver", "device", "serial", "kind", "details", "started_utc", "ended_utc", "bytes", "sha256",
    "min_entropy", "min_entropy_origin", "bit_order", "conditioned", "gaps", "recorded_by",
}  # fmt: skip


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_file())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recordings").mkdir()
    return tmp_path / "recordings"


def test_a_recording_is_the_raw_bytes_with_a_sidecar(folder):
    old = os.umask(0)
    try:
        result = everett("capture", "sim:seed=7,h=6.4", folder / "r.bin", "--bytes", "3000001")
    finally:
        os.umask(old)
    assert result.exit_code == 0, result.output
    assert files(folder) == ["r.bin", "r.bin.json"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    data = (folder / "r.bin").read_bytes()
    assert data == open_driver("sim:seed=7").bytes_at(0, 3_000_001).tobytes()
    about = json.loads((folder / "r.bin.json").read_text())
    assert set(about) == FIELDS
    start, end = (datetime.fromisoformat(about.pop(f"{word}_utc")) for word in ("started", "ended"))
    assert start <= end and start.utcoffset().total_seconds() == 0
    assert about == {
        "format": "everett recording 1",
        "uri": "sim:seed=7,h=6.4",
        "driver": "sim",
        "device": "simulated source (Philox, seed 7)",
        "serial": "seed-7",
        "kind": "simulated",
        "details": {},
        "bytes": 3_000_001,
        "sha256": hashlib.sha256(data).hexdigest(),
        "min_entropy": 6.4,
        "min_entropy_origin": "claimed by user",
        "bit_order": "msb_first",
        "conditioned": False,
        "gaps": [],
        "recorded_by": f"everett_cuda {ev.__version__}",
    }
    assert about["sha256"] in result.stdout and "NOT QUANTUM (simulated)" in result.stdout


def test_a_recording_of_a_device_is_replayed_as_recorded(folder, roof):
    roof.put({"serial": "7", "conditioned": True})
    assert everett("capture", "auto", folder / "r.bin", "--bytes", "20kB").exit_code == 0
    assert [line.split()[0] for line in roof.log()] == ["opened", "closed"]
    with Source.open(f"replay:{folder / 'r.bin'}") as source:
        status = source.status()
    assert (status.kind, status.label) == ("recorded", "NOT QUANTUM NOW (recorded)")
    assert status.name == f"recording {folder / 'r.bin'}, recorded from roof lamp serial 7"
    assert status.device["recorded from"] == "roof lamp serial 7 (lamp:, kind quantum)"
    assert status.device["SHA-256"] == "checked" and status.device_conditions


def test_lost_transfers_are_gaps_that_the_sidecar_names(folder):
    result = everett("capture", "sim:seed=3,fault=short@1000+short@3000", folder / "r.bin", "--bytes", "10000")
    assert result.exit_code == 0 and "gaps      2: " in result.stdout
    good = open_driver("sim:seed=3").bytes_at(0, 11_024).tobytes()
    assert (folder / "r.bin").read_bytes() == good[:1000] + good[1512:3000] + good[3512:]
    assert json.loads((folder / "r.bin.json").read_text())["gaps"] == [1000, 2488]


def test_bytes_lost_before_the_first_are_no_gap(folder):
    assert everett("capture", "sim:seed=3,fault=short@0", folder / "r.bin", "--bytes", "100").exit_code == 0
    assert json.loads((folder / "r.bin.json").read_text())["gaps"] == []


@pytest.mark.parametrize("name", ["r.bin", "r.bin.json", "r.bin.part"])
@pytest.mark.parametrize("link", [False, True])
def test_nothing_that_is_there_is_replaced(folder, name, link):
    victim = folder / name if not link else folder / "victim"
    victim.write_text("precious")
    if link:
        (folder / name).symlink_to(victim)
    before = files(folder)
    result = everett("capture", "sim:seed=1", folder / "r.bin", "--bytes", "10")
    assert result.exit_code == 2 and f"{folder / name} exists already" in result.stderr
    assert victim.read_text() == "precious" and files(folder) == before


@pytest.mark.parametrize(
    "lamp, code, said",
    [
        ({"trouble": "lost", "at": 9000}, 1, "fell off the roof"),
        ({"trouble": "fault", "at": 9000}, 4, "filament is broken"),
        ({"trouble": "silent", "at": 9000}, 1, "gave no bytes for 0.3 s"),
        ({"state": "in use by rngd (pid 71)"}, 1, "rngd"),
    ],
)
def test_after_a_fault_nothing_is_left_and_that_is_said(folder, roof, lamp, code, said, monkeypatch):
    monkeypatch.setattr(recording, "PATIENCE_S", 0.3)
    roof.put({"serial": "7", **lamp})
    result = everett("capture", "lamp:7", folder / "r.bin", "--bytes", "100000")
    assert result.exit_code == code and said in result.stderr and result.stdout == ""
    assert ("nothing was kept: 9,000 of 100,000 bytes had been recorded" in result.stderr) == ("trouble" in lamp)
    assert files(folder) == []
    assert len(roof.log()) == (2 if "trouble" in lamp else 0)


def test_a_full_disk_leaves_nothing(folder):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = everett_process("capture", "sim:seed=1", folder / "r.bin", "--bytes", "1MB", preexec_fn=small_files)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in said and "Traceback" not in said
    assert files(folder) == []


def test_a_folder_that_is_not_there(folder):
    result = everett("capture", "sim:seed=1", folder / "none" / "r.bin", "--bytes", "10")
    assert result.exit_code == 1 and "No such file or directory" in result.stderr


@pytest.mark.parametrize("size", ["0", "-5", "ten", "1.5MiB"])
def test_sizes_that_are_none(folder, size):
    result = everett("capture", "sim:seed=1", folder / "r.bin", "--bytes", size)
    assert result.exit_code == 2 and f"--bytes {size}" in result.stderr and files(folder) == []


def test_a_recording_is_not_recorded_again(folder):
    result = everett("capture", "replay:x", folder / "r.bin", "--bytes", "10")
    assert result.exit_code == 2 and "is a recording already" in result.stderr and files(folder) == []
