"""What each command has to say of a device that is well, and of one that cannot be used; whatever the device, however it
is emulated.

`run(command, *arguments)` runs the command where the device can be seen: in this process, or in another one.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everett_cuda.cli import examination, tap

SAMPLES = 10_000  # the fewest that are estimated: half a second, not ten
SECONDS = 0.3
LABELS = {
    "quantum": "quantum",
    "quantum-remote": "quantum, remote (the provider knows these bits)",
    "electronic": "NOT QUANTUM (electronic)",
    "simulated": "NOT QUANTUM (simulated)",
}


@dataclass
class Rig:
    """An emulated device that is plugged in, and what is true of it.

    uri: what the commands are given. serial: what the open device says (None: not to be known beforehand). listed: URI,
    serial number and rate of its row in `everett devices`, None for what is never listed. sent: the first n raw bytes that
    a program gets from it now; asked after the capture.
    """

    uri: str
    kind: str
    serial: str | None
    sent: Callable[[int], bytes]
    listed: tuple[str, str, float | None] | None
    conditioned: bool = False
    metered: bool = False
    device: Any = None


def quicken(monkeypatch) -> None:
    """Fewer samples are estimated, and slow devices are not waited for longer than the rate takes."""
    monkeypatch.setattr(tap, "SAMPLES", SAMPLES)
    monkeypatch.setattr(examination, "COLLECT_S", 2.0)


def check_devices(run, rig: Rig) -> None:
    """Its row; or that it has none."""
    result = run("devices", "--json")
    rows = {row["uri"]: row for row in json.loads(result.stdout)["devices"]}
    scheme = rig.uri.partition(":")[0]
    if rig.listed is None:
        assert not [uri for uri in rows if uri.startswith(f"{scheme}:")]
        return
    uri, serial, rate = rig.listed
    row = rows[uri]
    assert result.exit_code == 0
    assert (row["serial"], row["kind"], row["label"], row["state"]) == (serial, rig.kind, LABELS[rig.kind], "ready")
    assert (row["rate_bytes_per_s"], row["min_entropy"], row["min_entropy_origin"]) == (rate, 4.0, "assumed")


def check_doctor(run, rig: Rig) -> dict:
    """Usable, for what it is; returns the report."""
    result = run("doctor", rig.uri, "--json", "--seconds", SECONDS)
    report = json.loads(result.stdout)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert result.exit_code == report["exit_code"] == 0, report["findings"]
    label = LABELS[rig.kind]
    assert report["verdict"] == ("usable" if rig.kind == "quantum" else f"usable, {label}")
    assert (report["kind"], report["label"], report["uri"]) == (rig.kind, label, rig.uri)
    assert rig.serial in (None, report["serial"])
    assert (found["kind"]["verdict"], found["kind"]["text"]) == ("ok" if rig.kind == "quantum" else "note", label)
    assert {f["verdict"] for f in report["findings"]} <= {"ok", "note"} and not any(f["absent"] for f in report["findings"])
    before_it_opens = report["findings"][: [f["check"] for f in report["findings"]].index("opens")]
    assert before_it_opens and report["device"]
    assert ("conditioning" in found) == rig.conditioned
    assert found["health tests"]["verdict"] == "ok" and report["alarms"] == [] and report["raw_bytes_tested"] > 0
    entropy = report["min_entropy"]
    if rig.metered:
        assert report["rate_bytes_per_s"] is None and "rate" not in found
    else:
        assert report["rate_bytes_per_s"] > 0 and found["rate"]["text"]
        assert entropy["samples"] == SAMPLES and entropy["claimed"] == entropy["assessed"] == 4.0 < entropy["estimated"]
    assert rig.uri in report["next_step"]
    return report


def check_monitor(run, rig: Rig) -> None:
    """It flows, and is called what it is."""
    result = run("monitor", rig.uri, "--once", "--json", "--seconds", SECONDS)
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    seen = json.loads(line)
    assert (seen["state"], seen["failure"], seen["alarms"]) == ("flowing", "", [])
    assert (seen["uri"], seen["kind"], seen["label"]) == (rig.uri, rig.kind, LABELS[rig.kind])
    assert rig.serial in (None, seen["serial"]) and seen["device_conditions"] == rig.conditioned
    assert seen["raw_bytes_in"] > 0 < seen["histogram"]["bytes"] and seen["device"]
    assert 0.4 < seen["histogram"]["ones_fraction"] < 0.6
    assert seen["conditioned_bytes_out"] > 0 and (seen["conditioned_bytes_destroyed"] == 0) == rig.metered, seen


def check_capture(run, rig: Rig, folder: Path, n: int = 20_001) -> dict:
    """The file holds the first n bytes that the device gave, and its sidecar says whose; returns the sidecar."""
    file = folder / "r.bin"
    result = run("capture", rig.uri, file, "--bytes", n)
    assert result.exit_code == 0, result.stderr
    data, about = file.read_bytes(), json.loads(file.with_name("r.bin.json").read_text())
    assert len(data) == n and data == rig.sent(n)
    assert (about["bytes"], about["sha256"], about["gaps"]) == (n, hashlib.sha256(data).hexdigest(), [])
    assert (about["uri"], about["driver"], about["kind"]) == (rig.uri, rig.uri.partition(":")[0], rig.kind)
    assert rig.serial in (None, about["serial"]) and about["device"] and about["details"]
    assert (about["conditioned"], about["min_entropy"]) == (rig.conditioned, 4.0)
    assert LABELS[rig.kind] in result.stdout and about["sha256"] in result.stdout
    return about


CHECKS = (check_devices, check_doctor, check_monitor)


def check_refusal(run, uri: str, folder: Path, code: int, said: str, next_step: str, open_code: int | None = None) -> dict:
    """doctor, monitor and capture say why a device cannot be used and what to do, and leave with `code`; the latter two
    with `open_code` where the doctor sees before the opening what is then an alarm. said, next_step: patterns.

    Returns the doctor's report; its next step, or what it says of the finding that failed, matches `next_step`.
    """
    open_code = code if open_code is None else open_code
    result = run("doctor", uri, "--json", "--seconds", SECONDS)
    report = json.loads(result.stdout)
    (failed,) = (f for f in report["findings"] if f["verdict"] == "fail")
    assert (result.exit_code, report["exit_code"], failed["absent"]) == (code, code, code == 3), failed
    assert re.search(said, failed["text"]) and re.search(next_step, report["next_step"] + failed["text"]), failed
    result = run("monitor", uri, "--once", "--json", "--seconds", SECONDS)
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"]) == (open_code, open_code), error
    assert re.search(said, error["message"]) and error["message"].splitlines()[0] in result.stderr
    result = run("capture", uri, folder / "refused.bin", "--bytes", 5000)
    assert result.exit_code == open_code and re.search(said, result.stderr), result.stderr
    assert "Traceback" not in result.stderr and not list(folder.glob("refused.bin*"))
    return report


def check_interruption(run, uri: str, folder: Path, code: int, said: str) -> None:
    """A capture that the device breaks off leaves nothing, and says so."""
    result = run("capture", uri, folder / "lost.bin", "--bytes", 1 << 20)
    assert result.exit_code == code and re.search(said, result.stderr), result.stderr
    assert re.search(r"nothing was kept: [\d,]+ of 1,048,576 bytes", result.stderr)
    assert not list(folder.glob("lost.bin*"))
