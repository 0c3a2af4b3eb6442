"""Held-out losses as a record: items, metrics and their paired differences from the base."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.statistics import paired_difference, standard_error
from deepen.evaluation.verdict import adjust, settle
from deepen.records import EvaluationRecord, Items, Metric, Provenance, TextResult, TokenShift

METRICS = ("nats_per_token", "bits_per_byte")
MARGIN = 0.01
"""Largest loss that counts as kept: 0.01 nats per token is one per cent of perplexity."""
ENOUGH_DOCUMENTS = 30
"""With fewer documents the items are windows; there are more, though those of one document are alike."""


def build_record(
    texts: Sequence[EvaluationText],
    nll: Mapping[str, NDArray[np.float64]],
    base_nll: Mapping[str, NDArray[np.float64]] | None,
    *,
    model: str,
    base: str,
    provenance: Provenance,
    seed: int = 0,
    margin: float = MARGIN,
    shift: Sequence[TokenShift] = (),
) -> EvaluationRecord:
    """Make the record of an evaluation.

    Args:
        texts: what was scored.
        nll: task -> nats per window under the model (see `evaluate_texts`).
        base_nll: the same under the base, or None where no base was scored.
        model: name or path of the model.
        base: name or path of the base.
        provenance: of this evaluation.
        seed: of the intervals' resampling.
        margin: largest loss that still counts as kept, in nats per token and in bits per byte.
        shift: of each text, where it was measured.
    """
    results = text_results(texts, nll, base_nll)
    return EvaluationRecord(
        model=model,
        base=base,
        metrics=text_metrics(results, seed=seed, margin=margin),
        texts=results,
        shift=list(shift),
        provenance=provenance,
    )


def text_results(
    texts: Sequence[EvaluationText],
    nll: Mapping[str, NDArray[np.float64]],
    base_nll: Mapping[str, NDArray[np.float64]] | None,
) -> list[TextResult]:
    """Return the items of each text; arguments as `build_record`."""
    return [_text_result(text, nll[text.task], base_nll[text.task] if base_nll else None) for text in texts]


def text_metrics(results: Sequence[TextResult], *, seed: int = 0, margin: float = MARGIN) -> list[Metric]:
    """Return both metrics of each text, with p values adjusted for all of them."""
    metrics = [
        metric
        for result in results
        for name in METRICS
        if (metric := item_metric(result.items, result.task, result.role, name, seed=seed, margin=margin))
    ]
    # Holm over texts: the two units of one loss are one question.
    by_unit = {name: iter(adjust([each for each in metrics if each.metric == name])) for name in METRICS}
    return [next(by_unit[metric.metric]) for metric in metrics]


def nats_per_token(
    texts: Sequence[EvaluationText], nll: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Return task -> mean loss, for the training log."""
    return {text.task: float(nll[text.task].sum() / text.tokens) for text in texts}


def item_metric(
    items: Items,
    task: str,
    role: Literal["general", "domain"],
    metric: str,
    *,
    seed: int = 0,
    margin: float = MARGIN,
) -> Metric | None:
    """Compute one metric of a text's items; None where its denominator is zero."""
    weights = item_weights(items, metric)
    if not weights.sum() > 0:
        return None
    if items.base_nll is None:
        value = float(np.sum(items.nll) / weights.sum())
        error = standard_error(items.nll, weights)
        return Metric(task=task, role=role, metric=metric, value=value, stderr=error, n=len(weights))
    interval = paired_difference(items.nll, items.base_nll, weights, seed=seed)
    found = Metric(
        task=task,
        role=role,
        metric=metric,
        value=interval.value,
        stderr=interval.stderr,
        n=interval.n,
        base_value=interval.base_value,
        delta=interval.delta,
        ci_low=interval.ci_low,
        ci_high=interval.ci_high,
        p=interval.p,
    )
    return settle(found, margin=margin, error=interval.error, units=interval.n)


def item_weights(items: Items, metric: str) -> NDArray[np.float64]:
    """Return the denominators of a metric: tokens, or bytes × ln 2 since a bit is ln 2 nats."""
    if metric == "nats_per_token":
        return np.asarray(items.tokens, dtype=np.float64)
    return np.asarray(items.bytes, dtype=np.float64) * math.log(2)


def number_items(text: EvaluationText) -> tuple[Literal["document", "window"], NDArray[np.int64]]:
    """Return what the items of a text are and the item each window belongs to, counted from 0: [windows]."""
    _, item = np.unique(text.document, return_inverse=True)
    if item.max(initial=-1) + 1 < ENOUGH_DOCUMENTS:
        return "window", np.arange(len(text.windows))
    return "document", item.astype(np.int64)


def _text_result(
    text: EvaluationText, nll: NDArray[np.float64], base_nll: NDArray[np.float64] | None
) -> TextResult:
    unit, item = number_items(text)

    def total(column: ArrayLike) -> NDArray[np.float64]:
        return np.bincount(item, weights=np.asarray(column, dtype=np.float64)).astype(np.float64)

    items = Items(
        unit=unit,
        tokens=total(text.predicted).astype(int).tolist(),
        bytes=total(text.bytes).astype(int).tolist(),
        nll=total(nll).tolist(),
        base_nll=None if base_nll is None else total(base_nll).tolist(),
    )
    return TextResult(task=text.task, role=text.role, digest=text.digest, items=items)
