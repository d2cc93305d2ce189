"""A sidecar for recordings that tests make."""

import hashlib
from pathlib import Path

from everett_cuda.drivers.sidecar import Sidecar, path_of


def sidecar_of(data: bytes, **changes) -> Sidecar:
    """What `everett capture` could have written for `data`, with `changes`."""
    fields = {
        "uri": "lamp:7",
        "driver": "lamp",
        "device": "roof lamp",
        "serial": "7",
        "kind": "quantum",
        "details": {"firmware": "1.7"},
        "started_utc": "2025-01-02T03:04:05.678+00:00",
        "ended_utc": "2025-01-02T03:04:06.678+00:00",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "min_entropy": 4.0,
        "min_entropy_origin": "assumed",
        "bit_order": "msb_first",
        "conditioned": False,
        "gaps": [],
        "recorded_by": "everett_cuda 0.1.0",
    }
    return Sidecar(**{**fields, **changes})


def recording(path: Path, data: bytes, **changes) -> Path:
    """Writes both files; returns `path`."""
    path.write_bytes(data)
    path_of(path).write_text(sidecar_of(data, **changes).to_json())
    return path
