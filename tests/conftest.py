"""Shared fixtures, and a closing line that counts the skips and says why."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data():
    """Recordings of real sources beside the project (or in EVERETT_SHARED_DATA); tests that need them skip without."""
    path = Path(os.environ.get("EVERETT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"recorded data not found at {path}; set EVERETT_SHARED_DATA to its folder")
    return path


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted({str(s.longrepr[2]).removeprefix("Skipped: ") for s in skipped if isinstance(s.longrepr, tuple)})
    terminalreporter.write_line(f"skips: {len(skipped)}" + "".join(f"\n  - {r}" for r in reasons))
