"""What a journal costs: a draw, a step's end, and a whole training step of the demo's model, with and without one.

The cases take turns; each turn writes a new journal, whose opening and closing are not timed. A whole step is much longer
than what a journal adds, so the row `share of a step` is computed from the parts: draws of a step and one step's end.
"""

import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.harness import Case, check, quantile_row, rows
from everett_cuda import keys
from everett_cuda.demo.model import CharacterTransformer, Shape, dropouts

BATCH = 16
CHARACTERS = 80
KEYS = {"no journal": None, "journal": b"", "encrypted journal": bytes(range(32))}


def _timer(folder: Path):
    def timer(cases: list[Case], repeats: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {case.name: [] for case in cases}
        for turn in range(repeats + 1):  # the first is a warm-up
            for case in cases:
                key = KEYS[case.name]
                path = folder / f"{turn}.evj"
                with nullcontext() if key is None else ev.journal(path, key or None):
                    start = time.perf_counter()
                    for _ in range(case.inner):
                        case.run()
                    elapsed = (time.perf_counter() - start) / case.inner
                path.unlink(missing_ok=True)
                if turn:
                    times[case.name].append(elapsed)
        return times

    return timer


def _training_step():
    torch.manual_seed(1)
    model = ev.convert(CharacterTransformer(CHARACTERS, Shape()).train())
    optimizer = torch.optim.AdamW(model.parameters())
    numbers = torch.randint(CHARACTERS, (BATCH, model.shape.context + 1))

    def step():
        loss = F.cross_entropy(model(numbers[:, :-1]).flatten(0, 1), numbers[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, dropouts(model)


def run(quick: bool = False) -> list[dict]:
    """Rows: a draw, a step's end, a training step, and the journal's share of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    training, draws = _training_step()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ev.journal(folder / "check.evj"):
            made = [keys.draw_record() for _ in range(3)]
        records = [r for r in ev.read_journal(folder / "check.evj") if r.ticket and r.data]
        check(len(records) == len(made), "every draw is in the journal")
        result = []
        for measure, call, inner, repeats in (
            ("a draw", keys.draw_record, 2000, 41),
            ("a step's end", ev.step, 200, 41),
            ("a training step", training, 4, 41),
        ):
            cases = [Case(case, call, inner=inner) for case in KEYS]
            group = {"measure": measure, "threads": 1}
            result += rows("journal", group, cases, 5 if quick else repeats, rival="no journal", timer=_timer(folder))
    p50 = {(row["measure"], row["case"]): row["p50_us"] for row in result}
    for case in list(KEYS)[1:]:
        added = sum(n * (p50[m, case] - p50[m, "no journal"]) for m, n in (("a draw", draws), ("a step's end", 1)))
        share = 100 * added / statistics.median([p50["a training step", c] for c in KEYS])
        result.append(quantile_row("journal", case, f"share of a step of {draws} draws", "%", [share]))
    torch.set_num_threads(before)
    return result
