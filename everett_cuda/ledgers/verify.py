"""Whether ledgers are what they claim: chain, signatures, arithmetic, attestations, and responses served twice. Offline.

It says what it does not prove, too. A ledger is what a program says of its own run: the chain shows that it was not
changed since, a signature by whom, and nothing shows that its bits were quantum or that this was the only run.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LedgerError, SourceError
from .chain import Reading, read_chain
from .schema import COUNTS, DRAWS
from .signature import verify as signature_holds
from .summary import Summary

NOT_PROVED = (
    "that any bit was quantum: a ledger repeats what the source said of itself, and tests cannot tell",
    "that no other runs were made, or that this ledger belongs to a given result",
    "times and host names: they are those of the machine that wrote it",
)
_GROWING = COUNTS[2:]
_OWN = ("conditioned_bytes_out", "bytes_handed_out", "bytes_destroyed")  # of a broker's source


@dataclass
class Verdict:
    """What was found of one ledger. problems: what makes it bad.

    chain: "whole", "unfinished" or "broken". signer: "verified", "wrong", "unsigned" or "not checked". signed_lines: how
    many lines the last good signature covers.
    """

    path: Path
    summary: Summary
    chain: str = "whole"
    signer: str = "not checked"
    signed_by: str = ""
    signed_lines: int = 0
    lines: int = 0
    head: str = ""
    attestations: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The verdict in one line."""
        said = {
            "whole": "consistent",
            "unfinished": f"unfinished: consistent to line {self.lines}",
            "broken": f"BROKEN: consistent to line {self.lines} only",
        }[self.chain]
        behind = f", but only to line {self.signed_lines}" if self.signed_lines < self.lines else ""
        signer = {
            "verified": f"signed by the given key{behind}",
            "wrong": "NOT signed by the given key",
            "unsigned": "NOT SIGNED: anybody could have written it",
            "not checked": "signer not checked",
        }[self.signer]
        return f"{said}, {signer}"


@dataclass
class Verdicts:
    """What was found of several ledgers. across: what they show together; alarm: a signed read was given twice."""

    ledgers: list[Verdict]
    across: list[str] = field(default_factory=list)
    alarm: bool = False

    @property
    def good(self) -> bool:
        return not self.across and not any(v.problems for v in self.ledgers)


