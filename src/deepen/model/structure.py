"""The blocks of a live model: where they are, how they are numbered, what the config says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deepen.errors import FamilyError
from deepen.families import Family, family_for


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a live model.

    Raises:
        FamilyError: deepen does not know it.
    """
    modules = (f"{name}." for name, _ in model.named_modules())
    return family_for(model.config.to_dict(), modules, type(model).__name__)


def blocks_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """Return the model's blocks, bottom to top.

    Raises:
        FamilyError: they are not where the family's causal LM has them.
    """
    try:
        blocks = model.get_submodule(family.layers)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise FamilyError(
            f"{type(model).__name__}: has no blocks at {family.layers}; give the causal LM itself, unwrapped"
        )
    return blocks


def depth_config(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    """Return the config values that depend on the number of blocks."""
    return {key: getattr(model.config, key) for key in (family.depth_key, *family.per_layer.keys)}


def install_blocks(
    model: PreTrainedModel, family: Family, blocks: Sequence[nn.Module], config: Mapping[str, Any]
) -> None:
    """Make `blocks` the model's blocks: list, config values and cache slots together.

    A block writes its keys and values to the cache slot `layer_idx`; two blocks with one number would
    share a slot and decode wrongly, so all are renumbered.
    """
    parent, _, name = family.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks))
    for key, value in config.items():
        setattr(model.config, key, value)
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010 - nn.Module declares no such attribute
