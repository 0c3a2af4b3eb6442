"""Which blocks of a live model are new: attached when deepen made them so, else read from its directory."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, Checkpoint
from deepen.errors import CheckpointError, PackError
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, base_name, read_expansion
from deepen.model.structure import blocks_of, family_of

_ATTRIBUTE = "_deepen_expansion"
_BYPASSED = "_deepen_bypassed"


def attach_record(model: PreTrainedModel, expansion: Expansion) -> None:
    """Note on the model which of its blocks are new."""
    setattr(model, _ATTRIBUTE, expansion)


def mark_bypassed(model: PreTrainedModel, bypassed: bool) -> None:
    """Note that the model's new blocks are switched off: for the time being it is the base."""
    setattr(model, _BYPASSED, bypassed)


def is_bypassed(model: PreTrainedModel) -> bool:
    """Return whether the model's new blocks are switched off."""
    return bool(getattr(model, _BYPASSED, False))


def find_expansion(model: PreTrainedModel) -> Expansion | None:
    """Return the record of the model's new blocks, or None for a model without or with them bypassed.

    A model that plain transformers loaded from an expanded checkpoint is recognised by the
    `expansion.json` in the directory it came from.

    Raises:
        PackError: that file describes another number of blocks.
    """
    if is_bypassed(model):
        return None
    found = getattr(model, _ATTRIBUTE, None)
    directory = Path(model.name_or_path or ".")
    if isinstance(found, Expansion) or not (model.name_or_path and (directory / MANIFEST_NAME).is_file()):
        return found
    expansion = read_expansion(directory)
    depth = len(blocks_of(model, family_of(model)))
    if depth != expansion.layout.depth:
        raise PackError(
            f"{directory / MANIFEST_NAME}: describes {expansion.layout.depth} blocks, the model has {depth}"
        )
    attach_record(model, expansion)
    return expansion


def expansion_of(model: PreTrainedModel) -> Expansion:
    """Return the record of the model's new blocks, as `find_expansion` does.

    Raises:
        PackError: the model has none, or they are bypassed.
    """
    if expansion := find_expansion(model):
        return expansion
    if is_bypassed(model):
        raise PackError("the model's new blocks are bypassed: do this outside `with deepen.bypass(model)`")
    raise PackError(
        f"{type(model).__name__} has no record of new blocks\n"
        "expand it with deepen.insert_blocks, or load it with deepen.load"
    )


def source_checkpoint(model: PreTrainedModel) -> Checkpoint | None:
    """Return the files the model was loaded from, by directory or by hub id; None where there are none."""
    directory = Path(model.name_or_path)
    if not model.name_or_path:
        return None
    if not directory.is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        try:
            config = try_to_load_from_cache(model.name_or_path, CONFIG, revision=revision)
        except ValueError:  # not the form of a hub id
            return None
        if not isinstance(config, str):
            return None
        directory = Path(config).parent
    try:
        return Checkpoint.open(directory)
    except CheckpointError:
        return None


def new_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the new blocks by exact name, from the record."""
    expansion, family = expansion_of(model), family_of(model)
    return {name: p for name, p in model.named_parameters() if base_name(expansion, family, name) is None}
