"""A model that decides for each row of a batch which of its packs takes part."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from deepen.errors import SwitchError
from deepen.model.decision import (
    Decision,
    Switch,
    Switching,
    find_switching,
    note_switching,
    playing,
    resting,
)
from deepen.model.grouping import Group, RowCaches, group_rows, merge_outputs, merge_sequences, take_rows
from deepen.model.state import state_of
from deepen.model.switch_file import read_switch

_METHODS: Final = ("forward", "generate")


def set_switch(model: PreTrainedModel, switch: str | Path | Switch | None) -> PreTrainedModel:
    """Let a model decide for each row of a batch which of its attached packs takes part, if any.

    `forward` decides from the first tokens of a row, and a row that goes on with a KV cache stays with what
    was decided when the cache was begun; `generate` decides once for each prompt. Rows with one decision are
    computed as one batch, with the padding they came with: its logits are, to the bit, those of the model
    with that pack alone on for these rows, and for the base those inside `deepen.bypass`. What is attached
    later competes too. Inside `deepen.bypass` nothing is decided. What `deepen.activate` switched on is on
    again after each call, also after one that failed. One thread at a time.

    Args:
        model: a model with new blocks.
        switch: `auto` (the prompt's likelihood, threshold 0), a switch, or the directory of one that
            `deepen blocks switch` wrote; None takes the switch off.

    Returns:
        The same model.

    Raises:
        PackError: nothing is attached.
        SwitchError: the switch cannot be read, or was made for other packs or another base.
    """
    if switch is None:
        note_switching(model, None)
        for name in _METHODS:
            vars(model).pop(name, None)
        return model
    chosen = find_switch(switch)
    chosen.candidates(model)
    note_switching(model, Switching(chosen))
    for name, method in zip(_METHODS, (_forward, _generate), strict=True):
        # Bound, so that a deep copy of the model has its own.
        vars(model)[name] = MethodType(_as(getattr(type(model), name), method), model)
    return model


def find_switch(switch: str | Path | Switch) -> Switch:
    """Return the switch that is meant; see `set_switch`."""
    if isinstance(switch, Switch):
        return switch
    return Switch() if switch == "auto" else read_switch(Path(switch))[0]


def switch_of(model: PreTrainedModel) -> Switch | None:
    """Return the model's switch."""
    found = find_switching(model)
    return found.switch if found else None


def decisions(model: PreTrainedModel) -> tuple[Decision, ...]:
    """Return what the model's switch decided last, one decision a row; empty before the first.

    Raises:
        SwitchError: the model has no switch.
    """
    return _switching(model).decisions


def _switching(model: PreTrainedModel) -> Switching:
    if found := find_switching(model):
        return found
    raise SwitchError('the model has no switch: deepen.load(base, pack, switch="auto"), or deepen.set_switch')


def _as(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that stands in for another: `generate` looks at the signature of `forward`."""

    @wraps(original)
    def stand_in(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if _switching(self).resting or state_of(self).bypassed:
            return original(self, *args, **kwargs)
        names = list(inspect.signature(original).parameters)[1:]
        with resting(self):
            return method(self, original, {**dict(zip(names, args, strict=False)), **kwargs})

    return stand_in


def _forward(model: PreTrainedModel, original: Callable[..., Any], given: dict[str, Any]) -> Any:
    if given.get("return_dict") is False:
        raise SwitchError("a model with a switch returns no tuples; leave return_dict out")
    ids = _token_ids(given, "input_ids")
    before = given.pop("past_key_values", None)
    if before is None:
        groups = _decide(model, _prompts(ids, given.get("attention_mask")))
        caches: tuple[Any, ...] = (None,) * len(groups)
    elif isinstance(before, RowCaches):
        groups, caches = before.groups, before.caches
    else:
        raise SwitchError(
            "a model with a switch goes on only with a KV cache that it began: give none at first"
        )
    outputs: list[ModelOutput] = []
    for group, cache in zip(groups, caches, strict=True):
        part = take_rows(given, group, len(ids))
        with playing(model, group.packs):
            outputs.append(original(model, **part, past_key_values=cache))
    return _together(outputs, groups, len(ids), given)


def _together(
    outputs: list[ModelOutput], groups: tuple[Group, ...], total: int, given: dict[str, Any]
) -> ModelOutput:
    if len(groups) > 1:
        summed = given.get("num_items_in_batch") is not None
        return merge_outputs(outputs, groups, total, given.get("labels"), summed)
    if (cache := outputs[0].get("past_key_values")) is not None:
        outputs[0]["past_key_values"] = RowCaches(groups, (cache,))
    return outputs[0]


def _generate(model: PreTrainedModel, original: Callable[..., Any], given: dict[str, Any]) -> Any:
    if given.get("past_key_values") is not None:
        raise SwitchError("a model with a switch generates from the whole prompt, not from a KV cache")
    ids = _token_ids(given, "inputs" if given.get("inputs") is not None else "input_ids")
    mask = given.get("attention_mask")
    if mask is None and (pad := _token(model, given, "pad_token_id")) not in (None, _end(model, given)):
        mask = ids != pad  # as `generate` itself takes it
    groups = _decide(model, _prompts(ids, mask))
    if len(groups) > 1 and _option(model, given, "return_dict_in_generate"):
        raise SwitchError(
            "scores and states of rows that different packs answer cannot be put together; "
            "give one row at a time, or leave return_dict_in_generate out"
        )
    parts = []
    for group in groups:
        with playing(model, group.packs):
            parts.append(original(model, **take_rows(given, group, len(ids))))
    if len(groups) == 1:
        return parts[0]
    pad = _token(model, given, "pad_token_id")
    return merge_sequences(parts, groups, len(ids), _end(model, given) if pad is None else pad)


def _decide(model: PreTrainedModel, prompts: list[Tensor]) -> tuple[Group, ...]:
    switching = _switching(model)
    switching.decisions = switching.switch.decide(model, prompts)
    return group_rows([decision.pack for decision in switching.decisions])


def _token_ids(given: dict[str, Any], name: str) -> Tensor:
    ids = given.get(name)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise SwitchError("a switch decides from token ids: give input_ids of shape [rows, tokens]")
    return ids


def _prompts(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return the ids of each row without its padding."""
    if mask is None:
        return list(ids)
    if mask.shape != ids.shape:
        raise SwitchError(
            f"attention_mask is {list(mask.shape)}; a switch needs that of the input_ids, {list(ids.shape)}"
        )
    return [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]


def _end(model: PreTrainedModel, given: dict[str, Any]) -> int | None:
    return _token(model, given, "eos_token_id")


def _token(model: PreTrainedModel, given: dict[str, Any], name: str) -> int | None:
    """Return a special token of a call of `generate`, the first where it has several."""
    found = _option(model, given, name)
    found = found[0] if isinstance(found, list | tuple) else found
    return None if found is None else int(found)


def _option(model: PreTrainedModel, given: dict[str, Any], name: str) -> Any:
    """Return what a call of `generate` says of an option, itself or by a generation config."""
    for said in (given.get(name), getattr(given.get("generation_config"), name, None)):
        if said is not None:
            return said
    return getattr(model.generation_config, name, None)
