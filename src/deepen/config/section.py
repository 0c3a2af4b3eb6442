"""What all parts of a recipe are made of: strict, frozen models and numbers with limits."""

import math
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)


def _whole(value: Any) -> Any:
    """Accept 4e6 where a whole number is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    """Accept 1 where 1.0 is meant; a bool is not a number."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    # What no float can hold is refused as infinity is.
    return float(value) if abs(value) < 10**300 else math.inf


def as_tuple(value: Any) -> Any:
    """Accept a list where a tuple is meant."""
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_real)]
Positive = Annotated[float, BeforeValidator(_real), Field(gt=0)]
Share = Annotated[float, BeforeValidator(_real), Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict in its types, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