def verify_ledgers(paths: Sequence[Path], key: str | None = None, root: str | None = None) -> Verdicts:
    """Checks each ledger, and all of them together.

    key: the signer's public key (64 hexadecimal digits), known from elsewhere. root: a file with the key of QCicada's
    vendor. Raises LedgerError for a file that is none, or is named twice, and SourceError for an unusable root.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise LedgerError("a ledger is named twice, and would repeat all of itself; name each one once")
    readings = [read_chain(path) for path in paths]
    verdicts = Verdicts([_verdict(reading, key) for reading in readings])
    runs = defaultdict(list)
    for verdict in verdicts.ledgers:
        runs[verdict.summary.begin["run"]].append(str(verdict.path))
    verdicts.across += [f"one run in several files: {', '.join(files)}" for files in runs.values() if len(files) > 1]
    verdicts.across += list(_repeated_responses(readings))
    _attestations(readings, verdicts, root)
    return verdicts


def summary_of(reading: Reading) -> Summary:
    """What the records say; LedgerError when one speaks of a source that was never opened."""
    summary = Summary(str(reading.path))
    for record in reading.records:
        try:
            summary.add(record)
        except KeyError as error:
            raise LedgerError(
                f"{reading.path}: line {record['n'] + 1} is about source {error}, which was never opened"
            ) from None
    return summary


def _verdict(reading: Reading, key: str | None) -> Verdict:
    verdict = Verdict(reading.path, summary_of(reading), lines=len(reading.records), head=reading.heads[-1])
    records = reading.records
    verdict.problems += _arithmetic(records)
    ends = [i for i, record in enumerate(records) if record["type"] == "end"]
    tail = [record["type"] for record in records[ends[0] + 1 :]] if ends else []
    if reading.damage:
        verdict.chain = "broken"
        verdict.problems.append(f"the chain breaks at {reading.damage}; what stands from there on is worth nothing")
    elif ends and (len(ends) > 1 or tail not in ([], ["signature"]) or reading.torn):
        verdict.chain = "broken"
        verdict.problems.append("something stands behind its end")
    elif not ends:
        verdict.chain = "unfinished"
        verdict.problems.append(
            "it has no end: the run was killed, still goes on, or the file was cut off"
            + (f" ({reading.torn} bytes of a torn line follow)" if reading.torn else "")
        )
    _check_signatures(reading, verdict, key)
    return verdict


def _check_signatures(reading: Reading, verdict: Verdict, key: str | None) -> None:
    """Every signature must be good, and of the key that the first record names; `key` says whose that is."""
    verdict.signed_by = reading.records[0]["signed_by"] or ""
    signatures = [(i, r) for i, r in enumerate(reading.records) if r["type"] == "signature"]
    for i, record in signatures:
        if record["key"] != verdict.signed_by:
            verdict.problems.append(f"line {i + 1} is signed by another key than the first record names")
        elif not signature_holds(record["key"], record["prev"], record["signature"]):
            verdict.problems.append(f"the signature in line {i + 1} is wrong")
        else:
            verdict.signed_lines = i
            continue
        verdict.signer = "wrong"
        return
    verdict.signed_lines += bool(verdict.signed_lines)  # the line of the signature itself is fixed by what it signs
    if not signatures:
        verdict.signer = "unsigned"
        if key is not None or verdict.signed_by:
            verdict.problems.append(
                "it is not signed" + (", although its first record names a key" if verdict.signed_by else "")
            )
    elif key is not None:
        verdict.signer = "verified" if verdict.signed_by == key else "wrong"
        if verdict.signer == "wrong":
            verdict.problems.append(f"it is signed by {verdict.signed_by}, not by the given key")
        elif verdict.chain == "whole" and verdict.signed_lines < verdict.lines:
            verdict.problems.append("its end is not signed")


def _arithmetic(records: Sequence[Mapping]) -> Iterable[str]:
    """What counts of one run can never be: bytes out of nothing, or counts that go back."""
    sources: dict[str, Mapping] = {}
    last: dict[str, Mapping[str, int]] = {}
    keyring, last_draws, last_steps = -1, {}, 0
    for record in records:
        line = f"line {record['n'] + 1}"
        if record["type"] == "source":
            sources[str(record["source"])] = record
        if record["type"] != "counts":
            continue
        draws = record["draws"]
        if draws and draws["draws"] != sum(draws[k] for k in ("fresh", "stretched", "shared", "reused", "replayed")):
            yield f"{line}: the draws are not the sum of their kinds"
        if record["keyring"] == keyring:
            yield from (f"{line}: {k} goes back" for k in DRAWS if draws.get(k, 0) < last_draws.get(k, 0))
        if record["keyring"] < keyring or record["steps"] < last_steps:
            yield f"{line}: steps or keyrings go back"
        keyring, last_draws, last_steps = record["keyring"], draws, record["steps"]
        for number, c in record["sources"].items():
            before = last.get(number, {})
            by_broker = sources[number]["by_broker"]  # it counts raw bytes and errors, from 0 when it was started anew
            growing = _OWN if by_broker else _GROWING
            yield from (f"{line}: {k} of source {number} goes back" for k in growing if c[k] < before.get(k, 0))
            last[number] = c
            if sources[number]["kind"] == "replayed":  # keys of a journal, that came of no bytes here
                continue
            block = sources[number]["raw_bytes_per_block"]
            if not by_broker and c["conditioned_bytes_out"] // 32 * block > c["raw_bytes_in"]:
                yield f"{line}: source {number} has conditioned more than came in"
            if c["bytes_handed_out"] + c["bytes_destroyed"] > c["conditioned_bytes_out"]:
                yield f"{line}: source {number} has handed out more than was conditioned"


def _repeated_responses(readings: Sequence[Reading]) -> Iterable[str]:
    """Responses that a web service gave more than once, with where and when."""
    seen = defaultdict(list)
    for reading in readings:
        host = reading.records[0]["host"]
        for record in reading.records:
            for r in record["responses"] if record["type"] == "responses" else ():
                seen[r["commitment"]].append(
                    (r["n_bytes"], f"{reading.path}:{record['n'] + 1} on {host} at {r['when']}")
                )
    for commitment, found in seen.items():
        if len(found) > 1:
            where = "\n  ".join(text for _, text in found)
            yield f"one response of {found[0][0]} bytes was served {len(found)} times (commitment {commitment}):\n  {where}"


def _attestations(readings: Sequence[Reading], verdicts: Verdicts, root: str | None) -> None:
    """Checks the signed reads of QCicadas, each by itself and all together."""
    found = [(reading, r) for reading in readings for r in reading.records if r["type"] == "attestation"]
    if not found:
        return
    from ..drivers import qcicada_attestation as qcicada  # its extra is needed for nothing else
    from ..drivers.qcicada_protocol import Info

    root_key = qcicada.load_root(root) if root is not None else None
    keys, reads = defaultdict(set), defaultdict(set)
    by_path = {verdict.path: verdict for verdict in verdicts.ledgers}
    for reading, record in found:
        verdict, line = by_path[reading.path], f"line {record['n'] + 1}"
        try:
            data, signature, key, certificate = (
                bytes.fromhex(record[name]) for name in ("bytes", "signature", "key", "certificate")
            )
            good = qcicada.verify(qcicada.load_key(key), data, signature)
        except ValueError as error:
            verdict.problems.append(f"{line}: the attestation is malformed ({error})")
            continue
        serial, hardware, at = record["serial"], record["hardware"], record["at"]
        if not good:
            verdict.problems.append(f"{line}: the signature of the attestation by {serial} is wrong")
            continue
        trust = "trust on first use, because no root key was given"
        if root_key is not None:
            try:
                message = qcicada.certified_message(Info(0, 0, serial, hardware), key)
            except SourceError as error:
                verdict.problems.append(f"{line}: {error}")
                continue
            if not qcicada.verify(root_key, message, certificate):
                verdict.problems.append(f"{line}: the root key does not vouch for {serial}; it may be an imitation")
                continue
            trust = f"genuine device: the given root certified it as {serial}, {hardware}"
        verdict.attestations.append(f"key {qcicada.fingerprint(key)[:16]} signed {len(data)} bytes at {at}; {trust}")
        keys[serial].add(key)
        # Two ledgers of one opening both record its read, which was made once: same moment, same host.
        once = (reading.records[0]["host"], at)
        reads[data].add(once)
        reads[signature].add(once)
    for serial, several in keys.items():
        if len(several) > 1 and root_key is None:
            names = ", ".join(sorted(qcicada.fingerprint(key)[:16] for key in several))
            verdicts.across.append(f"{serial} signs with several keys ({names}): another device, or a new key in it")
    if any(len(times) > 1 for times in reads.values()):
        verdicts.alarm = True
        verdicts.across.append("ALARM: a signed read was given more than once: a recording answers in a device's place")
