"""Names of tensors as family files write them: `{q,k}_proj` for several, `*` for a number."""

import re
from collections.abc import Iterable
from itertools import product
from typing import Final

_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_NUMBER: Final = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)")


def spell_out(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return every name that patterns with braces stand for: `a.{b,c}` is `a.b` and `a.c`."""
    names: list[str] = []
    for pattern in patterns:
        pieces = _BRACES.split(pattern)  # text, choices, text, choices, ..., text
        choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
        names += ["".join(chosen) for chosen in product(*choices)]
    return tuple(names)


def generic(name: str) -> str:
    """Return the name with its numbers as `*`: `experts.12.up_proj.weight` is `experts.*.up_proj.weight`."""
    return _NUMBER.sub("*", name)


def number_in(name: str) -> int | None:
    """Return the first number of a name, such as the expert's; None where it has none."""
    found = _NUMBER.search(name)
    return int(found.group()) if found else None
