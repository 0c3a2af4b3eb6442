import shutil
from pathlib import Path
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, INDEX, Checkpoint, atomic_directory
from deepen.expansion.carry import carry
from deepen.methods.method import widen
from deepen.model import DTYPES, base_tensors, save_tensors


class Full:
    """Full fine-tuning: every parameter of the base trains; an ordinary checkpoint is saved."""

    name: Final = "full"
    keeps_base: Final = False

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Make every parameter trainable."""
        model.requires_grad_(True)
        return widen(dict(model.named_parameters()))

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `model/`: the base's directory with trained tensors, each in the base's own precision.

        Config and tokenizer files are the base's, byte for byte: re-saving them would change formats.
        """
        target = run / "model"
        trained = base_tensors(model)
        with atomic_directory(target, overwrite=True) as staged:
            carry(base.directory, staged)
            shutil.copyfile(base.directory / CONFIG, staged / CONFIG)
            for shard in base.shards:
                tensors = {t.name: trained[t.name] for t in shard.tensors if t.name in trained}
                dtypes = {t.name: DTYPES[t.dtype] for t in shard.tensors if t.name in trained}
                save_tensors(staged / shard.path.name, tensors, dtypes)
            if base.index is not None:
                shutil.copyfile(base.directory / INDEX, staged / INDEX)
        return target
