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
from ..errors import EverettError, SourceError, StartupTestFailed
from ..source import RING_BYTES, STARTUP_BYTES, STARTUP_BYTES_METERED, Source
from ..source_status import SourceStatus
from .output import ExitCode, exit_code_of, floor_to, rate_text
from .tap import SAMPLES, Sample, Tap

COLLECT_S = 10.0  # how long slow devices are waited for, unless the rate is measured for longer
DRAW_BYTES = 1 << 18
METERED_RING_BYTES = 1 << 14
# (at least so many samples, what perfect bytes are estimated at, or more). Measured with numpy's PCG64 and Philox, the
# least of some seeds: 7.01 (3 seeds), 6.80 (6), 6.57 (12), 6.01 (30), 5.43 (60); here with a margin. An estimate above it
# says nothing against a claim of more, and with fewer samples no estimate says anything.
PERFECT = ((1_000_000, 6.8), (300_000, 6.6), (100_000, 6.3), (30_000, 5.9), (10_000, 5.4))
FEWEST_SAMPLES = PERFECT[-1][0]

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
    bit_order: str = "msb_first"
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

    def add(self, check: str, verdict: str, text: str, next_step: str = "", absent: bool = False) -> None:
        """Makes a finding."""
        self.findings.append(Finding(check, verdict, text, next_step, absent))
        self.tell(self.findings[-1])

    def fail(self, check: str, text: str, code: ExitCode, next_step: str = "") -> None:
        """Makes a finding that decides the exit code, unless a graver one has (an alarm is the gravest)."""
        self.exit_code = max(self.exit_code, code)
        self.add(check, "fail", text, next_step, absent=code == ExitCode.NO_DEVICE)

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
        if report.exit_code == ExitCode.OK and driver.scheme == "broker":
            _draw_from_broker(report)
        elif report.exit_code == ExitCode.OK:
            _run(report, seconds, sample, driver.metered)
            if report.exit_code == ExitCode.OK:
                _estimate(report, sample)
    except EverettError as error:
        report.fail("source", str(error), exit_code_of(error))
    finally:
        sample.destroy()
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
    for finding in driver.examine(uri):
        if finding.verdict == "fail":
            code = ExitCode.NO_DEVICE if finding.absent else ExitCode.BAD
            report.fail(finding.check, finding.text, code, finding.next_step)
        else:
            report.add(finding.check, finding.verdict, finding.text, finding.next_step)
    return driver


def _run(report: Examination, seconds: float, sample: Sample, metered: bool) -> None:
    """Opens the source, lets it flow, destroys what it gives, and says how it did."""
    uri = report.uri
    ring_bytes = METERED_RING_BYTES if metered else RING_BYTES
    try:
        source = Source(uri, lambda: Tap(open_driver(uri), sample), ring_bytes)
    except StartupTestFailed as error:
        next_step = "try another cable and supply, then have the device repaired: a false alarm has a chance of 2^-60"
        report.fail("start-up test", str(error), ExitCode.ALARM, next_step)
        return
    except SourceError as error:
        report.fail("opens", str(error), exit_code_of(error))
        return
    with source:
        report.status = status = source.status()
        report.bit_order = source.driver.bit_order
        serial = f", serial {status.serial}" if status.serial else ""
        report.add("opens", "ok", f"{status.name}{serial}")
        report.add("kind", "ok" if status.kind == "quantum" else "note", status.label)
        for name, value in status.device.items():
            report.add(name, "ok", value)
        if status.device_conditions:
            text = "the device conditions its output: tests see only its total failure, and estimates nothing of its noise"
            report.add("conditioning", "note", text)
        startup = STARTUP_BYTES_METERED if metered else STARTUP_BYTES
        report.add("start-up test", "ok", f"{startup:,} raw bytes passed")
        if not metered:
            _flow(report, source, seconds, sample)
        report.status = source.status()
    _judge_flow(report)


def _draw_from_broker(report: Examination) -> None:
    """Opens a broker's source and draws one key, which is destroyed. Its raw bytes are examined where the device is."""
    with Source.open(report.uri) as source:
        drawn = source.ring.discard(32, COLLECT_S)
        report.status = status = source.status()
        report.add("opens", "ok", f"{status.name}, serial {status.serial}")
        report.add("kind", "ok" if status.kind == "quantum" else "note", status.label)
        if drawn == 32:
            report.add("health tests", "ok", status.health)
        else:
            code = ExitCode.ALARM if status.state == "alarm" else ExitCode.BAD
            why = source.outage() or status.health
            report.fail("flow", f"no key came in {COLLECT_S:g} s: {why}", code, "see the broker's log")


