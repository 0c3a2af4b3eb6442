"""What a sequence of tasks leaves of each: figures of the matrix R (TRACE, arXiv 2310.06762, section 4.3).

`R[t][i]` is the score on task i after training on tasks 0 … t; entries above the diagonal are None.
"""

from collections.abc import Sequence
from statistics import fmean

Scores = Sequence[Sequence[float | None]]


def overall_performance(scores: Scores) -> float:
    """Return OP: the mean of all tasks' scores after the last one.

    Raises:
        ValueError: the matrix is not square, or lacks a score.
    """
    return fmean(_filled(scores)[-1])


def backward_transfer(scores: Scores) -> float | None:
    """Return BWT: how far earlier tasks' scores have moved, in the mean, since each was learned.

    Divided by T − 1, as the printed values are. None where there is one task only.

    Raises:
        ValueError: the matrix is not square, or lacks a score.
    """
    rows = _filled(scores)
    moved = [last - rows[task][task] for task, last in enumerate(rows[-1][:-1])]
    return fmean(moved) if moved else None


def forward_transfer(before: Sequence[float], base: Sequence[float]) -> float | None:
    """Return FWT (Lopez-Paz and Ranzato, arXiv 1706.08840): what earlier tasks teach of later ones.

    The mean, over all tasks but the first, of the score just before a task was trained on less the base's.
    None where there is one task only.

    Args:
        before: score on each task just before it was trained on; of the first, the base's.
        base: the base's score on each task.

    Raises:
        ValueError: they differ in length, or are empty.
    """
    if len(before) != len(base) or not base:
        raise ValueError(f"{len(before)} scores before training and {len(base)} of the base")
    moved = [here - there for here, there in zip(before[1:], base[1:], strict=True)]
    return fmean(moved) if moved else None


def _filled(scores: Scores) -> list[list[float]]:
    """Return each row up to the diagonal."""
    if not scores or any(len(row) != len(scores) for row in scores):
        raise ValueError(
            f"R has rows of {[len(row) for row in scores]} scores, not {len(scores)} of {len(scores)}"
        )
    rows = [list(row[: task + 1]) for task, row in enumerate(scores)]
    for task, row in enumerate(rows):
        if None in row:
            raise ValueError(f"R has no score on task {row.index(None)} after task {task}")
    return [[float(value) for value in row if value is not None] for row in rows]
