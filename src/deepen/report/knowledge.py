"""The page of a study of knowledge, and its table for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from rich.console import Console

from deepen.records import Comparison, Difference, KnowledgeRecord
from deepen.report.comparison import MEANING, describe_differences, print_table
from deepen.report.page import METRICS
from deepen.report.svg import INK, MUTED, SERIES, Chart, chart
from deepen.report.templates import render
from deepen.report.wording import change, interval, loss
from deepen.report.write import write_page


def write_knowledge_report(study: Path, record: KnowledgeRecord) -> Path:
    """Write `report.html` into a study's directory; return its path.

    Raises:
        OutputError: the page cannot be written.
    """
    return write_page(study / "report.html", render_knowledge(record))


def render_knowledge(record: KnowledgeRecord) -> str:
    """Return the page as HTML; it links the records of the cells, relative to itself."""
    comparison = record.comparison
    return render(
        "knowledge.html.j2",
        study=record,
        comparison=comparison,
        findings=describe_differences(comparison) if comparison else [],
        charts=difference_charts(comparison) if comparison else [],
        unit=METRICS.get(comparison.metric, comparison.metric) if comparison else "",
        meaning=MEANING,
        spread=_spread,
    )


def _spread(values: Sequence[float]) -> str:
    """Write the range over seeds; nothing for a single one."""
    return f"seeds {loss(min(values))} to {loss(max(values))}" if len(values) > 1 else "one seed"


def print_knowledge(record: KnowledgeRecord, console: Console) -> None:
    """Print the table of the means over seeds, then how the models differ from the tuned base."""
    if record.comparison is None:
        console.print("the tuned base, with which the others are compared, is not finished", soft_wrap=True)
        return
    print_table(record.comparison, console)
    for line in describe_differences(record.comparison):
        console.print(line, highlight=False, soft_wrap=True)


def difference_charts(comparison: Comparison) -> list[Chart]:
    """Differences from the tuned base of all others: held-out losses, and scores of tasks by their metric."""
    units = list(dict.fromkeys(column.metric for column in comparison.columns))
    others = len(comparison.rows) > 2
    return [_differences(comparison, unit, number) for number, unit in enumerate(units) if others]


def _differences(comparison: Comparison, unit: str | None, number: int) -> Chart:
    places = [at for at, column in enumerate(comparison.columns) if column.metric == unit]
    names = [comparison.columns[at].name for at in places]
    found = [(row.label, [row.cells[at].from_first for at in places]) for row in comparison.rows[2:]]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for which, (label, differences) in enumerate(found):
            _draw_row(axes, label, differences, which, len(found))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(f"{unit or 'nats per token'}, change from {comparison.rows[1].label}")
        if figure := axes.get_figure():
            figure.legend(loc="outside lower left", fontsize=11, labelcolor=INK, handlelength=1.4)

    title = f"Scores: {unit}" if unit else "Held-out loss  (left: better)"
    words = "; ".join(
        f"{label}, {name}: {change(each.delta)}, {interval(each.ci_low, each.ci_high)}"
        for label, differences in found
        for name, each in zip(names, differences, strict=True)
        if each
    )
    return chart(f"differences-{number}", title, words, (5.2, 2.0 + 0.5 * len(names)), draw)


def _draw_row(axes: Axes, label: str, differences: Sequence[Difference | None], which: int, of: int) -> None:
    """Draw one model's differences, a little above or below the others'."""
    shown = [(at, each) for at, each in enumerate(differences) if each]
    height = [at + 0.18 * (which - (of - 1) / 2) for at, _ in shown]
    middle = [each.delta for _, each in shown]
    low = [max(each.delta - (each.delta if each.ci_low is None else each.ci_low), 0) for _, each in shown]
    high = [max((each.delta if each.ci_high is None else each.ci_high) - each.delta, 0) for _, each in shown]
    axes.errorbar(
        middle,
        height,
        xerr=[low, high],
        linestyle="",
        color=SERIES[which % len(SERIES)],
        marker="os^DvPX"[which % 7],
        markersize=6,
        linewidth=1.4,
        capsize=2.5,
        label=label,
    )
