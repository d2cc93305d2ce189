"""`everett monitor [URI]`: how a source is doing, live or once.

It opens the source itself and destroys every bit that it draws, so it cannot watch a source that another process holds.
The histogram counts raw bytes; what those bytes were conditioned into is destroyed unseen, so it gives nothing away.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EverettError
from .output import ExitCode, exit_code_of, print_json, printable, rate_text

if TYPE_CHECKING:
    from ..source_status import SourceStatus
    from .tap import Histogram

METERED_RING_BYTES = 1 << 14
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 64


def monitor(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The source; auto is the first local quantum device.")] = "auto",
    once: Annotated[bool, typer.Option("--once", help="One measurement, then leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line for each measurement.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long one measurement lasts.")] = 1.0,
) -> None:
    """Watch rate, ring, alarms and byte frequencies of a source, until Ctrl-C. Every bit that it draws is destroyed.

    A source that costs money or quota a byte is not drawn from: its ring fills once, and that is shown.
    """
    from ..drivers import driver_of, open_driver, parse_uri
    from ..source import RING_BYTES, Source
    from .tap import Histogram, Tap

    histogram = Histogram()
    try:
        parsed = parse_uri(uri)
        metered = parsed.scheme != "auto" and driver_of(parsed).metered
        ring_bytes = METERED_RING_BYTES if metered else RING_BYTES
        if parsed.scheme == "broker":  # raw bytes are seen where the device is
            source = Source.open(uri)
        else:
            source = Source(uri, lambda: Tap(open_driver(uri), histogram), ring_bytes)
    except EverettError as error:
        if as_json:
            about = {"type": type(error).__name__, "message": str(error), "exit_code": int(exit_code_of(error))}
            print_json({"uri": uri, "error": about}, indent=None)
        raise
    with source, _screen(once, as_json) as show:
        flows = True
        while flows:
            before, started = source.status(), time.monotonic()
            while flows and time.monotonic() - started < seconds:
                # What is there, and not a large piece: a slow device may not fill one in a measurement.
                if metered or not source.ring.discard(max(32, source.ring.unread), 0.1):
                    time.sleep(0.02)
                flows = source.status().state in ("starting", "flowing")
            status = source.status()
            show(_snapshot(before, status, time.monotonic() - started, histogram))
            flows = flows and not once
    if status.state in ("alarm", "failed"):
        raise typer.Exit(ExitCode.ALARM if status.state == "alarm" else ExitCode.BAD)


def _snapshot(before: "SourceStatus", now: "SourceStatus", seconds: float, histogram: "Histogram") -> dict:
    """The JSON document; docs/cli.md describes its fields."""
    counts = histogram.counts.copy()
    counted = int(counts.sum())
    most = int(counts.argmax())
    ones = sum(int(n) * value.bit_count() for value, n in enumerate(counts))
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        **{name: getattr(now, name) for name in ("uri", "name", "serial", "kind", "label", "state", "failure", "health")},
        "seconds": round(seconds, 3),
        "raw_bytes_per_s": round((now.raw_bytes_in - before.raw_bytes_in) / seconds, 1),
        "conditioned_bytes_per_s": round((now.conditioned_bytes_out - before.conditioned_bytes_out) / seconds, 1),
        "alarms": [asdict(alarm) for alarm in now.alarms],
        "alarm_counts": now.alarm_counts,
        "transport_errors": now.transport_errors,
        "raw_bytes_in": now.raw_bytes_in,
        "raw_bytes_held_back": now.raw_bytes_held_back,
        "raw_bytes_dropped": now.raw_bytes_dropped,
        "conditioned_bytes_out": now.conditioned_bytes_out,
        "conditioned_bytes_destroyed": now.bytes_handed_out + now.bytes_destroyed,
        "ring_bytes": now.ring_bytes,
        "ring_unread": now.ring_unread,
        "min_entropy": now.min_entropy,
        "min_entropy_origin": now.min_entropy_origin,
        "device_conditions": now.device_conditions,
        "conditioner": now.conditioner,
        "device": now.device,
        "histogram": {
            "of": "raw bytes",
            "bytes": counted,
            "counts": counts.tolist(),
            "ones_fraction": ones / (8 * counted) if counted else None,
            "most_frequent": most if counted else None,
            "most_frequent_fraction": int(counts[most]) / counted if counted else None,
        },
    }


@contextmanager
def _screen(once: bool, as_json: bool) -> Iterator[Callable[[dict], None]]:
    """What shows a snapshot: JSON lines, a live table on a terminal, or one table after the other."""
    if as_json:
        yield lambda snapshot: print_json(snapshot, indent=None)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if once or not console.is_terminal:
        yield lambda snapshot: console.print(_table(snapshot))
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda snapshot: live.update(_table(snapshot), refresh=True)


def _table(s: dict):
    from rich.table import Table
    from rich.text import Text

    rows = {
        "source": f"{s['uri']}: {s['name']}" + (f", serial {s['serial']}" if s["serial"] else ""),
        "kind": s["label"],
        "state": s["state"] + (f" ({s['failure']})" if s["failure"] else ""),
        "health": s["health"],
        "raw in": f"{rate_text(s['raw_bytes_per_s'])}, {s['raw_bytes_in']:,} bytes; {s['raw_bytes_held_back']:,} held back, "
        f"{s['raw_bytes_dropped']:,} dropped, {s['transport_errors']} transport errors",
        "bits out": f"{rate_text(s['conditioned_bytes_per_s'])}, {s['conditioned_bytes_out']:,} bytes; "
        f"{s['conditioned_bytes_destroyed']:,} drawn and destroyed",
        "ring": f"{s['ring_unread']:,} of {s['ring_bytes']:,} bytes",
        "min-entropy": f"{s['min_entropy']:g} bits a raw byte ({s['min_entropy_origin']})",
        **{name: str(value) for name, value in s["device"].items()},
        "raw bytes": _histogram_text(s["histogram"]),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        style = "bold red" if (name == "health" and s["alarms"]) or (name == "state" and s["failure"]) else ""
        table.add_row(Text(printable(name), style="dim"), Text(printable(text), style=style))
    return table


def _histogram_text(histogram: dict) -> str:
    """Bars of four byte values each, 0 to 255; a flat source has all bars at half height."""
    if not histogram["bytes"]:
        return "none counted yet"
    counts = histogram["counts"]
    width = 256 // _COLUMNS
    mean = histogram["bytes"] / _COLUMNS
    sums = [sum(counts[i : i + width]) for i in range(0, 256, width)]
    bars = "".join(_BARS[min(len(_BARS) - 1, int(4 * n / mean + 0.5))] for n in sums)
    return (
        f"{bars}\nvalues 0 to 255 of {histogram['bytes']:,} bytes; 1 bits {histogram['ones_fraction']:.2%}; most frequent "
        f"{histogram['most_frequent']:#04x}, {histogram['most_frequent_fraction']:.3%} (even: {1 / 256:.3%})"
    )
