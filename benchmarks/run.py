"""`python -m benchmarks.run --device cpu|cuda [--only dropout] [--quick] [--source URI]`: runs benchmarks, prints a table,
writes the rows to benchmarks/results (with --quick it only prints). On a GPU the last table says what was reached."""

import argparse
import importlib
import sys

import torch
from rich.console import Console
from rich.table import Table

import everett_cuda as ev
from benchmarks import harness, targets_gpu
from everett_cuda import kernels
from everett_cuda.errors import EverettError

# Imported when they run: a GPU's need triton and `_cuda`.
BENCHES = {
    "cpu": {
        name: f"bench_{name}"
        for name in (
            "dropout", "fused", "journal", "noise", "overhead", "compile", "ring", "broker", "quantis_usb", "quantis_pcie",
        )
    },
    "cuda": {name: f"bench_{name}_gpu" for name in ("dropout", "fused", "noise", "pool")},
}


def _show(console: Console, name: str, rows: list[dict]) -> None:
    shown = ["measure", "dtype", "threads", "cache", "n", "case", "p20_us", "p50_us", "p80_us", "gb_per_s", "copies",
             "percent_of_copy", "times_rival", "p20", "p50", "p80", "unit"]  # fmt: skip
    used = [column for column in shown if any(column in row for row in rows)]
    table = Table(*used, title=name)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in used))
    console.print(table)


def _show_targets(console: Console, rows: list[dict]) -> None:
    table = Table("what", "at least", "measured", "reached", title="what a GPU must reach")
    for line in targets_gpu.judged(rows):
        table.add_row(*line)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(BENCHES), default="cpu")
    parser.add_argument("--only", action="append", help="just this benchmark (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="few repeats; rows are printed, not written")
    parser.add_argument("--source", default="sim:seed=7", help="where keys come from; it does not change the speed")
    arguments = parser.parse_args(argv)
    benches = BENCHES[arguments.device]
    names = arguments.only or list(benches)
    if unknown := [name for name in names if name not in benches]:
        parser.error(f"--only {unknown[0]}: on {arguments.device} there are {', '.join(benches)}")
    try:
        kernels.of_device(torch.device(arguments.device))
    except EverettError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    console = Console()
    everything = []
    for name in names:
        ev.open(arguments.source)  # anew each time, so that no benchmark runs on keys stretched by the one before
        rows = importlib.import_module(f"benchmarks.{benches[name]}").run(arguments.quick)
        ev.close()
        everything += rows
        _show(console, name, rows)
        if not arguments.quick:
            console.print(f"written: {harness.write(name, arguments.device, rows)}")
    if arguments.device == "cuda":
        _show_targets(console, everything)
    return 0


if __name__ == "__main__":
    sys.exit(main())
