"""Which blocks of a live model are new: attached when deepen made them so, else read from its directory."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from deepen.errors import PackError
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, base_name, read_expansion
from deepen.model.structure import blocks_of, family_of

_ATTRIBUTE = "_deepen_expansion"


def attach_record(model: PreTrainedModel, expansion: Expansion) -> None:
    """Note on the model which of its blocks are new."""
    setattr(model, _ATTRIBUTE, expansion)


def find_expansion(model: PreTrainedModel) -> Expansion | None:
    """Return the record of the model's new blocks, or None for a model without.

    A model that plain transformers loaded from an expanded checkpoint is recognised by the
    `expansion.json` in the directory it came from.

    Raises:
        PackError: that file describes another number of blocks.
    """
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
        PackError: the model has none.
    """
    if expansion := find_expansion(model):
        return expansion
    raise PackError(
        f"{type(model).__name__} has no record of new blocks\n"
        "expand it with deepen.insert_blocks, or load it with deepen.load"
    )


def new_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the new blocks by exact name, from the record."""
    expansion, family = expansion_of(model), family_of(model)
    return {name: p for name, p in model.named_parameters() if base_name(expansion, family, name) is None}
