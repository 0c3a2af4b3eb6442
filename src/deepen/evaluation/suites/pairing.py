"""The model's items beside the base's: metrics with their paired differences, and the items to read."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lm_eval.api.metrics import bits_per_byte, mean

from deepen.errors import EvaluationError
from deepen.evaluation.suites.comparing import compare_scores
from deepen.evaluation.suites.library import LoadedTask
from deepen.records import Metric, ScoredItem, ScoredTask, TaskScores

_RIGHT: Final = ("acc_per_token", "acc_norm", "acc", "exact_match", "pass@1")


@dataclass(frozen=True, kw_only=True)
class PairedTask:
    """A task under the model and its base.

    Attributes:
        scores: the items of each metric that is a mean or a ratio of sums over them.
        metrics: all metrics, those compared among themselves alone.
    """

    scores: list[TaskScores]
    metrics: list[Metric]


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One metric of one task or group over its items.

    Attributes:
        task: name in results.
        metric: `acc`, or `exact_match,strict-match` where an answer is taken out of the text.
        leaves: the tasks whose items it is made of.
        aggregate: the harness's function from values to the figure.
        higher_is_better: whether more is better.
    """

    task: str
    metric: str
    leaves: tuple[str, ...]
    aggregate: Callable[[Sequence[Any]], float] | None
    higher_is_better: bool

    def values(self, scored: ScoredTask) -> list[Any]:
        name, _, filtered = self.metric.partition(",")
        return [
            item.values[name]
            for item in scored.items
            if item.task in self.leaves and name in item.values and item.filter == (filtered or "none")
        ]


def pair_task(loaded: LoadedTask, model: ScoredTask, base: ScoredTask | None) -> PairedTask:
    """Put each metric of a task under the model beside the base's, on the same items.

    Bits per byte are compared as the ratio of sums they are; other figures of the harness that are no means
    (perplexity, F1, …) are given without an interval.

    Raises:
        EvaluationError: the task has none of the metrics asked for, or one is not a number for each item.
    """
    columns = list(_columns(loaded, model))
    if not columns:
        held = sorted({metric for item in model.items for metric in item.values})
        raise EvaluationError(
            f"{loaded.spec.label}: has no metric {', '.join(loaded.spec.metrics)}; it has {', '.join(held)}"
        )
    itemised = [column for column in columns if column.aggregate in (None, mean, bits_per_byte)]
    scores = [_scores(column, model, base) for column in itemised]
    others = [_other(column, model, base) for column in columns if column not in itemised]
    metrics = [*compare_scores(scores), *others]
    return PairedTask(
        scores=scores,
        metrics=[metric.model_copy(update={"role": loaded.spec.role}) for metric in metrics],
    )


def item_lines(model: ScoredTask, base: ScoredTask | None) -> Iterator[str]:
    """Write the items as lines of JSON: what was asked, what is right, and what either answered."""
    others = base.items if base else [None] * len(model.items)
    for item, other in zip(model.items, others, strict=True):
        line: dict[str, Any] = {
            "task": item.task,
            "doc_id": item.doc_id,
            "filter": item.filter,
            "target": item.target,
            "request": item.request,
            "answer": item.answer,
            "value": item.values,
            "correct": _right(item),
        }
        if other is not None:
            line |= {"base_answer": other.answer, "base": other.values, "base_correct": _right(other)}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _right(item: ScoredItem) -> bool | None:
    """Whether the item counts as right; None where its metrics do not say."""
    found = next((item.values[metric] for metric in _RIGHT if metric in item.values), None)
    return None if found is None else bool(found == 1)


def _columns(loaded: LoadedTask, scored: ScoredTask) -> Iterator[_Column]:
    if loaded.group or len(loaded.tasks) == 1:
        yield from _columns_of(loaded, scored, loaded.spec.label, tuple(loaded.tasks))
        return
    for leaf in loaded.tasks:  # of a tag
        yield from _columns_of(loaded, scored, replace(loaded.spec, name=leaf).label, (leaf,))


def _columns_of(
    loaded: LoadedTask, scored: ScoredTask, name: str, leaves: tuple[str, ...]
) -> Iterator[_Column]:
    task = loaded.tasks[leaves[0]]
    aggregates, better = task.aggregation(), task.higher_is_better()
    for metric in _metrics(loaded, scored, leaves):
        plain = metric.partition(",")[0]
        yield _Column(
            task=name,
            metric=metric,
            leaves=leaves,
            aggregate=aggregates.get(plain),
            higher_is_better=bool(better.get(plain, True)),
        )


def _metrics(loaded: LoadedTask, scored: ScoredTask, leaves: tuple[str, ...]) -> list[str]:
    """Name the metrics to report: those asked for and held, else a group's own, else all."""
    held: dict[str, None] = {}
    for item in scored.items:
        if item.task in leaves:
            suffix = "" if item.filter == "none" else f",{item.filter}"
            held.update(dict.fromkeys(f"{metric}{suffix}" for metric in item.values))
    if wanted := loaded.spec.metrics:
        return [metric for metric in held if metric in wanted or metric.partition(",")[0] in wanted]
    listed = loaded.group.aggregate_metric_list if loaded.group else None
    own = {each.metric for each in listed or ()}
    return [metric for metric in held if not own or metric.partition(",")[0] in own]


def _scores(column: _Column, model: ScoredTask, base: ScoredTask | None) -> TaskScores:
    values, others = column.values(model), None if base is None else column.values(base)
    weights = None
    if column.aggregate is bits_per_byte:  # (log-likelihood, bytes) of each
        weights = [size * math.log(2) for _, size in values]
        values = [-nats for nats, _ in values]
        others = None if others is None else [-nats for nats, _ in others]
    if not all(isinstance(value, int | float) for value in (*values, *(others or ()))):
        raise EvaluationError(f"{column.task}: {column.metric} is not a number for each item")
    return TaskScores(
        task=column.task,
        metric=column.metric,
        higher_is_better=column.higher_is_better,
        values=values,
        base=others,
        weights=weights,
    )


def _other(column: _Column, model: ScoredTask, base: ScoredTask | None) -> Metric:
    """A figure that is no mean over items."""
    assert column.aggregate is not None
    values = column.values(model)
    metric = Metric(
        task=column.task,
        metric=column.metric,
        value=float(column.aggregate(values)),
        stderr=None,
        n=len(values),
        higher_is_better=column.higher_is_better,
    )
    if base is None:
        return metric
    base_value = float(column.aggregate(column.values(base)))
    return metric.model_copy(update={"base_value": base_value, "delta": metric.value - base_value})
