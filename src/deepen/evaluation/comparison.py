"""Compare runs that were evaluated on the same items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepen.errors import DataError
from deepen.evaluation.record import item_weights
from deepen.evaluation.statistics import paired_difference
from deepen.records import (
    Cell,
    Column,
    Comparison,
    Difference,
    EvaluationRecord,
    Items,
    Row,
    RunResult,
    TextResult,
    read_record,
    read_result,
)

_ROLES = ("general", "domain")
# Evaluations of one base in other precisions or batches agree better than this; those of two bases do not.
_SAME_BASE = 1e-2


@dataclass(frozen=True)
class _Run:
    directory: Path
    label: str
    result: RunResult
    record: EvaluationRecord

    def text(self, task: str) -> TextResult:
        return next(text for text in self.record.texts if text.task == task)


def compare_runs(
    run_dirs: Sequence[Path],
    labels: Sequence[str] | None = None,
    *,
    metric: str = "nats_per_token",
    seed: int = 0,
) -> Comparison:
    """Put finished runs beside their base: losses, paired differences from the base and from the first run.

    Args:
        run_dirs: run directories, each with `result.json` and `evaluation/heldout.json`.
        labels: names of the rows; default: the directories' names.
        metric: `nats_per_token` or `bits_per_byte`.
        seed: of the intervals' resampling.

    Raises:
        DataError: a run is unfinished, was not evaluated beside its base, or was evaluated on other texts or
            another base than the first.
    """
    if not run_dirs:
        raise DataError("compare: no run given")
    if labels is not None and len(labels) != len(run_dirs):
        raise DataError(f"compare: {len(labels)} labels for {len(run_dirs)} runs")
    runs = [
        _read(directory, label) for directory, label in zip(run_dirs, labels or _names(run_dirs), strict=True)
    ]
    for run in runs:
        _check_comparable(runs[0], run)
    columns = _columns(runs[0].record)
    return Comparison(
        metric=metric,
        base=runs[0].record.base,
        columns=[_describe(runs[0], name, tasks) for name, tasks in columns],
        rows=[
            Row(label="base", cells=[_base_cell(runs[0], tasks, metric) for _, tasks in columns]),
            *(_row(run, runs[0], [tasks for _, tasks in columns], metric, seed) for run in runs),
        ],
    )


def _names(run_dirs: Sequence[Path]) -> list[str]:
    names = [directory.resolve().name for directory in run_dirs]
    return names if len(set(names)) == len(names) else [str(directory) for directory in run_dirs]


def _read(directory: Path, label: str) -> _Run:
    result = read_result(directory)
    record = read_record(directory / "evaluation" / "heldout.json", EvaluationRecord)
    if not record.texts or any(text.items.base_nll is None for text in record.texts):
        raise DataError(f"{directory}: holds no held-out texts scored beside the base; nothing to compare")
    return _Run(directory, label, result, record)


def _check_comparable(first: _Run, run: _Run) -> None:
    digests, others = ({text.task: text.digest for text in each.record.texts} for each in (first, run))
    if differing := sorted(task for task in digests.keys() | others if digests.get(task) != others.get(task)):
        raise DataError(
            f"{run.directory}: not evaluated on the same texts as {first.directory} (differs: "
            f"{', '.join(differing)}). Evaluate both with one evaluate section and one tokenizer"
        )
    for task in digests:
        ours, theirs = first.text(task).items, run.text(task).items
        if ours.tokens != theirs.tokens:
            raise DataError(f"{run.directory}: {task} is not cut into the same items as in {first.directory}")
        if not np.isclose(np.sum(_base_nll(ours)), np.sum(_base_nll(theirs)), rtol=_SAME_BASE):
            raise DataError(
                f"{run.directory}: its base scores {task} otherwise than the base of {first.directory}"
            )


def _columns(record: EvaluationRecord) -> list[tuple[str, list[str]]]:
    """Name and texts of each column: a role as a whole, then its texts where there are several."""
    columns: list[tuple[str, list[str]]] = []
    for role in _ROLES:
        tasks = [text.task for text in record.texts if text.role == role]
        columns += [(f"all {role}", tasks)] * (len(tasks) > 1) + [(task, [task]) for task in tasks]
    return columns


def _describe(run: _Run, name: str, tasks: Sequence[str]) -> Column:
    role = run.text(tasks[0]).role
    items = _pool(run, tasks)
    alone = sum(text.role == role for text in run.record.texts) == len(tasks)
    return Column(name=name, role=role, pooled=alone, n=len(items.tokens), tokens=sum(items.tokens))


def _pool(run: _Run, tasks: Sequence[str]) -> Items:
    """The items of several texts as one."""
    each = [run.text(task).items for task in tasks]
    return Items(
        unit=each[0].unit,
        tokens=[tokens for items in each for tokens in items.tokens],
        bytes=[size for items in each for size in items.bytes],
        nll=[nll for items in each for nll in items.nll],
        base_nll=[nll for items in each for nll in _base_nll(items)],
    )


def _base_nll(items: Items) -> list[float]:
    return items.base_nll or []


def _base_cell(run: _Run, tasks: Sequence[str], metric: str) -> Cell:
    items = _pool(run, tasks)
    return Cell(value=float(np.sum(_base_nll(items)) / item_weights(items, metric).sum()))


def _row(run: _Run, first: _Run, columns: Sequence[Sequence[str]], metric: str, seed: int) -> Row:
    return Row(
        label=run.label,
        run=str(run.directory),
        method=run.result.method,
        trainable=run.result.parameters.trainable,
        tokens=run.result.tokens,
        seconds=run.result.seconds,
        cells=[_cell(run, first, tasks, metric, seed) for tasks in columns],
    )


def _cell(run: _Run, first: _Run, tasks: Sequence[str], metric: str, seed: int) -> Cell:
    items = _pool(run, tasks)
    weights = item_weights(items, metric)
    base = _difference(items.nll, _base_nll(items), weights, seed)
    other = None if run is first else _difference(items.nll, _pool(first, tasks).nll, weights, seed)
    return Cell(value=float(np.sum(items.nll) / weights.sum()), from_base=base, from_first=other)


def _difference(
    nll: Sequence[float], other: Sequence[float], weights: NDArray[np.float64], seed: int
) -> Difference:
    interval = paired_difference(nll, other, weights, seed=seed)
    return Difference(delta=interval.delta, ci_low=interval.ci_low, ci_high=interval.ci_high)
