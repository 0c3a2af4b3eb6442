"""The blocks of a live model: where they are, how they are numbered, what the config says of them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from deepen.errors import FamilyError
from deepen.families import Family, family_for
from deepen.model.packed import packed_layers, plain_dtype, plain_layer

ABSENT: Final = "deepen: the config has no such key"
_LISTS: Final = ("layer_types", "mlp_layer_types")


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a live model, in the dialect of its modules.

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


def copied_block(block: nn.Module) -> nn.Module:
    """Return a copy of a block that shares its configs: what is set on the model's later holds for it too.

    Layers that are packed in fewer bits are ordinary ones in the copy; their values are still to be given.
    """
    configs = (vars(module).get("config") for module in block.modules())
    made: dict[int, Any] = {id(config): config for config in configs if config is not None}
    dtype = plain_dtype(block)
    made |= {id(layer): plain_layer(layer, dtype) for layer in packed_layers(block).values()}
    return copy.deepcopy(block, made)


def depth_config(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    """Return the config values that depend on the number of blocks; `ABSENT` where there is none."""
    resets = (key for numbers in family.per_layer.numbers for key in numbers.reset)
    held = next(_text_configs(model, family)).to_dict()
    keys = (family.depth_key, *family.per_layer.keys, *_LISTS, *resets)
    return {key: held.get(key, ABSENT) for key in keys}


def reordered_config(
    model: PreTrainedModel, family: Family, config: Mapping[str, Any], origins: Sequence[int]
) -> dict[str, Any]:
    """Return the values of `depth_config` for a model whose block j is block `origins[j]` of another.

    Args:
        model: gives what does not depend on the number of blocks.
        family: its family.
        config: `depth_config` of that other model.
        origins: for each block of the new model, the block whose kind it has.

    Raises:
        LayoutError: the config has no words for the kinds of blocks in this order.
    """
    rest = next(_text_configs(model, family)).to_dict()
    known = {key: value for key, value in {**rest, **config}.items() if value is not ABSENT}
    changed = family.per_layer.reorder(known, known[family.depth_key], origins)
    return {**config, **changed, family.depth_key: len(origins)}


def install_blocks(
    model: PreTrainedModel, family: Family, blocks: Sequence[nn.Module], config: Mapping[str, Any]
) -> None:
    """Make `blocks` the model's blocks: list, config values and cache slots together.

    A block writes its keys and values to the cache slot `layer_idx`; two blocks with one number would
    share a slot and decode wrongly, so all are renumbered.
    """
    parent, _, name = family.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks))
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010 - nn.Module declares no such attribute
    for held in _text_configs(model, family):
        for key, value in config.items():
            if value is not ABSENT:
                setattr(held, key, copy.copy(value))
            elif key in vars(held):
                delattr(held, key)
    _forget_recorders(model)


def _text_configs(model: PreTrainedModel, family: Family) -> Iterator[Any]:
    """The config that describes the blocks, and equal ones that modules hold for themselves."""
    config = getattr(model.config, family.section) if family.section else model.config
    held = [vars(module).get("config") for module in model.modules()]
    yield from {id(each): each for each in (config, *held) if type(each) is type(config)}.values()


def _forget_recorders(model: PreTrainedModel) -> None:
    """Let transformers hook the blocks anew when hidden states are next asked for: it does so only once."""
    for module in model.modules():
        if getattr(module, "_output_capturing_hooks_installed", False):
            setattr(module, "_output_capturing_hooks_installed", False)  # noqa: B010
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
