"""Rows of a study beside each other: paired differences on the items that all of them were scored on."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from deepen.evaluation.statistics import paired_difference
from deepen.records import Difference, StudyPair, StudyRow, StudyScore, TextResult
from deepen.studies.cells import Store
from deepen.studies.table import item_column, read_texts


def study_pairs(rows: Sequence[StudyRow], store: Store) -> list[StudyPair]:
    """Compare all rows of each domain, two by two, on the seeds that both have.

    Raises:
        DataError: a cell's record is missing or malformed.
    """
    texts = {(row.domain, row.row, seed): found for row in rows for seed, found in _texts(row, store)}

    def pair(one: StudyRow, other: StudyRow) -> StudyPair | None:
        seeds = [seed for seed in one.seeds if seed in other.seeds]
        held = [[texts[row.domain, row.row, seed] for seed in seeds] for row in (one, other)]
        if not seeds:
            return None
        kept = one.general and other.general and _difference(held, one.general)
        return StudyPair(
            domain=one.domain,
            row=one.row,
            other=other.row,
            seeds=seeds,
            learned=_difference(held, one.domain_score),
            kept=kept or None,
        )

    alike = ((one, other) for one, other in combinations(rows, 2) if one.domain == other.domain)
    return [found for one, other in alike if (found := pair(one, other))]


def _texts(row: StudyRow, store: Store) -> list[tuple[int, list[TextResult]]]:
    return [(seed, read_texts(store, cell)) for seed, cell in zip(row.seeds, row.cells, strict=True)]


def _difference(held: Sequence[Sequence[Sequence[TextResult]]], score: StudyScore) -> Difference:
    """Compare means over seeds on the texts of a score."""
    one, other = (np.mean([_items(texts, score, "nll") for texts in seeds], axis=0) for seeds in held)
    found = paired_difference(one, other, _items(held[0][0], score, "tokens"))
    return Difference(delta=found.delta, ci_low=found.ci_low, ci_high=found.ci_high, p=found.p)


def _items(texts: Sequence[TextResult], score: StudyScore, name: str) -> NDArray[np.float64]:
    named = [text for text in texts if text.role == score.role and text.task in score.texts]
    return item_column(named, name)
