"""A tokenised set of conversations on disk, prepared once and then opened in no time.

::

    CACHE/conversations/KEY/
      ids.bin               the ids of all conversations, in the smallest unsigned type
      learned.bin           a byte an id: whether the assistant says it
      ends.bin              int64: where each conversation ends
      conversations.json    what the directory holds
      heldout/              the same four of the conversations that are kept out, where a share of them is

KEY hashes all that decides the content: the bytes of the files, the form they are read in, the tokenizer's
behaviour, the chat template, the length of a window and the share kept out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deepen.data.corpus import Tokens
from deepen.data.meta import read_meta
from deepen.errors import DataError

FORMAT_VERSION: Final = 1
META: Final = "conversations.json"
IDS: Final = "ids.bin"
LEARNED: Final = "learned.bin"
ENDS: Final = "ends.bin"
HELDOUT: Final = "heldout"


@dataclass(frozen=True, kw_only=True)
class ConversationCounts:
    """What became of a set of conversations.

    Attributes:
        read: conversations read.
        kept: of them, those that are trained on.
        unanswered: left out, as the assistant says nothing in them that is to be learned.
        cut: longer than a window, and so cut at its end.
        cut_tokens: ids lost by that, whole conversations left out for it included.
        lost: left out, as nothing that is learned stands before the cut.
        torn: the assistant's turns of which the first token also holds the end of what stands before.
        tokens: ids of what is kept.
        trained: of them, those that are learned.
        median: ids of the middle conversation by length, before any is cut.
        most: ids of the one that 95% are no longer than.
        longest: ids of the longest.
    """

    read: int
    kept: int
    unanswered: int
    cut: int
    cut_tokens: int
    lost: int
    torn: int
    tokens: int
    trained: int
    median: int
    most: int
    longest: int

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{self.kept:,} conversations, {self.tokens:,} tokens, {self.trained:,} learned"]
        parts += [f"{self.unanswered:,} without an answer left out"] if self.unanswered else []
        cut = f"{self.cut:,} cut at the end of the window ({self.cut_tokens:,} tokens lost)"
        parts += [cut] if self.cut else []
        parts += [f"{self.lost:,} left out, the answer behind the cut"] if self.lost else []
        torn = f"{self.torn:,} answers begin inside a token of the prompt"
        parts += [torn] if self.torn else []
        return "; ".join(parts)


class ConversationCorpus:
    """Conversations end to end, memory-mapped.

    Attributes:
        directory: where they lie.
        tokens: ids of all conversations.
        documents: conversations.
        document_ends: where each ends: int64 [conversations].
        digest: key of the content.
        forms: a line a file: which form it has and what told it.
        counts: what was made of what was read.
    """

    def __init__(self, directory: Path) -> None:
        meta = read_meta(directory / META, FORMAT_VERSION)
        self.directory = directory
        self.digest = str(meta["digest"])
        self.forms = tuple(meta["forms"])
        self.counts = ConversationCounts(**meta["counts"])
        self._ids = _map(directory / IDS, np.dtype(meta["dtype"]), self.counts.tokens)
        self._learned = _map(directory / LEARNED, np.dtype(np.bool_), self.counts.tokens)
        self.document_ends = np.asarray(
            _map(directory / ENDS, np.dtype(np.int64), self.counts.kept), dtype=np.int64
        )
        self.tokens, self.documents = self.counts.tokens, self.counts.kept

    @property
    def heldout(self) -> "ConversationCorpus | None":
        """The conversations kept out of training."""
        directory = self.directory / HELDOUT
        return ConversationCorpus(directory) if directory.is_dir() else None

    def documents_read(self) -> Iterator[tuple[Tokens, npt.NDArray[np.bool_]]]:
        """Yield the ids of each conversation, and which of them the assistant says."""
        begin = 0
        for end in self.document_ends.tolist():
            yield self.read(begin, end - begin), self.learned(begin, end - begin)
            begin = end

    def read(self, position: int, count: int) -> Tokens:
        """Return `count` ids from `position` on, read in a circle."""
        return self._ids.take(np.arange(position, position + count), mode="wrap").astype(np.int64)

    def learned(self, position: int, count: int) -> npt.NDArray[np.bool_]:
        """Return which of `count` ids from `position` on the assistant says."""
        return np.asarray(self._learned[position : position + count])


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize:
        wanted = count * dtype.itemsize
        raise DataError(
            f"{path}: holds {size} bytes, {META} says {wanted}; remove the directory to build it anew"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
