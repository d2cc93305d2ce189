"""Entropy path: raw bytes through health tests, conditioner and ring, while the main thread spins in Python.

A spinning main thread is the hard case: each time the reader needs the GIL it waits up to 5 ms. Windows with flow and
windows without (nobody draws, so the ring is full and the pump sleeps) alternate in one process; the main thread's loss
is the difference of its loop rate between the two. Target: 200 MB/s raw in at H = 4 from `replay:`, under 5 % loss, and
95 % of the rate of a device of 4 Mbit/s.

At full speed the pipeline takes a core for itself, the reader and the consumer some percent of another: with two cores
the main thread gives those up. So the loss is measured twice, at full speed and at a draw of 84 MB/s (210 MB/s raw).
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import quantile_row, spin
from everett_cuda import _C, health
from everett_cuda.source import Source

RECORDING_BYTES = 64 << 20
WINDOW_S = 0.6
DRAW_BYTES_PER_S = 84e6
WINDOWS = 25  # short and many: a virtual machine's neighbours move a single one by 15 %


def _row(name: str, measure: str, unit: str, values: list[float]) -> dict:
    return quantile_row("ring", name, measure, unit, values)


def _draw(ring: _C.Ring, seconds: float, bytes_per_s: float | None) -> None:
    """Draws without the GIL: all there is, or bytes_per_s in slices of 0.2 s (this thread too waits for the GIL)."""
    end = time.perf_counter() + seconds
    if bytes_per_s is None:
        ring.discard(1 << 62, seconds)
        return
    due = time.perf_counter()
    while (now := time.perf_counter()) < end:
        ring.discard(int(bytes_per_s * 0.2), end - now)
        due += 0.2
        time.sleep(max(0.0, min(due, end) - time.perf_counter()))


def _windows(source: Source, bytes_per_s: float | None = None) -> tuple[list[float], list[float]]:
    """(raw bytes a second, main thread's loss in percent) of alternating windows."""
    rates, losses = [], []
    spin(0.2)
    for _ in range(WINDOWS):
        consumer = threading.Thread(target=_draw, args=(source.ring, WINDOW_S, bytes_per_s))
        before, start = source.status().raw_bytes_in, time.perf_counter()
        consumer.start()
        busy = spin(WINDOW_S - 0.2)
        rates.append((source.status().raw_bytes_in - before) / (time.perf_counter() - start))
        consumer.join()
        time.sleep(0.05)  # the ring fills, the pump goes to sleep
        free = spin(WINDOW_S - 0.2)
        losses.append(100 * (1 - busy / free))
    return rates, losses


def _in_process() -> Iterator[dict]:
    """The C++ parts alone, on one thread and without Python beside them."""
    raw = np.random.Generator(np.random.Philox(3)).bytes(RECORDING_BYTES)
    for avx2 in (True, False):
        if avx2 and not _C.has_avx2():
            continue
        tests = _C.Health(health.cutoffs(4), fingerprint_key=bytes(16), avx2=avx2)
        rates = []
        for _ in range(WINDOWS):
            tests.forget_units()
            start = time.perf_counter()
            _, alarm = tests.scan(raw)
            rates.append(RECORDING_BYTES / (time.perf_counter() - start) / 1e6)
            if alarm is not None:
                raise RuntimeError(f"{alarm.test} at byte {alarm.offset}")
        yield _row("health", f"four tests and duplicates, {'AVX2' if avx2 else 'portable'}, raw in", "MB/s", rates)


def run(quick: bool = False) -> list[dict]:
    """All rows: measure, case, unit, repeats, p20, p50 and p80 in that unit; quick changes nothing."""
    return list(_rows())


def _rows() -> Iterator[dict]:
    yield from _in_process()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.bin"
        path.write_bytes(np.random.Generator(np.random.Philox(5)).bytes(RECORDING_BYTES))
        for draw, words in ((None, "full speed"), (DRAW_BYTES_PER_S, "84 MB/s drawn")):
            with Source.open(f"replay:{path}?loop=1") as source:
                rates, losses = _windows(source, draw)
                alarms = source.status().alarms
            if alarms:
                raise RuntimeError(f"alarm on a good recording: {alarms[0]}")
            yield _row("entropy path", f"replay:, H=4, {words}: raw in", "MB/s", [r / 1e6 for r in rates])
            yield _row("entropy path", f"replay:, H=4, {words}: main thread's loss", "%", losses)
    with Source.open("sim:seed=11,rate=4Mbit/s") as source:
        rates, losses = _windows(source)
    yield _row("entropy path", "sim: 4 Mbit/s, of its rate", "%", [r / 5e5 * 100 for r in rates])
    yield _row("entropy path", "sim: 4 Mbit/s, main thread's loss", "%", losses)

