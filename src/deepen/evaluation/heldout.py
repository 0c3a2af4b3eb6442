"""Held-out loss of a causal language model on windows of token ids."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError, TrainingError

Progress = Callable[[int, int], None]
"""Called with (windows scored, windows to score)."""

# Elements of one batch's logits (1 GB in bf16), and of the part of them that is widened to fp32 at a time.
_MOST_LOGITS = 2**29
_WIDENED_LOGITS = 2**24
_IGNORED = -100


def evaluate_texts(
    model: Any,
    texts: Sequence[EvaluationText],
    *,
    batch_tokens: int = 16384,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Score every text; return task -> summed nats per window. Arguments as `score_windows`.

    Raises:
        DataError: two texts have one name, or as `score_windows`.
        TrainingError: as `score_windows`.
    """
    windows = [window for text in texts for window in text.windows]
    tasks = [text.task for text in texts]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise DataError(f"evaluate: more than one text is called {', '.join(sorted(twice))}; give them names")
    # One call for all texts, so that their odds and ends share batches.
    nll = score_windows(model, windows, batch_tokens=batch_tokens, autocast=autocast, progress=progress)
    ends = np.cumsum([len(text.windows) for text in texts])
    return dict(zip(tasks, np.split(nll, ends[:-1]), strict=True)) if tasks else {}


@torch.no_grad()
def score_windows(
    model: Any,
    windows: Sequence[NDArray[np.int64]],
    *,
    batch_tokens: int = 16384,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Sum the negative log-likelihood of each window's tokens after its first.

    Windows of like length share a batch, padded at the end: under causal attention no token sees the padding,
    so a result does not depend on its neighbours beyond rounding. The model is called with `use_cache=False`
    (with a cache, some models read position restarts differently) and left in the mode it was in.

    Args:
        model: a `PreTrainedModel` for causal language modelling, on any device.
        windows: token ids, each of shape (length,); a window of one token scores 0.
        batch_tokens: tokens, padding included, in one forward pass; fewer where the vocabulary is large.
        autocast: compute type on the model's device; None computes in the weights' own.
        progress: called after each batch.

    Returns:
        Nats per window, shape (windows,).

    Raises:
        DataError: a token id the model has no embedding for.
        TrainingError: the model's loss is not a finite number.
    """
    _check_ids(model, windows)
    device = next(model.parameters()).device
    nll = np.zeros(len(windows))
    done, total = 0, sum(len(window) > 1 for window in windows)
    with _evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for batch in _batches(windows, min(batch_tokens, _MOST_LOGITS // _vocabulary(model))):
            nll[batch] = _score(model, [windows[index] for index in batch], device)
            done += len(batch)
            if progress:
                progress(done, total)
    if not np.isfinite(nll).all():
        raise TrainingError(
            f"held-out loss is not a number in {int((~np.isfinite(nll)).sum())} of {len(nll)} windows: the "
            "model's weights hold NaN or have diverged; try a lower learning rate"
        )
    return nll


def _check_ids(model: Any, windows: Sequence[NDArray[np.int64]]) -> None:
    known = _vocabulary(model)
    for window in windows:
        if window.size and not 0 <= int(window.min()) <= int(window.max()) < known:
            raise DataError(
                f"evaluate: token id {int(window.max())} but the model has {known} embeddings; "
                "its tokenizer is another model's"
            )


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off; on exit every module is in the mode it was in, also where they differed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(windows: Sequence[NDArray[np.int64]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of windows of like length, longest first so that a lack of memory shows at once."""
    scored = (index for index, window in enumerate(windows) if len(window) > 1)
    order = sorted(scored, key=lambda index: -len(windows[index]))
    start = 0
    while start < len(order):
        rows = max(batch_tokens // len(windows[order[start]]), 1)
        yield order[start : start + rows]
        start += rows


def _score(model: Any, windows: Sequence[NDArray[np.int64]], device: torch.device) -> NDArray[np.float64]:
    ids = torch.zeros(len(windows), len(windows[0]), dtype=torch.int64)
    labels = torch.full_like(ids, _IGNORED)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.from_numpy(np.asarray(window, dtype=np.int64))
        labels[row, : len(window) - 1] = ids[row, 1 : len(window)]
    # The last column predicts nothing, so it is not computed.
    logits = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits
    losses = _cross_entropy(logits.flatten(0, 1), labels[:, :-1].flatten().to(device))
    nll: NDArray[np.float64] = losses.view(len(windows), -1).sum(1, dtype=torch.float64).cpu().numpy()
    return nll


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the fp32 loss of each position, widening only some logits at a time."""
    rows = max(_WIDENED_LOGITS // logits.shape[-1], 1)
    with torch.autocast(logits.device.type, enabled=False):
        parts = [
            functional.cross_entropy(part.float(), label, ignore_index=_IGNORED, reduction="none")
            for part, label in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
        ]
    return torch.cat(parts)
