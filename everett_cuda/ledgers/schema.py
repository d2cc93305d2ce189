"""Which fields a record of each type has, and of what kind: what a reader may rely on, whoever wrote the file."""

from collections.abc import Mapping

# Of every source, in a record of counts; all but the first two only grow.
COUNTS = (
    "raw_bytes_held_back", "passes", "raw_bytes_in", "raw_bytes_dropped", "conditioned_bytes_out", "bytes_handed_out",
    "bytes_destroyed", "transport_errors", "startup_tests", "reconnections", "transient_alarms",
)  # fmt: skip
DRAWS = ("draws", "fresh", "stretched", "shared", "reused", "replayed", "unverified", "replay_misses", "waits")

_TEXT_OR_NONE = (str, type(None))
_INT_OR_NONE = (int, type(None))
_EVERY = {"n": int, "prev": str, "type": str, "utc": str, "ms": int}
FIELDS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "begin": {
        "format": str, "run": str, "host": str, "pid": int, "program": str, "ranks": dict, "environment": dict,
        "settings": dict, "interval_s": str, "every_steps": _INT_OR_NONE, "signed_by": _TEXT_OR_NONE,
    },
    "source": {
        "source": int, "uri": str, "name": str, "serial": str, "kind": str, "label": str, "min_entropy": str,
        "min_entropy_origin": str, "device_conditions": bool, "device": dict, "conditioner": str,
        "raw_bytes_per_block": int, "loop": bool, "by_broker": bool, "health": dict, "locked": bool,
    },
    "refused": {"uri": str, "error": str, "said": str},
    "state": {"source": int, "state": str, "failure": str},
    "alarm": {
        "source": int, "test": str, "offset": int, "value": int, "cutoff": int, "startup": bool, "permanent": bool,
        "said": str,
    },
    "attestation": {
        "source": int, "serial": str, "hardware": str, "at": str, "bytes": str, "signature": str, "key": str,
        "certificate": str, "verdict": str,
    },
    "responses": {"source": int, "responses": list},
    "provenance": {"ranks": dict},
    "counts": {"why": str, "steps": int, "keyring": int, "draws": dict, "sources": dict, "settings": dict},
    "end": {},
    "signature": {"key": str, "signature": str},
}  # fmt: skip
_RESPONSE = {"when": str, "n_bytes": int, "commitment": str}
_SOURCE_COUNTS = {"state": str, "alarms": dict, **{name: int for name in COUNTS}}


def check(record: Mapping) -> None:
    """ValueError for a record that is not of one of these types, or not as its type is."""
    kind = record.get("type")
    if kind not in FIELDS:
        raise ValueError(f"it is of an unknown type, {kind!r}")
    _check(record, {**_EVERY, **FIELDS[kind]}, kind)
    if kind == "responses":
        for row in record["responses"]:
            _check(row, _RESPONSE, "response")
    elif kind == "provenance":
        if not all(isinstance(rank, dict) and isinstance(rank.get("said"), str) for rank in record["ranks"].values()):
            raise ValueError("a rank has a line that says whose device is behind it")
    elif kind == "counts":
        draws = record["draws"]
        if draws:
            _check(draws, {name: int for name in DRAWS}, "draws", exact=False)
        for number, counts in record["sources"].items():
            if not number.isdecimal() or len(number) > 9:
                raise ValueError(f"{number!r} is no number of a source")
            _check(counts, _SOURCE_COUNTS, "counts of a source")
        tables = [draws, *(counts["alarms"] for counts in record["sources"].values())]
        if not all(type(value) is int for table in tables for value in table.values()):
            raise ValueError("a count is no integer")


def _check(record: object, fields: Mapping, what: str, exact: bool = True) -> None:
    if not isinstance(record, dict) or not fields.keys() <= record.keys() or (exact and len(record) > len(fields)):
        raise ValueError(f"a {what} record has the fields {', '.join(fields)}")
    for name, kinds in fields.items():
        # exactly: True is an int to isinstance
        if type(record[name]) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
            raise ValueError(f"{name} of a {what} record is {record[name]!r}")
