"""Small figures of what reaches and moves each block that trains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from deepen.report.read import RunReport

WIDTH, HEIGHT = 140, 26
_MOST_POINTS = 70


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One figure of one block over training.

    Attributes:
        name: of the figure.
        first: its value at the beginning, averaged over a few steps.
        last: at the end.
        path: the line, in a box of `WIDTH` by `HEIGHT`, for SVG; empty without two points.
    """

    name: str
    first: float
    last: float
    path: str


@dataclass(frozen=True)
class BlockTraces:
    """The figures of one block."""

    block: int
    traces: tuple[Trace, ...]


def trace_blocks(report: RunReport) -> list[BlockTraces]:
    """Return the figures of every block that trained, bottom to top.

    Lines of one figure share a logarithmic scale, so that blocks can be compared by eye.
    """
    names = sorted({index for point in report.training for index in point.blocks})
    steps = {index: [p.blocks[index] for p in report.training if index in p.blocks] for index in names}
    gradients = {index: _thin([step.gradient_norm for step in steps[index]]) for index in names}
    updates = {index: _thin([step.update for step in steps[index]]) for index in names}
    return [
        BlockTraces(index, (_trace("gradient norm", index, gradients), _trace("update", index, updates)))
        for index in names
    ]


def _thin(values: Sequence[float]) -> list[float]:
    size = -(-len(values) // _MOST_POINTS)
    return [fmean(values[at : at + size]) for at in range(0, len(values), size)]


def _trace(name: str, index: int, all_values: dict[int, list[float]]) -> Trace:
    values = all_values[index]
    positive = [value for each in all_values.values() for value in each if value > 0]
    return Trace(name=name, first=values[0], last=values[-1], path=_path(values, positive))


def _path(values: Sequence[float], scale: Sequence[float]) -> str:
    if len(values) < 2 or not scale:
        return ""
    low, high = math.log(min(scale)), math.log(max(scale))
    points = []
    for place, value in enumerate(values):
        share = (math.log(max(value, math.exp(low))) - low) / ((high - low) or 1)
        x, y = place / (len(values) - 1) * WIDTH, (HEIGHT - 2) * (1 - share) + 1
        points.append(f"{x:.1f} {y:.1f}")
    return "M" + " L".join(points)
