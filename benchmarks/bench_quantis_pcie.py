"""quantis-pcie: raw bytes from a card's node through its driver, the health tests, the conditioner and into the ring, while
the main thread spins in Python (the hard case: a thread that needs the GIL then waits 5 ms for it, each time).

A pipe that another process fills as fast as it can (target: 200 MB/s), and emulated cards that make bytes at the rate of
real ones and hold none back between reads (target: 95 % of their rate).
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.harness import quantile_row, spin
from everett_cuda.source import Source

WINDOW_S = 0.5
WINDOWS = 15
# More than the duplicate test remembers (32 MiB), so that the same bytes may come again.
PERIOD_BYTES = 64 << 20
_WRITER = f"""
import fcntl, os, sys
import numpy as np
data = memoryview(np.random.Generator(np.random.Philox(5)).bytes({PERIOD_BYTES}))
pipe = os.open(sys.argv[1], os.O_WRONLY)
fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
try:
    while True:
        for at in range(0, len(data), 1 << 20):
            sent = 0
            while sent < 1 << 20:
                sent += os.write(pipe, data[at + sent : at + (1 << 20)])
except BrokenPipeError:
    pass
"""
_TESTS = Path(__file__).resolve().parent.parent / "tests"


def _rates(uri: str, windows: int, spinning: bool, window_s: float = WINDOW_S) -> list[float]:
    """Raw bytes a second in each window, all of the ring's bits drawn without the GIL."""
    rates = []
    with Source.open(uri) as source:
        for k in range(windows + 1):
            consumer = threading.Thread(target=source.ring.discard, args=(1 << 62, window_s + 0.2))
            consumer.start()
            time.sleep(0.1)  # the ring has been emptied by now
            before, start = source.status().raw_bytes_in, time.perf_counter()
            (spin if spinning else time.sleep)(window_s)
            if k:  # the first one warms up
                rates.append((source.status().raw_bytes_in - before) / (time.perf_counter() - start))
            consumer.join()
        status = source.status()
    if status.alarms or status.transport_errors:
        raise RuntimeError(f"{uri}: {status.health}, {status.transport_errors} transport errors")
    return rates


def _row(case: str, unit: str, values: list[float]) -> dict:
    return quantile_row("quantis_pcie", "quantis-pcie", case, unit, values)


def run(quick: bool = False) -> list[dict]:
    """A pipe at full speed, and emulated cards at their own rate where a C compiler is there. quick: fewer windows."""
    windows = 3 if quick else WINDOWS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/pipe"
        os.mkfifo(path)
        for spinning in (True, False):
            with subprocess.Popen([sys.executable, "-c", _WRITER, path]):
                time.sleep(2.0 if quick else 4.0)  # it makes its bytes, and waits for a reader
                rates = _rates(f"quantis-pcie:{path}?unproven=1", windows, spinning)
            case = "pipe at full speed, raw in, main thread " + ("spins" if spinning else "sleeps")
            rows.append(_row(case, "MB/s", [r / 1e6 for r in rates]))
    sys.path.insert(0, str(_TESTS))
    from devices.kernel_double import KernelDouble, why_not

    if why_not():
        print(f"emulated cards left out: {why_not()}", file=sys.stderr)
        return rows
    with tempfile.TemporaryDirectory() as folder:
        environment = KernelDouble(Path(folder)).environment()
        command = [sys.executable, "-m", "benchmarks.bench_quantis_pcie", str(windows)]
        done = subprocess.run(command, env=environment, cwd=_TESTS.parent, capture_output=True, text=True, check=True)
    return rows + json.loads(done.stdout)


def _emulated(windows: int) -> list[dict]:
    """Runs in a process that has the double of the kernel preloaded."""
    sys.path.insert(0, str(_TESTS))
    from devices.kernel_double import KernelDouble

    kernel = KernelDouble(Path(os.environ["KERNEL_DOUBLE"]))
    rows = []
    for name, make, rate, pace in (
        # Its bytes come in portions of 64 KiB, 131 ms each: a window has to hold many.
        ("module card, 1 module", lambda: kernel.module_card(0, modules=1, bytes_per_s=5e5), 5e5, 8),
        ("PCIe-240M", lambda: kernel.chip_card(0, bytes_per_s=30e6), 30e6, 1),
    ):
        kernel.clear()
        make()
        rates = _rates("quantis-pcie:0", max(2, windows // pace), True, WINDOW_S * pace)
        values = [100 * r / rate for r in rates]
        rows.append(_row(f"emulated {name}, of its rate, main thread spins", "%", values))
    return rows


if __name__ == "__main__":
    print(json.dumps(_emulated(int(sys.argv[1]))))
