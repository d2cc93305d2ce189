"""What a ledger says, in short: made from its records one by one, while it is written or when it is read."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..source_status import AlarmReport

_KEYS = ("fresh", "stretched", "shared", "reused", "replayed")


@dataclass
class SourceSummary:
    """One source: its record, its latest counts, and its alarms."""

    record: Mapping
    counts: Mapping = field(default_factory=dict)
    alarms: list[Mapping] = field(default_factory=list)
    attestations: int = 0
    responses: int = 0
    state: str = "flowing"
    failure: str = ""

    def lines(self) -> Iterable[str]:
        r, c = self.record, self.counts
        yield f"{r['uri']}: {r['name']}" + (f", serial {r['serial']}" if r["serial"] else "")
        yield f"kind         {r['label']}"
        yield f"state        {self.state}" + (f" ({self.failure})" if self.failure else "")
        yield f"min-entropy  {r['min_entropy']} bits a raw byte ({r['min_entropy_origin']})"
        tests = "; total-failure only (device output is conditioned)" if r["device_conditions"] else ""
        if c:
            total = f"{sum(c['alarms'].values())} alarms, {c['startup_tests']} start-up tests passed, "
            yield f"health       {total}{c['reconnections']} reconnections, {c['transport_errors']} transport errors{tests}"
        for alarm in self.alarms:
            yield f"             {'PERMANENT ' if alarm['permanent'] else ''}{report_of(alarm)}"
        if c:
            yield (
                f"bytes        {c['raw_bytes_in']:,} raw in, {c['conditioned_bytes_out']:,} conditioned, "
                f"{c['bytes_handed_out']:,} handed out, {c['bytes_destroyed']:,} destroyed"
            )
        if self.attestations:
            yield f"attestations {self.attestations}"
        if self.responses:
            yield f"responses    {self.responses} committed to"


def report_of(alarm: Mapping) -> AlarmReport:
    """The alarm of a record."""
    names = ("test", "offset", "value", "cutoff", "startup", "permanent", "said")
    return AlarmReport(**{name: alarm[name] for name in names})


@dataclass
class Summary:
    """A run in short; print it. file: empty where no ledger is written.

    draws: what became of the draws, over all keyrings. ranks: whose device stands behind which rank, where it is known.
    """

    file: str
    failure: str = ""
    begin: Mapping = field(default_factory=dict)
    records: int = 0
    steps: int = 0
    ended: bool = False
    sources: dict[int, SourceSummary] = field(default_factory=dict)
    settings: Mapping = field(default_factory=dict)
    ranks: Mapping = field(default_factory=dict)
    refused: list[Mapping] = field(default_factory=list)
    _draws: dict[int, Mapping[str, int]] = field(default_factory=dict)

    def add(self, record: Mapping) -> None:
        """Takes the next record in. KeyError, TypeError or AttributeError for one that lacks what its type has."""
        self.records += 1
        kind = record["type"]
        if kind == "begin":
            self.begin = record
            self.settings = record["settings"]
        elif kind == "source":
            self.sources[record["source"]] = SourceSummary(record)
        elif kind == "counts":
            self._count(record)
        elif kind == "alarm":
            self.sources[record["source"]].alarms.append(record)
        elif kind == "state":
            source = self.sources[record["source"]]
            source.state, source.failure = record["state"], record["failure"]
        elif kind == "attestation":
            self.sources[record["source"]].attestations += 1
        elif kind == "responses":
            self.sources[record["source"]].responses += len(record["responses"])
        elif kind == "provenance":
            self.ranks = record["ranks"]
        elif kind == "refused":
            self.refused.append(record)
        elif kind == "end":
            self.ended = True

    def _count(self, record: Mapping) -> None:
        self.steps = record["steps"]
        self.settings = record["settings"]
        if record["draws"]:
            self._draws[record["keyring"]] = record["draws"]
        for number, counts in record["sources"].items():
            source = self.sources[int(number)]
            source.counts, source.state = counts, counts["state"]

    def with_counts(self, counts: Mapping, failure: str) -> "Summary":
        """A copy with the counts of now."""
        now = copy.deepcopy(self)
        now._count(counts)
        now.failure = failure
        return now

    @property
    def draws(self) -> dict[str, int]:
        """draws, fresh, stretched, shared, reused, replayed, ...; empty when there were none. Sums over keyrings."""
        total: Counter = Counter()
        for draws in self._draws.values():
            total.update(draws)
        return dict(total)

    @property
    def alarms(self) -> int:
        """Health alarms of all sources."""
        return sum(len(source.alarms) for source in self.sources.values())

    def to_json(self) -> dict:
        """For `--json`."""
        return {
            "file": self.file,
            "records": self.records,
            "begin": dict(self.begin),
            "ended": self.ended,
            "steps": self.steps,
            "draws": self.draws,
            "settings": dict(self.settings),
            "sources": [
                {
                    **{k: v for k, v in s.record.items() if k not in ("n", "prev", "type", "utc", "ms")},
                    "state": s.state,
                    "failure": s.failure,
                    "counts": dict(s.counts),
                    "alarms": [str(report_of(alarm)) for alarm in s.alarms],
                    "attestations": s.attestations,
                    "responses": s.responses,
                }
                for s in self.sources.values()
            ],
            "refused": [f"{r['uri']}: {r['said']}" for r in self.refused],
            "ranks": dict(self.ranks),
        }

    def __str__(self) -> str:
        lines = []
        if self.file:
            run = f", run {self.begin['run']} on {self.begin['host']}" if self.begin else ""
            lines.append(f"ledger:       {self.file}, {self.records} records{run}")
        if self.failure:
            lines.append(f"FAILED:       {self.failure}")
        for number, source in self.sources.items():
            first, *rest = source.lines()
            lines += [f"source {number}:     {first}", *(f"  {line}" for line in rest)]
        if not self.sources:
            lines.append("source:       none")
        lines += [f"refused:      {r['uri']}: {r['said']}" for r in self.refused]
        draws = self.draws
        if draws:
            lines.append("keys:         " + ", ".join(f"{draws[name]:,} {name}" for name in _KEYS))
            direct = sum(s.counts.get("bytes_handed_out", 0) for s in self.sources.values()) - 32 * draws["fresh"]
            if direct >= 0:
                lines.append(f"not as keys:  {direct:,} bytes handed out (direct words, pools, keys that were lost)")
        for rank, entry in self.ranks.items():
            lines.append(f"rank {rank}:       {entry['said']}")
        return "\n".join(lines)
