"""New blocks of a live model that are made from two neighbours; the numbers are those of the byte engine."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.expansion.layout import Layout, NewBlock
from deepen.expansion.neighbours import Alignment, check_alike, differing, same_kind
from deepen.families import Family
from deepen.model.structure import reordered_config

State = Mapping[str, torch.Tensor]


def fuse_neighbours(
    model: PreTrainedModel,
    family: Family,
    config: Mapping[str, Any],
    blocks: Sequence[nn.Module],
    layout: Layout,
    copies: Sequence[nn.Module],
) -> None:
    """Make copies of base blocks what `NewBlock.init` says, but for what is filled.

    Args:
        model: the model.
        family: its family, in the dialect of its modules.
        config: `depth_config` of the base.
        blocks: the base's blocks.
        layout: says what each new block is made from.
        copies: the new blocks, each a copy of the lower one.

    Raises:
        LayoutError: two neighbours differ in kind, or hold what cannot be averaged or aligned.
    """
    kinds = partial(reordered_config, model, family, config)
    for block, new in zip(layout.new_blocks, copies, strict=True):
        if block.init == "copy":
            continue
        below, above = (_averaged(blocks[number], family) for number in (block.copy_of, block.copy_of + 1))
        check_alike(block, *({n: (t.dtype, t.shape) for n, t in held.items()} for held in (below, above)))
        if not same_kind(kinds, len(blocks), block.copy_of):
            raise differing(block, "the config makes them of different kinds")
        alignment = _alignment(model, family, block, below, above) if block.init == "transport" else None
        values = new.state_dict(keep_vars=True)
        for name in below:
            kept = family.fill(name, block.zero) is None
            if kept and not values[name].is_meta:  # a model only planned has no values
                values[name].data.copy_(_mean(name, below, above, alignment))


def _averaged(block: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    held = block.state_dict().items()
    return {
        name: tensor for name, tensor in held if tensor.is_floating_point() and not family.is_buffer(name)
    }


def _alignment(
    model: PreTrainedModel, family: Family, block: NewBlock, below: State, above: State
) -> Alignment:
    shapes = {name: tuple(tensor.shape) for name, tensor in below.items()}
    read = [{name: partial(_numbers, tensor) for name, tensor in held.items()} for held in (below, above)]
    return Alignment(block, shapes, family.text_config(model.config.to_dict()), *read)


def _mean(name: str, below: State, above: State, alignment: Alignment | None) -> torch.Tensor:
    from deepen.expansion.fusion import middle

    second = _numbers(above[name])
    if alignment and name in alignment.places:
        axis, indices = alignment.order(name)
        second = np.take(second, indices, axis)
    return torch.from_numpy(np.asarray(middle(_numbers(below[name]), second)))


def _numbers(tensor: torch.Tensor) -> Any:
    held = tensor.detach().cpu()
    return (held if held.dtype == torch.float64 else held.float()).numpy()
