"""Looking into tensor bytes without numpy: is anything not finite, and how far apart are two tensors."""

import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final

from deepen.checkpoint.fingerprint import CHUNK, hashed_ranges, tensor_reader
from deepen.checkpoint.header import ITEM_BYTES, Tensor

# The bits of an element's last and last but one byte (little-endian) that hold its exponent: all of them ones
# means NaN or infinity.
_ALL_ONES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"BF16": (0x7F, 0x80), "F16": (0x7C, 0x00), "F32": (0x7F, 0x80), "F64": (0x7F, 0xF0)}
)
_ARRAYS: Final[Mapping[str, str]] = MappingProxyType(
    {"F32": "f", "F64": "d", "I8": "b", "U8": "B", "BOOL": "B", "I16": "h", "U16": "H"}
    | {"I32": "i", "U32": "I", "I64": "q", "U64": "Q"}
)


def not_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds NaN or infinity.

    All of a tensor up to 1 MiB is looked at; of a longer one the sample that the fast fingerprint reads, so
    that looking at a model costs milliseconds, not a pass over its files.
    """
    if tensor.dtype not in _ALL_ONES:
        return False
    whole = tensor.length <= CHUNK
    ranges = [(0, tensor.length)] if whole else hashed_ranges(tensor.length, "fast")
    item = ITEM_BYTES[tensor.dtype]
    with tensor_reader(tensor) as read:
        # Samples may begin inside an element: move them back to its first byte.
        return any(_has_not_finite(tensor.dtype, read(at - at % item, count)) for at, count in ranges)


def max_abs_difference(dtype: str, first: bytes, second: bytes) -> float | None:
    """Return the largest |a - b| over two runs of elements; infinity if any differing pair is not finite.

    None for dtypes Python cannot decode (float8, complex).
    """
    if first == second:
        return 0.0
    ours, theirs = decode(dtype, first), decode(dtype, second)
    if ours is None or theirs is None:
        return None
    return max(map(_distance, ours, theirs), default=0.0)


def decode(dtype: str, data: bytes) -> Sequence[float] | None:
    """Return the elements of little-endian tensor bytes as Python numbers; None for float8 and complex."""
    if dtype == "F16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[::2], data[1::2]
        return array("f", bytes(wide))
    return array(_ARRAYS[dtype], data) if dtype in _ARRAYS else None


def _distance(a: float, b: float) -> float:
    if a == b:
        return 0.0
    distance = abs(a - b)
    return distance if math.isfinite(distance) else math.inf


def _has_not_finite(dtype: str, data: bytes) -> bool:
    item, (high, low) = ITEM_BYTES[dtype], _ALL_ONES[dtype]
    tops = data[item - 1 :: item]
    # Sane weights have no such top byte at all, and translate() finds that out at memory speed.
    if not tops.translate(None, _without(high)):
        return False
    pairs = zip(tops, data[item - 2 :: item], strict=True)
    return any(top & high == high and second & low == low for top, second in pairs)


@cache
def _without(bits: int) -> bytes:
    """All byte values that lack some of `bits`."""
    return bytes(byte for byte in range(256) if byte & bits != bits)
