"""The page of a study of continual learning, and its table for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from deepen.records import ContinualRecord, SequenceCell, TraceDelta
from deepen.report.svg import DOMAIN, INK, MUTED, Chart, chart
from deepen.report.templates import render
from deepen.report.write import write_page

# The darkest square, on which text can still be read.
_DARKEST = 0.75


def write_continual_report(study: Path, record: ContinualRecord) -> Path:
    """Write `report.html` into a study's directory; return its path.

    Raises:
        OutputError: the page cannot be written.
    """
    return write_page(study / "report.html", render_continual(record))


def render_continual(record: ContinualRecord) -> str:
    """Return the page of a study as HTML; it links the records of its cells, relative to itself."""
    return render(
        "continual.html.j2",
        study=record,
        cells=[(cell, matrix_chart(record, cell)) for cell in record.cells],
        score=score,
        signed=signed,
        general=mean_general,
        delta=delta,
        total=lambda cell, name: sum(getattr(task, name) for task in cell.learned),
    )


def matrix_chart(record: ContinualRecord, cell: SequenceCell) -> Chart:
    """Draw R as a heat-map: the darker a square, the higher the score; each holds its number."""
    names = [task.name for task in record.tasks]
    rows: list[Sequence[float | None]] = [record.base_scores, *cell.R]

    def draw(axes: Axes) -> None:
        for row, scores in enumerate(rows):
            for column, value in enumerate(scores):
                if value is not None:
                    _square(axes, row, column, value, own=column == row - 1)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) + 0.5, -0.5)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axes.set_yticks(range(len(names) + 1), ["base", *names])
        axes.set_xlabel("score on")
        axes.set_ylabel("after learning")
        axes.grid(False)
        axes.tick_params(length=0)

    title = f"{cell.method}, seed {cell.seed}: scores after each task"
    ends = (
        f"{name} {score(own)} when learned, {score(last)} at the end"
        for name, own, last in zip(names, (row[i] for i, row in enumerate(cell.R)), cell.R[-1], strict=True)
    )
    size = (0.75 * len(names) + 1.4, 0.5 * len(names) + 1.8)
    return chart(f"r-{cell.method}-{cell.seed}", title, f"{'; '.join(ends)}.", size, draw)


def _square(axes: Axes, row: int, column: int, value: float, *, own: bool) -> None:
    box = Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, linewidth=0)
    box.set_facecolor(DOMAIN)
    box.set_alpha(_DARKEST * min(max(value, 0), 1))
    axes.add_patch(box)
    if own:
        frame = Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor=MUTED, linewidth=1.2)
        axes.add_patch(frame)
    axes.text(column, row, score(value), ha="center", va="center", color=INK, fontsize=11)


def print_continual(record: ContinualRecord, console: Console) -> None:
    """Print a row a cell, then what was cut of the tasks."""
    table = Table(caption="scores from 0 to 1; 95% intervals over test items")
    table.add_column("method", no_wrap=True)
    for heading in ("seed", "OP", "95%", "BWT", "95%", "FWT", "general Δ", "trained"):
        table.add_column(heading, justify="right", no_wrap=True)
    if record.base_scores:
        table.add_row("base", "", score(fmean(record.base_scores)))
    for cell in record.cells:
        table.add_row(*_cells(cell))
    console.print(table)
    for cell in record.cells:
        if cell.deltas:
            said = "; ".join(f"{each.name} {delta(each)}" for each in cell.deltas)
            console.print(f"{cell.method}, seed {cell.seed}: {said}", highlight=False, soft_wrap=True)
    for task in record.tasks:
        if task.prompts_cut or task.test_prompts_cut or task.answers_cut:
            said = (
                f"{task.name}: cut in their middle {task.prompts_cut} of {task.learned} prompts learned, "
                f"{task.test_prompts_cut} of {task.tested} tested; {task.answers_cut} answers learned are "
                f"longer than the {task.answer_tokens} tokens that may be written"
            )
            console.print(said, highlight=False, soft_wrap=True)


def _cells(cell: SequenceCell) -> tuple[str, ...]:
    return (
        cell.method,
        str(cell.seed),
        score(cell.op),
        f"{score(cell.op_low)} to {score(cell.op_high)}",
        signed(cell.bwt),
        f"{signed(cell.bwt_low)} to {signed(cell.bwt_high)}",
        signed(cell.forward_transfer),
        signed(mean_general(cell)),
        f"{max((task.trainable for task in cell.learned), default=0):,}",
    )


def mean_general(cell: SequenceCell) -> float | None:
    """Return the mean change of general texts' losses from the base, nats per token: what was forgotten."""
    deltas: Sequence[float] = [metric.delta for metric in cell.general if metric.delta is not None]
    return fmean(deltas) if deltas else None


def delta(each: TraceDelta) -> str:
    """Write one of TRACE's deltas with its interval, or that it was not measured."""
    if each.value is None:
        return "not measured"
    ends = f" ({signed(each.low)} to {signed(each.high)})" if each.low is not None else ""
    return signed(each.value) + ends


def score(value: float | None) -> str:
    """Write a score."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Write a change."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")
