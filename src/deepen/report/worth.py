"""The page of what new blocks are worth, and its tables for the terminal."""

from pathlib import Path

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from deepen.records import Metric, WorthRecord
from deepen.report.svg import DOMAIN, INK, MUTED, Chart, chart
from deepen.report.templates import render
from deepen.report.wording import change, interval, loss
from deepen.report.write import write_page


def write_worth_page(record: WorthRecord, path: Path) -> Path:
    """Write one self-contained HTML page with the path from base to model and the tables; return its path.

    Raises:
        OutputError: the page cannot be written.
    """
    return write_page(path, render_worth(record))


def render_worth(record: WorthRecord) -> str:
    """Return the page as HTML."""
    return render("worth.html.j2", record=record, chart=path_chart(record))


def path_chart(record: WorthRecord) -> Chart:
    """Return the path from base to model: general loss across, domain loss up, a point a factor."""
    points = [(f"{point.alpha:g}", point.general, point.domain) for point in record.path]
    base = record.path[0]
    xs, ys = [x.value for _, x, _ in points], [y.value for _, _, y in points]

    def draw(axes: Axes) -> None:
        axes.axvline(base.general.value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.axhline(base.domain.value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        bars = [[list(arm) for arm in zip(*map(arms, role), strict=True)] for role in _by_role(record)]
        axes.errorbar(
            xs,
            ys,
            xerr=bars[0],
            yerr=bars[1],
            color=DOMAIN,
            marker="o",
            markersize=5,
            linewidth=1.4,
            capsize=2,
        )
        at = next(point for point in record.path if point.alpha == record.chosen)
        axes.plot(
            [at.general.value],
            [at.domain.value],
            "o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=INK,
        )
        for (label, x, y), point in zip(points, record.path, strict=True):
            name = {0.0: "base", 1.0: "model"}.get(point.alpha, label)
            axes.annotate(name, (x.value, y.value), (8, 6), textcoords="offset points", color=INK)
        axes.margins(0.16)
        axes.set_xlabel("general loss  (left: kept better)")
        axes.set_ylabel("domain loss  (down: learned more)")

    words = "; ".join(f"α {label}: general {loss(x.value)}, domain {loss(y.value)}" for label, x, y in points)
    return chart("path", "From the base to the model", words, (5.4, 4.2), draw)


def _by_role(record: WorthRecord) -> tuple[list[Metric], list[Metric]]:
    return [point.general for point in record.path], [point.domain for point in record.path]


def arms(metric: Metric) -> tuple[float, float]:
    """Lengths of an interval's bar below and above its point."""
    if metric.delta is None or metric.ci_low is None or metric.ci_high is None:
        return 0.0, 0.0
    return max(metric.delta - metric.ci_low, 0), max(metric.ci_high - metric.delta, 0)


def print_worth(record: WorthRecord, console: Console) -> None:
    """Print a table of the blocks, one of the path, and the point chosen."""
    console.print(record.layout, highlight=False, markup=False)
    console.print(_block_table(record))
    console.print(_path_table(record))
    said = f"chosen: α = {record.chosen:g}, {record.rule}; by this text, so score it on another"
    console.print(said, highlight=False, soft_wrap=True)


def _block_table(record: WorthRecord) -> Table:
    table = new_table("block", "after", "general without", "domain without", "adds, general", "adds, domain")
    for each in record.blocks:
        table.add_row(
            str(each.block),
            str(each.after) if each.after >= 0 else "bottom",
            _moved(each.general),
            _moved(each.domain),
            f"{100 * each.general_share:.1f} %",
            f"{100 * each.domain_share:.1f} %",
        )
    return table


def _path_table(record: WorthRecord) -> Table:
    table = new_table("α", "general", "from base", "domain", "from base")
    for point in record.path:
        mark = "→ " if point.alpha == record.chosen else ""
        general, domain = point.general, point.domain
        table.add_row(
            f"{mark}{point.alpha:g}", loss(general.value), _moved(general), loss(domain.value), _moved(domain)
        )
    return table


def new_table(*titles: str) -> Table:
    """Return a table of numbers for the terminal, without rows."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _moved(metric: Metric) -> str:
    """A difference over its interval."""
    if not metric.delta:
        return "–" if metric.delta is None else "0"
    return f"{change(metric.delta)}\n{interval(metric.ci_low, metric.ci_high)}"
