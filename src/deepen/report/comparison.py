"""Runs side by side, for a page and for the terminal."""

from itertools import chain, repeat
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepen.records import Cell, Column, Comparison, Difference
from deepen.report.figures import plane_chart
from deepen.report.page import METRICS
from deepen.report.retention import p_value
from deepen.report.templates import render
from deepen.report.wording import change, interval, loss
from deepen.report.write import write_page

_LEVEL = 0.05
MEANING = {"general": "must be kept", "domain": "must be learned"}


def write_comparison_page(comparison: Comparison, path: Path) -> Path:
    """Write one self-contained HTML page with the learned/kept plane and the tables; return its path.

    Raises:
        OutputError: the page cannot be written.
    """
    return write_page(path, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """Return the page of a comparison as HTML."""
    unit = METRICS.get(comparison.metric, comparison.metric)
    return render(
        "comparison.html.j2",
        comparison=comparison,
        chart=plane_chart(comparison),
        unit=unit,
        meaning=MEANING,
    )


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the comparison, a row a run; where that does not fit, a row a text and run."""
    table = render_table(comparison)
    fits = console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width
    console.print(table if fits else render_tall_table(comparison))


def render_table(comparison: Comparison) -> Table:
    """Return the comparison as a table for the terminal: values and their differences from the base."""
    table = _table(comparison)
    table.add_column("run")
    for column in comparison.columns:
        table.add_column(Text("\n".join(_heading(column))), justify="right")
        table.add_column(Text("Δ base"), justify="right")
    for row in comparison.rows:
        table.add_row(Text(row.label), *(text for cell in row.cells for text in _texts(cell)))
    return table


def render_tall_table(comparison: Comparison) -> Table:
    """Return the comparison as a table of six columns, however many texts and tasks there are."""
    table = _table(comparison)
    table.add_column("text", no_wrap=True)
    table.add_column("run", overflow="fold")  # of all columns a name can best do with two lines
    for heading in ("value", "Δ base", "95% interval", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, column in enumerate(comparison.columns):
        # The base's row and the first run's are always there to hold these two.
        said = chain(_heading(column), repeat(""))
        for row, words in zip(comparison.rows, said, strict=False):
            cell = row.cells[place]
            moved, ends, p = (*_difference(cell.from_base), "", "", "")[:3]
            table.add_row(Text(words), Text(row.label), _value(cell), moved, ends, p.removeprefix("p "))
        table.add_section()
    return table


def _table(comparison: Comparison) -> Table:
    unit = METRICS.get(comparison.metric, comparison.metric)
    tasks = "; of ↑ more is better" if any(column.metric for column in comparison.columns) else ""
    return Table(
        caption=f"{unit}{tasks}; differences are from the base, paired, with 95% intervals; "
        "p is adjusted (Holm)"
    )


def _heading(column: Column) -> tuple[str, str]:
    """Two lines: the name, and what the text is for or what the task's figure is."""
    if column.metric is None:
        return column.name, MEANING[column.role]
    return column.name, f"{column.metric} {'↑' if column.higher_is_better else '↓'}"


def _value(cell: Cell) -> str:
    return "–" if cell.value is None else loss(cell.value)


def describe_differences(comparison: Comparison) -> list[str]:
    """Say of each run after the first how it differs from the first, as a whole for each role and by task.

    What an interval cannot tell apart is called so, and so is what it could only alone, not among many. Then
    the texts left out.
    """
    first = comparison.rows[1].label
    said = [
        f"{row.label} against {first}: "
        + "; ".join(
            f"{_what(column)} {_against(cell.from_first)}"
            for column, cell in zip(comparison.columns, row.cells, strict=True)
            if column.pooled or column.metric
        )
        for row in comparison.rows[2:]
    ]
    return said + [f"left out: {line}" for line in comparison.left_out]


def _what(column: Column) -> str:
    return f"{column.name} {column.metric}" if column.metric else f"{column.role} loss"


def _against(difference: Difference | None) -> str:
    if difference is None:
        return "not compared"
    low, high = difference.ci_low, difference.ci_high
    ends = f"({interval(low, high)})"
    if low is None or high is None or low <= 0 <= high:
        return f"not distinguishable {ends}"
    if difference.p_holm is not None and difference.p_holm >= _LEVEL:
        p = p_value(difference.p_holm)
        return f"not distinguishable, counting all comparisons ({interval(low, high)}; p {p})"
    size = change(abs(difference.delta)).removeprefix("+")
    return f"{size} {'lower' if difference.delta < 0 else 'higher'} {ends}"


def _texts(cell: Cell) -> tuple[Text, Text]:
    return Text(_value(cell)), Text("\n".join(_difference(cell.from_base)))


def _difference(difference: Difference | None) -> tuple[str, ...]:
    """The difference, its interval and, in newer records, its adjusted p."""
    if difference is None:
        return ()
    said = change(difference.delta), interval(difference.ci_low, difference.ci_high)
    return said if difference.p_holm is None else (*said, f"p {p_value(difference.p_holm)}")
