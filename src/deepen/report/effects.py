"""What each new block does: a figure, and tables for the page and the terminal."""

from pathlib import Path

from matplotlib.axes import Axes
from rich.console import Console
from rich.text import Text

from deepen.records import EffectsRecord, TextEffect, TokenEffect
from deepen.report.svg import DOMAIN, GENERAL, INK, MUTED, Chart, chart
from deepen.report.templates import render
from deepen.report.wording import change, interval, loss, shown
from deepen.report.worth import arms, new_table
from deepen.report.write import write_page

_MARKERS = "osD^v"
# Tokens of each block and text in the terminal; the page has all.
_NAMED = 3


def write_effects_page(record: EffectsRecord, path: Path) -> Path:
    """Write one self-contained HTML page with the figure and the tables; return its path.

    Raises:
        OutputError: the page cannot be written.
    """
    return write_page(path, render_effects(record))


def render_effects(record: EffectsRecord) -> str:
    """Return the page as HTML."""
    return render("effects.html.j2", effects=record, effects_chart=effects_chart(record))


def effects_chart(record: EffectsRecord) -> Chart:
    """Return the figure: by how much each block moves the loss of each text read off the stream.

    Texts of one role share a colour; each text has a marker and a place of its own within a block's row.
    """
    texts = [(text.task, text.role) for text in record.blocks[0].texts]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for number, (task, role) in enumerate(texts):
            row = [block.texts[number].loss for block in record.blocks]
            offset = 0.18 * (number - (len(texts) - 1) / 2)
            axes.errorbar(
                [metric.delta or 0.0 for metric in row],
                [place + offset for place in range(len(row))],
                xerr=[list(arm) for arm in zip(*map(arms, row), strict=True)],
                color=GENERAL if role == "general" else DOMAIN,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linestyle="",
                elinewidth=1.4,
                capsize=2,
                label=f"{task} ({role})",
            )
        axes.set_yticks(range(len(record.blocks)), [str(block.block) for block in record.blocks])
        axes.set_ylim(-0.6, len(record.blocks) - 0.4)
        axes.set_ylabel("new block")
        axes.set_xlabel("change of the loss, nats per token  (left: likelier)")
        axes.legend(fontsize=11, labelcolor=INK, loc="best")

    words = "; ".join(
        f"block {block.block}: "
        + ", ".join(f"{text.task} {change(text.loss.delta or 0.0)}" for text in block.texts)
        for block in record.blocks
    )
    height = min(9.0, 1.4 + 0.5 * len(record.blocks))
    return chart(
        "effects", "What each new block does to the loss read off the stream", words, (5.4, height), draw
    )


def print_effects(record: EffectsRecord, console: Console) -> None:
    """Print a table of the blocks and texts, and one of the tokens."""
    console.print(record.layout, highlight=False, markup=False)
    table = new_table("block", "text", "adds", "changes", "below", "above", "Δ")
    named = new_table("block", "text", "token", "Δ log p", "times", "most after")
    for block in record.blocks:
        for text in block.texts:
            table.add_row(str(block.block), text.task, *_figures(text))
            for each in text.tokens[:_NAMED]:
                named.add_row(str(block.block), text.task, *_cells(each))
    console.print(table)
    said = "below, above: nats per token read off the stream there; changes: of first choices"
    console.print(said, highlight=False, soft_wrap=True)
    console.print(named)


def _figures(text: TextEffect) -> list[str]:
    found = text.loss
    return [
        f"{100 * text.share:.1f} %",
        f"{100 * text.changed:.1f} %",
        loss(found.base_value or 0.0),
        loss(found.value),
        f"{change(found.delta or 0.0)}\n{interval(found.ci_low, found.ci_high)}",
    ]


def _cells(token: TokenEffect) -> list[Text]:
    found = (shown(token.token), change(token.gain), str(token.count), shown(token.context[-24:]))
    return [Text(each) for each in found]  # as it is: a text may hold what looks like markup
