"""Windows of token ids as batches for a model, as held-out evaluation runs it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deepen.errors import DataError, EvaluationError
from deepen.evaluation.memory import collect_memory, lacks_memory

T = TypeVar("T")


def check_ids(model: Any, windows: Sequence[NDArray[np.int64]]) -> None:
    """Raise `DataError` for a token id the model has no embedding for."""
    known = vocabulary(model)
    for window in windows:
        if window.size and not 0 <= int(window.min()) <= int(window.max()) < known:
            raise DataError(
                f"evaluate: token id {int(window.max())} but the model has {known} embeddings; "
                "its tokenizer is another model's"
            )


def vocabulary(model: Any) -> int:
    """Return the number of token ids the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off; on exit every module is in the mode it was in, also where they differed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def batches(windows: Sequence[NDArray[np.int64]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of windows of like length, longest first so that a lack of memory shows at once."""
    scored = (index for index, window in enumerate(windows) if len(window) > 1)
    order = sorted(scored, key=lambda index: -len(windows[index]))
    start = 0
    while start < len(order):
        rows = max(batch_tokens // len(windows[order[start]]), 1)
        yield order[start : start + rows]
        start += rows


def fitting(
    windows: Sequence[NDArray[np.int64]], batch_tokens: int, work: Callable[[list[int]], T], what: str
) -> Iterator[tuple[list[int], T]]:
    """Yield each batch and what `work` makes of it.

    A batch that does not fit the memory is halved, and so are those after it.

    Args:
        windows: token ids, each of shape (length,).
        batch_tokens: tokens, padding included, in a batch.
        work: given the indices of a batch's windows.
        what: is measured, for the error.

    Raises:
        EvaluationError: one window alone does not fit the memory.
    """
    pending = list(batches(windows, batch_tokens))
    while pending:
        batch = pending[0]
        if found := _try(work, batch):
            yield batch, found[0]
            pending = pending[1:]
        elif len(batch) > 1:
            collect_memory()
            pending = halved(pending)
        else:
            raise EvaluationError(f"{what}: {len(windows[batch[0]])} tokens alone do not fit the memory")


def _try(work: Callable[[list[int]], T], batch: list[int]) -> tuple[T] | None:
    """Return what comes of a batch; None where the memory runs out, and what filled it is let go."""
    try:
        return (work(batch),)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
    return None


def halved(batches: Sequence[list[int]]) -> list[list[int]]:
    """Return the batches with each of more than one window cut in two."""
    halves = [(batch[: -(-len(batch) // 2)], batch[-(-len(batch) // 2) :]) for batch in batches]
    return [half for pair in halves for half in pair if half]


def padded(windows: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    """Return windows, the longest first, as ids [windows, length], padded at the end."""
    ids = torch.zeros(len(windows), len(windows[0]), dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.from_numpy(np.asarray(window, dtype=np.int64))
    return ids
