import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, INDEX, Checkpoint, Shard, atomic_directory
from deepen.expansion import Progress
from deepen.expansion.carry import carry
from deepen.methods.method import widen
from deepen.model import DTYPES, base_tensors, parameter_dtypes, save_tensors


class Full:
    """Full fine-tuning: every parameter of the base trains; an ordinary checkpoint is saved."""

    name: Final = "full"
    keeps_base: Final = False

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Make every parameter trainable."""
        model.requires_grad_(True)
        return widen(dict(model.named_parameters()))

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Those of the base's tensors."""
        held = {name: DTYPES[tensor.dtype] for name, tensor in base.tensors.items() if tensor.dtype in DTYPES}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return parameter_dtypes(model, held, trained)

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `model/`: the base's directory with trained tensors, each in the base's own precision.

        Config and tokenizer files are the base's, byte for byte: re-saving them would change formats.
        """
        target = run / "model"
        trained = base_tensors(model, repeated=True)
        with atomic_directory(target, overwrite=True, inside=(base.directory,)) as staged:
            carry(base.directory, staged)
            shutil.copyfile(base.directory / CONFIG, staged / CONFIG)
            for shard in base.shards:
                _save_shard(shard, trained, staged / shard.path.name)
            if base.index is not None:
                shutil.copyfile(base.directory / INDEX, staged / INDEX)
        return target

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Return None: what is saved is an ordinary checkpoint."""
        return None


def _save_shard(shard: Shard, trained: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one file's tensors anew; those that the model computes itself (buffers) stay as they were."""
    dtypes = {t.name: DTYPES[t.dtype] for t in shard.tensors if t.name in trained}
    with safe_open(shard.path, "pt") as held:
        tensors = {
            t.name: trained[t.name] if t.name in trained else held.get_tensor(t.name) for t in shard.tensors
        }
    save_tensors(path, tensors, dtypes)
