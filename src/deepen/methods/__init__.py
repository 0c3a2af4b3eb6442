"""What trains and what is saved: one short file a method."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from deepen.methods.blocks import Blocks
from deepen.methods.full import Full
from deepen.methods.method import Method

METHODS: Final[Mapping[str, Method]] = MappingProxyType({"blocks": Blocks(), "full": Full()})

__all__ = ["METHODS", "Blocks", "Full", "Method"]
