"""Which blocks of a live model are new."""

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.errors import PackError
from deepen.expansion.manifest import Expansion
from deepen.model.state import active_expansion, find_state, refuse_bypassed, state_of
from deepen.model.structure import family_of


def find_expansion(model: PreTrainedModel) -> Expansion | None:
    """Return the record of the model's active new blocks, or None for a model without.

    Names of tensors in it are those of files. Several packs that are active together are one expansion.

    Raises:
        PackError: the `expansion.json` the model came with describes another number of blocks.
    """
    state = find_state(model)
    return active_expansion(model, state) if state else None


def expansion_of(model: PreTrainedModel) -> Expansion:
    """Return the record of the model's active new blocks, as `find_expansion` does.

    Raises:
        PackError: the model has none, or none is active.
    """
    state = state_of(model)
    if expansion := active_expansion(model, state):
        return expansion
    refuse_bypassed(state)
    first = next(iter(state.packs))
    raise PackError(f"none of the model's block packs is active: deepen.activate(model, {first!r})")


def new_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the new blocks by exact name in the model, from the record.

    Raises:
        PackError: the model has no active new blocks.
    """
    new, family = expansion_of(model).layout.new_indices, family_of(model)
    named = model.named_parameters(remove_duplicate=False)
    return {n: p for n, p in named if (place := family.split(n)) and place[0] in new}


def new_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return all that makes up the new blocks by exact name: parameters, and buffers that are their state.

    Raises:
        PackError: the model has no active new blocks.
    """
    new, family = expansion_of(model).layout.new_indices, family_of(model)
    places = ((name, tensor, family.split(name)) for name, tensor in model.state_dict().items())
    return {n: t for n, t, place in places if place and place[0] in new and not family.is_buffer(place[1])}
