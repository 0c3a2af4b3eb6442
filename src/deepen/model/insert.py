from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.errors import FamilyError, LayoutError
from deepen.expansion.layout import Layout, NewBlock
from deepen.expansion.manifest import Expansion, Fingerprint
from deepen.expansion.stages import describe_expansion
from deepen.families import Family, Zero, generic
from deepen.model.dtypes import FLOAT_NAMES
from deepen.model.fingerprint import live_fingerprint
from deepen.model.fuse import fuse_neighbours
from deepen.model.names import FileNames, file_names
from deepen.model.packed import plain_state
from deepen.model.quantised import fill_from_files, unpacked_files
from deepen.model.state import (
    NEW,
    Attached,
    State,
    active_expansion,
    base_state,
    find_state,
    refuse_bypassed,
    switch,
)
from deepen.model.structure import blocks_of, copied_block, family_of, reordered_config


def insert_blocks(
    model: PreTrainedModel,
    layout: Layout,
    *,
    base: str | Path | None = None,
    fingerprint: Fingerprint | None = None,
    name: str = NEW,
) -> PreTrainedModel:
    """Add new blocks to a live model, in place; it computes exactly what it did before.

    Each new block is a copy of a base block, or made from two (`NewBlock.init`). Its residual writes (W^O and
    the feed-forward output, with biases; the gain of the norm behind them, where there is one) are filled so
    that it adds nothing (arXiv 2401.02415 section 3.1), or others are (`NewBlock.zero`). In a model that is
    expanded already, earlier new blocks become base; where its packs are all switched off, the blocks become
    another pack beside them. A model that bitsandbytes holds quantised copies from its unquantised files.

    Args:
        model: a causal LM of a known family.
        layout: from `deepen.plan_layout`, for the model as it stands.
        base: name or path recorded as the base; default: where the model was loaded from.
        fingerprint: the base's; default: of its files while the model equals them, else of its tensors.
        name: what to call them in `activate` and `detach`.

    Returns:
        The same model.

    Raises:
        FamilyError: deepen does not know the model, or what should be filled in a block, or cannot fill it.
        LayoutError: the layout is for another number of blocks, or the result cannot be described.
        PackError: the model is bypassed, or its files, which a quantised one is copied from, lack a tensor.
    """
    family = family_of(model)
    blocks = blocks_of(model, family)
    refuse_bypassed(find_state(model))
    state = base_state(model)
    if len(blocks) != layout.base_blocks:
        raise LayoutError(f"the layout is for {layout.base_blocks} base blocks, the model has {len(blocks)}")
    if name in state.packs:
        raise LayoutError(f"{name!r} is attached already; give the new blocks another name")
    _check_fillable(blocks, family, layout)
    files = _files_to_copy(model, layout)
    reordered_config(model, family, state.config, layout.origins)
    names = file_names(model)
    tensors = {index: names.of(_tensors(block, family, index)) for index, block in enumerate(blocks)}
    expansion = describe_expansion(
        layout,
        names.family,
        {index: tuple(_inside(name, names) for name in held) for index, held in tensors.items()},
        str(base or model.name_or_path or "unnamed"),
        fingerprint or Fingerprint(fast=live_fingerprint(model)),
        _record_below(model, state),
    )
    copies = [_identity_copy(blocks[new.copy_of], new, family, names) for new in layout.new_blocks]
    fuse_neighbours(model, family, state.config, list(blocks), layout, copies)
    state.packs[name] = Attached(expansion, tuple(copies))
    switch(model, state, [name])
    if files:
        fill_from_files(model, layout, files)
        switch(model, state, [name])  # what was read lies on the CPU
    return model


def _files_to_copy(model: PreTrainedModel, layout: Layout) -> Checkpoint | None:
    files = unpacked_files(model)
    if files and any(block.init != "copy" for block in layout.new_blocks):
        raise LayoutError("init: new blocks of a quantised model are copies; choose init copy")
    return files


def _tensors(block: nn.Module, family: Family, index: int) -> dict[str, torch.Tensor]:
    return {family.join(index, name): tensor for name, tensor in plain_state(block).items()}


def _inside(name: str, names: FileNames) -> str:
    place = names.family.split(name)
    if place is None:
        raise FamilyError(
            f"tensor {name!r} of a block has no place in the {names.family.name} family's blocks"
        )
    return place[1]


def _record_below(model: PreTrainedModel, state: State) -> Expansion | None:
    """Return the record of the base, where that was expanded itself."""
    below = active_expansion(model, state.below) if state.below else None
    if below and below.new_rows:
        raise LayoutError("the model's new blocks brought rows of new tokens: merge them, then expand")
    return below


def _check_fillable(blocks: nn.ModuleList, family: Family, layout: Layout) -> None:
    """Refuse packed weights: zero bytes of a quantised matrix need not mean zero."""
    fills = [family.fills(zero) for zero in {block.zero for block in layout.new_blocks}]
    for index, block in enumerate(blocks):
        for name, tensor in plain_state(block).items():
            if any(generic(name) in each for each in fills) and tensor.dtype not in FLOAT_NAMES:
                raise FamilyError(
                    f"tensor {family.join(index, name)!r} is {str(tensor.dtype).removeprefix('torch.')}: "
                    "a quantised model cannot be expanded; load it unquantised"
                )


def _identity_copy(block: nn.Module, placed: NewBlock, family: Family, names: FileNames) -> nn.Module:
    new = copied_block(block)
    with torch.no_grad():
        for name, tensor in new.state_dict(keep_vars=True).items():
            if (value := family.fill(name, placed.zero)) is not None:
                tensor.fill_(value)
    held = names.state(_tensors(new, family, placed.copy_of))
    inside = {_inside(name, names): tensor for name, tensor in held.items()}
    _check_identity(inside, names.family, placed.zero)
    return new


def _check_identity(tensors: Mapping[str, torch.Tensor], family: Family, zero: Zero) -> None:
    """Check a new block by the names in files: all that should is filled, something in each sub-layer."""
    fills = {name: value for name in tensors if (value := family.fill(name, zero)) is not None}
    for name, value in fills.items():
        if tensors[name].is_meta:
            continue  # a model that is only planned has no values
        if not bool((tensors[name] == value).all()):
            raise FamilyError(
                f"filled {name!r} has another name in memory, which the {family.name} family lacks"
            )
    held = set(map(generic, fills))
    for part in family.parts:
        known = {
            name
            for alternative in family.block
            if alternative.part == part
            for name in (*alternative.required, *alternative.optional)
            if family.fill(name, zero) is not None
        }
        if known and not known & held:
            raise FamilyError(f"a new block of the {family.name} family has nothing to fill in its {part}")
