"""What is attached to a live model: a base, block packs by name, and which of them are active.

Block list, config values and cache slots of the model are always built anew from this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.blocks.merge import single_pack
from deepen.errors import PackError
from deepen.expansion import with_blocks
from deepen.expansion.layout import Layout, NewBlock
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, read_expansion
from deepen.expansion.stages import previous_expansion
from deepen.model.names import file_names
from deepen.model.rows import Rows, place_rows, tables_with
from deepen.model.source import source_directory
from deepen.model.structure import blocks_of, depth_config, family_of, install_blocks, reordered_config

_ATTRIBUTE: Final = "_deepen_state"
NEW: Final = "new"


@dataclass(frozen=True)
class Attached:
    """New blocks that are there to be switched on.

    Attributes:
        expansion: the record of them, as if they stood on the base alone.
        blocks: them, as `expansion.latest_blocks` lists them.
        rows: the rows that came with them; None where there are none, or where they train beside the tables.
    """

    expansion: Expansion
    blocks: tuple[nn.Module, ...]
    rows: Rows | None = None


@dataclass(kw_only=True)
class State:
    """What is attached to a model.

    Attributes:
        base: the blocks of the base.
        config: its config values that depend on their number.
        rows: its rows of new tokens, where a pack brings others.
        packs: what is attached, by name.
        active: the names of what is switched on, from the bottom.
        below: the state of the base, where that was expanded itself.
        bypassed: whether the model is bypassed for the time being.
    """

    base: tuple[nn.Module, ...]
    config: Mapping[str, Any]
    rows: Rows | None = None
    packs: dict[str, Attached] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    below: "State | None" = None
    bypassed: bool = False

    @property
    def stage(self) -> int:
        """Number of the expansion that its packs are, from 0."""
        return 0 if self.below is None else self.below.stage + 1


def find_state(model: PreTrainedModel) -> State | None:
    """Return what is attached to a model; None where nothing ever was.

    A model that plain transformers loaded from an expanded checkpoint is recognised by the
    `expansion.json` in the directory it came from.

    Raises:
        PackError: that file describes another number of blocks.
    """
    state = vars(model).get(_ATTRIBUTE)
    if isinstance(state, State):
        return state
    directory = source_directory(model)
    if directory is None or not (directory / MANIFEST_NAME).is_file():
        return None
    expansion, family = read_expansion(directory), family_of(model)
    blocks = tuple(blocks_of(model, family))
    if len(blocks) != expansion.layout.depth:
        raise PackError(
            f"{directory / MANIFEST_NAME}: describes {expansion.layout.depth} blocks, "
            f"the model has {len(blocks)}"
        )
    state = _recorded(model, expansion, blocks, depth_config(model, family))
    set_state(model, state)
    return state


def state_of(model: PreTrainedModel) -> State:
    """Return what is attached to a model.

    Raises:
        PackError: nothing is.
    """
    state = find_state(model)
    if state and state.packs:
        return state
    raise PackError(
        f"{type(model).__name__} has no record of new blocks\n"
        "expand it with deepen.insert_blocks, or load it with deepen.load"
    )


def refuse_bypassed(state: State | None) -> None:
    """Refuse what would not outlive the end of a bypass.

    Raises:
        PackError: the model is bypassed.
    """
    if state and state.bypassed:
        raise PackError("the model's new blocks are bypassed: do this outside `with deepen.bypass(model)`")


def set_state(model: PreTrainedModel, state: State) -> None:
    """Note on the model what is attached to it."""
    vars(model)[_ATTRIBUTE] = state


def forget_state(model: PreTrainedModel) -> None:
    """Forget what is attached to a model that is given up."""
    vars(model).pop(_ATTRIBUTE, None)


def settle_base(model: PreTrainedModel) -> None:
    """Take a model as it stands for a base: new blocks that its files record are no longer new."""
    state = State(
        base=tuple(blocks_of(model, family_of(model))), config=depth_config(model, family_of(model))
    )
    set_state(model, state)


def base_state(model: PreTrainedModel) -> State:
    """Return the state to which another pack can be added: the model as it stands is its base."""
    state, family = find_state(model), family_of(model)
    if state is not None and not state.active:
        return state
    blocks = tuple(blocks_of(model, family))
    return State(base=blocks, config=depth_config(model, family), below=state)


def switch(model: PreTrainedModel, state: State, names: Sequence[str]) -> None:
    """Make the model its base with the packs named on it, from the bottom, and the state the model's.

    Raises:
        LayoutError: the config has no words for the kinds of blocks in this order.
        PackError: several of the packs bring rows of the same tables.
    """
    family, chosen = family_of(model), [state.packs[name] for name in names]
    if sum(each.expansion.new_rows is not None for each in chosen) > 1:
        raise PackError(f"{', '.join(names)}: several of them bring new rows of one vocabulary; activate one")
    layout, places = stacked_layout(len(state.base), [each.expansion for each in chosen])
    config = state.config
    if chosen:
        config = reordered_config(model, family, config, layout.origins)
    blocks = dict(zip(layout.base_positions, state.base, strict=True))
    for new, (pack, number) in zip(layout.new_blocks, places, strict=True):
        blocks[new.index] = _following(chosen[pack].blocks[number], state.base[new.copy_of])
    install_blocks(model, family, [blocks[index] for index in range(layout.depth)], config)
    _switch_rows(model, state, chosen)
    state.active = tuple(names)
    set_state(model, state)


def _switch_rows(model: PreTrainedModel, state: State, chosen: Sequence[Attached]) -> None:
    """Put the chosen pack's rows into the model's tables, or the base's where it has none."""
    for pack in state.packs.values():
        if pack.rows is not None and pack.expansion.new_rows and state.rows is not None:
            placed = next((each.rows for each in chosen if each.rows is not None), state.rows)
            place_rows(model, pack.expansion.new_rows, placed)
            return


