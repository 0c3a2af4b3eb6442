"""What was evaluated, item by item: the texts and tasks that a run, an evaluation or one record holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepen.errors import DataError
from deepen.evaluation.paired import PairedItems
from deepen.evaluation.record import item_weights
from deepen.evaluation.suites.comparing import paired_items
from deepen.records import (
    EvaluationRecord,
    Role,
    RunResult,
    TaskRecord,
    TextResult,
    read_record,
    read_result,
)

Key = tuple[str, str]
"""A text or task, and its metric."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a text or task on its items.

    Attributes:
        items: of the model and, where one was scored, its base.
        role: `general` (must be kept) or `domain` (must be learned).
        asked: digest of what was scored, the same for every model.
        tokens: predicted tokens of a text; None for a task.
    """

    items: PairedItems
    role: Role
    asked: str
    tokens: int | None

    @property
    def is_text(self) -> bool:
        """Whether it is a held-out loss."""
        return self.tokens is not None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """All scores found in one place.

    Attributes:
        place: a run, a directory of an evaluation, or a record.
        label: how results call it.
        result: of a run; None for others.
        base: name or path of the base; None where none was scored.
        scores: of texts, then of tasks.
        itemless: figures that are no score of items, such as perplexities.
    """

    place: Path
    label: str
    result: RunResult | None
    base: str | None
    scores: Mapping[Key, Score]
    itemless: tuple[str, ...]


def read_evaluated(place: Path, label: str, metric: str) -> Evaluated:
    """Read everything that was evaluated in a place.

    Args:
        place: a finished run, a directory `deepen evaluate` wrote, or one record of either.
        label: how results call it.
        metric: of texts: `nats_per_token` or `bits_per_byte`.

    Raises:
        DataError: nothing was evaluated there, a run is unfinished, or a record is malformed.
    """
    result, files = None, [place]
    if not place.is_file():
        files = _records_in(place)
        if not files:
            result, files = read_result(place), _records_in(place / "evaluation")
    texts = [read_record(path, EvaluationRecord) for path in files if not _is_task(path)]
    tasks = [read_record(path, TaskRecord) for path in files if _is_task(path)]
    # A run's own texts stand before those of one name that were scored later.
    found = [pair for text in texts[::-1] for pair in _of_texts(text, metric)]
    scores = dict(found) | dict(pair for task in tasks for pair in _of_task(task))
    if not scores:
        raise DataError(f"{place}: holds no evaluation (no items in heldout.json, texts.json or task-….json)")
    return Evaluated(
        place=place,
        label=label,
        result=result,
        base=next((base for base in [*(r.base for r in texts), *(r.base for r in tasks)] if base), None),
        scores=scores,
        itemless=tuple(line for task in tasks for line in _itemless(task)),
    )


def mean_of(runs: Sequence[Evaluated], label: str) -> Evaluated:
    """Average several runs of one recipe, as of several seeds, item by item.

    Raises:
        DataError: they were not all evaluated on the same items.
    """
    first = runs[0]
    for run in runs:
        other = [key for key in first.scores if not _asked_alike(first.scores[key], run.scores.get(key))]
        if other or len(run.scores) != len(first.scores):
            raise DataError(f"{run.place}: not evaluated on the same items as {first.place}")
    scores = {
        key: replace(score, items=replace(score.items, values=_mean([run.scores[key] for run in runs])))
        for key, score in first.scores.items()
    }
    return replace(first, label=label, scores=scores)


def _asked_alike(score: Score, other: Score | None) -> bool:
    return other is not None and (score.asked, len(score.items.values)) == (
        other.asked,
        len(other.items.values),
    )


def _mean(scores: Sequence[Score]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.mean([score.items.values for score in scores], axis=0)
    return values


def _records_in(directory: Path) -> list[Path]:
    texts = [directory / name for name in ("heldout.json", "texts.json")]
    return [path for path in texts if path.is_file()] + sorted(directory.glob("task-*.json"))


def _is_task(path: Path) -> bool:
    return path.name.startswith("task-")


def _of_texts(record: EvaluationRecord, metric: str) -> Iterator[tuple[Key, Score]]:
    for text in record.texts:
        items = _text_items(text, metric)
        yield (
            (text.task, metric),
            Score(items=items, role=text.role, asked=text.digest, tokens=sum(text.items.tokens)),
        )


def _text_items(text: TextResult, metric: str) -> PairedItems:
    base = text.items.base_nll
    return PairedItems(
        task=text.task,
        metric=metric,
        values=np.asarray(text.items.nll, dtype=np.float64),
        base=None if base is None else np.asarray(base, dtype=np.float64),
        weights=item_weights(text.items, metric),
        higher_is_better=False,
    )


def _of_task(record: TaskRecord) -> Iterator[tuple[Key, Score]]:
    roles = {(metric.task, metric.metric): metric.role for metric in record.metrics}
    for scores in record.scores:
        key = scores.task, scores.metric
        role = roles.get(key) or "general"
        yield key, Score(items=paired_items(scores), role=role, asked=record.asked, tokens=None)


def _itemless(record: TaskRecord) -> Iterator[str]:
    held = {(scores.task, scores.metric) for scores in record.scores}
    for metric in record.metrics:
        if (metric.task, metric.metric) not in held:
            yield f"{metric.task} {metric.metric}: no score of single items"
