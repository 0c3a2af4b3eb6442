"""Held-out loss of a causal language model on windows of token ids."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError, TrainingError
from deepen.evaluation.windows import (
    check_ids,
    evaluating,
    fitting,
    padded,
    vocabulary,
)

Flags = NDArray[np.bool_]

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
    counted: list[Flags | None] = []
    for text in texts:
        counted += text.counted or [None] * len(text.windows)
    tasks = [text.task for text in texts]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise DataError(f"evaluate: more than one text is called {', '.join(sorted(twice))}; give them names")
    # One call for all texts, so that their odds and ends share batches.
    nll = score_windows(
        model, windows, counted, batch_tokens=batch_tokens, autocast=autocast, progress=progress
    )
    ends = np.cumsum([len(text.windows) for text in texts])
    return dict(zip(tasks, np.split(nll, ends[:-1]), strict=True)) if tasks else {}


@torch.no_grad()
def score_windows(
    model: Any,
    windows: Sequence[NDArray[np.int64]],
    counted: Sequence[Flags | None] | None = None,
    *,
    batch_tokens: int = 16384,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Sum the negative log-likelihood of each window's tokens after its first, or of some of them.

    Windows of like length share a batch, padded at the end: under causal attention no token sees the padding,
    so a result does not depend on its neighbours beyond rounding. A batch that does not fit the memory is
    halved, and so are those after it. The model is called with `use_cache=False`
    (with a cache, some models read position restarts differently) and left in the mode it was in.

    Args:
        model: a `PreTrainedModel` for causal language modelling, on any device.
        windows: token ids, each of shape (length,); a window of one token scores 0.
        counted: which of each window's tokens after its first count, (length - 1,); None: all.
        batch_tokens: tokens, padding included, in one forward pass; fewer where the vocabulary is large.
        autocast: compute type on the model's device; None computes in the weights' own.
        progress: called after each batch.

    Returns:
        Nats per window, shape (windows,).

    Raises:
        DataError: a token id the model has no embedding for.
        TrainingError: the model's loss is not a finite number.
        EvaluationError: one window alone does not fit the memory.
    """
    check_ids(model, windows)
    device = next(model.parameters()).device
    nll = np.zeros(len(windows))
    done, total = 0, sum(len(window) > 1 for window in windows)
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        most = min(batch_tokens, _MOST_LOGITS // vocabulary(model))

        def score(batch: list[int]) -> NDArray[np.float64]:
            chosen = [counted[index] if counted else None for index in batch]
            return _score(model, [windows[index] for index in batch], chosen, device)

        for batch, scored in fitting(windows, most, score, "held-out loss"):
            nll[batch] = scored
            done += len(batch)
            if progress:
                progress(done, total)
    if not np.isfinite(nll).all():
        raise TrainingError(
            f"held-out loss is not a number in {int((~np.isfinite(nll)).sum())} of {len(nll)} windows: the "
            "model's weights hold NaN or have diverged; try a lower learning rate"
        )
    return nll


def _score(
    model: Any,
    windows: Sequence[NDArray[np.int64]],
    counted: Sequence[Flags | None],
    device: torch.device,
) -> NDArray[np.float64]:
    ids = padded(windows)
    labels = torch.full_like(ids, _IGNORED)
    for row, (window, flags) in enumerate(zip(windows, counted, strict=True)):
        labels[row, : len(window) - 1] = ids[row, 1 : len(window)]
        if flags is not None:
            labels[row, : len(window) - 1][torch.from_numpy(~flags)] = _IGNORED
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
