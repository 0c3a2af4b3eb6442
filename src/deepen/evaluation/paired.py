"""Two models on the same items."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from deepen.records import Metric

_Z_975 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class PairedItems:
    """The values of one metric of one task, item by item.

    Attributes:
        task: name in results.
        metric: name in results.
        values: of the model, shape (items,).
        base: of the base on the same items, or None where no base was scored.
        clusters: number of the document an item is from, where several share one.
        higher_is_better: whether more is better.
    """

    task: str
    metric: str
    values: NDArray[np.float64]
    base: NDArray[np.float64] | None
    clusters: NDArray[np.int64] | None = None
    higher_is_better: bool = True


def compare_items(items: Sequence[PairedItems], *, margin: float = 0.01, seed: int = 0) -> list[Metric]:
    """Return value, base, paired difference and its normal 95% interval of each."""
    return [_compare(each) for each in items]


def _compare(items: PairedItems) -> Metric:
    metric = Metric(
        task=items.task,
        role="general",
        metric=items.metric,
        value=float(items.values.mean()),
        stderr=_error(items.values),
        n=len(items.values),
    )
    if items.base is None:
        return metric
    change = items.values - items.base
    delta, error = float(change.mean()), _error(change)
    ends = {} if error is None else {"ci_low": delta - _Z_975 * error, "ci_high": delta + _Z_975 * error}
    return metric.model_copy(update={"base_value": float(items.base.mean()), "delta": delta, **ends})


def _error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
