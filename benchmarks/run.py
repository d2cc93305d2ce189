"""`python -m benchmarks.run --device cpu [--only dropout] [--quick] [--source URI]`: runs benchmarks, prints a table,
writes the rows to benchmarks/results (with --quick it only prints)."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

import everett_cuda as ev
from benchmarks import (
    bench_dropout,
    bench_fused,
    bench_noise,
    bench_overhead,
    bench_quantis_pcie,
    bench_quantis_usb,
    bench_ring,
    harness,
)

BENCHES = {
    "dropout": bench_dropout, "fused": bench_fused, "noise": bench_noise, "overhead": bench_overhead, "ring": bench_ring,
    "quantis_usb": bench_quantis_usb, "quantis_pcie": bench_quantis_pcie,
}  # fmt: skip


def _show(console: Console, name: str, rows: list[dict]) -> None:
    shown = ["measure", "dtype", "threads", "case", "p20_us", "p50_us", "p80_us", "gb_per_s", "copies", "times_rival",
             "p20", "p50", "p80", "unit"]  # fmt: skip
    used = [column for column in shown if any(column in row for row in rows)]
    table = Table(*used, title=name)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in used))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=list(BENCHES), action="append", help="just this benchmark (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="few repeats; rows are printed, not written")
    parser.add_argument("--source", default="sim:seed=7", help="where keys come from; it does not change the speed")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        print("bench-gpu: no GPU kernels to time yet; this version's CUDA module checks the law", file=sys.stderr)
        return 2
    console = Console()
    for name in arguments.only or BENCHES:
        ev.open(arguments.source)  # anew each time, so that no benchmark runs on keys stretched by the one before
        rows = BENCHES[name].run(arguments.quick)
        ev.close()
        _show(console, name, rows)
        if not arguments.quick:
            console.print(f"written: {harness.write(name, arguments.device, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
