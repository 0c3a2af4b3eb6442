"""Compare runs, or records of evaluations, on the items they share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepen.errors import DataError
from deepen.evaluation.record import item_weights
from deepen.evaluation.statistics import Interval, paired_difference
from deepen.evaluation.verdict import holm
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
    result: RunResult | None
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

    Texts that all were evaluated on are compared; the others are named in `left_out`.

    Args:
        run_dirs: directories of finished runs, or files of evaluation records (`heldout.json`).
        labels: names of the rows; default: the directories' names.
        metric: `nats_per_token` or `bits_per_byte`.
        seed: of the intervals' resampling.

    Raises:
        DataError: a run is unfinished or was not evaluated beside its base; a text of one name is not the
            same in all, or not cut into the same items; the bases differ; or no text is common to all.
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
    runs, left_out = _share_texts(runs)
    columns = _columns(runs[0].record)
    return Comparison(
        metric=metric,
        base=runs[0].record.base,
        columns=[_describe(runs[0], name, tasks) for name, tasks in columns],
        rows=[
            Row(label="base", cells=[_base_cell(runs[0], tasks, metric) for _, tasks in columns]),
            *_adjust([_row(run, runs[0], [tasks for _, tasks in columns], metric, seed) for run in runs]),
        ],
        left_out=left_out,
    )


def _names(run_dirs: Sequence[Path]) -> list[str]:
    names = [directory.resolve().name for directory in run_dirs]
    return names if len(set(names)) == len(names) else [str(directory) for directory in run_dirs]


def _read(directory: Path, label: str) -> _Run:
    path, result = directory, None
    if not directory.is_file():
        path, result = directory / "evaluation" / "heldout.json", read_result(directory)
    record = read_record(path, EvaluationRecord)
    if not record.texts or any(text.items.base_nll is None for text in record.texts):
        raise DataError(f"{directory}: holds no held-out texts scored beside the base; nothing to compare")
    return _Run(directory, label, result, record)


def _check_comparable(first: _Run, run: _Run) -> None:
    digests, others = ({text.task: text.digest for text in each.record.texts} for each in (first, run))
    common = [task for task in digests if task in others]
    differing = [task for task in common if digests[task] != others[task]]
    if differing or not common:
        raise DataError(
            f"{run.directory}: not evaluated on the same texts as {first.directory} (differs: "
            f"{', '.join(differing or sorted({*digests, *others}))}). "
            "Evaluate both with one evaluate section and one tokenizer"
        )
    for task in common:
        ours, theirs = first.text(task).items, run.text(task).items
        if ours.tokens != theirs.tokens:
            raise DataError(f"{run.directory}: {task} is not cut into the same items as in {first.directory}")
        if not np.isclose(np.sum(_base_nll(ours)), np.sum(_base_nll(theirs)), rtol=_SAME_BASE):
            raise DataError(
                f"{run.directory}: its base scores {task} otherwise than the base of {first.directory}"
            )


def _share_texts(runs: Sequence[_Run]) -> tuple[list[_Run], list[str]]:
    """Return the runs with the texts that all have, and a line for each that some lack.

    Raises:
        DataError: no text is common to all.
    """
    held = {str(run.directory): {text.task for text in run.record.texts} for run in runs}
    shared = set.intersection(*held.values())
    if not shared:
        raise DataError(f"{', '.join(held)}: no text was evaluated in all of them; nothing to compare")
    every = dict.fromkeys(text.task for run in runs for text in run.record.texts)
    left_out = [
        f"{task}: not evaluated in {', '.join(name for name, tasks in held.items() if task not in tasks)}"
        for task in every
        if task not in shared
    ]
    return [_keep(run, shared) for run in runs], left_out


def _keep(run: _Run, tasks: set[str]) -> _Run:
    texts = [text for text in run.record.texts if text.task in tasks]
    return replace(run, record=run.record.model_copy(update={"texts": texts}))


def _adjust(rows: Sequence[Row]) -> list[Row]:
    """Adjust the p values of all runs and columns, those from the base and those from the first run apart."""
    cells = [cell for row in rows for cell in row.cells]
    base = iter(_adjusted([cell.from_base for cell in cells]))
    first = iter(_adjusted([cell.from_first for cell in cells]))
    return [
        row.model_copy(
            update={
                "cells": [
                    cell.model_copy(update={"from_base": next(base), "from_first": next(first)})
                    for cell in row.cells
                ]
            }
        )
        for row in rows
    ]


def _adjusted(differences: Sequence[Difference | None]) -> list[Difference | None]:
    adjusted = holm([each.p if each else None for each in differences])
    return [
        each.model_copy(update={"p_holm": p}) if each else None
        for each, p in zip(differences, adjusted, strict=True)
    ]


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
    result = run.result
    return Row(
        label=run.label,
        run=str(run.directory),
        method=result.method if result else None,
        trainable=result.parameters.trainable if result else None,
        tokens=result.tokens if result else None,
        seconds=result.seconds if result else None,
        cells=[_cell(run, first, tasks, metric, seed) for tasks in columns],
    )


def _cell(run: _Run, first: _Run, tasks: Sequence[str], metric: str, seed: int) -> Cell:
    items = _pool(run, tasks)
    weights = item_weights(items, metric)
    base = paired_difference(items.nll, _base_nll(items), weights, seed=seed)
    other = (
        None
        if run is first
        else _difference(paired_difference(items.nll, _pool(first, tasks).nll, weights, seed=seed))
    )
    return Cell(value=base.value, from_base=_difference(base), from_first=other)


def _difference(found: Interval) -> Difference:
    return Difference(delta=found.delta, ci_low=found.ci_low, ci_high=found.ci_high, p=found.p)
