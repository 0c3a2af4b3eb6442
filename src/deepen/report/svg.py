"""matplotlib charts as SVG that takes its text and colours from the page around it."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in these colours, which then become the page's own, light or dark.
INK, MUTED, GENERAL, DOMAIN, _RULE = "#010101", "#020202", "#030303", "#040404", "#0b0b0b"
SERIES = ("#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0c0c0c")
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--faint)",
    _RULE: "var(--rule)",
    GENERAL: "var(--general)",
    DOMAIN: "var(--domain)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Chart:
    """A chart and what it shows."""

    title: str
    svg: Markup


def chart(
    name: str, title: str, description: str, size: tuple[float, float], draw: Callable[[Axes], None]
) -> Chart:
    """Draw a chart as an inline SVG element.

    Args:
        name: prefix of its ids, unique on a page.
        title: what it is, for screen readers.
        description: what it shows, in words.
        size: width and height in inches of 72 CSS pixels.
        draw: draws into the axes, in the colours of this module.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The page's fonts draw the text, so it does not matter which glyphs matplotlib's own lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _inline(file.getvalue(), name, title, description))


def _inline(svg: str, name: str, title: str, description: str) -> Markup:
    """Reduce a stand-alone SVG to an element of an HTML page."""
    view = re.search(r'viewBox="([^"]*)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    # Older matplotlib writes the shorthand `font: 12px …`, newer the two properties.
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body).replace("xlink:href", "href")
    body = re.sub(r"#(?:0[0-9a-c]){3}\b", lambda found: _PAGE_COLOURS.get(found[0], found[0]), body)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    labels = (
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    box = view[1] if view else ""
    root = f'<svg class="chart" viewBox="{box}" role="img" aria-labelledby="{name}-title {name}-desc">'
    return Markup(f"{root}{labels}{body}")
