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
Of documents that say which of their ids are learned, as conversations do, the others are not predicted.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from deepen.data.bins import best_fit_bins
from deepen.data.corpus import Tokens

Packing = Literal["stream", "best_fit"]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Documents(Protocol):
    """Documents end to end, as `deepen.data.corpus.Corpus` has them."""

    @property
    def tokens(self) -> int:
        """Ids of all documents."""

    @property
    def documents(self) -> int:
        """Documents."""

    @property
    def digest(self) -> str:
        """Key of the content."""

    @property
    def document_ends(self) -> Integers:
        """Where each ends in the stream: [documents], rising."""

    def read(self, position: int, count: int) -> Tokens:
        """Return `count` ids of the stream from `position` on, read in a circle."""

    def learned(self, position: int, count: int) -> Flags | None:
        """Return which of `count` ids from `position` on are learned; None: every one of the stream."""


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


def open_windows(corpus: Documents, length: int, packing: Packing, *, document_masks: bool) -> Windows:
    """Cut documents into windows of `length` predicted ids.

    Raises:
        ValueError: only some ids are learned, and documents would be torn or see each other.
    """
    if not (packing == "best_fit" and document_masks) and corpus.learned(0, 1) is not None:
        raise ValueError("documents of which some ids are learned need best_fit and document masks")
    if packing == "best_fit":
        return _BestFit(corpus, length, document_masks)
    return _Stream(corpus, length, document_masks)


class _Stream:
    def __init__(self, corpus: Documents, length: int, masks: bool) -> None:
        self._corpus, self._length, self._masks = corpus, length, masks

    def __len__(self) -> int:
        return -(-self._corpus.tokens // self._length)

    def __getitem__(self, index: int) -> Window:
        tokens = self._corpus.read(index * self._length, self._length + 1)
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

    def __init__(self, corpus: Documents, length: int, masks: bool) -> None:
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
        learned = np.arange(self._length + 1) < ends[-1]
        for begin, size, end in zip(self._begins[rows].tolist(), sizes.tolist(), ends.tolist(), strict=True):
            tokens[end - size : end] = self._corpus.read(begin, size)
            flags = self._corpus.learned(begin, size)
            if flags is not None:
                learned[end - size : end] = flags
        trained = learned[1:]
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
        flags = self._corpus.learned(0, self._corpus.tokens)
        if flags is not None:
            trained -= int((~flags).sum()) - int((~flags[self._begins]).sum())
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
