"""Plain data as bytes, between two processes of which one is hostile.

Not pickle, whose loading runs code, and not marshal, whose loading may crash: JSON in which a scalar is
itself and everything else a list that begins with its tag. What arrives is made of exact built-in types, so
no `__eq__` or `__hash__` of the other side ever runs here. Subclasses arrive as their base: a `Counter` as a
dict, a named tuple as a tuple; an iterator as an iterator over its first `_MOST_ITEMS` items; any other
object as an `Opaque`.
"""

import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from itertools import islice
from typing import Any

_MOST_ITEMS = 100_000
_SMALL = 1 << 53


class Opaque:
    """Stands for an object that is not plain data: true or false as that one was, and equal to nothing."""

    def __init__(self, name: str, truth: bool) -> None:
        self.name, self.truth = name, truth

    def __bool__(self) -> bool:
        return self.truth

    def __repr__(self) -> str:
        return f"<an object of type {self.name}>"


def encode(value: Any) -> bytes:
    """Write a value; raises RecursionError where it is nested too deeply (or in itself)."""
    return json.dumps(_tagged(value)).encode()


def decode(data: bytes) -> Any:
    """Read what `encode` wrote; raises ValueError for anything else, whatever the bytes hold."""
    try:
        return _untagged(json.loads(data))
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not a message: {type(error).__name__}") from None


def _tagged(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _SMALL else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, dict | KeysView | ItemsView | ValuesView | Iterator):
        return _tagged_view(value)
    return _tagged_sequence(value)


def _tagged_view(value: Any) -> Any:
    if isinstance(value, dict):
        return ["dict", [[_tagged(key), _tagged(item)] for key, item in value.items()]]
    if isinstance(value, KeysView):
        return ["set", [_tagged(key) for key in value]]
    return ["iterator", [_tagged(item) for item in islice(iter(value), _MOST_ITEMS)]]


def _tagged_sequence(value: Any) -> Any:
    if isinstance(value, range):
        return ["range", *map(_tagged, (value.start, value.stop, value.step))]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_tagged(item) for item in value]]
    for module, name in _NUMBERS:
        if (type(value).__module__, type(value).__name__) == (module, name):
            return [name, str(value)]
    if type(value).__module__ in {"collections", "array"} and hasattr(value, "__iter__"):
        # A deque or an array equals only its own kind; a list is the nearest plain value.
        return ["list", [_tagged(item) for item in value]]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _tagged(value.tolist())
    name = value.name if isinstance(value, Opaque) else type(value).__name__
    return ["object", name, bool(value)]


# Numbers that equal the built-in ones they stand for.
_NUMBERS = (("fractions", "Fraction"), ("decimal", "Decimal"))


def _untagged(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    tag, *parts = value
    return _READERS[tag](*parts)


def _items(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError
    return [_untagged(item) for item in values]


def _read_dict(pairs: Any) -> dict[Any, Any]:
    return {_untagged(key): _untagged(item) for key, item in pairs}


def _read_fraction(text: str) -> Any:
    from fractions import Fraction

    return Fraction(text)


def _read_decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


_READERS: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda real, imag: complex(float(real), float(imag)),
    "dict": _read_dict,
    "list": _items,
    "tuple": lambda values: tuple(_items(values)),
    "set": lambda values: set(_items(values)),
    "frozenset": lambda values: frozenset(_items(values)),
    "iterator": lambda values: iter(_items(values)),
    "range": lambda *ends: range(*map(_untagged, ends)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "object": lambda name, truth: Opaque(str(name), truth is True),
    "Fraction": _read_fraction,
    "Decimal": _read_decimal,
}
