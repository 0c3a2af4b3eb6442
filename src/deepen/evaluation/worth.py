"""What new blocks are worth, and how far to follow them: paired differences over documents.

Every general text together is one task, every domain text another: a loss is that of all their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.record import number_items
from deepen.records import Metric, PathPoint, Role

KNEE = "the least sum of general and domain loss: a nat forgotten weighs as much as a nat learned"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """All texts of one role, a column an entry a window.

    Attributes:
        role: what they stand for.
        windows: token ids, each of shape (length,).
        tokens: predicted tokens.
        items: number of the document, or of the window where documents are few: what intervals resample.
    """

    role: Role
    windows: list[NDArray[np.int64]]
    tokens: NDArray[np.float64]
    items: NDArray[np.int64]


def pool_texts(texts: Sequence[EvaluationText], role: Role) -> Pool:
    """Put the texts of a role together; items of different texts stay apart."""
    chosen = [text for text in texts if text.role == role]
    items = [number_items(text)[1] for text in chosen]
    starts = np.cumsum([0, *(each.max() + 1 for each in items)])
    return Pool(
        role=role,
        windows=[window for text in chosen for window in text.windows],
        tokens=np.asarray([count for text in chosen for count in text.predicted], dtype=np.float64),
        items=np.concatenate([each + start for each, start in zip(items, starts, strict=False)]),
    )


def compare_pool(pool: Pool, nats: Sequence[NDArray[np.float64]], base: NDArray[np.float64]) -> list[Metric]:
    """Compare losses with a base's on the same windows.

    Args:
        pool: the windows.
        nats: of each thing compared, nats a window; p values are adjusted for all of them.
        base: nats a window of what they are compared with.
    """
    compared = [
        PairedItems(
            task=pool.role,
            metric="nats_per_token",
            values=values,
            base=base,
            clusters=pool.items,
            weights=pool.tokens,
            higher_is_better=False,
        )
        for values in nats
    ]
    return [metric.model_copy(update={"role": pool.role}) for metric in compare_items(compared)]


def choose_alpha(path: Sequence[PathPoint], max_general_loss: float | None) -> tuple[float, str]:
    """Choose a point of the path; of equal ones the smallest factor.

    Args:
        path: the points; 0, the base, is one of them, so that a limit from 0 on can always be held.
        max_general_loss: largest rise of the general loss over the base's, in nats per token.

    Returns:
        The factor and the rule. With a limit: the lowest domain loss among the points that hold it. Without:
        the least sum of general and domain loss.
    """
    ascending = sorted(path, key=lambda point: point.alpha)
    if max_general_loss is None:
        return min(ascending, key=lambda point: point.general.value + point.domain.value).alpha, KNEE
    allowed = [point for point in ascending if (point.general.delta or 0.0) <= max_general_loss]
    rule = f"the lowest domain loss with a general loss at most {max_general_loss:g} nats above the base's"
    return min(allowed, key=lambda point: point.domain.value).alpha, rule
