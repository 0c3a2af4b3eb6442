"""What reaches each block that trains, and how far a step moves it.

Parameters belong to a block by the exact prefix of their name, so this holds for new blocks, existing ones
and adapters inside them alike. Sharded tensors (FSDP) are measured where they lie and added up over
processes; replicated ones (DDP) are the same everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from deepen.families import Family
from deepen.training.parallel import local
from deepen.training.world import World

Blocks = Mapping[int, Sequence[nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One step of what trains in one block.

    Attributes:
        gradient_norm: L2 norm of its gradient before clipping.
        update: L2 norm of what the step added to its weights (decay included), over the norm of the weights
            afterwards: a share, comparable between blocks, methods and models, where 1e-3 is a usual size.
            0 where nothing moved.
    """

    gradient_norm: float
    update: float


def by_block(parameters: Mapping[str, nn.Parameter], family: Family) -> dict[int, list[nn.Parameter]]:
    """Return what trains of each block, bottom to top; what lies outside the blocks is left out."""
    found: dict[int, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if place := family.split(name):
            found.setdefault(place[0], []).append(parameter)
    return dict(sorted(found.items()))


def gradient_norms(blocks: Blocks, world: World) -> dict[int, float]:
    """Return the norm of the gradient of each block, as it lies in `grad`."""
    parts = [_norms([p.grad for p in each if p.grad is not None]) for each in blocks.values()]
    return _whole(blocks, parts, world)


def step_blocks(optimizer: torch.optim.Optimizer, blocks: Blocks, world: World) -> dict[int, float]:
    """Make the optimiser's step, block after block; return `BlockReport.update` of each.

    The difference is taken from the weights themselves, so it is exact for every optimiser. Only one block's
    weights are held twice at a time; the optimiser works on each parameter by itself, so the order changes
    nothing.
    """
    groups = optimizer.param_groups
    block_of = {id(p): index for index, parameters in blocks.items() for p in parameters}
    changes = []
    try:
        for index in (*blocks, None):
            optimizer.param_groups = [
                {**group, "params": chosen}
                for group in groups
                if (chosen := [p for p in group["params"] if block_of.get(id(p)) == index])
            ]
            changes.append(_change(optimizer, [] if index is None else blocks[index]))
    finally:
        optimizer.param_groups = groups
    moved = _whole(blocks, changes[:-1], world)
    weights = _whole(blocks, [_norms(parameters) for parameters in blocks.values()], world)
    return {index: size / weights[index] if size else 0.0 for index, size in moved.items()}


def _change(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Make a step of the optimiser's present groups; return the norm of each parameter's change."""
    weights = [local(p.detach()) for p in parameters]
    before = [weight.clone() for weight in weights]
    optimizer.step()
    if before:
        torch._foreach_sub_(before, weights)
    return _norms(before)


def _norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the norm of this process's part of each tensor."""
    parts = [local(tensor.detach()) for tensor in tensors]
    return list(torch._foreach_norm(parts)) if parts else []


def _whole(blocks: Blocks, norms: Sequence[Sequence[torch.Tensor]], world: World) -> dict[int, float]:
    """Put the norms of each block's tensors together, over processes where each has but a part."""
    flat = [norm for each in norms for norm in each]
    if not flat:
        return dict.fromkeys(blocks, 0.0)
    # One transfer; on the CPU, as not every device has fp64, in which squares neither over- nor underflow.
    squares = torch.stack(flat).cpu().double().square()
    parts = torch.split(squares, [len(each) for each in norms])
    summed = torch.stack([part.sum() for part in parts])
    if any(isinstance(p, DTensor) for parameters in blocks.values() for p in parameters):
        world.add(summed)
    return dict(zip(blocks, summed.sqrt().tolist(), strict=True))
