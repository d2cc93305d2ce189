"""The broker: bytes moved to 8 clients, from a conditioned pool and end to end; 32-byte draws through shared memory and by
message; what it costs at rest, and how long it takes to start.

The server and 8 client processes share the machine's cores. A draw is timed from Python, so each figure holds the call and
the clock too (about 0.3 us). Targets: 2 GB/s moved from a pool, 100 MB/s conditioned end to end at H = 4; draws through
shared memory 100,000 a second with p99 under 5 us, by message 10,000 a second with p99 under 200 us; under 1 % of a core at
rest with 8 clients; the first byte under 2 s after the start-up test.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.harness import quantile_row
from everett_cuda import _C
from everett_cuda.broker.listening import Listener
from everett_cuda.drivers import broker_wire as wire
from everett_cuda.drivers.broker_connection import Connection
from everett_cuda.source import Source

CLIENTS = 8
WINDOW_S = 3.0
RECORDING_BYTES = 64 << 20
REST_S = 10.0
START_S = 8.0  # until all clients have started
_CLIENT = f"""
import sys, time
from everett_cuda.source import Source
source = Source.open("broker:" + sys.argv[1])
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
start = time.monotonic()
print(source.ring.discard(1 << 50, {WINDOW_S}) / (time.monotonic() - start))
"""


def _moved(path: Path) -> float:
    """Bytes a second to all clients."""
    start = str(time.time() + START_S)
    command = [sys.executable, "-c", _CLIENT, str(path), start]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(CLIENTS)]
    return sum(float(client.communicate()[0]) for client in clients)


def _latencies(draw: Callable[[], object], n: int) -> list[float]:
    """Microseconds of each of n calls, sorted."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        draw()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times)


def _draws(name: str, times: list[float]) -> list[dict]:
    n = len(times)
    rows = [
        quantile_row("broker", f"{name}: p99", "latency", "us", [times[n * 99 // 100]]),
        quantile_row("broker", f"{name}: longest", "latency", "us", [times[-1]]),
        quantile_row("broker", f"{name}: draws a second", "rate", "1/s", [1e6 * n / sum(times)]),
    ]
    return [quantile_row("broker", name, "latency", "us", times), *rows]


@contextlib.contextmanager
def _serving(uri: str, path: Path):
    """`everett serve` as a process of its own; yields it and the moment when it said that it serves."""
    command = [sys.executable, "-m", "everett_cuda", "serve", uri, "--socket", str(path), "--group", ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if "serving " in line:
                break
        yield process, time.perf_counter()
    finally:
        process.terminate()
        process.communicate()


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _end_to_end(folder: Path, quick: bool) -> list[dict]:
    """Raw bytes of a recording through health tests, conditioner and broker to the clients."""
    recording = folder / "raw"
    recording.write_bytes(np.random.default_rng(2).bytes(RECORDING_BYTES))
    with _serving(f"replay:{recording}?loop=1&h=4", folder / "e"):
        moved = [_moved(folder / "e") / 1e6 for _ in range(1 if quick else 5)]
    return [quantile_row("broker", f"{CLIENTS} clients, conditioned end to end, H = 4", "moved", "MB/s", moved)]


def _rest_and_start(folder: Path, quick: bool) -> list[dict]:
    starts, shares = [], []
    for _ in range(1 if quick else 5):
        with _serving("sim:seed=7,rate=500kB/s", folder / "r") as (process, ready), contextlib.ExitStack() as clients:
            first = clients.enter_context(Source.open(f"broker:{folder / 'r'}"))
            first.take(32, 10.0)
            starts.append(time.perf_counter() - ready)
            for _ in range(CLIENTS - 1):
                clients.enter_context(Source.open(f"broker:{folder / 'r'}"))
            time.sleep(3.0)  # until all rings are full
            before = _cpu_s(process.pid)
            time.sleep(REST_S)
            shares.append(100 * (_cpu_s(process.pid) - before) / REST_S)
    return [
        quantile_row("broker", "from the start-up test to a client's first byte", "latency", "s", starts),
        quantile_row("broker", f"{CLIENTS} clients that draw nothing", "share of a core", "%", shares),
    ]


def run(quick: bool = False) -> list[dict]:
    """All rows. quick: one window, and fewer draws."""
    folder = Path(tempfile.mkdtemp(prefix="evbench"))
    listener = Listener(folder / "s", "")
    ring = _C.Ring(1 << 22)
    serves = wire.Serves("simulated", bytes(16), Fraction(4), "assumed", "pool", "", "", "pool:", 80, False, False)
    server = _C.BrokerServer(listener.fileno(), [ring], serves.pack())
    pool = np.random.default_rng(1).bytes(1 << 24)

    def fill():
        while ring.put(pool):
            pass

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        moved = [_moved(folder / "s") / 1e6 for _ in range(1 if quick else 5)]
        rows = [quantile_row("broker", f"{CLIENTS} clients, from a pool", "moved", "MB/s", moved)]
        with Source.open(f"broker:{folder / 's'}") as source:
            out = bytearray(32)
            draw = source.ring.take_into
            rows += _draws("32 bytes, shared memory", _latencies(lambda: draw(out, 1.0), 10_000 if quick else 300_000))
        connection = Connection(folder / "s", shared=False)
        rows += _draws("32 bytes, by message", _latencies(lambda: connection.draw(32, 1.0), 2_000 if quick else 30_000))
        connection.close()
        rows += _end_to_end(folder, quick) + _rest_and_start(folder, quick)
    finally:
        ring.end(_C.Take.closed)
        filler.join()
        server.stop()
        listener.close()
        shutil.rmtree(folder)
    return rows
