"""`python -m everett_cuda.demo --source URI`: opens the source, trains the twins, samples, and writes the report. Under
torchrun all processes train the twins together."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import distributed, session
from ..errors import EverettError
from . import report, text
from .budget import check_recording
from .model import Shape, dropouts
from .ranks import Ranks, default_source, open_source, started
from .sample import sample_line
from .train import make_twins, train

LINES = 3
LONGEST = 80
TEMPERATURE = 0.8


def run(
    uri: str, steps: int, folder: Path, seed: int, threads: int, console: Console, ranks: Ranks
) -> report.Report | None:
    """The whole demo on the source that `uri` names; writes into `folder`, prints to `console`, sets torch's threads. Only
    the first rank samples, reports, prints and writes; the others return None.

    Raises EverettError (no source, a recording too short for the run, no matplotlib) or OSError (folder not writable),
    all of these before the training where they can be known. The source is closed in any case.
    """
    report.require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        source = open_source(uri, ranks)
        corpus = text.load()
        twins = make_twins(corpus, Shape(), seed, ranks)
        draws_per_step = dropouts(twins[0].model)
        if ranks.first:
            label = source.status().label
            console.print(f"source {source.driver.name}: {label}", markup=False, highlight=False, soft_wrap=True)
            shared = 0 if ranks.size == 1 else 2 * steps + 2 + ranks.size * (2 * steps // distributed.INTERVAL_STEPS + 1)
            check_recording(source, keys=draws_per_step * steps + shared, words=LINES * LONGEST)
        torch.set_num_threads(threads)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=steps, losses="")

            def on_step(step: int) -> None:
                losses = ", ".join(f"{twin.name} {twin.losses[-1]:.3f}" for twin in twins)
                progress.update(task, completed=step, losses=f"loss: {losses}")

            def on_held_out(step: int) -> None:
                losses = ", ".join(f"{twin.name} {twin.held_out[-1][1]:.3f}" for twin in twins)
                console.print(f"step {step:4}: held-out loss {losses}")

            train(twins, corpus, steps, seed, ranks, on_step, on_held_out)
        if not ranks.first:
            return None
        lines = [sample_line(twins[1].model, corpus.characters, source, LONGEST, TEMPERATURE) for _ in range(LINES)]
        behind = tuple(str(p) for p in distributed.provenance()) if ranks.size > 1 else ()
        made = report.make(session.status(), twins, draws_per_step, lines, behind)
    finally:
        distributed.teardown()
        session.close()
    console.print(report.table(made))
    report.print_lines(made, console)
    for path in report.write(made, folder):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return made


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "whole number from 1 on"  # argparse names it in its error


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, 2 after an error (its message on stderr), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m everett_cuda.demo", description=__doc__)
    help = "for example auto, replay:FILE or sim:seed=7 (default EVERETT_SOURCE, the broker of this machine, or auto)"
    parser.add_argument("--source", metavar="URI", default=default_source(), help=help)
    parser.add_argument("--steps", type=_positive, default=400, help="training steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of plot and table (demo)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and nonces, never of keys (default 0)")
    # Ops this small gain little by a second thread, and lose much where another process wants the core: with two
    # threads on two busy cores 150 steps took 10 minutes, with one 400 steps took 70 s.
    parser.add_argument("--threads", type=_positive, default=1, help="of torch and of ours (default %(default)s)")
    given = parser.parse_args(arguments)
    try:
        with started() as ranks:
            console = Console(quiet=not ranks.first)
            run(given.source, given.steps, given.out, given.seed, given.threads, console, ranks)
    except (EverettError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the source is closed, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
