"""Where the bytes of a planned tensor come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.checkpoint import Tensor


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes taken from a file, from byte `offset` of it."""

    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Fill:
    """A constant in every element."""

    value: float


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of two tensors of the base, in fp32 (fp64 of fp64), rounded to their type.

    Attributes:
        first: the one.
        second: the other, of the same type and shape.
        order: finds how the second is put in another order first: along which axis, by which indices. It
            reads the blocks, so it is asked only when bytes are. None: as it is.
    """

    first: Tensor
    second: Tensor
    order: Callable[[], tuple[int, Any]] | None = None


Source = Copy | Fill | Mean
