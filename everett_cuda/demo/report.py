"""What a run measured, as a record, a table and a plot; each says what kind of source the bits came from."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..errors import EverettError
from ..session import Status
from .sample import Line
from .train import Twin

SMOOTHED_STEPS = 20


@dataclass(frozen=True)
class Report:
    """A whole run. Times in milliseconds a step (p20, median, p80), of torch and ours; losses in nats a character."""

    uri: str
    label: str
    steps: int
    parameters: int
    dropouts_per_step: int
    p: float
    torch_step_ms: tuple[float, float, float]
    everett_step_ms: tuple[float, float, float]
    torch_losses: list[float]
    everett_losses: list[float]
    torch_held_out: list[tuple[int, float]]
    everett_held_out: list[tuple[int, float]]
    fresh: int
    stretched: int
    reused: int
    raw_bytes_in: int
    conditioned_bytes_out: int
    direct_bytes: int
    health: str
    lines: list[Line]
    torch_version: str
    threads: int
    machine: str
    ranks: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Median time of a step, ours over torch's."""
        return self.everett_step_ms[1] / self.torch_step_ms[1]


def make(
    status: Status, twins: tuple[Twin, Twin], dropouts_per_step: int, lines: list[Line], ranks: tuple[str, ...] = ()
) -> Report:
    """The report of a finished run. ranks: of several processes, whose source stands behind each; losses, times and counts
    are the first one's."""

    def milliseconds(twin: Twin) -> tuple[float, float, float]:
        return tuple(float(q) for q in np.percentile(np.array(twin.step_s) * 1e3, [20, 50, 80]))

    torchs, ours = twins
    return Report(
        uri=status.source.uri,
        label=status.source.label,
        steps=len(ours.losses),
        parameters=sum(p.numel() for p in ours.model.parameters()),
        dropouts_per_step=dropouts_per_step,
        p=ours.model.shape.p,
        torch_step_ms=milliseconds(torchs),
        everett_step_ms=milliseconds(ours),
        torch_losses=torchs.losses,
        everett_losses=ours.losses,
        torch_held_out=torchs.held_out,
        everett_held_out=ours.held_out,
        fresh=status.draws["fresh"],
        stretched=status.draws["stretched"],
        reused=status.draws["reused"],
        raw_bytes_in=status.source.raw_bytes_in,
        conditioned_bytes_out=status.source.conditioned_bytes_out,
        direct_bytes=sum(line.bits for line in lines) // 8,
        health=status.source.health,
        lines=lines,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        machine=platform.processor() or platform.machine(),
        ranks=ranks,
    )


def table(report: Report) -> Table:
    """The report as a table for people."""
    r = report
    out = Table(
        title=f"{r.steps:,} steps, {r.parameters:,} parameters, {r.dropouts_per_step} dropouts a step (p = {r.p:g}), "
        f"{r.threads} thread{'s' * (r.threads > 1)}" + (f", {len(r.ranks)} processes" if r.ranks else "")
    )
    out.add_column("", no_wrap=True)
    out.add_column("torch", justify="right")
    out.add_column("everett_cuda", justify="right")

    def time(step_ms: tuple[float, float, float]) -> str:
        return f"{step_ms[1]:.1f} ({step_ms[0]:.1f} to {step_ms[2]:.1f})"

    last = slice(-SMOOTHED_STEPS, None)
    out.add_row("ms a step (p20 to p80)", time(r.torch_step_ms), time(r.everett_step_ms))
    out.add_row("median, over torch's", "1", f"{r.ratio:.3f}")
    out.add_row(
        f"training loss (last {min(SMOOTHED_STEPS, r.steps)})",
        f"{np.mean(r.torch_losses[last]):.3f}",
        f"{np.mean(r.everett_losses[last]):.3f}",
    )
    out.add_row("held-out loss", f"{r.torch_held_out[-1][1]:.3f}", f"{r.everett_held_out[-1][1]:.3f}")
    out.add_section()
    for name, value in (
        ("kind of source", r.label),
        ("health", r.health),
        ("keys fresh", f"{r.fresh:,}"),
        ("keys stretched", f"{r.stretched:,}"),
        ("keys reused", f"{r.reused:,}"),
        ("raw bytes in", f"{r.raw_bytes_in:,}"),
        ("conditioned bytes out", f"{r.conditioned_bytes_out:,}"),
        ("direct bytes used", f"{r.direct_bytes:,}"),
    ):
        out.add_row(name, "", value)
    return out


def print_lines(report: Report, console: Console) -> None:
    """The sampled lines, each with the number of direct bits that chose it, the source's label once more, and the ranks."""
    title = f"Sampled text, 64 direct (unexpanded) bits a character; source {report.label}:"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    for line in report.lines:
        console.print(f"{line.bits:6,} bits | {line.text}", markup=False, highlight=False, soft_wrap=True)
    for line in report.ranks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(report: Report, folder: Path) -> list[Path]:
    """Writes loss.png, table.txt and report.json into `folder`, which exists; returns their paths."""
    paths = [folder / name for name in ("loss.png", "table.txt", "report.json")]
    plot(report, paths[0])
    with open(paths[1], "w", encoding="utf-8") as file:
        console = Console(file=file, width=120, color_system=None)
        console.print(f"source: {report.uri}", markup=False, highlight=False, soft_wrap=True)
        console.print(table(report))
        print_lines(report, console)
    paths[2].write_text(json.dumps(asdict(report) | {"ratio": report.ratio}, indent=1) + "\n", encoding="utf-8")
    return paths


def require_matplotlib() -> None:
    """Raises EverettError when the plot could not be drawn at the end of the run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EverettError(
            "the demo draws its plot with matplotlib, which is not installed. Run: pip install everett_cuda[demo]"
        ) from error


def plot(report: Report, path: Path) -> None:
    """Both training losses (smoothed) and both held-out losses, in one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = (
        ("torch", report.torch_losses, report.torch_held_out, "tab:blue", "o", 3.5),
        ("everett_cuda", report.everett_losses, report.everett_held_out, "tab:orange", "D", 1.2),
    )
    for name, losses, held_out, colour, marker, width in rows:  # torch's line is wide: ours lies on it
        window = min(SMOOTHED_STEPS, max(1, len(losses) // 4))
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        at = np.arange(len(smooth)) + (window + 1) / 2  # the middle of the steps that a mean is over, counted from 1
        axes.plot(at, smooth, color=colour, linewidth=width, label=f"{name}: training, mean over {window} steps")
        axes.plot(*zip(*held_out, strict=True), marker, color=colour, fillstyle="none", label=f"{name}: held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a character)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"Character transformer, dropout p = {report.p:g}: torch beside everett_cuda", fontsize=12)
    uri = report.uri if len(report.uri) <= 60 else "..." + report.uri[-57:]
    colour = "tab:red" if "NOT QUANTUM" in report.label else "black"
    figure.suptitle(f"{report.label}     source {uri}", fontsize=11, color=colour)
    figure.savefig(path)
