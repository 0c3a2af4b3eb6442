"""The layout as a drawing: the stack of blocks, bottom to top."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

_HEIGHT = 400
_LABEL_HEIGHT = 14


@dataclass(frozen=True)
class Box:
    """One block of the drawing; y grows downwards."""

    y: float
    height: float
    new: bool


@dataclass(frozen=True)
class Label:
    """The name of neighbouring new blocks: written at `y`, pointing at `at`."""

    text: str
    y: float
    at: float


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A drawing of a layout, `height` tall."""

    base: int
    new: tuple[int, ...]
    boxes: list[Box]
    labels: list[Label]
    height: float


def draw_tower(line: str) -> Tower | None:
    """Draw a layout line (`■` a base block, `□4` the new block at index 4); None if it is no such line."""
    if re.sub(r"■|□\d+|\s", "", line):
        return None
    marks = re.findall(r"■|□\d+", line)
    new = tuple(index for index, mark in enumerate(marks) if mark != "■")
    if not marks or any(marks[index] != f"□{index}" for index in new):
        return None
    pitch = min(max(_HEIGHT / len(marks), 6), 22)
    height = pitch * len(marks)
    gap = 2 if pitch < 12 else 3
    boxes = [Box(height - (index + 1) * pitch, pitch - gap, index in new) for index in range(len(marks))]
    return Tower(base=len(marks) - len(new), new=new, boxes=boxes, labels=_labels(new, boxes), height=height)


def _labels(new: Sequence[int], boxes: Sequence[Box]) -> list[Label]:
    """Name runs of new blocks, from the bottom, moved up where two would overlap."""
    labels: list[Label] = []
    for _, run in groupby(enumerate(new), key=lambda pair: pair[1] - pair[0]):
        indices = [index for _, index in run]
        top, bottom = boxes[indices[-1]], boxes[indices[0]]
        at = (top.y + bottom.y + bottom.height) / 2
        y = min(at, labels[-1].y - _LABEL_HEIGHT) if labels else at
        text = str(indices[0]) if len(indices) == 1 else f"{indices[0]}–{indices[-1]}"
        labels.append(Label(text, y, at))
    return labels
