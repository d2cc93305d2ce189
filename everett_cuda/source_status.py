"""What a source says about itself: one frozen record, in words that never call a bit quantum that is not."""

from dataclasses import dataclass

DEVICE_STATUS = "device status"
_LABELS = {
    "quantum": "quantum",
    "quantum-remote": "quantum, remote (the provider knows these bits)",
    "electronic": "NOT QUANTUM (electronic)",
    "recorded": "NOT QUANTUM NOW (recorded)",
    "simulated": "NOT QUANTUM (simulated)",
}


def label(kind: str, loop: bool = False) -> str:
    """How a source of this kind is named in every status, log and plot."""
    return _LABELS[kind] + (", REPEATS (loop=1)" if loop else "")


@dataclass(frozen=True)
class AlarmReport:
    """One health alarm. offset: the raw byte, counted since the opening, with which the test reached its cutoff.

    said: of a device status, what the driver says that it means.
    """

    test: str
    offset: int
    value: int
    cutoff: int
    startup: bool
    permanent: bool
    said: str = ""

    @classmethod
    def all_of(cls, records: list, faults: list[str]) -> tuple["AlarmReport", ...]:
        """From the C++ `AlarmRecord`s; faults: what was said of those that are a device status, in order."""
        reports, said = [], iter(faults)
        for r in records:
            text = next(said) if r.test == DEVICE_STATUS else ""
            reports.append(cls(r.test, r.offset, r.value, r.cutoff, r.startup, r.permanent, text))
        return tuple(reports)

    def __str__(self) -> str:
        if self.test == "duplicate unit":
            return f"duplicate unit: the 512 bytes up to byte {self.offset} repeat those {self.value} units before"
        if self.test == DEVICE_STATUS:
            return f"device status {self.value:#x} instead of {self.cutoff:#x} at byte {self.offset}: {self.said}"
        return f"{self.test} {self.value} reached cutoff {self.cutoff} at byte {self.offset}"


@dataclass(frozen=True)
class SourceStatus:
    """A source at one moment; all counts are since it was opened, in bytes unless named otherwise.

    state: starting, flowing, reconnecting (to its broker), alarm (permanent), exhausted, failed or closed.
    min_entropy: claimed bits a raw byte. device: what the device says of itself (firmware, mode, spend, ...).
    raw_bytes_held_back: read and not yet proven or conditioned. raw_bytes_dropped: destroyed by alarms and transport
    errors. bytes_destroyed: conditioned bytes that an alarm or the close destroyed. by_broker: a broker has the device;
    raw bytes and alarms are its count, for all its clients.
    """

    uri: str
    name: str
    serial: str
    kind: str
    label: str
    state: str
    failure: str
    min_entropy: float
    min_entropy_origin: str
    device_conditions: bool
    device: dict[str, str]
    conditioner: str
    raw_bytes_per_block: int
    alarms: tuple[AlarmReport, ...]
    alarm_counts: dict[str, int]
    transient_alarms: int
    transport_errors: int
    raw_bytes_in: int
    raw_bytes_held_back: int
    raw_bytes_dropped: int
    conditioned_bytes_out: int
    bytes_handed_out: int
    bytes_destroyed: int
    ring_bytes: int
    ring_unread: int
    ring_locked: bool
    loop: bool
    passes: int
    by_broker: bool = False

    @property
    def health(self) -> str:
        """The verdict in words, alarms counted."""
        total = len(self.alarms)
        if self.state == "alarm" and self.alarms:
            verdict = f"PERMANENT ALARM: {self.alarms[-1]}"
        elif total:
            verdict = f"{total} alarm{'s' * (total > 1)} since open, the last: {self.alarms[-1]}"
        else:
            verdict = "ok"
        if self.device_conditions:
            verdict += "; total-failure only (device output is conditioned)"
        return f"by the broker: {verdict}" if self.by_broker else verdict

    def __str__(self) -> str:
        rows = {
            "source": f"{self.uri}: {self.name}" + (f", serial {self.serial}" if self.serial else ""),
            "kind": self.label,
            **({"device": ", ".join(f"{k} {v}" for k, v in self.device.items())} if self.device else {}),
            "state": self.state + (f" ({self.failure})" if self.failure else ""),
            "health": self.health,
            "min-entropy": f"{self.min_entropy:g} bits a raw byte ({self.min_entropy_origin})",
            "conditioner": f"{self.conditioner}, {self.raw_bytes_per_block} raw bytes to 32",
            "raw bytes": f"{self.raw_bytes_in:,} in, {self.raw_bytes_held_back:,} held back, "
            f"{self.raw_bytes_dropped:,} dropped, {self.transport_errors} transport errors",
            "conditioned": f"{self.conditioned_bytes_out:,} out, {self.bytes_handed_out:,} handed out, "
            f"{self.bytes_destroyed:,} destroyed",
            "ring": f"{self.ring_unread:,} of {self.ring_bytes:,} bytes unread, "
            f"locked: {'yes' if self.ring_locked else 'no'}",
        }
        if self.loop:
            rows["loop"] = f"loop=1, begun again {self.passes} times"
        return "\n".join(f"{name + ':':13} {text}" for name, text in rows.items())
