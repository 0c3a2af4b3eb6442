"""Held-out evaluation by all processes of a run, each scoring a share of the windows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deepen.data.evaluation_text import EvaluationText
from deepen.errors import EvaluationError
from deepen.evaluation.heldout import Progress, evaluate_texts
from deepen.evaluation.memory import lacks_memory
from deepen.evaluation.shift import Shift, comparing, measure_shift, summarise_shift
from deepen.records import TokenShift
from deepen.training.parallel import plain_root, release
from deepen.training.world import World


def score_texts(
    root: nn.Module,
    texts: Sequence[EvaluationText],
    world: World,
    *,
    autocast: torch.dtype | None,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return task -> summed nats per window, in every process. Arguments and errors as `evaluate_texts`.

    Args:
        root: of a model that may lie in several processes, see `deepen.training.parallel`.
        texts: the same in every process.
        world: those processes.
        autocast: dtype of the compute, or None for the parameters' own.
        progress: called after each batch of this process.
    """
    model = _Everywhere(plain_root(root), world)
    mine = [text.share(world.rank, world.size) for text in texts]
    found = evaluate_texts(model, mine, autocast=autocast, progress=progress)
    model.wait(autocast, lambda model: model(input_ids=_token(model), use_cache=False))
    release(root)
    shares = world.gather(found)
    if world.size == 1:
        return found
    whole = {text.task: np.zeros(len(text.windows)) for text in texts}
    for rank, losses in enumerate(shares):
        for task, values in losses.items():
            whole[task][rank :: world.size] = values
    return whole


def shift_texts(
    root: nn.Module,
    texts: Sequence[EvaluationText],
    world: World,
    base: Callable[[Any], AbstractContextManager[object]],
    *,
    autocast: torch.dtype | None,
    progress: Progress | None = None,
) -> list[TokenShift]:
    """Return how far the model has moved from its base on each text, in every process.

    Arguments as `score_texts`, and `base` as `measure_shift`.
    """
    model = _Everywhere(plain_root(root), world)
    windows = [window for text in texts for window in text.windows]
    mine = windows[world.rank :: world.size]
    found = measure_shift(model, mine, base, autocast=autocast, progress=progress, call=model.call)
    model.wait(autocast, lambda model: comparing(base, _token(model))(model))
    release(root)
    whole = {name: np.zeros(len(windows), column.dtype) for name, column in asdict(found).items()}
    for rank, share in enumerate(world.gather(found)):
        for name, column in asdict(share).items():
            whole[name][rank :: world.size] = column
    return summarise_shift(texts, Shift(**whole))


def _token(model: Any) -> torch.Tensor:
    return torch.zeros(1, 1, dtype=torch.long, device=model.device)


class _Everywhere:
    """The model as `evaluate_texts` sees it.

    Sharded weights are gathered by all processes at once, but one may have more batches than another: every
    pass is agreed on, and who has finished passes along until all have.
    """

    def __init__(self, root: nn.Module, world: World) -> None:
        self._root, self._world = root, world

    def __call__(self, **inputs: Any) -> Any:
        return self.call(lambda model: model(**inputs))

    def call(self, work: Callable[[Any], Any]) -> Any:
        """Return what `work` makes of the model."""
        self._world.any(True)
        try:
            return self._root(work)
        except (RuntimeError, MemoryError) as error:
            # A smaller batch would be a pass that the others do not know of.
            if self._world.size == 1 or not lacks_memory(error):
                raise
        raise EvaluationError("held-out loss: a batch does not fit the memory of one of the processes")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root.model, name)

    @torch.no_grad()
    def wait(self, autocast: torch.dtype | None, work: Callable[[Any], Any]) -> None:
        """Take part in the others' passes until no one has a window left.

        Args:
            autocast: as in the others' passes.
            work: the same as theirs, on next to nothing.
        """
        while self._world.any(False):
            with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
                self._root(work)
