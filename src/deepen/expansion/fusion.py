"""A new block from two neighbours: their mean, element by element, the upper one's units aligned first.

OpT-DeUS (arXiv 2508.08011) makes a new block by optimal transport between the neurons of two neighbours,
their average, and residual writes of zero. With uniform marginals over n units each, an optimal plan is a
permutation (Birkhoff), so the assignment problem is solved exactly: units are matched such that

    Σ_i ‖ below_i − above_π(i) ‖²,  the same as  −2 Σ_i ⟨below_i, above_π(i)⟩ + constant

is least, over all weights of a unit: what it reads and what it writes. Units are neurons and whole heads, see
`deepen.families.units`, so that a permuted neighbour computes what it did.

The only module of the byte engine that needs numpy; it is imported where means are made, and only there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepen.checkpoint import ITEM_BYTES, Tensor, tensor_reader
from deepen.errors import CheckpointError
from deepen.expansion.sources import Mean
from deepen.families import Kind, Place

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.intp]
Held = Mapping[str, Callable[[], Floats]]

_TYPES: Final = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_COLUMNS: Final = 1024
# Sums of products stay below it, so that fp64 holds them exactly in whatever order they are added up.
_EXACT_BITS: Final = 51


@contextmanager
def mean_reader(source: Mean) -> Iterator[Callable[[int, int], bytes]]:
    """Give a function that returns `count` bytes of a mean from `offset`, both multiples of an element."""
    dtype = source.first.dtype
    with tensor_reader(source.first) as first, tensor_reader(source.second) as second:
        read = second
        if source.order:
            moved = _moved(source.second, second, source.order())

            def read(offset: int, count: int) -> bytes:
                return moved[offset : offset + count].tobytes()

        def mean(offset: int, count: int) -> bytes:
            return narrow(
                dtype, middle(widen(dtype, first(offset, count)), widen(dtype, read(offset, count)))
            )

        yield mean


def middle(first: Floats, second: Floats) -> Floats:
    """Return the mean of two arrays in their precision; of equal ones, these."""
    return (first + second) * first.dtype.type(0.5)


def widen(dtype: str, data: bytes) -> Floats:
    """Return little-endian elements as fp32, fp64 as fp64, flat."""
    raw = np.frombuffer(data, _TYPES[dtype])
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw if dtype == "F64" else raw.astype(np.float32)


def narrow(dtype: str, values: Floats) -> bytes:
    """Return the elements rounded to a type, to even where two are equally near."""
    if dtype != "BF16":
        return values.astype(_TYPES[dtype]).tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).tobytes()


def whole(tensor: Tensor) -> Floats:
    """Read a tensor as fp32, fp64 as fp64."""
    with tensor_reader(tensor) as read:
        return widen(tensor.dtype, read(0, tensor.length)).reshape(tensor.shape)


def _moved(
    tensor: Tensor, read: Callable[[int, int], bytes], order: tuple[int, Indices]
) -> NDArray[np.uint8]:
    """Return a tensor's bytes with its units in another order."""
    axis, indices = order
    raw = np.frombuffer(read(0, tensor.length), f"V{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
    return np.ascontiguousarray(np.take(raw, indices, axis)).reshape(-1).view(np.uint8)


def align(
    places: Mapping[str, Place], below: Held, above: Held, *, heads: int, groups: int
) -> dict[Kind, Indices]:
    """Return, for each unit of the block below, its counterpart in the block above, by kind of unit.

    The products are of whole numbers, of weights cut to as many bits as keep their sums exact: so every
    machine finds the same.

    Args:
        places: where the units of each tensor lie.
        below: tensor name -> reads it, of the block whose order is kept.
        above: the same of the other.
        heads: number of query heads.
        groups: number of heads of keys and values.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    kinds, found = {place.kind for place in places.values()}, dict[Kind, Indices]()
    if "neurons" in kinds:
        found["neurons"] = assign(_likeness(places, below, above, {"neurons": 0})["neurons"])
    if "heads" in kinds:
        products = _likeness(places, below, above, {"heads": heads, "groups": groups})
        found |= _nested(products["heads"], products["groups"])
    return found


def spread(units: Indices, size: int) -> Indices:
    """Return the order of the places of an axis, of which each unit has `size`."""
    return (units[:, None] * size + np.arange(size)).reshape(-1)


def _likeness(
    places: Mapping[str, Place], below: Held, above: Held, counts: Mapping[Kind, int]
) -> dict[Kind, Floats]:
    """Return the inner products of all units below with all above; a count of 0 is that of the axis."""
    chosen = {name: place for name, place in places.items() if place.kind in counts}
    largest, features = 0.0, 1
    for name in chosen:
        for array in (below[name](), above[name]()):
            most = float(np.abs(array).max())
            if not np.isfinite(most):
                raise CheckpointError(f"init transport: {name!r} of a base block holds NaN or infinity")
            largest, features = max(largest, most), features + array.size
    bits = (_EXACT_BITS - features.bit_length()) // 2
    unit = 2.0 ** (bits - int(np.frexp(largest)[1]))
    found: dict[Kind, Floats] = {}
    for name, place in chosen.items():
        ours, theirs = (_by_unit(held[name](), place, counts[place.kind]) for held in (below, above))
        products = _products(ours, theirs, unit)
        found[place.kind] = found[place.kind] + products if place.kind in found else products
    return found


def _by_unit(array: Floats, place: Place, count: int) -> Floats:
    """Return a tensor as one row a unit; 0: one for each place of the axis."""
    first = np.moveaxis(array, place.axis, 0)
    return first.reshape(count or len(first), -1)


def _products(below: Floats, above: Floats, unit: float) -> Floats:
    total = np.zeros((len(below), len(above)))
    for start in range(0, below.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        total += np.rint(below[:, part] * np.float64(unit)) @ np.rint(above[:, part] * np.float64(unit)).T
    return total


def assign(likeness: Floats) -> Indices:
    """Return for each row the column that it is matched with, such that the sum is greatest."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    found: Sequence[Indices] = linear_sum_assignment(likeness, maximize=True)
    return found[1]


def _nested(heads: Floats, groups: Floats) -> dict[Kind, Indices]:
    """Match groups of heads, and inside each pair of groups the heads that share its keys and values."""
    count, size = len(groups), len(heads) // len(groups)
    inner = heads.reshape(count, size, count, size).transpose(0, 2, 1, 3)
    matched = [[assign(inner[i, j]) for j in range(count)] for i in range(count)]
    total = groups.copy()
    for i in range(count):
        for j in range(count):
            total[i, j] += inner[i, j][np.arange(size), matched[i][j]].sum()
    chosen = assign(total)
    queries = [j * size + matched[i][j] for i, j in enumerate(chosen)]
    return {"groups": chosen, "heads": np.concatenate(queries)}
