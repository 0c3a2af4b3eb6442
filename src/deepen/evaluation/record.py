"""Held-out losses as a record: items, metrics and their paired differences from the base."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.statistics import paired_difference, standard_error
from deepen.records import EvaluationRecord, Items, Metric, Provenance, TextResult

METRICS = ("nats_per_token", "bits_per_byte")
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
    """
    results = [
        _text_result(text, nll[text.task], base_nll[text.task] if base_nll else None) for text in texts
    ]
    metrics = [
        metric
        for result in results
        for name in METRICS
        if (metric := item_metric(result.items, result.task, result.role, name, seed=seed))
    ]
    return EvaluationRecord(model=model, base=base, metrics=metrics, texts=results, provenance=provenance)


def nats_per_token(
    texts: Sequence[EvaluationText], nll: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Return task -> mean loss, for the training log."""
    return {text.task: float(nll[text.task].sum() / text.tokens) for text in texts}


def item_metric(
    items: Items, task: str, role: Literal["general", "domain"], metric: str, *, seed: int = 0
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
    return Metric(
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
    )


def item_weights(items: Items, metric: str) -> NDArray[np.float64]:
    """Return the denominators of a metric: tokens, or bytes × ln 2 since a bit is ln 2 nats."""
    if metric == "nats_per_token":
        return np.asarray(items.tokens, dtype=np.float64)
    return np.asarray(items.bytes, dtype=np.float64) * math.log(2)


def _text_result(
    text: EvaluationText, nll: NDArray[np.float64], base_nll: NDArray[np.float64] | None
) -> TextResult:
    _, item = np.unique(text.document, return_inverse=True)
    unit: Literal["document", "window"] = "document"
    if item.max(initial=-1) + 1 < ENOUGH_DOCUMENTS:
        unit, item = "window", np.arange(len(text.windows))

    def total(column: ArrayLike) -> NDArray[np.float64]:
        return np.bincount(item, weights=np.asarray(column, dtype=np.float64)).astype(np.float64)

    items = Items(
        unit=unit,
        tokens=total([len(window) - 1 for window in text.windows]).astype(int).tolist(),
        bytes=total(text.bytes).astype(int).tolist(),
        nll=total(nll).tolist(),
        base_nll=None if base_nll is None else total(base_nll).tolist(),
    )
    return TextResult(task=text.task, role=text.role, digest=text.digest, items=items)
