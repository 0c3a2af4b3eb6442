"""Held-out evaluation by all processes of a run, each scoring a share of the windows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deepen.data.evaluation_text import EvaluationText
from deepen.evaluation.heldout import Progress, evaluate_texts
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
    mine = [replace(text, windows=text.windows[world.rank :: world.size]) for text in texts]
    found = evaluate_texts(model, mine, autocast=autocast, progress=progress)
    model.wait(autocast)
    release(root)
    shares = world.gather(found)
    if world.size == 1:
        return found
    whole = {text.task: np.zeros(len(text.windows)) for text in texts}
    for rank, losses in enumerate(shares):
        for task, values in losses.items():
            whole[task][rank :: world.size] = values
    return whole


class _Everywhere:
    """The model as `evaluate_texts` sees it.

    Sharded weights are gathered by all processes at once, but one may have more batches than another: every
    pass is agreed on, and who has finished passes along until all have.
    """

    def __init__(self, root: nn.Module, world: World) -> None:
        self._root, self._world = root, world

    def __call__(self, **inputs: Any) -> Any:
        self._world.any(True)
        return self._root(lambda model: model(**inputs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root.model, name)

    @torch.no_grad()
    def wait(self, autocast: torch.dtype | None) -> None:
        """Take part in the others' passes until no one has a window left."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self._world.any(False):
            with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
                self._root(lambda model: model(input_ids=token, use_cache=False))
