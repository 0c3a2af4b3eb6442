"""Put block packs on a live base, switch between them, take them off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from deepen.blocks import Pack, open_pack
from deepen.errors import PackError
from deepen.expansion import MANIFEST_NAME, ROWS_PREFIX
from deepen.families import Family
from deepen.model.fingerprint import live_fingerprint
from deepen.model.names import file_names, put_tensors
from deepen.model.record import new_tensors
from deepen.model.rows import Rows, last_rows
from deepen.model.state import (
    Attached,
    State,
    base_state,
    find_state,
    refuse_bypassed,
    set_state,
    state_of,
    switch,
)
from deepen.model.structure import copied_block, family_of


def attach(model: PreTrainedModel, pack: str | Path, name: str | None = None) -> PreTrainedModel:
    """Put a block pack on a live base and switch it on alone.

    Packs attached before stay, switched off. No code of the pack's is run.

    Args:
        model: the base, with or without other packs.
        pack: directory or hub id of a block pack.
        name: what to call it in `activate` and `detach`; default: the last part of `pack`.

    Returns:
        The same model.

    Raises:
        PackError: the pack is malformed or was made for another base, or the name is taken.
    """
    held = open_pack(pack)
    state = state_for(model, held)
    _check_base(model, state, held)
    return attach_checked(model, held, state, name or Path(pack).name)


def attach_checked(model: PreTrainedModel, pack: Pack, state: State, name: str) -> PreTrainedModel:
    """Put a pack on a base it is known to fit, as `attach` does."""
    name = name or pack.directory.resolve().name
    if name in state.packs:
        raise PackError(f"{name!r} is attached already; give the pack another name, or detach that one")
    before, active = find_state(model), state.active
    origins = [state.base[block.copy_of] for block in pack.expansion.latest_blocks]
    tensors = _read(pack.shard.path)
    rows = _take_rows(model, pack, tensors)
    if rows is not None and pack.expansion.new_rows and state.rows is None:
        state.rows = last_rows(model, pack.expansion.new_rows)
    state.packs[name] = Attached(pack.expansion.portable, tuple(map(copied_block, origins)), rows)
    try:
        switch(model, state, [name])
        _fill(model, pack, tensors)
        switch(model, state, [name])
    except BaseException:
        switch(model, state, active)
        del state.packs[name]
        set_state(model, before or state)
        raise
    return model


def detach(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Take a pack off a model; with none left it is the base it was.

    Raises:
        PackError: nothing of that name is attached.
    """
    state = _named(model, [name])
    switch(model, state, [other for other in state.active if other != name])
    del state.packs[name]
    if not state.packs and state.below:
        set_state(model, state.below)
    return model


def activate(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    """Switch to the packs named: none is the base, several are stacked in this order from the bottom.

    A KV cache made before must not be used afterwards.

    Raises:
        PackError: nothing of such a name is attached.
        LayoutError: the config has no words for the kinds of blocks in this order.
    """
    state = _named(model, names)
    if len(set(names)) < len(names):
        raise PackError(f"{', '.join(names)}: a pack can be active only once")
    switch(model, state, names)
    return model


def attached(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of what is attached to the model, active or not."""
    state = find_state(model)
    return tuple(state.packs) if state else ()


@contextmanager
def bypass(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Run the model with its new blocks switched off: exactly the base.

    Inside the context the model *is* the base: its block list, its config and its cache slots are the
    base's. Of a model that was expanded more than once, the base is what the last expansion was made from.
    Bypassing again inside changes nothing. One thread at a time; a KV cache made inside must not be used
    outside.

    Raises:
        PackError: the model has no record of new blocks.
    """
    state = state_of(model)
    active, bypassed = state.active, state.bypassed
    try:
        switch(model, state, ())
        state.bypassed = True
        yield model
    finally:
        switch(model, state, active)
        state.bypassed = bypassed


def _named(model: PreTrainedModel, names: tuple[str, ...] | list[str]) -> State:
    state = state_of(model)
    refuse_bypassed(state)
    if unknown := [name for name in names if name not in state.packs]:
        held = ", ".join(map(repr, state.packs))
        raise PackError(f"nothing is attached as {unknown[0]!r}; there is {held}")
    return state


def state_for(model: PreTrainedModel, pack: Pack) -> State:
    """Return what a pack is added to: one of the stage that is attached goes beside it, the next on top."""
    state = find_state(model)
    refuse_bypassed(state)
    if state and state.stage == pack.expansion.stage:
        return state
    return base_state(model)


def _check_base(model: PreTrainedModel, state: State, pack: Pack) -> None:
    recorded, family = pack.expansion, family_of(model)
    if recorded.family != family.name or recorded.base_blocks != len(state.base):
        raise PackError(
            f"{pack.directory}: belongs to a {recorded.family} of {recorded.base_blocks} blocks "
            f"({recorded.base}), not to this model, a {family.name} of {len(state.base)}"
        )
    known = next((each.expansion.base_fingerprint.fast for each in state.packs.values()), None)
    found = known or live_fingerprint(model)
    if found != recorded.base_fingerprint.fast:
        raise PackError(
            f"{pack.directory}: belongs to {recorded.base} with fingerprint "
            f"{recorded.base_fingerprint.fast[:16]}…,\nnot to this model, with fingerprint {found[:16]}…"
        )


def _fill(model: PreTrainedModel, pack: Pack, held: Mapping[str, torch.Tensor]) -> None:
    """Give the new blocks, which the model now has, the pack's tensors."""
    path, new = pack.shard.path, pack.expansion.layout.new_indices
    tensors: dict[str, torch.Tensor] = {}
    family = _dialect(model, list(held))
    # Copied: what is mapped from a file may lie unaligned, and sums come out in other last bits.
    for name, tensor in held.items():
        place = family.split(name)
        if place is None or place[0] not in new:
            raise PackError(f"{path}: tensor {name!r} belongs to no new block of {MANIFEST_NAME}")
        if not family.is_buffer(place[1]):
            tensors[name] = tensor.clone()
    put_tensors(model, tensors, set(new_tensors(model)), str(path))


def _take_rows(model: PreTrainedModel, pack: Pack, tensors: dict[str, torch.Tensor]) -> Rows | None:
    """Take the rows that a pack brings out of its tensors.

    Raises:
        PackError: they are not rows of the model's tables.
    """
    path, rows = pack.shard.path, pack.expansion.new_rows
    if rows is None:
        return None
    try:
        needed = last_rows(model, rows)
    except AttributeError:
        raise PackError(f"{path}: {MANIFEST_NAME} has new_rows of a table that the model lacks") from None
    for table, held in needed.items():
        found = tensors.pop(ROWS_PREFIX + table, None)
        if found is None or found.shape != held.shape or held.shape[0] != rows.count:
            raise PackError(
                f"{path}: has no tensor {ROWS_PREFIX + table!r} of {rows.count} rows of the model's"
            )
        needed[table] = found.clone()
    return needed


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PackError(f"{path}: cannot be read ({error})") from None


def _dialect(model: PreTrainedModel, names: list[str]) -> Family:
    held = file_names(model)
    return next((f for f in (held.family, held.saved) if any(map(f.split, names))), family_of(model))
