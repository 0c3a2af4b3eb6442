"""Scores of two models on the same items, a metric a task: difference, interval, test and verdict.

Right-or-wrong items get McNemar's exact test and Tango's score interval (`deepen.evaluation.binary`), and
where they share clusters the score test, for as many items as they are worth. All others get the studentised
bootstrap of `deepen.evaluation.statistics`, which draws clusters as wholes. It cannot know what it has not
seen: where scores between 0 and 1 differ in next to no item, they are counted as right or wrong too, which of
all such scores of one mean vary most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deepen.errors import DataError
from deepen.evaluation.binary import (
    clustered_interval,
    design_effect,
    exact_p,
    mcnemar_p,
    score_interval,
)
from deepen.evaluation.statistics import Interval, paired_difference, standard_error
from deepen.evaluation.verdict import adjust, settle
from deepen.records import Metric

_Floats = NDArray[np.float64]

# Fewer items or clusters that differ are too few to draw from.
_FEW_DIFFER = 8


@dataclass(frozen=True, kw_only=True)
class PairedItems:
    """One score of every item of a task.

    Attributes:
        task: name in results.
        metric: name of the score, such as `acc`.
        values: of the model, shape (items,).
        base: of the base on the same items in the same order; None where it was not evaluated.
        clusters: a number for each item; items of one number belong together (questions on one document)
            and are never counted as independent. None: each item stands alone.
        weights: denominators, such as an item's tokens where `values` are its summed nats: the score is
            Σ values / Σ weights. None: each item counts 1, and the score is a mean.
        higher_is_better: whether a larger score is a gain.
    """

    task: str
    metric: str
    values: NDArray[np.float64]
    base: NDArray[np.float64] | None
    clusters: NDArray[np.int64] | None = None
    weights: NDArray[np.float64] | None = None
    higher_is_better: bool = True


def compare_items(items: Sequence[PairedItems], *, margin: float = 0.01, seed: int = 0) -> list[Metric]:
    """Compare a model with its base on every task.

    Neither the order of tasks nor that of items (with their clusters) changes a result.

    Args:
        items: the tasks; `p_holm` is over all of them.
        margin: largest loss that still counts as kept, in the score's own unit (0.01: a point of accuracy).
        seed: of the resampling; each task's interval depends on the seed and its own items alone.

    Returns:
        A metric for each task, in the order given.

    Raises:
        DataError: a task has no items, columns that differ in length, or a score that is not a number.
        ValueError: the margin is not a positive number.
    """
    return adjust([_compare(_check(each), margin, seed) for each in items])


def _check(items: PairedItems) -> PairedItems:
    columns = [
        column for column in (items.values, items.base, items.clusters, items.weights) if column is not None
    ]
    if {column.shape for column in columns} != {(len(items.values),)} or not len(items.values):
        shapes = ", ".join(str(column.shape) for column in columns)
        raise DataError(
            f"{items.task}: scores shaped {shapes}; each needs one entry an item, and there must be one"
        )
    for name, column in (("the model", items.values), ("the base", items.base)):
        if column is not None and not np.isfinite(column).all():
            odd = int((~np.isfinite(column)).sum())
            raise DataError(
                f"{items.task}: {items.metric} under {name} is not a number in {odd} of {len(column)} items; "
                "score these items, or leave them out for both models"
            )
    return items


def _compare(items: PairedItems, margin: float, seed: int) -> Metric:
    values, sizes = _by_cluster(items, items.values)
    if items.base is None:
        error = standard_error(values, sizes)
        return _metric(items, value=float(np.sum(values) / np.sum(sizes)), stderr=error)
    base, _ = _by_cluster(items, items.base)
    right_or_wrong = items.weights is None and _is_binary(items.values) and _is_binary(items.base)
    alone = right_or_wrong and len(sizes) == len(items.values)
    if right_or_wrong or _hardly_differs(items, items.base):
        found = _counted(items, items.base, alone)
    else:
        found = paired_difference(values, base, sizes, seed=seed)
    metric = _metric(
        items,
        value=found.value,
        stderr=found.stderr,
        base_value=found.base_value,
        delta=found.delta,
        ci_low=found.ci_low,
        ci_high=found.ci_high,
        p=found.p,
    )
    tails = partial(_tails, items.values, items.base) if alone else None
    return settle(metric, margin=margin, error=found.error, units=len(sizes), tails=tails)


def _tails(values: _Floats, base: _Floats, difference: float) -> tuple[float, float]:
    """Return the chances of a difference as high, and as low, as that of right-or-wrong items."""
    n, gained, lost = len(values), int((values > base).sum()), int((values < base).sum())
    return exact_p(gained, lost, n, difference), exact_p(lost, gained, n, -difference)


def _hardly_differs(items: PairedItems, base: _Floats) -> bool:
    """Whether scores between 0 and 1 differ in too few items or clusters to draw from."""
    scores = np.append(items.values, base)
    units = np.arange(len(base)) if items.clusters is None else items.clusters
    bounded = items.weights is None and scores.min() >= 0 and scores.max() <= 1
    return bool(bounded) and len(np.unique(units[items.values != base])) < _FEW_DIFFER


def _counted(items: PairedItems, base: _Floats, alone: bool) -> Interval:
    """Infer from how much was gained and how much was lost; `alone`: by single items, right or wrong."""
    change = items.values - base
    parts = (items.values, base, np.maximum(change, 0), np.maximum(-change, 0), np.ones(len(base)))
    columns = [_by_cluster(items, part)[0] for part in parts]
    # The order of the items does not show in the last bit.
    order = np.lexsort(columns)
    values, others, gains, losses, sizes = (column[order] for column in columns)
    effect = 1.0 if alone else design_effect(gains, losses, sizes)
    low = high = p = error = None
    if effect is not None:
        gained, lost, n = (float(each.sum()) / effect for each in (gains, losses, sizes))
        if alone:
            (low, high), p = score_interval(gained, lost, n), mcnemar_p(int(gained), int(lost))
        else:
            low, high, p = clustered_interval(gained, lost, n, len(sizes))
        # For planning, Agresti and Coull's two of each more than seen: none discordant is not none ever.
        rate = (gained + lost + 2) / (n + 4)
        error = float(np.sqrt((rate - ((gained - lost) / (n + 4)) ** 2) / n))
    return Interval(
        value=float(values.sum() / sizes.sum()),
        stderr=standard_error(values, sizes),
        base_value=float(others.sum() / sizes.sum()),
        delta=float((gains - losses).sum() / sizes.sum()),
        ci_low=low,
        ci_high=high,
        n=len(sizes),
        error=error,
        p=p,
    )


def _metric(items: PairedItems, **found: float | None) -> Metric:
    given = {"task": items.task, "metric": items.metric, "n": len(items.values)}
    return Metric.model_validate(given | {"higher_is_better": items.higher_is_better} | found)


def _by_cluster(items: PairedItems, values: _Floats) -> tuple[_Floats, _Floats]:
    """Return the sum of values and of weights of each cluster: the score is the ratio of their totals."""
    weights = np.ones(len(values)) if items.weights is None else items.weights
    if items.clusters is None:
        return np.asarray(values, dtype=np.float64), weights
    # Within a cluster added by size, so that the order of the items does not show in the last bit.
    order = np.lexsort((weights, values, items.clusters))
    _, place = np.unique(items.clusters[order], return_inverse=True)
    sums = (np.bincount(place, weights=column[order]) for column in (values, weights))
    of_values, of_weights = (each.astype(np.float64) for each in sums)
    return of_values, of_weights


def _is_binary(values: _Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())
