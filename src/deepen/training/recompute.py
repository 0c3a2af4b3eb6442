"""Activation checkpointing: which blocks forget what they computed and compute it again for the gradient.

Below the first block that trains nothing is stored for a gradient, so there is nothing to forget. Above it
a frozen block stores less than one that trains and costs as much to compute again; `auto` begins with frozen
blocks, from the bottom, and takes no more than memory asks for.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from deepen.errors import TrainingError

Recompute = Literal["none", "auto", "full"]

_MEMINFO: Final = Path("/proc/meminfo")
_NOTHING: Final = torch.empty(0)
# Left free by `auto`: what allocators waste, and what is no activation.
MARGIN: Final = 0.15


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """What one block stores for the gradient of a batch.

    Attributes:
        saved: bytes it keeps from its forward pass to its backward pass.
        kept: bytes of its input, which are all it keeps when it is computed again.
        frozen: whether nothing in it trains.
    """

    saved: int
    kept: int
    frozen: bool


def measure_blocks(blocks: Sequence[nn.Module], forward: Callable[[], object]) -> list[BlockMemory]:
    """Run a forward pass and measure what each block would store. Only one block's is in memory at a time.

    Args:
        blocks: the model's blocks.
        forward: runs the model on a batch of the size in question, with gradients.
    """
    # By the storage itself, not its address: one without values (`deepen.planner`) has none.
    weights: set[int] = set()
    held: dict[int, torch.UntypedStorage] = {}  # of the block being run: a freed address is used again
    saved: list[int] = []
    inputs: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if saved and storage._cdata not in weights | held.keys():
            held[storage._cdata] = storage
            saved[-1] += storage.nbytes()
        return _NOTHING  # the tensor itself is let go

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held.clear()
        # Now, as weights that are sharded lie whole in memory only while their block runs.
        weights.clear()
        weights.update(p.untyped_storage()._cdata for p in block.parameters())
        states = args[0] if args else kwargs["hidden_states"]
        inputs.append(states.numel() * states.element_size())
        saved.append(0)

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        BlockMemory(saved=bytes_, kept=kept if bytes_ else 0, frozen=not trains(block))
        for block, bytes_, kept in zip(blocks, saved, inputs, strict=True)
    ]


def choose_blocks(memory: Sequence[BlockMemory], mode: Recompute, budget: int) -> tuple[int, ...]:
    """Return the numbers of the blocks to compute again, in ascending order.

    Args:
        memory: what each block stores.
        mode: `none`; `full`: every block that stores anything; `auto`: as few as fit the budget, frozen ones
            first.
        budget: bytes that all blocks together may store, the one being computed again included.
    """
    storing = [index for index, block in enumerate(memory) if block.saved]
    if mode != "auto":
        return tuple(storing) if mode == "full" else ()
    chosen: list[int] = []
    held = sum(block.saved for block in memory)
    for index in sorted(storing, key=lambda index: (not memory[index].frozen, index)):
        again = max((memory[i].saved for i in chosen), default=0)
        if held + again <= budget:
            break
        chosen.append(index)
        held -= memory[index].saved - memory[index].kept
    return tuple(sorted(chosen))


def recompute(blocks: Sequence[nn.Module]) -> None:
    """Have these blocks, and no others, compute their forward pass again in the backward pass while training.

    Non-reentrant: with the reentrant kind a block whose input needs no gradient would silently get none.

    Raises:
        TrainingError: a block is of a class that transformers cannot checkpoint.
    """
    for block in blocks:
        if not isinstance(block, GradientCheckpointingLayer):
            raise TrainingError(
                f"{type(block).__name__} cannot be computed again in the backward pass; "
                "say train.recompute: none"
            )
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def free_memory(device: torch.device) -> int:
    """Return the bytes that activations can still take on a device, less a margin."""
    return int(available_memory(device) * (1 - MARGIN))


def available_memory(device: torch.device) -> int:
    """Return the bytes that this process can still take on a device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif _MEMINFO.exists():
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free


def trains(block: nn.Module) -> bool:
    """Return whether anything in a block trains."""
    return any(parameter.requires_grad for parameter in block.parameters())
