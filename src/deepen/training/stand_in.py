"""Modules that stand in the places of a model's blocks for a while, to see or change what passes there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
