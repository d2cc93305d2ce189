"""Check, then time: rivals and ours call by call in turns in one process, medians with p20/p80, rows as JSON lines.

A case is timed `repeats` times; between two of its timings every other case of its group runs once, so drift and noise
hit all of them alike and their ratio keeps its meaning. Times of one machine are not comparable with another's.
"""

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """One thing to time. bytes: moved by one call, by the formula given; 0 where bytes mean nothing."""

    name: str
    run: Callable[[], object]
    bytes: int = 0
    formula: str = ""
    inner: int = 1  # calls a timing, for calls that are short against the clock


def _percentile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, round(q * (len(values) - 1)))]


def machine() -> str:
    """CPU model and core count, as the operating system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} of {torch.multiprocessing.cpu_count()} cores"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def gpu() -> dict:
    """The GPU, its driver and torch's CUDA, for the rows of GPU benchmarks."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    memory = round(properties.total_memory / 2**30)
    return {"gpu": f"{properties.name}, {memory} GiB", "driver": driver, "cuda": torch.version.cuda}


def facts() -> dict:
    """What every row says about where it was made."""
    from everett_cuda import _C

    return {
        "machine": machine(),
        "instruction_set": _C.instruction_set(),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def interleave(cases: list[Case], repeats: int, warmup: int = 6) -> dict[str, list[float]]:
    """Seconds a call of each case, `repeats` of them, the cases taking turns. A virtual machine takes the first touches of
    huge pages from its host, ten times slower than later ones, so that a few warm-up calls are needed."""
    for case in cases:
        for _ in range(warmup):
            case.run()
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            start = time.perf_counter()
            for _ in range(case.inner):
                case.run()
            times[case.name].append((time.perf_counter() - start) / case.inner)
    return times


Timer = Callable[[list[Case], int], dict[str, list[float]]]


def rows(
    bench: str,
    group: dict,
    cases: list[Case],
    repeats: int,
    copy: str = "",
    rival: str = "",
    timer: Timer = interleave,
) -> list[dict]:
    """Timed rows of one group. copy, rival: names of the cases that the others are set against: `copies` is the time in
    copies (p50 over p50), `percent_of_copy` the bandwidth against the copy's, `times_rival` how often faster."""
    times = timer(cases, repeats)
    median = {name: statistics.median(t) for name, t in times.items()}
    copy_case = next((c for c in cases if c.name == copy), None)
    result = []
    for case in cases:
        t = times[case.name]
        row = {"bench": bench, **group, "case": case.name}
        row |= {f"p{q}_us": round(_percentile(t, q / 100) * 1e6, 3) for q in (20, 50, 80)}
        row["repeats"] = repeats
        if case.bytes:
            row["bytes"], row["formula"] = case.bytes, case.formula
            row["gb_per_s"] = round(case.bytes / median[case.name] / 1e9, 2)
        if copy_case and case.name != copy:
            row["copies"] = round(median[case.name] / median[copy], 2)
            if case.bytes and copy_case.bytes:
                bandwidth = case.bytes / median[case.name] / (copy_case.bytes / median[copy])
                row["percent_of_copy"] = round(100 * bandwidth, 1)
        if rival and case.name != rival:
            row["times_rival"] = round(median[rival] / median[case.name], 2)
            row["rival"] = rival
        result.append(row)
    return result


def quantile_row(bench: str, case: str, measure: str, unit: str, values: list[float]) -> dict:
    """A row of repeated measurements of one quantity, in `unit`."""
    quantiles = {f"p{q}": round(_percentile(values, q / 100), 2) for q in (20, 80)}
    p50 = round(statistics.median(values), 2)
    return {"bench": bench, "measure": measure, "case": case, "unit": unit, "repeats": len(values),
            "p20": quantiles["p20"], "p50": p50, "p80": quantiles["p80"]}  # fmt: skip


def spin(seconds: float) -> float:
    """Loop turns a second of pure Python in this thread: a main thread that wants the GIL all the time."""
    turns, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        for _ in range(1000):
            turns += 1
    return turns / (now - start)


def write(bench: str, device: str, all_rows: list[dict]) -> Path:
    """Replaces results/BENCH.DEVICE.jsonl by these rows, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{bench}.{device}.jsonl"
    common = facts() | (gpu() if device == "cuda" else {})
    scratch = path.with_suffix(".new")
    scratch.write_text("".join(json.dumps({**row, **common}) + "\n" for row in all_rows))
    scratch.replace(path)
    return path


def check(condition: bool, what: str) -> None:
    """A benchmark of something wrong is worth nothing."""
    if not condition:
        raise AssertionError(f"checked before timing, and wrong: {what}")
