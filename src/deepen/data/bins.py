"""Packing by best-fit decreasing."""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def best_fit_bins(sizes: Integers, capacity: int) -> tuple[npt.NDArray[np.int64], int]:
    """Pack by best-fit decreasing: each item into the bin with the least room that holds it.

    Items of one size are placed together, so that the work grows with the number of sizes and not of items.

    Args:
        sizes: falling, in [1, capacity].
        capacity: of a bin.

    Returns:
        The bin of each item, and the number of bins.
    """
    result = np.empty(len(sizes), dtype=np.int64)
    room = _Room()
    count = done = 0
    distinct, totals = np.unique(sizes, return_counts=True)
    for size, total in zip(distinct[::-1].tolist(), totals[::-1].tolist(), strict=True):
        end = done + total
        while done < end:
            tightest = room.least(size)
            if tightest is None:
                tightest = capacity
                opened = -(-(end - done) // (capacity // size))
                room.add(capacity, np.arange(count, count + opened))
                count += opened
            done = _fill(room, tightest, size, result, done, end)
    return result, count


class _Room:
    """Bins by the room left in them."""

    def __init__(self) -> None:
        self._bins: dict[int, Integers] = {}
        self._levels: list[int] = []

    def least(self, size: int) -> int | None:
        """Return the least room that holds `size`."""
        at = bisect_left(self._levels, size)
        return self._levels[at] if at < len(self._levels) else None

    def add(self, room: int, bins: Integers) -> None:
        if not room or not len(bins):
            return
        if room in self._bins:
            self._bins[room] = np.concatenate([self._bins[room], bins])
        else:
            self._bins[room] = bins
            insort(self._levels, room)

    def pop(self, room: int) -> Integers:
        del self._levels[bisect_left(self._levels, room)]
        return self._bins.pop(room)


def _fill(room: _Room, left: int, size: int, result: Integers, done: int, end: int) -> int:
    """Fill bins that have `left` room with items of one size, one bin after another; return what is done.

    A bin that takes an item has less room than any other the item fits, so it takes the next as well.
    """
    bins, each = room.pop(left), left // size
    used = min(len(bins), -(-(end - done) // each))
    items = min(used * each, end - done)
    result[done : done + items] = np.repeat(bins[:used], each)[:items]
    room.add(left, bins[used:])
    room.add(left - each * size, bins[: used - 1])
    room.add(left - (items - (used - 1) * each) * size, bins[used - 1 : used])
    return done + items
