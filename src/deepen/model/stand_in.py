"""Modules that stand in the places of a model's blocks for a while, to see or change what passes there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def standing_in(blocks: nn.ModuleList, others: Mapping[int, nn.Module]) -> Iterator[None]:
    """Let other modules stand in the places of some blocks."""
    held = {index: blocks[index] for index in others}
    try:
        for index, other in others.items():
            blocks[index] = other
        yield
    finally:
        for index, block in held.items():
            blocks[index] = block


class StandIn(nn.Module):
    """Has all that a model may look for in the block it stands in for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no child: its parameters are the model's already

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


class Watched(StandIn):
    """Notes what its block returns.

    Attributes:
        items: of the tuple that it returns; 0: it returns a tensor.
    """

    items = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        found = self.block(*args, **kwargs)
        self.items = len(found) if isinstance(found, tuple) else 0
        return found


class Passed(StandIn):
    """Returns what it is given, or other states, in the form in which its block returns something."""

    def __init__(self, block: nn.Module, items: int, states: torch.Tensor | None = None) -> None:
        super().__init__(block)
        self.items, self.states = items, states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run nothing."""
        found = args[0] if args else kwargs["hidden_states"]
        states = found if self.states is None else self.states
        return (states, *[None] * (self.items - 1)) if self.items else states
