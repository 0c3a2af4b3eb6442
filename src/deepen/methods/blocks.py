from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.blocks import merge_pack
from deepen.checkpoint import Checkpoint
from deepen.expansion import Progress
from deepen.methods.method import widen
from deepen.methods.rows import extended_rows, row_dtypes
from deepen.model import (
    expansion_of,
    file_dtypes,
    freeze_base,
    new_parameters,
    parameter_dtypes,
    save_blocks,
    train_rows,
)


class Blocks:
    """Block expansion (arXiv 2401.02415): only the new blocks train; a block pack is saved.

    Beside them the rows of new tokens can train, as in method `rows`; the pack then holds them too.
    """

    name: Final = "blocks"
    keeps_base: Final = True

    def __init__(self, *, new_rows: bool = False) -> None:
        """Take the settings of a recipe."""
        self._new_rows = new_rows

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Freeze everything outside the recorded new blocks, and put new rows beside their tables.

        Raises:
            TrainingError: rows are to train, and the model's vocabulary was not extended.
        """
        rows = extended_rows(model, "train.new_rows") if self._new_rows else None
        trained = freeze_base(model)
        return widen(trained | train_rows(model, rows) if rows else trained)

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Those of the tensors that the new blocks copy, and of the tables."""
        dtypes = parameter_dtypes(model, file_dtypes(model, base), new_parameters(model))
        rows = expansion_of(model).new_rows if self._new_rows else None
        return dtypes | row_dtypes(model, rows, base) if rows else dtypes

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `blocks/`."""
        return save_blocks(model, run / "blocks", dtypes=file_dtypes(model, base), overwrite=True)

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Write base and pack as one checkpoint."""
        target = run / "model"
        merge_pack(base.directory, run / "blocks", target, overwrite=True, progress=progress)
        return target
