"""The figures of a study's page."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from deepen.records import StudyRecord, StudyRow, StudyScore
from deepen.report.svg import INK, MUTED, SERIES, Chart, chart
from deepen.report.wording import change, count, loss

# One more than the colours: no two of some dozens of rows look alike.
_MARKERS = "os^DvPX*"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def plane(record: StudyRecord, domain: str) -> Chart | None:
    """Return the learning–forgetting plane of a domain; None where no general text was scored.

    General loss less the base's across, domain loss up; a cross for the intervals, a dot a seed.
    """
    rows = [row for row in record.rows if row.domain == domain and row.general]
    if not rows:
        return None
    base = rows[0].domain_score.base_value
    places = [("base", 0.0, base), *((row.row, *_place(row)) for row in rows)]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.axhline(base, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot([0], [base], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK, label="base")
        for number, row in enumerate(rows):
            _draw_row(axes, row, SERIES[number % len(SERIES)], _MARKERS[number % len(_MARKERS)])
        axes.margins(0.12)
        # Names beside the plot: methods may lie as near to each other as they like.
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=11, labelcolor=INK, handlelength=1.4)
        axes.set_xlabel("general loss, change from the base  (left: kept better)")
        axes.set_ylabel("domain loss  (down: learned more)")

    words = "; ".join(f"{label}: general {change(x)}, domain {loss(y)}" for label, x, y in places)
    return chart(f"plane-{domain}", f"Learning and forgetting: {domain}", words, (7.0, 4.4), draw)


def _place(row: StudyRow) -> tuple[float, float]:
    return (row.general.delta if row.general else 0.0), row.domain_score.value


def _draw_row(axes: Axes, row: StudyRow, colour: str, marker: str) -> None:
    general, domain = row.general, row.domain_score
    if general is None:
        return
    across = general.seed_deltas
    up = [domain.base_value + delta for delta in domain.seed_deltas]
    axes.plot(across, up, linestyle="", marker=".", markersize=4, color=colour, alpha=0.7)
    x, y = _place(row)
    bars = [[[size] for size in _arms(score)] for score in (general, domain)]
    axes.errorbar(
        x,
        y,
        xerr=bars[0],
        yerr=bars[1],
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1.4,
        capsize=2.5,
        label=row.row,
    )


def _arms(score: StudyScore) -> tuple[float, float]:
    """Lengths of an interval's bar below and above its point."""
    if score.ci_low is None or score.ci_high is None:
        return 0.0, 0.0
    return max(score.delta - score.ci_low, 0), max(score.ci_high - score.delta, 0)


def curves_chart(record: StudyRecord, domain: str) -> Chart | None:
    """Training loss of all rows over tokens: colour by number of blocks, dash by placement and zeros."""
    rows = [row for row in record.rows if row.domain == domain and len(row.curve) > 1]
    if not rows:
        return None
    colours, dashes = _styles(rows)

    def draw(axes: Axes) -> None:
        for row, colour, dash in zip(rows, colours, dashes, strict=True):
            x, y = zip(*row.curve, strict=True)
            axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.5, label=row.row)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("nats per token")
        axes.legend(fontsize=10, labelcolor=INK, handlelength=3.2, ncols=1 + (len(rows) > 6))

    words = "; ".join(f"{row.row} ends at {loss(row.curve[-1][1])}" for row in rows)
    return chart(f"curves-{domain}", f"Training loss: {domain}", words, (6.4, 4.6), draw)


def _styles(rows: Sequence[StudyRow]) -> tuple[list[str], list[object]]:
    """Colour and dash of each row: by its facts where all rows have them, else by its number."""
    if all({"blocks", "placement"} <= row.facts.keys() for row in rows):
        counts = sorted({int(row.facts["blocks"]) for row in rows})
        kinds = list(dict.fromkeys(map(_kind, rows)))
        at = [(counts.index(int(row.facts["blocks"])), kinds.index(_kind(row))) for row in rows]
    else:
        at = [(number, number // len(SERIES)) for number in range(len(rows))]
    return [SERIES[c % len(SERIES)] for c, _ in at], [_DASHES[d % len(_DASHES)] for _, d in at]


def _kind(row: StudyRow) -> str:
    """What makes a line over numbers of new blocks: where they stand, and what of them was zero."""
    zeroed = row.facts.get("zeroed", "writes")
    return str(row.facts["placement"]) + ("" if zeroed == "writes" else f", {zeroed} zero")


def count_charts(record: StudyRecord, domain: str) -> list[Chart]:
    """Change of domain and of general loss over the number of new blocks, a line a kind of them."""
    rows = [row for row in record.rows if row.domain == domain and "blocks" in row.facts]
    if len({row.facts["blocks"] for row in rows}) < 2:
        return []
    said: list[tuple[str, Callable[[StudyRow], StudyScore | None]]] = [
        ("Domain loss", lambda row: row.domain_score),
        ("General loss", lambda row: row.general),
    ]
    return [
        _over_counts(f"{domain}-{number}", f"{name}: {domain}", rows, of)
        for number, (name, of) in enumerate(said)
        if all(of(row) for row in rows)
    ]


def _over_counts(
    name: str, title: str, rows: Sequence[StudyRow], of: Callable[[StudyRow], StudyScore | None]
) -> Chart:
    kinds = list(dict.fromkeys(map(_kind, rows)))

    def draw(axes: Axes) -> None:
        for number, kind in enumerate(kinds):
            found = sorted(
                (int(row.facts["blocks"]), score) for row in rows if _kind(row) == kind and (score := of(row))
            )
            x, y = [blocks for blocks, _ in found], [score.delta for _, score in found]
            bars = list(zip(*(_arms(score) for _, score in found), strict=True))
            axes.errorbar(
                x,
                y,
                yerr=bars,
                color=SERIES[number % len(SERIES)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.5,
                capsize=2.5,
                label=kind,
            )
        axes.axhline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({int(row.facts["blocks"]) for row in rows}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(MaxNLocator(1))
        axes.set_xlabel("new blocks")
        axes.set_ylabel("Δ, nats per token")
        axes.legend(fontsize=11, labelcolor=INK, handlelength=3)

    words = "; ".join(f"{row.row}: {change(score.delta)}" for row in rows if (score := of(row)))
    return chart(f"counts-{name}", title, words, (4.4, 3.4), draw)
