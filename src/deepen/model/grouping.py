"""A batch whose rows are answered by different packs: cut into groups, and put together again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from deepen.errors import SwitchError

# Tensors of which each row of the batch has its own; of no others is it known.
_OF_ROWS: Final = frozenset(
    {"inputs", "input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}
)
_OF_ALL: Final = frozenset({"logits_to_keep", "cache_position", "num_items_in_batch"})


@dataclass(frozen=True)
class Group:
    """Rows of a batch that are answered together.

    Attributes:
        pack: what takes part; None: the base alone.
        rows: their numbers, ascending.
    """

    pack: str | None
    rows: tuple[int, ...]

    @property
    def packs(self) -> tuple[str, ...]:
        """The packs that are on."""
        return () if self.pack is None else (self.pack,)


@dataclass(frozen=True)
class RowCaches:
    """KV caches of a batch, one a group: packs differ in their number of blocks.

    Attributes:
        groups: who answers which rows, decided when the caches were begun.
        caches: one a group.
    """

    groups: tuple[Group, ...]
    caches: tuple[Any, ...]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of a row that are cached."""
        return int(self.caches[0].get_seq_length(layer_idx))


def group_rows(packs: Sequence[str | None]) -> tuple[Group, ...]:
    """Return rows by the pack that answers them: the base's first, then by their first row."""
    order = sorted(dict.fromkeys(packs), key=lambda pack: pack is not None)
    return tuple(Group(pack, tuple(i for i, each in enumerate(packs) if each == pack)) for pack in order)


def take_rows(given: Mapping[str, Any], group: Group, total: int) -> dict[str, Any]:
    """Return the arguments of a call for some rows of its batch.

    Args:
        given: name -> argument.
        group: the rows.
        total: rows of the batch; where they are all the group's, nothing is cut.

    Raises:
        SwitchError: a tensor of which it is not known what its rows are.
    """
    if len(group.rows) == total:
        return dict(given)
    return {name: _take(name, value, group, total) for name, value in given.items()}


def _take(name: str, value: Any, group: Group, total: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or name in _OF_ALL:
        return value
    if name in _OF_ROWS and len(value) == total:
        return value[list(group.rows)]
    if name in _OF_ROWS and len(value) == 1:
        return value
    raise SwitchError(
        f"{name} {list(value.shape)} cannot be cut into rows that different packs answer\n"
        "give one row at a time, or decide yourself with deepen.activate"
    )


def merge_outputs(
    outputs: Sequence[ModelOutput], groups: Sequence[Group], total: int, labels: Tensor | None, summed: bool
) -> ModelOutput:
    """Return the outputs of groups as that of their batch.

    Args:
        outputs: one a group.
        groups: the groups.
        total: rows of the batch.
        labels: of the batch, where losses are among the outputs.
        summed: whether the losses are sums over a number of tokens that was given, not means.

    Raises:
        SwitchError: one is of no fixed shape, as the states of every block are.
    """
    merged: dict[str, Any] = {}
    for name in outputs[0]:
        parts = [output[name] for output in outputs]
        if name == "past_key_values":
            merged[name] = RowCaches(tuple(groups), tuple(parts))
        elif name == "loss" and labels is not None:
            merged[name] = _merge_losses(parts, groups, labels, summed)
        elif all(isinstance(part, Tensor) and part.ndim for part in parts):
            merged[name] = _merge(parts, groups, total)
        else:
            raise SwitchError(
                f"{name} of rows that different packs answer cannot be put together; give one row at a time"
            )
    return type(outputs[0])(**merged)


def merge_sequences(parts: Sequence[Tensor], groups: Sequence[Group], total: int, pad: int | None) -> Tensor:
    """Return generated sequences in the order of their prompts, padded at the end to the longest.

    Args:
        parts: one a group, [rows × sequences of each, length].
        groups: the groups.
        total: rows of the batch.
        pad: the token to pad with.

    Raises:
        SwitchError: padding is needed and there is no token for it.
    """
    longest = max(part.shape[1] for part in parts)
    if pad is None and any(part.shape[1] < longest for part in parts):
        raise SwitchError("sequences differ in length and the model has no padding token: give pad_token_id")
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad or 0) for part in parts]
    several = len(parts[0]) // len(groups[0].rows)
    by_prompt = [part.view(-1, several, longest) for part in padded]
    return _merge(by_prompt, groups, total).flatten(0, 1)


def _merge(parts: Sequence[Tensor], groups: Sequence[Group], total: int) -> Tensor:
    order = torch.tensor([row for group in groups for row in group.rows], device=parts[0].device)
    together = torch.cat(list(parts))
    assert len(together) == total
    return together[order.argsort()]


def _merge_losses(parts: Sequence[Tensor], groups: Sequence[Group], labels: Tensor, summed: bool) -> Tensor:
    """Weigh means by the tokens they are of: those with a label, but for the first of a row."""
    if summed:
        return torch.stack(list(parts)).sum()
    counts = [(labels[list(group.rows), 1:] != -100).sum() for group in groups]
    # The mean over no token is not a number, and counts for nothing.
    weighed = [part * count for part, count in zip(parts, counts, strict=True) if count]
    return torch.stack(weighed).sum() / torch.stack(counts).sum() if weighed else parts[0]
