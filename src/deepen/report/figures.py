"""The charts of the pages."""

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from deepen.records import Comparison, Difference
from deepen.report.read import RunReport
from deepen.report.svg import DOMAIN, GENERAL, INK, MUTED, SERIES, Chart, chart
from deepen.report.wording import count, loss

_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MOST_POINTS = 300


def training_chart(report: RunReport) -> Chart | None:
    """Training loss over tokens; None without logged steps."""
    points = [(point.tokens, point.loss) for point in report.training]
    if len(points) < 2:
        return None
    size = -(-len(points) // _MOST_POINTS)
    thinned = [_mean(points[at : at + size]) for at in range(0, len(points), size)]
    window = max(len(thinned) // 30, 1)
    smooth = [_mean(thinned[max(at - window, 0) : at + window + 1]) for at in range(len(thinned))]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*thinned, strict=True), color=MUTED, linewidth=0.8, alpha=0.5)
        axes.plot([x for x, _ in thinned], [y for _, y in smooth], color=INK, linewidth=1.8)

    description = f"Training loss from {loss(smooth[0][1])} to {loss(smooth[-1][1])} nats per token."
    return _over_tokens("training", "Training loss", description, draw)


def speed_chart(report: RunReport) -> Chart | None:
    """Tokens a second over tokens; None without logged speeds."""
    points = [(p.tokens, p.tokens_per_second) for p in report.training if p.tokens_per_second is not None]
    if len(points) < 2:
        return None
    size = -(-len(points) // _MOST_POINTS)
    thinned = [_mean(points[at : at + size]) for at in range(0, len(points), size)]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*thinned, strict=True), color=INK, linewidth=1.4)
        axes.yaxis.set_major_formatter(lambda value, _: count(value))
        axes.set_ylim(bottom=0)

    usual = median(speed for _, speed in points)
    description = f"Training speed over training: {count(round(usual))} tokens a second in the median step."
    return _over_tokens("speed", "Speed", description, draw, "tokens a second")


def heldout_chart(report: RunReport, role: Literal["general", "domain"]) -> Chart | None:
    """Held-out loss of one role's texts over tokens, with the base's; None without any.

    The general and the domain chart span equally many nats, so that equal changes look equal.
    """
    metrics = report.metrics("nats_per_token", role)
    curves = {each.task: _curve(report, each.task) for each in metrics}
    if not any(len(curve) > 1 for curve in curves.values()):
        return None
    colour = GENERAL if role == "general" else DOMAIN

    def draw(axes: Axes) -> None:
        for metric, dash in zip(metrics, _cycle(len(metrics)), strict=True):
            if metric.base_value is not None:
                axes.axhline(metric.base_value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
                axes.annotate(
                    "base",
                    (1, metric.base_value),
                    (0, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    fontsize=11,
                )
            x, y = zip(*curves[metric.task], strict=True)
            axes.plot(
                x, y, color=colour, linewidth=1.8, linestyle=dash, marker="o", markersize=3, label=metric.task
            )
        low, high = _extent(report, role)
        span = 1.16 * _span(report)
        bottom = max((low + high - span) / 2, min(low, 0))
        axes.set_ylim(bottom, bottom + span)
        if len(metrics) > 1:
            axes.legend(fontsize=11, labelcolor=INK, handlelength=3)

    ends = "; ".join(
        f"{task} from {loss(curve[0][1])} to {loss(curve[-1][1])}" for task, curve in curves.items() if curve
    )
    title = "Held-out general text" if role == "general" else "Held-out domain text"
    return _over_tokens(role, title, f"Nats per token over training: {ends}.", draw)


def plane_chart(comparison: Comparison) -> Chart | None:
    """The learned/kept plane: general loss across, domain loss up; None unless both roles and a base were."""
    pooled = [
        [column.pooled and column.role == role for column in comparison.columns]
        for role in ("general", "domain")
    ]
    if not all(any(each) for each in pooled):
        return None
    across, up = (each.index(True) for each in pooled)
    rows = [(row.label, row.cells[across].value, row.cells[up].value) for row in comparison.rows]
    places = [(label, x, y) for label, x, y in rows if x is not None and y is not None]
    if len(places) < len(rows):
        return None
    _, base_x, base_y = places[0]

    def draw(axes: Axes) -> None:
        axes.axvline(base_x, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.axhline(base_y, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(
            [base_x],
            [base_y],
            marker="o",
            markersize=8,
            markerfacecolor="none",
            markeredgecolor=INK,
            linestyle="",
        )
        for number, (run, (_, x, y)) in enumerate(zip(comparison.rows[1:], places[1:], strict=True)):
            cells = run.cells[across], run.cells[up]
            bars = [[[size] for size in _arms(cell.from_base)] for cell in cells]
            axes.errorbar(
                x,
                y,
                xerr=bars[0],
                yerr=bars[1],
                color=SERIES[number % len(SERIES)],
                marker="os^Dv"[number % 5],
                markersize=6,
                linewidth=1.4,
                capsize=2.5,
            )
        axes.margins(0.18)
        _annotate(axes, places)
        axes.set_xlabel("general loss  (left: kept better)")
        axes.set_ylabel("domain loss  (down: learned more)")

    description = "; ".join(f"{label}: general {loss(x)}, domain {loss(y)}" for label, x, y in places)
    return chart("plane", "Learned against kept", description, (5.4, 4.2), draw)


def _annotate(axes: Axes, places: Sequence[tuple[str, float, float]]) -> None:
    """Name points towards the middle of the plot, moved apart from the bottom up where two would overlap."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[bool, float]] = []
    for label, x, y in sorted(places, key=lambda place: place[2]):
        flip = x > (left + right) / 2
        at = (y - bottom) / (top - bottom) + 0.03
        while any(flip == side and abs(at - other) < 0.055 for side, other in taken):
            at += 0.01
        taken.append((flip, at))
        axes.annotate(
            label,
            (x, bottom + at * (top - bottom)),
            (-8 if flip else 8, 0),
            textcoords="offset points",
            ha="right" if flip else "left",
            va="center",
            color=INK,
        )


def _arms(difference: Difference | None) -> tuple[float, float]:
    """Lengths of an interval's bar below and above its point."""
    if difference is None or difference.ci_low is None or difference.ci_high is None:
        return 0.0, 0.0
    return max(difference.delta - difference.ci_low, 0), max(difference.ci_high - difference.delta, 0)


def _curve(report: RunReport, task: str) -> list[tuple[float, float]]:
    return [
        (point.tokens, point.evaluation[task]) for point in report.evaluations if task in point.evaluation
    ]


def _extent(report: RunReport, role: Literal["general", "domain"]) -> tuple[float, float]:
    metrics = report.metrics("nats_per_token", role)
    values = [value for each in metrics for value in (each.value, each.base_value) if value is not None]
    values += [value for each in metrics for _, value in _curve(report, each.task)]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _span(report: RunReport) -> float:
    extents = [_extent(report, role) for role in ("general", "domain")]
    return max(*(high - low for low, high in extents), 0.05)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(x for x, _ in points), fmean(y for _, y in points)


def _cycle(number: int) -> list[object]:
    return [_DASHES[index % len(_DASHES)] for index in range(number)]


def _over_tokens(
    name: str, title: str, description: str, draw: Callable[[Axes], None], unit: str = "nats per token"
) -> Chart:
    def with_axes(axes: Axes) -> None:
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel(unit)

    return chart(name, title, description, (4.0, 3.0), with_axes)