def _flow(report: Examination, source: Source, seconds: float, sample: Sample) -> None:
    """Lets the source flow until the rate is measured and the sample is full, or the time is over, or it ends."""
    report.nominal_rate_bytes_per_s = source.driver.rate_bytes_per_s
    before, started = source.status().raw_bytes_in, time.monotonic()
    while True:
        if not source.ring.discard(DRAW_BYTES, 0.05):
            time.sleep(0.01)
        status, elapsed = source.status(), time.monotonic() - started
        flows = status.state in ("starting", "flowing")
        if report.rate_bytes_per_s is None and flows and elapsed >= seconds:  # a short recording has no rate
            report.rate_bytes_per_s = (status.raw_bytes_in - before) / elapsed
        if not flows or (elapsed >= seconds and (sample.full or elapsed >= COLLECT_S)):
            return


def _judge_flow(report: Examination) -> None:
    status, rate, nominal = report.status, report.rate_bytes_per_s, report.nominal_rate_bytes_per_s
    if rate is not None:
        text = rate_text(rate) + (f" of {rate_text(nominal)}" if nominal else "; it declares no rate of its own")
        slow = "see whether the machine is busy, and try another port or cable"
        if rate == 0 or (nominal and rate < nominal / 10):
            report.fail("rate", text, ExitCode.BAD, slow)
        else:
            is_slow = nominal is not None and rate < nominal / 2
            report.add("rate", "note" if is_slow else "ok", text, slow if is_slow else "")
    if status.transport_errors:
        text = f"{status.transport_errors} transport errors; their bytes were dropped"
        report.add("transport", "note", text, "try another port or cable")
    if status.alarms:
        report.fail(
            "health tests",
            f"{status.health}, within {status.raw_bytes_in:,} raw bytes",
            ExitCode.ALARM,
            "an alarm is never chance (2^-60): do not use the device before its cause is known",
        )
    elif status.state == "failed":
        report.fail("flow", status.failure, ExitCode.BAD, "see what happened to the device, then run this again")
    else:
        report.add("health tests", "ok", f"{status.raw_bytes_in:,} raw bytes, no alarm")


def _estimate(report: Examination, sample: Sample) -> None:
    status = report.status
    report.samples = len(sample.raw)
    claim = f"claimed {status.min_entropy:g} bits a byte ({status.min_entropy_origin})"
    if report.samples < FEWEST_SAMPLES:
        report.add("min-entropy", "note", f"{claim}; {report.samples:,} raw bytes are too few to estimate it")
        return
    samples = np.frombuffer(sample.raw, dtype=np.uint8)
    if report.bit_order == "lsb_first":  # the estimates of single bits go in the order in which they were made
        samples = np.packbits(np.unpackbits(samples, bitorder="little"))
    found = estimate(samples)
    report.estimates = {
        **{f"{name}, bytes": value for name, value in found.symbols.items()},
        **{f"{name}, bits": 8 * value for name, value in found.bits.items()},
    }
    report.estimated = found.min_entropy
    report.assessed = min(status.min_entropy, report.estimated)
    text = f"{claim}, estimated {report.estimated:.2f} from {report.samples:,} raw bytes: {report.assessed:.2f} counts"
    if report.samples < SAMPLES:
        text += f" (SP 800-90B asks for {SAMPLES:,}; fewer make estimates low)"
    if report.estimated >= status.min_entropy:
        report.add("min-entropy", "ok", text)
        return
    usable = floor_to(report.estimated)
    advice = f"open it with h={usable:g}" if usable >= 0.52 else "do not use it"
    if report.estimated >= next(least for n, least in PERFECT if report.samples >= n):
        text += "; perfect bits may be estimated as low, so nothing speaks against the claim"
        report.add("min-entropy", "note", text, f"{advice} to claim no more than the bytes show")
    else:
        report.fail("min-entropy", f"{text}; the claim does not hold", ExitCode.BAD, advice)
