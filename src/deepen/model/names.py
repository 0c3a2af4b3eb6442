"""What the tensors of a live model are called in its files, and back.

Three things lie between the two, all of them known to transformers alone: it fuses the experts of a block
into one tensor, it renames (`block_sparse_moe` is `mlp` in memory), and it adds or takes away prefixes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from deepen.checkpoint import Checkpoint
from deepen.errors import FamilyError, PackError
from deepen.families import Family, family_for
from deepen.model.packed import plain_state
from deepen.model.source import source_checkpoint
from deepen.model.structure import family_of

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FileNames:
    """The names of a live model's tensors in its files.

    Attributes:
        family: the model's family in the dialect of its files.
        saved: the same in the dialect that transformers would save it in.
        live: the same in the dialect of its modules.
        model: the model.
    """

    family: Family
    saved: Family
    live: Family
    model: PreTrainedModel

    def state(self, tensors: State) -> dict[str, torch.Tensor]:
        """Return tensors of the model in the form its files have: by name, and one by one where they are.

        Args:
            tensors: live name -> tensor; of a block whose experts are fused, all of them.
        """
        reverted = revert_weight_conversion(self.model, dict(tensors))
        rename = self._rename
        return {rename(name): tensor for name, tensor in reverted.items()}

    def of(self, tensors: State) -> tuple[str, ...]:
        """Return what `state` would name, without computing it."""
        return tuple(self.state({name: tensor.to("meta") for name, tensor in tensors.items()}))

    @property
    def _rename(self) -> Callable[[str], str]:
        # A head that is the embeddings is in no file, so transformers does not know how to name it there.
        known = ((*_outside(self.live), *_outside(self.saved)), _outside(self.family) * 2)
        outside = dict(zip(*known, strict=True))

        def rename(name: str) -> str:
            place = self.saved.split(name)
            return self.family.join(*place) if place else outside.get(name, name)

        return rename


def _outside(family: Family) -> tuple[str, ...]:
    return (*family.outside_required, *family.outside_optional)


def file_names(model: PreTrainedModel, files: Checkpoint | None = None) -> FileNames:
    """Return how the model's tensors are called in its files.

    Args:
        model: the model.
        files: the files; default: those it was loaded from. Without any, those transformers would write.

    Raises:
        FamilyError: deepen does not know the model.
    """
    family = family_of(model)
    first = {n: t.to("meta") for n, t in plain_state(model).items() if (family.split(n) or (0,))[0] == 0}
    saved = family_for(model.config.to_dict(), revert_weight_conversion(model, first), type(model).__name__)
    spoken = _spoken(files or source_checkpoint(model))
    theirs = spoken if spoken and spoken.name == saved.name else saved
    return FileNames(family=theirs, saved=saved, live=family, model=model)


def _spoken(files: Checkpoint | None) -> Family | None:
    try:
        return family_for(files.config, files.tensors, f"{files.directory}/config.json") if files else None
    except FamilyError:
        return None


def put_tensors(model: PreTrainedModel, tensors: State, wanted: set[str], where: str) -> None:
    """Give tensors of the model the values that files hold.

    Args:
        model: the model; its other tensors stay.
        tensors: name in files -> tensor.
        wanted: live names that must come out of them.
        where: the files, for messages.

    Raises:
        PackError: a tensor is missing, of another shape, or has no place in the model.
    """
    before = vars(model).get("_weight_conversions")
    config = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model))
    try:
        found, _ = convert_and_load_state_dict_in_model(
            model=model, state_dict=dict(tensors), load_config=config, disk_offload_index=None
        )
    finally:
        # What was used for these tensors alone says nothing about the files of the whole model.
        vars(model)["_weight_conversions"] = before
    _check(found, wanted, where)


def _check(found: Any, wanted: set[str], where: str) -> None:
    if missing := wanted & set(found.missing_keys):
        raise PackError(f"{where}: tensor {min(missing)!r} is missing")
    if found.mismatched_keys:
        name, held, needed = min(found.mismatched_keys)
        raise PackError(f"{where}: tensor {name!r} is {list(held)}, the model needs {list(needed)}")
    if found.unexpected_keys:
        raise PackError(f"{where}: tensor {min(found.unexpected_keys)!r} has no place in the model")
    if found.conversion_errors:
        raise PackError(f"{where}: tensor {min(found.conversion_errors)!r} cannot be put together")
