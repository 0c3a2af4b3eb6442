"""Was it kept? Non-inferiority by the interval, Holm's correction over tasks, and how many items would tell.

Kept means that a loss above the margin is ruled out: the worse end of the 95% interval of the difference lies
within the margin. So the error that matters, calling kept what lost exactly the margin, happens at most one
time in 40 (the one-sided level of 2.5% that ICH E9 asks of non-inferiority trials). Lost is the mirror image:
the better end lies beyond the margin. Anything else is undecided, never "no difference".

An interval of right-or-wrong items errs at one end a little more or less often than that, since counts jump.
There the exact test must agree (`deepen.evaluation.binary.exact_p`), whose level of 2.5% holds to the letter.

An interval of scores misses evenly on both sides only where their differences are not skewed. Where few items
lose much, a sample may hold none of them, look harmless, and end short of the truth twice as often as on the
other side; and it is just such a sample that does not show its skewness. What one end errs by falls with the
root of the items (Hall, *The Bootstrap and Edgeworth Expansion*, 1992, chapter 3), so the ends that decide
lie 1 + `_CAUTION` / √units times as far from the difference as the interval's. The constant was chosen by
simulation: with it no shape of docs/statistics.md is called kept more often than 2.5%.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtri  # type: ignore[import-untyped]

from deepen.records import Metric

FEWEST_ITEMS = 30
"""Below this the intervals are not shown to hold their level, and nothing is called kept or lost."""
# 95% two-sided, and the chance of 4 in 5 that so many items decide.
_Z_975, _Z_80 = float(ndtri(0.975)), float(ndtri(0.8))
_MOST_ITEMS = 1e9
_CAUTION = 2.5
# Of one end of a 95% interval.
_LEVEL = 0.025

Tails = Callable[[float], tuple[float, float]]
"""Difference -> the chances, were it the truth, of one at least as high, and as low, as was seen."""


def settle(
    metric: Metric, *, margin: float, error: float | None, units: int, tails: Tails | None = None
) -> Metric:
    """Return the metric with its verdict and, where undecided, the items that would likely decide.

    Args:
        metric: with its base, difference and interval; without them it comes back as it is.
        margin: largest loss that still counts as kept, in the metric's own unit.
        error: standard error of the difference, for planning.
        units: independent items: clusters where items share one.
        tails: the exact test; with it the interval's ends decide where they are, if the test agrees.

    Raises:
        ValueError: the margin is not a positive number.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"margin {margin}: must be a positive number")
    if metric.delta is None:
        return metric
    # In the direction of a gain.
    sign = 1 if metric.higher_is_better else -1
    given = None not in (metric.ci_low, metric.ci_high) and units >= FEWEST_ITEMS
    caution = 0.0 if tails else _CAUTION
    reach = 1 + caution / math.sqrt(units)
    ends = (metric.delta + reach * ((end or 0) - metric.delta) for end in (metric.ci_low, metric.ci_high))
    worst, best = sorted(sign * end for end in ends)
    verdict = "kept" if worst > -margin else "lost" if best < -margin else None
    if given and verdict and (tails is None or _agrees(tails, verdict, sign, margin)):
        return metric.model_copy(update={"margin": margin, "verdict": verdict})
    needed = _items_needed(metric.n, sign * metric.delta, margin, error, units, caution)
    return metric.model_copy(update={"margin": margin, "verdict": "not enough items", "items_needed": needed})


def _agrees(tails: Tails, verdict: str, sign: int, margin: float) -> bool:
    """Whether what was seen would be rare enough if the loss were just the margin."""
    gain, loss = tails(-sign * margin)[::sign]
    return (gain if verdict == "kept" else loss) <= _LEVEL


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return the p values adjusted by Holm's step-down procedure; None stays None and does not count."""
    known = [place for place, value in enumerate(values) if value is not None]
    raw = np.array([values[place] for place in known], dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    adjusted: list[float | None] = [None] * len(values)
    for place, value in zip(order.tolist(), stepped.tolist(), strict=True):
        adjusted[known[place]] = min(1.0, value)
    return adjusted


def adjust(metrics: Sequence[Metric]) -> list[Metric]:
    """Return the metrics with `p_holm` over all of them."""
    adjusted = holm([metric.p for metric in metrics])
    return [metric.model_copy(update={"p_holm": p}) for metric, p in zip(metrics, adjusted, strict=True)]


def _items_needed(
    n: int, gain: float, margin: float, error: float | None, units: int, caution: float
) -> int | None:
    """Items in all with which 4 samples in 5 would decide, if spread and loss stay as they are observed.

    A gain is not counted on: where one was observed, no difference is assumed. None where there is no
    telling: a single item, no spread, or a loss of just the margin.
    """
    distance = abs(margin + min(gain, 0))
    if error is None or error == 0 or distance == 0:
        return None
    # The root x of the units solves distance = spread * (z975 * (1 + caution / x) + z80) / x.
    spread = error * math.sqrt(units)
    linear = spread * (_Z_975 + _Z_80)
    root = (linear + math.sqrt(linear**2 + 4 * distance * spread * _Z_975 * caution)) / (2 * distance)
    needed = max(n / units * root**2, n * FEWEST_ITEMS / units, n + 1)
    return math.ceil(needed) if needed < _MOST_ITEMS else None
