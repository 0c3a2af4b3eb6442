"""Finished tasks compared together, so that what is adjusted for their number is so for all of them."""

from collections.abc import Sequence

import numpy as np

from deepen.errors import DataError, EvaluationError
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.records import Metric, TaskRecord, TaskScores


def compare_scores(scores: Sequence[TaskScores]) -> list[Metric]:
    """Return the metric of each, compared together.

    Raises:
        EvaluationError: a score is not a number, or the model and its base were not given the same items.
    """
    try:
        return compare_items([paired_items(each) for each in scores])
    except DataError as error:
        raise EvaluationError(str(error)) from None


def compare_tasks(records: Sequence[TaskRecord]) -> list[TaskRecord]:
    """Return the records with the metrics of all their tasks compared together."""
    together = compare_scores([scores for record in records for scores in record.scores])
    found = {(metric.task, metric.metric): metric for metric in together}
    return [
        record.model_copy(update={"metrics": [_updated(metric, found) for metric in record.metrics]})
        for record in records
    ]


def _updated(metric: Metric, found: dict[tuple[str, str], Metric]) -> Metric:
    update = found.get((metric.task, metric.metric))
    return metric if update is None else update.model_copy(update={"role": metric.role})


def paired_items(scores: TaskScores) -> PairedItems:
    """Return the columns of a task's score as they are compared."""
    return PairedItems(
        task=scores.task,
        metric=scores.metric,
        values=np.asarray(scores.values, dtype=np.float64),
        base=None if scores.base is None else np.asarray(scores.base, dtype=np.float64),
        weights=None if scores.weights is None else np.asarray(scores.weights, dtype=np.float64),
        higher_is_better=scores.higher_is_better,
    )
