"""Compare runs, or records of evaluations, on the items they share."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepen.errors import DataError
from deepen.evaluation.evaluated import Evaluated, Key, read_evaluated
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.verdict import holm
from deepen.records import Cell, Column, Comparison, Difference, Metric, Row

_ROLES = ("general", "domain")
# Evaluations of one base in other precisions or batches agree better than this; those of two bases do not.
_SAME_BASE = 1e-2
_SAME_ANSWERS = 0.9


def compare_runs(
    run_dirs: Sequence[Path],
    labels: Sequence[str] | None = None,
    *,
    metric: str = "nats_per_token",
    seed: int = 0,
) -> Comparison:
    """Put runs beside their base: losses and tasks, paired differences from the base and from the first run.

    Texts and tasks that all were evaluated on, on the same items, are compared; others are named in
    `left_out`.

    Args:
        run_dirs: finished runs, directories that `deepen evaluate` wrote, or records (`heldout.json`,
            `task-NAME.json`).
        labels: names of the rows; default: the directories' names.
        metric: of texts: `nats_per_token` or `bits_per_byte`.
        seed: of the intervals' resampling.

    Raises:
        DataError: a run is unfinished or nothing was evaluated; a text of one name is not the same in all,
            or not cut into the same items; the bases differ; or nothing is common to all.
    """
    if not run_dirs:
        raise DataError("compare: no run given")
    if labels is not None and len(labels) != len(run_dirs):
        raise DataError(f"compare: {len(labels)} labels for {len(run_dirs)} runs")
    runs = [
        read_evaluated(place, label, metric)
        for place, label in zip(run_dirs, labels or _names(run_dirs), strict=True)
    ]
    return compare_evaluated(runs, metric=metric, seed=seed)


def compare_evaluated(
    runs: Sequence[Evaluated], *, metric: str = "nats_per_token", seed: int = 0
) -> Comparison:
    """Compare what was read already; arguments and errors as `compare_runs`."""
    for run in runs:
        _check_comparable(runs[0], run)
    shared, left_out = _share(runs)
    columns = [(_describe(runs[0], name, keys, shared), keys) for name, keys in _columns(runs[0], shared)]
    rows = [[_cell(run, runs[0], keys, seed) for _, keys in columns] for run in runs]
    return Comparison(
        metric=metric,
        base=next((run.base for run in runs if run.base), None),
        columns=[column for column, _ in columns],
        rows=[
            Row(label="base", cells=[Cell(value=_base_value(runs, keys)) for _, keys in columns]),
            *(_row(run, cells) for run, cells in zip(runs, _adjust(rows), strict=True)),
        ],
        left_out=left_out,
    )


def _names(run_dirs: Sequence[Path]) -> list[str]:
    names = [directory.resolve().name for directory in run_dirs]
    return names if len(set(names)) == len(names) else [str(directory) for directory in run_dirs]


def _check_comparable(first: Evaluated, run: Evaluated) -> None:
    common = [key for key in first.scores if key in run.scores]
    differing = [
        task
        for task, metric in common
        if first.scores[task, metric].is_text and not _asked_alike(first, run, (task, metric))
    ]
    if differing or not common:
        every = sorted({task for task, _ in (*first.scores, *run.scores)})
        raise DataError(
            f"{run.place}: not evaluated on the same texts and tasks as {first.place} (differs: "
            f"{', '.join(differing or every)}). Evaluate both with one evaluate section and one tokenizer"
        )
    for key in common:
        if _asked_alike(first, run, key):
            _check_paired(first, run, key)


def _asked_alike(first: Evaluated, run: Evaluated, key: Key) -> bool:
    return first.scores[key].asked == run.scores[key].asked


def _check_paired(first: Evaluated, run: Evaluated, key: Key) -> None:
    ours, theirs = first.scores[key].items, run.scores[key].items
    if not np.array_equal(_weights(ours), _weights(theirs)):
        raise DataError(f"{run.place}: {key[0]} is not cut into the same items as in {first.place}")
    if not _same_base(ours, theirs):
        raise DataError(f"{run.place}: its base scores {key[0]} otherwise than the base of {first.place}")


def _same_base(ours: PairedItems, theirs: PairedItems) -> bool:
    """Whether the two bases can be one: losses nearly equal, or nearly all answers."""
    if ours.base is None or theirs.base is None:
        return True
    if ours.weights is not None:
        return bool(np.isclose(ours.base.sum(), theirs.base.sum(), rtol=_SAME_BASE))
    return bool(np.isclose(ours.base, theirs.base, rtol=_SAME_BASE).mean() >= _SAME_ANSWERS)


def _weights(items: PairedItems) -> NDArray[np.float64]:
    return np.ones(len(items.values)) if items.weights is None else items.weights


def _share(runs: Sequence[Evaluated]) -> tuple[set[Key], list[str]]:
    """Return what all were evaluated on alike, and a line for everything else.

    Raises:
        DataError: nothing is common to all.
    """
    left_out: dict[Key, str] = {}
    for key in dict.fromkeys(key for run in runs for key in run.scores):
        lacking = [run for run in runs if key not in run.scores]
        other = [run for run in runs if not lacking and not _asked_alike(runs[0], run, key)]
        if lacking or other:
            why = "not evaluated in" if lacking else f"not asked the same as in {runs[0].place}:"
            where = ", ".join(str(run.place) for run in lacking or other)
            left_out[key] = f"{_name(runs, key)}: {why} {where}"
    shared = {key for key in runs[0].scores if key not in left_out}
    lines = [*left_out.values(), *dict.fromkeys(line for run in runs for line in run.itemless)]
    if not shared:
        places = ", ".join(str(run.place) for run in runs)
        told = "".join(f"\n{line}" for line in lines)
        raise DataError(f"{places}: no text or task was evaluated in all of them; nothing to compare{told}")
    return shared, lines


def _name(runs: Sequence[Evaluated], key: Key) -> str:
    found = next(run.scores[key] for run in runs if key in run.scores)
    return key[0] if found.is_text else " ".join(key)


def _columns(run: Evaluated, shared: set[Key]) -> Iterator[tuple[str, list[Key]]]:
    """Name and scores of each column: a role's texts as a whole, then each where there are several; tasks."""
    texts = [key for key in run.scores if key in shared and run.scores[key].is_text]
    for role in _ROLES:
        keys = [key for key in texts if run.scores[key].role == role]
        if len(keys) > 1:
            yield f"all {role}", keys
        yield from ((key[0], [key]) for key in keys)
    for role in _ROLES:
        for key, score in run.scores.items():
            if key in shared and not score.is_text and score.role == role:
                yield key[0], [key]


