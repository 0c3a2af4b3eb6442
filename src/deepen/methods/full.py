import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, INDEX, Checkpoint, Shard, atomic_directory
from deepen.expansion import (
    PreparedCheckpoint,
    Progress,
    expanded_tensors,
    open_base,
    plan_files,
    write_checkpoint,
)
from deepen.expansion.carry import carry
from deepen.methods.method import widen
from deepen.model import DTYPES, find_expansion, model_tensors, parameter_dtypes, save_tensors
from deepen.model.dtypes import written_dtypes
from deepen.model.names import file_names
from deepen.model.packed import plain_state


class Full:
    """Full fine-tuning: every parameter trains, new blocks' too; an ordinary checkpoint is saved."""

    name: Final = "full"
    keeps_base: Final = False

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Make every parameter trainable."""
        model.requires_grad_(True)
        return widen(dict(model.named_parameters()))

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Those of the base's tensors, of a new block's those that it copies."""
        held = {name: DTYPES[tensor.dtype] for name, tensor in base.tensors.items() if tensor.dtype in DTYPES}
        if expansion := find_expansion(model):
            held = written_dtypes(expansion, file_names(model), base, plain_state(model))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return parameter_dtypes(model, held, trained)

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `model/`: the base's directory with trained tensors, each in the base's own precision.

        Config and tokenizer files are the base's, byte for byte: re-saving them would change formats. Of a
        model with new blocks, those of the base expanded; no `expansion.json`, as the base is not in it.
        """
        target = run / "model"
        trained = model_tensors(model, repeated=True)
        with atomic_directory(target, overwrite=True, inside=(base.directory,)) as staged:
            carry(base.directory, staged)
            with _as_many_blocks(model, base, staged / "like") as like:
                shutil.copyfile(like.directory / CONFIG, staged / CONFIG)
                for shard in like.shards:
                    _save_shard(shard, trained, staged / shard.path.name)
                if like.index is not None:
                    shutil.copyfile(like.directory / INDEX, staged / INDEX)
        return target

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Return None: what is saved is an ordinary checkpoint."""
        return None


@contextmanager
def _as_many_blocks(model: PreTrainedModel, base: Checkpoint, scratch: Path) -> Iterator[Checkpoint]:
    """Give a checkpoint with a place for each of the model's tensors: the base, or the base expanded."""
    expansion = find_expansion(model)
    if expansion is None:
        yield base
        return
    opened = open_base(base.directory)
    plan = plan_files(base, expanded_tensors(opened, expansion.layout))
    write_checkpoint(PreparedCheckpoint(base=opened, plan=plan, expansion=expansion), scratch)
    yield Checkpoint.open(scratch)
    shutil.rmtree(scratch)


def _save_shard(shard: Shard, trained: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one file's tensors anew; those that the model computes itself (buffers) stay as they were."""
    dtypes = {t.name: DTYPES[t.dtype] for t in shard.tensors if t.name in trained}
    with safe_open(shard.path, "pt") as held:
        tensors = {
            t.name: trained[t.name] if t.name in trained else held.get_tensor(t.name) for t in shard.tensors
        }
    save_tensors(path, tensors, dtypes)
