"""Rows of an extended vocabulary in a live model: trained beside its tables, or in them with a block pack."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.errors import CheckFailed
from deepen.expansion import ROWS_PREFIX, NewRows

Rows = Mapping[str, torch.Tensor]
"""Table, by its name in files -> its last rows."""

_PART = "new"


def last_rows(model: PreTrainedModel, rows: NewRows) -> dict[str, torch.Tensor]:
    """Return copies of the last rows of the model's tables as they stand."""
    return {name: table.detach()[rows.first :].clone() for name, table in _tables(model, rows).items()}


def place_rows(model: PreTrainedModel, rows: NewRows, values: Rows) -> None:
    """Make them the last rows of the model's tables."""
    for name, table in _tables(model, rows).items():
        # Through `data`: a bypass between a forward and its backward pass ends with the rows there were.
        table.data[rows.first :] = values[name].to(table.device, table.dtype)


def tables_with(model: PreTrainedModel, rows: NewRows, values: Rows) -> dict[int, torch.Tensor]:
    """Return the address of each of the model's tables -> a copy of it with these last rows."""
    return {
        table.data_ptr(): torch.cat([table.detach()[: rows.first], values[name].to(table)])
        for name, table in _tables(model, rows).items()
    }


def part_rows(
    model: PreTrainedModel, rows: NewRows, active: Callable[[], bool] = lambda: True
) -> dict[str, nn.Parameter]:
    """Put the last rows beside their tables as parameters of their own; return these by name.

    Optimiser and weight decay then never meet an old row, and the tables stay what they are.

    Args:
        model: the model.
        rows: which.
        active: whether they count; otherwise the model computes with the rows in its tables.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    part = _new_part(embeddings, rows.first)
    embeddings.register_forward_hook(_look_up(rows.first, active))
    if head is not None:
        ends = _new_part(head, rows.first)
        if head.weight is embeddings.weight:
            ends.weight = part.weight
        head.register_forward_hook(_append(rows.first, active))
    parts = {id(parameter) for table in (embeddings, head) if table for parameter in table.new.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in parts}


def parted_rows(model: PreTrainedModel, rows: NewRows) -> dict[str, nn.Parameter]:
    """Return table, by its name in files -> its last rows, which were put beside it."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = dict.fromkeys(rows.inputs, embeddings.new.weight)
    return found | {name: head.new.get_parameter(name.rpartition(".")[2]) for name in rows.outputs}


def check_parted(model: PreTrainedModel, rows: NewRows) -> None:
    """Check that the rows beside the model's tables are, to the bit, those in them.

    Raises:
        CheckFailed: one is not.
    """
    held = last_rows(model, rows)
    for name, part in parted_rows(model, rows).items():
        if not torch.equal(held[name].to(part.dtype), part):
            raise CheckFailed(f"{name}: the rows that are to train are not the base's before training")


def packed_rows(model: PreTrainedModel, rows: NewRows) -> dict[str, torch.Tensor]:
    """Return the rows as a block pack holds them, by their names there."""
    beside = _PART in model.get_input_embeddings()._modules
    held: Rows = parted_rows(model, rows) if beside else last_rows(model, rows)
    return {ROWS_PREFIX + name: tensor for name, tensor in held.items()}


def _tables(model: PreTrainedModel, rows: NewRows) -> dict[str, nn.Parameter]:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = dict.fromkeys(rows.inputs, embeddings.weight)
    return found | {name: head.get_parameter(name.rpartition(".")[2]) for name in rows.outputs}


def _new_part(table: nn.Module, first: int) -> Any:
    """Give a table a part of its own kind for its rows from `first`: what it does to rows, that does too."""
    part: Any = copy.copy(table)
    part._parameters = {
        name: None if held is None else nn.Parameter(held.detach()[first:].clone())
        for name, held in table._parameters.items()
    }
    part._modules, part._forward_hooks, part.padding_idx = {}, type(table._forward_hooks)(), None
    # Whoever counts what a linear layer computes asks for its features.
    part.out_features = part.num_embeddings = len(part.weight)
    table.add_module(_PART, part)
    return part


_Hook = Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


def _look_up(first: int, active: Callable[[], bool]) -> _Hook:
    """Return a hook that gives ids from `first` on their vectors by the new part."""

    def hook(table: Any, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        if not active():
            return found
        ids = given[0]
        fresh = table.new((ids - first).clamp(min=0)).to(found.dtype)
        return torch.where((ids >= first)[..., None], fresh, found)

    return hook


def _append(first: int, active: Callable[[], bool]) -> _Hook:
    """Return a hook that takes the logits from `first` on by the new part."""

    def hook(table: Any, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        if not active():
            return found
        fresh = table.new(given[0].to(table.new.weight.dtype)).to(found.dtype)
        return torch.cat([found[..., :first], fresh], dim=-1)

    return hook
