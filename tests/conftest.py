"""Shared fixtures, and a closing line that counts the skips and says why."""

import os
from pathlib import Path

import emulated_gpu
import emulation
import numpy as np
import pytest
from devices import lamp
from devices.bare_machine import bare_machine

from everett_cuda import _C, followers, kernels, keys

pytest.register_assert_rewrite("cli_checks")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data():
    """Recordings of real sources beside the project (or in EVERETT_SHARED_DATA); tests that need them skip without."""
    path = Path(os.environ.get("EVERETT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"recorded data not found at {path}; set EVERETT_SHARED_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def emulated():
    """The CUDA module compiled for the CPU (tests/emulation), with its `control` functions: kernels take CPU addresses."""
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler (g++, or CXX) to compile the CUDA kernels for the CPU")
    return emulation.load()


@pytest.fixture
def ring():
    """An empty ring (1 MiB) behind the process's keys, with default settings."""
    ring = _C.Ring(1 << 20)
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)
    keys.attach(ring)
    yield ring
    keys.detach()
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)


@pytest.fixture
def gpu(emulated, ring, monkeypatch):
    """An emulated GPU behind CPU tensors, with 4,000 numbered keys."""
    ring.put(emulated_gpu.numbered(4000))
    gpu = emulated_gpu.EmulatedGpu(emulated)
    monkeypatch.setitem(kernels._by_index, -1, gpu.kernels)
    monkeypatch.setattr(followers, "_all", [gpu.kernels.graph_key, gpu.kernels.pool])
    return gpu


@pytest.fixture(params=["op", "step"])
def freshness(request):
    """An open source with plenty of keys, in both freshnesses."""
    ring = _C.Ring(1 << 20)
    ring.put(np.random.default_rng(1).bytes(1 << 19))
    keys.configure(on_starved="error")
    keys.set_freshness(request.param)
    keys.attach(ring)
    yield request.param
    keys.detach()
    keys.set_freshness("op")
    keys.configure(on_starved="stretch")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A `BareMachine`: this one's own devices are not looked at."""
    with bare_machine(tmp_path / "machine", monkeypatch) as bare:
        yield bare


@pytest.fixture
def roof(tmp_path, monkeypatch, machine):
    """A `lamp.Roof` with no lamps, and the lamps' driver installed, for this process and those it starts."""
    site, home = tmp_path / "site", tmp_path / "home"
    site.mkdir()
    home.mkdir()
    lamp.install(site)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("LAMP_HOME", str(home))
    return lamp.Roof(home)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted({str(s.longrepr[2]).removeprefix("Skipped: ") for s in skipped if isinstance(s.longrepr, tuple)})
    terminalreporter.write_line(f"skips: {len(skipped)}" + "".join(f"\n  - {r}" for r in reasons))
