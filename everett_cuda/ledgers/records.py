"""What each record of a ledger says, made from the statuses of sources; no key, no conditioned byte, no address of one.

Numbers that are no integers are text, because a float's text differs between programs.
"""

import os
import platform
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from .. import _C, __version__, health
from ..drivers.responses import Response
from ..reference import LAW_VERSION
from ..source import Source
from ..source_status import AlarmReport, SourceStatus
from .chain import FORMAT
from .schema import COUNTS

# What a driver's `details` say of a signed read; they make a record of their own.
ATTESTATION = ("attestation", "attested at", "attested bytes", "signature", "device key", "certificate")


def plain(value: object) -> object:
    """`value` with its floats as text (None, the absence of a limit, stays)."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def begin(settings: Mapping, interval_s: float, every_steps: int | None, signed_by: str | None) -> dict:
    """The first record: which run this is, on what. Of the command line only the program's name: arguments may hold
    secrets."""
    ranks = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    return {
        "type": "begin",
        "format": FORMAT,
        "run": secrets.token_hex(16),  # the system's generator: it names the run, and no key comes of it
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "program": os.path.basename(sys.argv[0]),
        "ranks": ranks,
        "environment": {
            "everett_cuda": __version__,
            "stream_law": LAW_VERSION,
            "torch": _version("torch"),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "instruction_set": _C.instruction_set(),
            "sha256": _C.sha256_library() or "hashlib",
        },
        "settings": plain(settings),
        "interval_s": repr(float(interval_s)),
        "every_steps": every_steps,
        "signed_by": signed_by,
    }


def source(number: int, source: Source, status: SourceStatus) -> dict:
    """A source that is open: what it is, what is claimed of it, and which tests watch it."""
    return {
        "type": "source",
        "source": number,
        "uri": status.uri,
        "name": status.name,
        "serial": status.serial,
        "kind": status.kind,
        "label": status.label,
        "min_entropy": str(health.exact(status.min_entropy)),  # 4, 32/5
        "min_entropy_origin": status.min_entropy_origin,
        "device_conditions": status.device_conditions,
        "device": {k: str(v) for k, v in status.device.items() if k not in ATTESTATION},
        "conditioner": status.conditioner,
        "raw_bytes_per_block": status.raw_bytes_per_block,
        "loop": status.loop,
        "by_broker": status.by_broker,
        "health": _tests(source, status),
        "locked": status.ring_locked,
    }


def _tests(source: Source, status: SourceStatus) -> dict:
    """Which tests watch the raw bytes, and their cutoffs."""
    if status.kind == "replayed":
        return {"tests": "none: keys of a journal are given again"}
    if status.by_broker:
        return {"tests": "by the broker, whose ledger names their cutoffs"}
    c = health.cutoffs(status.min_entropy)
    return {
        "alpha": f"2^-{health.ALPHA_BITS}",
        "cutoffs": {
            "repetition count (bits)": c.rct_bits,
            "repetition count (bytes)": c.rct_bytes,
            "adaptive proportion (bits)": c.apt_bits,
            "adaptive proportion (bytes)": c.apt_bytes,
        },
        "duplicate_units": True,
        "startup_bytes": source.startup_bytes,
    }


def attestation(number: int, status: SourceStatus) -> dict | None:
    """The device's latest signed read; None where the driver gives none."""
    said = status.device
    if "attested bytes" not in said:
        return None
    return {
        "type": "attestation",
        "source": number,
        "serial": status.serial,
        "hardware": said["hardware"],
        "at": said["attested at"],
        "bytes": said["attested bytes"],
        "signature": said["signature"],
        "key": said["device key"],
        "certificate": said["certificate"],
        "verdict": said["attestation"],
    }


def alarm(number: int, report: AlarmReport) -> dict:
    """One health alarm, with the raw byte that reached the cutoff."""
    return {
        "type": "alarm",
        "source": number,
        "test": report.test,
        "offset": report.offset,
        "value": report.value,
        "cutoff": report.cutoff,
        "startup": report.startup,
        "permanent": report.permanent,
        "said": report.said,
    }


def refused(uri: str, error: BaseException) -> dict:
    """A source that could not be opened: its start-up test failed, or it is not there."""
    return {"type": "refused", "uri": uri, "error": type(error).__name__, "said": str(error)}


def state(number: int, status: SourceStatus) -> dict:
    """A source whose state has changed: starting, flowing, alarm, exhausted, failed or closed."""
    return {"type": "state", "source": number, "state": status.state, "failure": status.failure}


def responses(number: int, new: Sequence[Response]) -> dict:
    """Commitments of a web service's responses (drivers/responses.py)."""
    rows = [{"when": r.when, "n_bytes": r.n_bytes, "commitment": r.commitment} for r in new]
    return {"type": "responses", "source": number, "responses": rows}


def counts(
    why: str, steps: int, keyring: int, draws: Mapping[str, int], sources: Mapping[int, SourceStatus], settings: Mapping
) -> dict:
    """How much of everything so far. keyring: a number that grows where the counts of draws begin again at 0."""
    return {
        "type": "counts",
        "why": why,
        "steps": steps,
        "keyring": keyring,
        "draws": dict(draws),
        "sources": {
            str(number): {
                "state": s.state,
                "alarms": dict(s.alarm_counts),
                **{name: getattr(s, name) for name in COUNTS},
            }
            for number, s in sources.items()
        },
        "settings": plain(settings),
    }
