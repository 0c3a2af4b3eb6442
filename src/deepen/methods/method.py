from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint, atomic_directory
from deepen.expansion import Progress
from deepen.model import save_tensors

# Methods whose whole base is held in fp32, as parts of it train.
WIDE: Final = ("full", "freeze", "scale")


class Method(Protocol):
    """One way to adapt a base."""

    @property
    def name(self) -> str:
        """Its name in recipes."""

    @property
    def keeps_base(self) -> bool:
        """Whether the base's tensors stay as they were, so that their bytes are audited afterwards."""

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Set what trains, in fp32, and return it by exact name; everything else is frozen."""

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Return the precision in which each trained parameter is saved: that of the base's files."""

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write the result below the run directory in the files' precision; return its directory."""

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Write `model/`, an ordinary checkpoint of what was saved; None where that is one already."""


def widen(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Hold what trains in fp32: updates smaller than a bf16 step are not lost."""
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def save_trained(model: PreTrainedModel, target: Path, file: str, base: Checkpoint) -> Path:
    """Write what trained to `target/file`, by its names in memory; return `target`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with atomic_directory(target, overwrite=True, inside=(base.directory,)) as staged:
        save_tensors(staged / file, trained)
    return target


def nearest(wanted: int, unit: int) -> int:
    """Return how many units of parameters come nearest to a number of them; at least one."""
    return max(1, round(wanted / unit))
