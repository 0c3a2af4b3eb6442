"""How far tensors have moved: sums of squares over their elements, streamed. Numpy is needed here."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import inf, sqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepen.checkpoint import ITEM_BYTES, Tensor, tensor_reader, workers

_CHUNK: Final = 1 << 18  # elements: with every worker's copies in float64 some tens of megabytes
_PLAIN: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
# 8-bit floats: (bits of the mantissa, bias of the exponent, whether 0x80 is the only NaN).
_SMALL: Final = {
    "F8_E4M3": (3, 7, False),
    "F8_E5M2": (2, 15, False),
    "F8_E4M3FNUZ": (3, 8, True),
    "F8_E5M2FNUZ": (2, 16, True),
}
DECODED: Final = frozenset({*_PLAIN, *_SMALL, "BF16"})

Floats = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Sums over the elements of one or several tensors x, and of what they are compared with.

    Attributes:
        count: number of elements.
        written: sum of (x - fill)^2, the fill being what the tensor was made from.
        change: sum of (x - y)^2 over the elements y of its origin; 0 without one.
        origin: sum of (y - fill)^2; 0 without one.
    """

    count: int = 0
    written: float = 0.0
    change: float = 0.0
    origin: float = 0.0

    def __add__(self, other: "Squares") -> "Squares":
        """Return the sums over both."""
        return Squares(
            count=self.count + other.count,
            written=self.written + other.written,
            change=self.change + other.change,
            origin=self.origin + other.origin,
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A tensor to measure: the constant it started from (0 if none), and the tensor it is a copy of."""

    tensor: Tensor
    fill: float = 0.0
    origin: Tensor | None = None


def decode_floats(dtype: str, data: bytes) -> Floats:
    """Return little-endian elements as float32 (float64 for F64); 8-bit floats without their scales.

    Args:
        dtype: one of `DECODED`.
        data: whole elements.
    """
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _SMALL:
        return _table(dtype)[np.frombuffer(data, np.uint8)]
    values: Floats = np.frombuffer(data, _PLAIN[dtype])
    return values.astype(np.float32) if dtype == "F16" else values


def sum_squares(pairs: Sequence[Compared]) -> list[Squares]:
    """Measure tensors, in parallel and a piece at a time; NaN where they hold NaN.

    Raises:
        CheckpointError: a file ends early.
    """
    with ThreadPoolExecutor(workers()) as pool:
        return list(pool.map(_sum, pairs))


def ratio(part: float, whole: float) -> float:
    """Return the quotient of two norms given by their squares; infinity where only the second is 0."""
    if whole == 0:
        return inf if part else 0.0
    return sqrt(part / whole)


def _sum(pair: Compared) -> Squares:
    total = Squares()
    item = ITEM_BYTES[pair.tensor.dtype]
    with tensor_reader(pair.tensor) as read:
        if pair.origin is None:
            for begin, count in _pieces(pair.tensor.length // item):
                x = decode_floats(pair.tensor.dtype, read(begin * item, count * item))
                total += Squares(count=count, written=_squared(x, pair.fill))
            return total
        with tensor_reader(pair.origin) as read_origin:
            for begin, count in _pieces(pair.tensor.length // item):
                x = decode_floats(pair.tensor.dtype, read(begin * item, count * item))
                y = _piece(pair.origin, read_origin, begin, count)
                total += Squares(
                    count=count,
                    written=_squared(x, pair.fill),
                    change=_squared(x, y),
                    origin=_squared(y, pair.fill),
                )
    return total


def _piece(tensor: Tensor, read: Callable[[int, int], bytes], begin: int, count: int) -> Floats:
    item = ITEM_BYTES[tensor.dtype]
    return decode_floats(tensor.dtype, read(begin * item, count * item))


def _pieces(length: int) -> list[tuple[int, int]]:
    return [(begin, min(_CHUNK, length - begin)) for begin in range(0, length, _CHUNK)]


def _squared(x: Floats, y: Floats | float) -> float:
    with np.errstate(all="ignore"):  # NaN and infinity are the answer then
        distance = np.subtract(x, y, dtype=np.float64)
        return float(np.dot(distance, distance))


@cache
def _table(dtype: str) -> Floats:
    """The value of each byte of an 8-bit float."""
    bits, bias, only_nan = _SMALL[dtype]
    codes = np.arange(256)
    exponent, mantissa = (codes & 0x7F) >> bits, codes & ((1 << bits) - 1)
    normal = (1 + mantissa / (1 << bits)) * np.exp2(exponent - float(bias))
    subnormal = mantissa / (1 << bits) * np.exp2(1.0 - bias)
    values = np.where(exponent > 0, normal, subnormal) * np.where(codes & 0x80, -1, 1)
    if only_nan:
        values[0x80] = np.nan
    elif bits == 3:
        values[[0x7F, 0xFF]] = np.nan
    else:  # as in IEEE 754: the highest exponent is infinity and NaN
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    table: Floats = values.astype(np.float32)
    return table
