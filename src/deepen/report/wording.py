"""Numbers and findings in plain words."""

import math
from dataclasses import dataclass
from typing import Literal

from deepen.records import EarlyStop, Metric, QuantisationResult

_MINUS = "\N{MINUS SIGN}"
# Between a number and its unit: the line does not break there.
_SPACE = "\N{NO-BREAK SPACE}"


def count(number: float) -> str:
    """Write a count as people say it: 812, 4.1 k, 1.1 M, 66.7 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{_SPACE}{letter}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Write a duration: 42 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.2g}{_SPACE}s"
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size}{_SPACE}{name}" + (f"{_SPACE}{rest}{_SPACE}{part_name}" if rest else "")
    return f"{whole}{_SPACE}s"


def loss(value: float) -> str:
    """Write a loss with three decimals."""
    return "not a number" if math.isnan(value) else f"{value:.3f}".replace("-", _MINUS)


def change(value: float) -> str:
    """Write a difference with its sign and three decimals, or as many as it takes to see it."""
    digits = 3 if abs(value) >= 0.0005 or value == 0 else -math.floor(math.log10(abs(value)))
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def interval(low: float | None, high: float | None) -> str:
    """Write the ends of an interval."""
    return (
        "too few items for an interval" if low is None or high is None else f"{change(low)} to {change(high)}"
    )


def number(value: int, noun: str) -> str:
    """Write an exact count with its noun: 1 block, 16,000 steps."""
    return f"{value} {noun}" if value == 1 else f"{value:,} {noun}s"


def shown(text: str) -> str:
    """Return a piece of text in quotes on one line, line breaks and odd characters made visible."""
    return f"‘{repr(text)[1:-1]}’"


def epochs(value: float) -> str:
    """Write how often a text was gone through: 1 epoch, 0.52 epochs."""
    written = f"{value:.3g}"
    return f"{written}{_SPACE}{'epoch' if written == '1' else 'epochs'}"


def quantisation(result: QuantisationResult) -> str:
    """Say how the base was held in training, what that cost, and what was trained is worth without it."""
    held = (
        f"In training the base's {number(result.layers, 'linear layer')} were held in {result.bits} bits, "
        f"{'unchanged' if result.unchanged else 'and changed'}."
    )
    costs = [
        f"{each.task}: base {loss(each.base_quantised)} so held, {loss(each.base)} in full precision; "
        f"trained {loss(each.trained_quantised)} and {loss(each.trained)}."
        for each in result.losses
    ]
    missing = [f"What that costs was not measured: {result.unmeasured}."] if result.unmeasured else []
    return " ".join([held, *costs, *missing])


def early_stop(result: EarlyStop) -> str:
    """Say what ended training before its time, and what was kept."""
    kept = f"those after step {result.kept:,}" if result.kept else "the base's own"
    return (
        f"Training ended after step {result.step:,}: the loss of {result.text} had risen by "
        f"{change(result.rise)} nats per token, and {result.bound:g} was allowed (train.max_general_loss). "
        f"The weights are {kept}."
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a figure means.

    Attributes:
        task: name of the text.
        role: `general` or `domain`.
        finding: in a word or two.
        amount: by how much, where there is a finding.
        kind: `good`, `bad` or `open`, for the eye.
        sentence: the finding with its numbers.
    """

    task: str
    role: Literal["general", "domain"]
    finding: str
    amount: str
    kind: Literal["good", "bad", "open"]
    sentence: str


_WORDS = {
    ("domain", "fell"): "learned",
    ("domain", "rose"): "got worse",
    ("general", "fell"): "improved",
    ("general", "rose"): "forgot",
}


def verdict(metric: Metric) -> Verdict:
    """Say what a metric in nats per token means: a finding only where its interval excludes zero."""
    low, high, delta = metric.ci_low, metric.ci_high, metric.delta
    if delta is None or metric.base_value is None:
        return _open(
            metric, "not compared", f"Loss is {loss(metric.value)} nats per token; the base was not scored."
        )
    role = metric.role or "general"
    moved = f"from {loss(metric.base_value)} to {loss(metric.value)} nats per token"
    if low is None or high is None:
        return _open(
            metric, "too few items", f"Loss went {moved}, but {number(metric.n, 'item')} gives no interval."
        )
    if low <= 0 <= high:
        return _open(metric, "not distinguishable", f"Loss went {moved}. {_bound(role, low, high)}")
    way = "fell" if delta < 0 else "rose"
    ends = " to ".join(_size(end) for end in sorted((abs(low), abs(high))))
    return Verdict(
        task=metric.task,
        role=role,
        finding=_WORDS[role, way],
        amount=f"{_size(delta)} nats per token",
        kind="good" if way == "fell" else "bad",
        sentence=f"Loss {way} {moved}, by {_size(delta)} (95% interval {ends}). "
        f"Perplexity is {math.exp(min(delta, 700)):.3g} times the base's.",
    )


def _open(metric: Metric, finding: str, sentence: str) -> Verdict:
    return Verdict(
        task=metric.task,
        role=metric.role or "general",
        finding=finding,
        amount="",
        kind="open",
        sentence=sentence,
    )


def _bound(role: str, low: float, high: float) -> str:
    """What an interval that holds zero still says: the largest loss it allows, for what was to be kept."""
    if role == "general":
        return (
            f"If anything was forgotten, it is less than {_size(high)} (95% interval {interval(low, high)})."
        )
    return f"The base alone could do that (95% interval of the difference {interval(low, high)})."


def _size(value: float) -> str:
    return change(abs(value)).removeprefix("+")
