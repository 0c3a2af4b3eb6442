"""The table of a study over rows × domains × seeds, made of its finished cells and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from deepen.config import TextSet
from deepen.errors import StudyError
from deepen.evaluation.statistics import paired_difference
from deepen.records import (
    CellRecord,
    EvaluationRecord,
    Role,
    RunFacts,
    StudyRow,
    StudyScore,
    TextResult,
    TrainingPoint,
    read_metrics,
    read_record,
)
from deepen.studies.cells import Store
from deepen.studies.grid import Grid, Place, labels

_CURVE_POINTS = 60


Texts = Mapping[str, Sequence[TextResult]]
"""Directory of a cell, relative to the study's -> what it was evaluated on."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A finished cell of a row: its record, where it lies, and the items of its texts."""

    seed: int
    folder: str
    facts: RunFacts
    texts: list[TextResult]
    training: list[TrainingPoint]


def study_rows(grid: Grid, store: Store) -> list[StudyRow]:
    """Return a row for each place of which a cell is finished and did not diverge, by domain.

    Raises:
        DataError: a record is missing or malformed.
        StudyError: two cells were not evaluated on the same items.
    """
    return [row for place in grid.places if (row := _row(grid, place, store))]


def _row(grid: Grid, place: Place, store: Store) -> StudyRow | None:
    rate = grid.rate(place, store.finished)
    if rate is None:
        return None
    held = finished_cells(grid, place, rate, store)
    diverged = [seed for seed, (_, record) in held.items() if record.result.get("diverged")]
    runs = [
        _read(store, folder, seed, record) for seed, (folder, record) in held.items() if seed not in diverged
    ]
    if not runs:
        return None
    first, texts = runs[0].facts, {run.folder: run.texts for run in runs}
    general = grid.recipe(place, rate, runs[0].seed).evaluate.general
    reported = grid.study.domains[place.domain].reported
    return StudyRow(
        row=place.row.label,
        domain=place.domain,
        facts=dict(place.row.facts),
        method=first.method,
        layout=first.layout,
        learning_rate=rate,
        seeds=[run.seed for run in runs],
        missing=[seed for seed in grid.study.seeds if seed not in held],
        diverged=diverged,
        cells=[run.folder for run in runs],
        trainable=first.trainable,
        tokens=first.tokens,
        flops=first.flops,
        seconds=median(run.facts.seconds for run in runs),
        general=pooled_score(texts, "general", general),
        domain_score=needed(pooled_score(texts, "domain", reported), place),
        curve=_mean_curve([run.training for run in runs]),
    )


def finished_cells(grid: Grid, place: Place, rate: float, store: Store) -> dict[int, tuple[str, CellRecord]]:
    """Return seed -> directory, relative to the study's, and record of the finished cells of a place."""
    cells = {seed: grid.cell(place, rate, seed) for seed in grid.study.seeds}
    return {
        seed: (str(store.directory(cell).relative_to(store.study)), record)
        for seed, cell in cells.items()
        if (record := store.finished(cell))
    }


def _read(store: Store, folder: str, seed: int, record: CellRecord) -> _Run:
    directory = store.study / folder
    training, _ = read_metrics(directory / "metrics.jsonl")
    return _Run(
        seed=seed,
        folder=folder,
        facts=RunFacts.model_validate(record.result),
        texts=read_texts(store, folder),
        training=training,
    )


def read_texts(store: Store, folder: str) -> list[TextResult]:
    """Return the items of the texts that a finished cell was evaluated on.

    Raises:
        DataError: its record is missing or malformed.
    """
    return read_record(store.study / folder / "evaluation" / "heldout.json", EvaluationRecord).texts


def needed(score: StudyScore | None, place: Place) -> StudyScore:
    """Return a score of what a study reports.

    Raises:
        StudyError: there is none.
    """
    if score is None:
        raise StudyError(f"{place.row.label} in {place.domain}: its cells hold none of the reported texts")
    return score


def pooled_score(found: Texts, role: Role, texts: Sequence[TextSet]) -> StudyScore | None:
    """Pool the texts of a role; average over seeds before the items are resampled.

    Args:
        found: what the cells of a row were evaluated on, one of each seed.
        role: of the texts.
        texts: those that count.

    Returns:
        The score; None where they were evaluated on none of these texts.

    Raises:
        StudyError: two cells were not evaluated on the same items.
    """
    names = labels(texts)
    chosen = [[text for text in own if text.role == role and text.task in names] for own in found.values()]
    if not chosen[0]:
        return None
    for folder, own in zip(found, chosen, strict=True):
        if [text.digest for text in own] != [text.digest for text in chosen[0]]:
            raise StudyError(f"{folder}: not evaluated on the same items as {next(iter(found))}")
    tokens = item_column(chosen[0], "tokens")
    base = item_column(chosen[0], "base_nll")
    losses = np.stack([item_column(own, "nll") for own in chosen])
    pooled = paired_difference(losses.mean(axis=0), base, tokens)
    return StudyScore(
        role=role,
        texts=[text.task for text in chosen[0]],
        n=pooled.n,
        tokens=int(tokens.sum()),
        value=pooled.value,
        base_value=pooled.base_value,
        delta=pooled.delta,
        ci_low=pooled.ci_low,
        ci_high=pooled.ci_high,
        seed_deltas=[float((each - base).sum() / tokens.sum()) for each in losses],
    )


def item_column(texts: Sequence[TextResult], name: str) -> NDArray[np.float64]:
    """Return one number of every item of some texts, one text after another."""
    return np.concatenate([np.asarray(getattr(text.items, name), dtype=np.float64) for text in texts])


def _mean_curve(logs: Sequence[Sequence[TrainingPoint]]) -> list[tuple[float, float]]:
    """Average the training loss over seeds and over as many steps as leave a few dozen points."""
    steps = min(len(log) for log in logs)
    size = max(1, -(-steps // _CURVE_POINTS))
    curve = []
    for begin in range(0, steps, size):
        span = slice(begin, min(begin + size, steps))
        tokens = fmean(point.tokens for point in logs[0][span])
        curve.append((tokens, round(fmean(point.loss for log in logs for point in log[span]), 4)))
    return curve
