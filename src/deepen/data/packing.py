"""How a corpus is cut into training windows.

A window has `length + 1` ids: the first `length` are inputs, the last `length` their targets. Two packings:

- `stream`: the documents end to end in a circle, cut every `length` ids. Nothing is lost and nothing padded;
  most documents are torn.
- `best_fit`: a document that fits stays whole. A longer one is cut into windows that share one id, so that
  every id but its first is predicted once; its rest is packed like a document. Best-fit decreasing: the
  longest first, each into the window with the least room that holds it (Ding et al., "Fewer Truncations
  Improve Language Modeling", 2024, arXiv:2404.10830). What stays empty is padding, which is not trained.

With document masks a document sees only itself: positions restart where one begins, which is what
transformers reads a block-diagonal mask from, and its first id, which nothing precedes, is not predicted.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from deepen.data.corpus import Corpus, Tokens

Packing = Literal["stream", "best_fit"]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Window:
    """One training window.

    Attributes:
        tokens: int64 [length + 1].
        positions: int64 [length], those of the inputs; None: 0, 1, 2, …
        trained: bool [length], whether a target counts in the loss; None: all do.
    """

    tokens: Tokens
    positions: Integers | None
    trained: Flags | None


@dataclass(frozen=True, kw_only=True)
class PackingCounts:
    """What a packing makes of a corpus, once through.

    Attributes:
        windows: windows.
        places: targets of all windows, padding included.
        trained: targets that count in the loss.
        padding: targets that are padding.
        documents: documents.
        cut: documents that do not lie whole in one window.
    """

    windows: int
    places: int
    trained: int
    padding: int
    documents: int
    cut: int


class Windows(Protocol):
    """The windows of one corpus, in an order that only the corpus decides."""

    def __len__(self) -> int:
        """Windows once through the corpus."""

    def __getitem__(self, index: int) -> Window:
        """Cut one window."""

    def starts(self, index: int) -> Integers:
        """Return the places in a window at which a document, a piece of one, or padding begins."""

    def padding(self, index: int) -> int:
        """Return how many ids at the end of a window are padding."""

    def counts(self) -> PackingCounts:
        """Add up what the packing does."""


def open_windows(corpus: Corpus, length: int, packing: Packing, *, document_masks: bool) -> Windows:
    """Cut a corpus into windows of `length` predicted ids."""
    if packing == "best_fit":
        return _BestFit(corpus, length, document_masks)
    return _Stream(corpus, length, document_masks)


class _Stream:
    def __init__(self, corpus: Corpus, length: int, masks: bool) -> None:
        self._corpus, self._length, self._masks = corpus, length, masks

    def __len__(self) -> int:
        return self._corpus.windows(self._length)

    def __getitem__(self, index: int) -> Window:
        tokens = self._corpus.window(index, self._length)
        if not self._masks:
            return Window(tokens, None, None)
        starts = self.starts(index)
        trained = np.ones(self._length, dtype=np.bool_)
        trained[starts[1:] - 1] = False
        return Window(tokens, _positions(starts, self._length), trained)

    def starts(self, index: int) -> Integers:
        ends = self._corpus.document_ends
        places = (index * self._length + np.arange(self._length + 1)) % self._corpus.tokens
        begins = (places == 0) | (ends[np.searchsorted(ends, places) % len(ends)] == places)
        begins[0] = True
        return np.flatnonzero(begins)

    def padding(self, index: int) -> int:
        return 0

    def counts(self) -> PackingCounts:
        length, ends, windows = self._length, self._corpus.document_ends, len(self)
        begins = np.concatenate([[0], ends[:-1]])
        # A document from b to e lies whole in the window that holds both, e being at most its last id.
        cut = int((ends - begins // length * length > length + 1).sum())
        places, hidden = windows * length, 0
        if self._masks:
            # Targets are the ids 1 … places of the circle; those that begin a document do not count.
            rounds, rest = divmod(places, self._corpus.tokens)
            hidden = rounds * len(ends) + int(np.searchsorted(begins, rest, side="right")) - 1
        return PackingCounts(
            windows=windows,
            places=places,
            trained=places - hidden,
            padding=0,
            documents=len(ends),
            cut=cut,
        )


class _BestFit:
    """Pieces of documents in bins: 17 bytes in memory for each, and about 100 while packing."""

    def __init__(self, corpus: Corpus, length: int, masks: bool) -> None:
        self._corpus, self._length, self._masks = corpus, length, masks
        ends = corpus.document_ends
        begins, sizes, first, self._cut = _pieces(ends, length)
        order = np.argsort(-sizes, kind="stable")
        bins, self._windows = best_fit_bins(sizes[order], length + 1)
        by_bin = order[np.argsort(bins, kind="stable")]
        self._begins, self._sizes, self._first = begins[by_bin], sizes[by_bin], first[by_bin]
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=self._windows))])

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Window:
        rows = self._rows(index)
        sizes = self._sizes[rows]
        ends = np.cumsum(sizes)
        # Padding is any id: nothing is trained on it, and as the last in the window nothing sees it.
        tokens = np.zeros(self._length + 1, dtype=np.int64)
        for begin, size, end in zip(self._begins[rows].tolist(), sizes.tolist(), ends.tolist(), strict=True):
            tokens[end - size : end] = self._corpus.read(begin, size)
        trained = np.arange(1, self._length + 1) < ends[-1]
        # Without masks a document's first id is predicted from the document before it, as in a stream; the
        # first id of a piece is the last of the piece before, where it was predicted.
        seams = ends[:-1]
        trained[(seams if self._masks else seams[~self._first[rows][1:]]) - 1] = False
        positions = _positions(self.starts(index), self._length) if self._masks else None
        return Window(tokens, positions, trained)

    def starts(self, index: int) -> Integers:
        edges = np.concatenate([[0], np.cumsum(self._sizes[self._rows(index)])])
        return edges if edges[-1] <= self._length else edges[:-1]

    def padding(self, index: int) -> int:
        return self._length + 1 - int(self._sizes[self._rows(index)].sum())

    def _rows(self, index: int) -> slice:
        return slice(int(self._edges[index]), int(self._edges[index + 1]))

    def counts(self) -> PackingCounts:
        places = self._windows * self._length
        pieces, held = len(self._sizes), int(self._sizes.sum())
        trained = held - pieces
        if not self._masks:
            heads = np.zeros(pieces, dtype=np.bool_)
            heads[self._edges[:-1]] = True
            trained += int((self._first & ~heads).sum())
        return PackingCounts(
            windows=self._windows,
            places=places,
            trained=trained,
            padding=places + self._windows - held,
            documents=self._corpus.documents,
            cut=self._cut,
        )


def _positions(starts: Integers, length: int) -> Integers:
    """Count from 0 at each start: [length]."""
    places = np.arange(length, dtype=np.int64)
    return places - starts[np.searchsorted(starts, places, side="right") - 1]


def _pieces(ends: Integers, length: int) -> tuple[Integers, Integers, Flags, int]:
    """Cut documents longer than `length + 1` ids into pieces of that size that share one id, and a rest.

    Returns:
        Where each piece begins in the stream, its ids, whether it begins a document, and how many documents
        were cut. A document of one id predicts nothing, but is kept: another may be predicted from it.
    """
    begins = np.concatenate([[0], ends[:-1]])
    predicted = np.maximum(ends - begins - 1, 0)
    parts = np.maximum(-(-predicted // length), 1)
    document = np.repeat(np.arange(len(ends)), parts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    piece_begins = begins[document] + place * length
    sizes = np.minimum(ends[document] - piece_begins, length + 1)
    return piece_begins, sizes, place == 0, int((parts > 1).sum())


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
