"""hwrng and chaoskey: this machine's own generator where it has one, and emulated ones in a preloaded process."""

import os
import tempfile
from pathlib import Path

import pytest
from devices.kernel_double import KernelDouble, run_pytest, why_not
from source_checks import nothing_left

from everett_cuda.drivers import hwrng
from everett_cuda.source import Source


@pytest.mark.parametrize(
    "name, kind",
    [
        ("virtio_rng.0", "simulated"), ("tpm-rng-0", "electronic"), ("s2q000-rng", "quantum"), ("S2Q000-RNG", "electronic"),
        ("s2q000-rng.1", "electronic"), ("", "electronic"), ("VIRTIO_RNG", "simulated"),
    ],
)  # fmt: skip
def test_only_one_name_is_quantum(name, kind):
    assert hwrng.origin(name)[0] == kind


def test_this_machines_own_generator():
    now = hwrng.sources()
    if now is None or not now.current or not os.access(hwrng.NODE, os.R_OK):
        pytest.skip(f"no {hwrng.NODE} with a current source that this user may read")
    with nothing_left(), Source.open("hwrng:") as opened:
        first, second = opened.take(32, timeout_s=20), opened.take(32, timeout_s=20)
        status = opened.status()
        assert first != second and status.serial == now.current and status.label.startswith("NOT QUANTUM")


def test_the_emulated_devices():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to the other user of one test
        os.chmod(folder, 0o755)
        run_pytest(KernelDouble(Path(folder)), "emulated_hwrng.py")
