"""What `everett doctor` does: from the cable to the bits, one finding after the other.

A driver says what stands between the cable and an open device; then the source is opened as for a training run, with a
tap on it, and its bits are destroyed; then the tapped raw bytes are judged by the estimators of SP 800-90B 6.3. An
estimate may lower a claim of entropy and never raises it (90B 3.1.3: the smaller of the two counts).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from ..drivers import Finding, driver_of, open_driver, parse_uri, quantum_devices
from ..entropy_estimate import estimate
from ..errors import DeviceNotFound, EverettError, HealthAlarm, SourceError, StartupTestFailed
from ..source import RING_BYTES, STARTUP_BYTES, STARTUP_BYTES_METERED, Source
from ..source_status import SourceStatus, label
from .output import ExitCode, exit_code_of, floor_to, rate_text
from .tap import SAMPLES, Sample, Tap

COLLECT_S = 10.0  # how long slow devices are waited for, unless the rate is measured for longer
DRAW_BYTES = 1 << 18
METERED_RING_BYTES = 1 << 14
# Below this, confidence bounds dominate: perfect bytes are estimated at under 4 bits.
FEWEST_SAMPLES = 10_000

VERDICTS = {
    ExitCode.OK: "usable",
    ExitCode.BAD: "not usable",
    ExitCode.USAGE: "no such source",
    ExitCode.NO_DEVICE: "no device",
    ExitCode.ALARM: "health alarm",
}


@dataclass
class Examination:
    """A report that grows: `tell` shows each finding when it is made. All entropies are bits a raw byte."""

    uri: str
    tell: Callable[[Finding], None]
    findings: list[Finding] = field(default_factory=list)
    exit_code: ExitCode = ExitCode.OK
    status: SourceStatus | None = None
    rate_bytes_per_s: float | None = None
    nominal_rate_bytes_per_s: float | None = None
    samples: int = 0
    estimates: dict[str, float] | None = None
    estimated: float | None = None
    assessed: float | None = None

    @property
    def verdict(self) -> str:
        """One line for the whole."""
        words = VERDICTS[self.exit_code]
        if self.status is not None and self.status.kind != "quantum":
            words += f", {self.status.label}"
        return words

    @property
    def next_step(self) -> str:
        """What to do about the first thing that stands in the way, or how to use the source."""
        if self.exit_code == ExitCode.OK:
            return f'ev.open("{self.uri}"), or EVERETT_SOURCE={self.uri}'
        return next((f.next_step for f in self.findings if f.verdict == "fail" and f.next_step), "see the finding above")

    def add(self, check: str, verdict: str, text: str, next_step: str = "") -> None:
        """Makes a finding."""
        self.findings.append(Finding(check, verdict, text, next_step))
        self.tell(self.findings[-1])

    def fail(self, check: str, text: str, code: ExitCode, next_step: str = "") -> None:
        """Makes a finding that decides the exit code; the first one does."""
        self.exit_code = self.exit_code or code
        self.add(check, "fail", text, next_step)

    def to_json(self) -> dict:
        """The document that docs/cli.md describes."""
        s = self.status
        return {
            "uri": self.uri,
            "name": s and s.name,
            "serial": s and s.serial,
            "kind": s and s.kind,
            "label": s and s.label,
            "device": s and s.device,
            "findings": [asdict(f) for f in self.findings],
            "rate_bytes_per_s": self.rate_bytes_per_s,
            "nominal_rate_bytes_per_s": self.nominal_rate_bytes_per_s,
            "raw_bytes_tested": s and s.raw_bytes_in,
            "alarms": s and [asdict(alarm) for alarm in s.alarms],
            "transport_errors": s and s.transport_errors,
            "min_entropy": {
                "claimed": s and s.min_entropy,
                "origin": s and s.min_entropy_origin,
                "estimated": self.estimated,
                "assessed": self.assessed,
                "samples": self.samples,
                "estimates": self.estimates,
            },
            "verdict": self.verdict,
            "next_step": self.next_step,
            "exit_code": int(self.exit_code),
        }


def examine(uri: str, seconds: float, tell: Callable[[Finding], None]) -> Examination:
    """Examines the source that `uri` names (`auto`: the first quantum device); errors become findings.

    seconds: how long the rate is measured. Takes that, up to 10 s for `SAMPLES` raw bytes, and the estimators' time.
    """
    report = Examination(uri, tell)
    sample = Sample()
    try:
        driver = _find(report)
        if report.exit_code == ExitCode.OK:
            _run(report, seconds, sample, driver.metered)
    except EverettError as error:
        report.fail("source", str(error), exit_code_of(error))
    if report.exit_code == ExitCode.OK:
        _estimate(report, sample)
    return report


def _find(report: Examination):
    """The driver's class, after its own findings."""
    uri = parse_uri(report.uri)
    if uri.scheme == "auto":
        found = quantum_devices(uri)
        device = next((d for d in found if d.state == "ready"), found[0])
        others = f"; {len(found) - 1} more: see `everett devices`" if len(found) > 1 else ""
        report.add("auto", "ok", f"{device.uri}{others}")
        report.uri, uri = device.uri, parse_uri(device.uri)
    driver = driver_of(uri)
    uri.parameters(driver.parameters)
    for number, finding in enumerate(driver.examine(uri)):
        if finding.verdict == "fail":
            # The contract has "found" come first.
            absent = driver.looks_for and number == 0
            report.fail(
                finding.check, finding.text, ExitCode.NO_DEVICE if absent else ExitCode.BAD, finding.next_step
            )
        else:
            report.add(finding.check, finding.verdict, finding.text, finding.next_step)
    return driver
