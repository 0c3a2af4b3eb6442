"""Was it kept, in perplexity, in a verdict, and token by token: what the page says beside the losses."""

import math
from dataclasses import dataclass

from deepen.records import Metric, TokenShift
from deepen.report.read import RunReport
from deepen.report.wording import change, interval, number

# The largest exponent of which the perplexity is still a number.
_MOST_NATS = 700.0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One text in the table of perplexities and verdicts; numbers as they are read.

    Attributes:
        task: name of the text.
        base: perplexity of the base; `–` where it was not scored.
        trained: perplexity of the trained model.
        factor: trained over base, with its 95% interval.
        finding: the verdict, with the items that would decide where it is open.
        p: of no difference at all, adjusted for the texts (Holm).
        kind: `good`, `bad` or `open`, for the eye.
    """

    task: str
    base: str
    trained: str
    factor: str
    finding: str
    p: str
    kind: str


def describe_kept(report: RunReport) -> list[Kept]:
    """Return a row for each text that was scored beside the base."""
    return [_kept(metric) for metric in report.metrics("nats_per_token") if metric.delta is not None]


def token_shifts(report: RunReport) -> list[TokenShift]:
    """Return the shifts measured, domain texts first."""
    found = report.heldout.shift if report.heldout else []
    return sorted(found, key=lambda each: each.role == "general")


def margin_of(report: RunReport) -> float | None:
    """Return the loss the verdicts are about; None in records made before there were any."""
    return next((each.margin for each in report.metrics("nats_per_token") if each.margin), None)


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One metric of a benchmark task.

    Attributes:
        metric: the figures.
        finding: the verdict, with the items that would decide where it is open; `–` without a difference.
        p: of no difference at all, adjusted for the tasks evaluated together (Holm).
        kind: `good`, `bad` or `open`, for the eye.
    """

    metric: Metric
    finding: str
    p: str
    kind: str


def describe_tasks(report: RunReport) -> list[TaskRow]:
    """Return a row for each metric of each finished task, domain tasks first."""
    metrics = [metric for task in report.tasks for metric in task.metrics]
    return [
        TaskRow(
            metric=metric,
            finding="–" if metric.verdict is None else finding(metric),
            p=p_value(metric.p_holm),
            kind=_kind(metric),
        )
        for metric in sorted(metrics, key=lambda each: each.role != "domain")
    ]


def finding(metric: Metric) -> str:
    """Say a verdict in words: `kept`, `learned` of a domain that gained, `lost`, or what it takes to tell."""
    if metric.verdict is None:
        return "not judged"
    if metric.verdict == "kept" and metric.role == "domain" and _gained(metric):
        return "learned"
    if metric.verdict != "not enough items" or metric.items_needed is None:
        return metric.verdict
    return f"not enough items: {number(metric.items_needed, 'item')} would likely tell"


def _gained(metric: Metric) -> bool:
    """Whether the whole interval lies on the better side."""
    ends = (metric.ci_low, metric.ci_high)
    return all(end is not None and (end > 0 if metric.higher_is_better else end < 0) for end in ends)


def p_value(p: float | None) -> str:
    """Write a p to two digits, and nothing below what resampling resolves."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _kept(metric: Metric) -> Kept:
    return Kept(
        task=metric.task,
        base="–" if metric.base_value is None else perplexity(metric.base_value),
        trained=perplexity(metric.value),
        factor=_factor(metric),
        finding=finding(metric),
        p=p_value(metric.p_holm),
        kind=_kind(metric),
    )


def _kind(metric: Metric) -> str:
    return {"kept": "good", "lost": "bad"}.get(metric.verdict or "", "open")


def perplexity(nats: float) -> str:
    """Write the perplexity of a loss in nats per token."""
    return "not a number" if math.isnan(nats) else f"{math.exp(min(nats, _MOST_NATS)):.4g}"


def _factor(metric: Metric) -> str:
    if metric.delta is None:
        return "–"
    low, high = metric.ci_low, metric.ci_high
    ends = interval(low, high) if low is None or high is None else f"{_times(low)} to {_times(high)}"
    return f"{_times(metric.delta)} ({ends})"


def _times(nats: float) -> str:
    return f"{math.exp(min(nats, _MOST_NATS)):.3g}"


def divergence(shift: TokenShift) -> str:
    """Write KL in nats per token with its interval."""
    ends = interval(shift.kl_low, shift.kl_high).replace("+", "")
    return f"{change(shift.kl).removeprefix('+')} ({ends})"