def base_tables(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """Return the address of each table that holds a pack's rows -> the table as it is in the base."""
    state = find_state(model)
    for pack in (state.packs[name] for name in state.active) if state else ():
        if state and state.rows is not None and pack.rows is not None and pack.expansion.new_rows:
            return tables_with(model, pack.expansion.new_rows, state.rows)
    return {}


def _following(block: nn.Module, origin: nn.Module) -> nn.Module:
    """Bring a block to where its origin is, and into its mode: inactive ones do not follow the model."""
    device = next(origin.parameters()).device
    if any(held.device != device for held in (*block.parameters(), *block.buffers())):
        block.to(device)
    return block.train(origin.training)


def stacked_layout(
    base_blocks: int, expansions: Sequence[Expansion]
) -> tuple[Layout, tuple[tuple[int, int], ...]]:
    """Return where the new blocks of several packs stand together on one base.

    Blocks that stand on the same base block are in the order of the packs, from the bottom.

    Returns:
        The layout, and for each of its new blocks the number of its pack and its own number there.
    """
    places = [
        (block.after, pack, number, block.copy_of)
        for pack, expansion in enumerate(expansions)
        for number, block in enumerate(expansion.latest_blocks)
    ]
    places.sort()
    new = tuple(
        NewBlock(index=after + 1 + below, after=after, copy_of=copy_of)
        for below, (after, _, _, copy_of) in enumerate(places)
    )
    return Layout(base_blocks, new), tuple((pack, number) for _, pack, number, _ in places)


def active_expansion(model: PreTrainedModel, state: State) -> Expansion | None:
    """Return the record of what is active, as one expansion of the base; None where nothing is."""
    if len(state.active) < 2:
        return state.packs[state.active[0]].expansion if state.active else None
    blocks = [
        block.model_copy(update={"pack": name})
        for name in state.active
        for block in state.packs[name].expansion.latest_blocks
    ]
    rows = (state.packs[name].expansion.new_rows for name in state.active)
    whole = with_blocks(state.packs[state.active[0]].expansion, blocks, file_names(model).family)
    return whole.model_copy(update={"averaged": {}, "new_rows": next(filter(None, rows), None)})


def _recorded(
    model: PreTrainedModel, expansion: Expansion, blocks: tuple[nn.Module, ...], config: Mapping[str, Any]
) -> State:
    """Take an expanded model apart, stage by stage and pack by pack."""
    layout, family, dialect = expansion.layout, family_of(model), file_names(model).family
    previous = previous_expansion(expansion, dialect)
    base = tuple(blocks[position] for position in layout.base_positions)
    base_config = reordered_config(model, family, config, layout.base_positions)
    packs = {}
    for name, indices in _packs(expansion).items():
        single = single_pack(expansion, name, dialect) if name != NEW else expansion
        packs[name] = Attached(single.portable, tuple(blocks[index] for index in indices))
    return State(
        base=base,
        config=base_config,
        packs=packs,
        active=tuple(packs),
        below=_recorded(model, previous, base, base_config) if previous else None,
    )


def _packs(expansion: Expansion) -> dict[str, list[int]]:
    """Names of the packs that were stacked, from the bottom, and their blocks; `new` where none were."""
    indices: dict[str, list[int]] = {name: [] for name in expansion.packs}
    for block in expansion.latest_blocks:
        if block.pack is None:
            return {NEW: [block.index for block in expansion.latest_blocks]}
        indices.setdefault(block.pack, []).append(block.index)
    return indices
