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
from deepen.model import file_dtypes, freeze_base, new_parameters, parameter_dtypes, save_blocks


class Blocks:
    """Block expansion (arXiv 2401.02415): only the new blocks train; a block pack is saved."""

    name: Final = "blocks"
    keeps_base: Final = True

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Freeze everything outside the recorded new blocks."""
        return widen(freeze_base(model))

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Those of the tensors that the new blocks copy."""
        return parameter_dtypes(model, file_dtypes(model, base), new_parameters(model))

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
