"""What a chat evaluation gives: scores item by item, metrics, and figures by category."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepen.evaluation.paired import PairedItems
from deepen.records import Metric, TaskScores

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What came of it.

    Attributes:
        scores: each metric item by item.
        metrics: value, base, difference, interval and verdict of each.
        results: of the model: the whole and each category -> figure -> value.
        base_results: the same of the base.
        left_out: items without a verdict for either model; they are in no figure.
        lines: one JSON object an item, to read.
    """

    scores: list[TaskScores]
    metrics: list[Metric]
    results: Figures
    base_results: Figures
    left_out: int
    lines: list[str]


def task_scores(items: PairedItems) -> TaskScores:
    """Return the items of a metric as records keep them."""
    return TaskScores(
        task=items.task,
        metric=items.metric,
        higher_is_better=items.higher_is_better,
        values=items.values.tolist(),
        base=None if items.base is None else items.base.tolist(),
    )


def figures(name: str, categories: Sequence[str], columns: Mapping[str, NDArray[np.float64]]) -> Figures:
    """Return the mean of each column over all items (`name`) and over each category (`name/category`)."""
    by = np.array(categories)
    groups = {name: np.ones(len(by), dtype=bool)}
    groups |= {f"{name}/{each}": by == each for each in sorted(set(categories))}
    return {
        group: {metric: float(values[held].mean()) for metric, values in columns.items()}
        for group, held in groups.items()
    }