def _describe(run: Evaluated, name: str, keys: Sequence[Key], shared: set[Key]) -> Column:
    score, items = run.scores[keys[0]], _pool(run, keys)
    alike = [key for key in shared if run.scores[key].is_text and run.scores[key].role == score.role]
    return Column(
        name=name,
        role=score.role,
        pooled=score.is_text and len(alike) == len(keys),
        n=len(items.values),
        tokens=sum(run.scores[key].tokens or 0 for key in keys) if score.is_text else None,
        metric=None if score.is_text else items.metric,
        higher_is_better=items.higher_is_better,
    )


def _pool(run: Evaluated, keys: Sequence[Key]) -> PairedItems:
    """The items of several texts as one."""
    each = [run.scores[key].items for key in keys]
    if len(each) == 1:
        return each[0]
    bases = [items.base for items in each if items.base is not None]
    return replace(
        each[0],
        values=np.concatenate([items.values for items in each]),
        base=np.concatenate(bases) if len(bases) == len(each) else None,
        weights=np.concatenate([_weights(items) for items in each]),
    )


def _base_value(runs: Sequence[Evaluated], keys: Sequence[Key]) -> float | None:
    """The base's value as the first run has it that was scored beside it."""
    pooled = (_pool(run, keys) for run in runs)
    return next(
        (float(items.base.sum() / _weights(items).sum()) for items in pooled if items.base is not None), None
    )


def _cell(run: Evaluated, first: Evaluated, keys: Sequence[Key], seed: int) -> Cell:
    items = _pool(run, keys)
    (beside_base,) = compare_items([items], seed=seed)
    from_first = None
    if run is not first:
        (found,) = compare_items([replace(items, base=_pool(first, keys).values)], seed=seed)
        from_first = _difference(found)
    return Cell(value=beside_base.value, from_base=_difference(beside_base), from_first=from_first)


def _difference(found: Metric) -> Difference | None:
    if found.delta is None:
        return None
    return Difference(delta=found.delta, ci_low=found.ci_low, ci_high=found.ci_high, p=found.p)


def _adjust(rows: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Adjust the p values of all runs and columns, those from the base and those from the first run apart."""
    cells = [cell for row in rows for cell in row]
    base = iter(_adjusted([cell.from_base for cell in cells]))
    first = iter(_adjusted([cell.from_first for cell in cells]))
    return [
        [cell.model_copy(update={"from_base": next(base), "from_first": next(first)}) for cell in row]
        for row in rows
    ]


def _adjusted(differences: Sequence[Difference | None]) -> list[Difference | None]:
    adjusted = holm([each.p if each else None for each in differences])
    return [
        each.model_copy(update={"p_holm": p}) if each else None
        for each, p in zip(differences, adjusted, strict=True)
    ]


def _row(run: Evaluated, cells: list[Cell]) -> Row:
    result = run.result
    return Row(
        label=run.label,
        run=str(run.place),
        method=result.method if result else None,
        trainable=result.parameters.trainable if result else None,
        tokens=result.tokens if result else None,
        seconds=result.seconds if result else None,
        cells=cells,
    )
