"""Elements of tensors scaled about a number, or averaged, as bytes. Numpy is needed here."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from deepen.blocks.norms import Floats, decode_floats
from deepen.checkpoint import ITEM_BYTES

_FLOATS: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
DAMPED: Final = frozenset({*_FLOATS, "BF16"})


def damped_bytes(dtype: str, data: bytes, fill: float, alpha: float) -> bytes:
    """Return little-endian elements w as fill + alpha (w − fill), rounded once, to nearest even.

    Args:
        dtype: one of `DAMPED`.
        data: whole elements.
        fill: what makes the tensor add nothing.
        alpha: the factor; at 1 the bytes are returned as they are.

    Raises:
        OverflowError: a result is not a finite number of the dtype.
    """
    if alpha == 1:
        return data
    if alpha == 0:  # also where an element is infinite
        return _encode(dtype, np.full(len(data) // ITEM_BYTES[dtype], fill))
    values = decode_floats(dtype, data).astype(np.float64)
    with np.errstate(all="ignore"):
        return _encode(dtype, fill + alpha * (values - fill))


def averaged_bytes(dtype: str, parts: Sequence[bytes], shares: Sequence[float]) -> bytes:
    """Return the weighted sum of little-endian elements, rounded once, to nearest even.

    Args:
        dtype: one of `DAMPED`.
        parts: equally many whole elements each.
        shares: the weight of each part.

    Raises:
        OverflowError: a result is not a finite number of the dtype.
    """
    with np.errstate(all="ignore"):
        values = [
            share * decode_floats(dtype, part).astype(np.float64)
            for part, share in zip(parts, shares, strict=True)
        ]
        return _encode(dtype, np.sum(values, axis=0))


def _encode(dtype: str, values: Floats) -> bytes:
    with np.errstate(all="ignore"):
        if dtype == "BF16":
            return _finite(_upper_halves(values)).tobytes()
        rounded = values.astype(_FLOATS[dtype])
    if not np.isfinite(rounded).all():
        raise OverflowError(f"an element is no finite number of {dtype}")
    return rounded.tobytes()


def _upper_halves(values: Floats) -> Floats:
    """Round float64 to bfloat16, once: by way of float32, rounded to odd so that no tie is made up."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    made_even = (wide != values) & (bits % 2 == 0)
    bits = np.where(made_even, np.where(np.abs(wide) < np.abs(values), bits + 1, bits - 1), bits)
    halves: Floats = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return halves


def _finite(halves: Floats) -> Floats:
    if (halves & 0x7F80 == 0x7F80).any():
        raise OverflowError("an element is no finite number of BF16")
    return halves
