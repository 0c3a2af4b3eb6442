"""A tokenised text on disk, prepared once and then opened in no time.

::

    CACHE/corpora/KEY/
      tokens-….arrow    column `tokens`: the ids of one document a row, in the smallest unsigned type
      heldout.arrow     column `text`: the documents kept out of training
      corpus.json       what the directory holds

KEY hashes all that decides the content: the bytes of the files, how documents are cut from them, the
tokenizer's behaviour and the held-out share. Where the files lie and when they were touched does not matter.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepen.config import TextSet
from deepen.data.build import FORMAT_VERSION, HELDOUT, META, Making, Progress, build_corpus, cut_units
from deepen.data.meta import read_meta
from deepen.data.pieces import Piece, join_pieces, map_documents, remove_pieces, take
from deepen.data.sources import OpenSource, open_source
from deepen.data.tokens import digest_of, end_of_text, token_dtype, tokenizer_digest
from deepen.errors import DataError, DeepenError, OutputError

Tokens = npt.NDArray[np.int64]


class Corpus:
    """A stream of training tokens and the held-out documents beside it, both memory-mapped.

    Attributes:
        directory: where it lies.
        tokens: training tokens, each document's end-of-text token included.
        documents: training documents.
        bytes: UTF-8 bytes of the training documents.
        heldout_documents: documents kept out of training.
        digest: key of the content; equal digests mean equal streams.
    """

    def __init__(self, directory: Path) -> None:
        meta = read_meta(directory / META, FORMAT_VERSION)
        self.directory = directory
        self.tokens = int(meta["tokens"])
        self.documents = int(meta["documents"])
        self.bytes = int(meta["bytes"])
        self.heldout_documents = int(meta["heldout_documents"])
        self.digest = str(meta["digest"])
        self._chunks = list(_token_chunks(directory))
        self._ends = list(accumulate(len(chunk) for chunk in self._chunks))
        if not self._ends or self._ends[-1] != self.tokens:
            found = self._ends[-1] if self._ends else 0
            raise DataError(
                f"{directory}: holds {found} tokens, {META} says {self.tokens}; remove it to build it anew"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the directory, not as its content."""
        return Corpus, (self.directory,)

    def windows(self, length: int) -> int:
        """Return how many windows of `length` predicted tokens cover the stream: ceil(tokens / length)."""
        return -(-self.tokens // length)

    def window(self, index: int, length: int) -> Tokens:
        """Return tokens [index·length, index·length + length] of the stream read in a circle.

        Args:
            index: any whole number; windows repeat after `tokens` of them at the latest.
            length: tokens to predict.

        Returns:
            `length + 1` ids: the first `length` are inputs, the last `length` their targets.
        """
        return self.read(index * length, length + 1)

    def read(self, position: int, count: int) -> Tokens:
        """Return `count` ids of the stream from `position` on, read in a circle."""
        result = np.empty(count, dtype=np.int64)
        position %= self.tokens
        filled = 0
        while filled < len(result):
            number = bisect_right(self._ends, position)
            chunk = self._chunks[number]
            offset = position - self._ends[number] + len(chunk)
            part = chunk[offset : offset + len(result) - filled]
            result[filled : filled + len(part)] = part
            filled += len(part)
            position = (position + len(part)) % self.tokens
        return result

    def learned(self, position: int, count: int) -> None:
        """Return None: of a text every id is learned."""

    @cached_property
    def document_ends(self) -> npt.NDArray[np.int64]:
        """Where each document ends in the stream: [documents], rising, the last equal to `tokens`.

        Eight bytes a document in memory, from the first use on.
        """
        ends = np.empty(self.documents, dtype=np.int64)
        at, reached = 0, 0
        for chunk in map_documents(self.directory):
            offsets = chunk.offsets.to_numpy(zero_copy_only=True)
            here = offsets[1:] - offsets[0] + reached
            ends[at : at + len(here)] = here
            at, reached = at + len(here), int(offsets[-1] - offsets[0]) + reached
        return ends

    def heldout_texts(self) -> Iterator[str]:
        """Read the held-out documents in the order of the source."""
        with pa.memory_map(str(self.directory / HELDOUT)) as source:
            for batch in pa.ipc.open_stream(source):
                for text in batch.column("text"):
                    yield text.as_py()


def prepare_corpus(
    text: TextSet,
    tokenizer: Any,
    *,
    cache: Path,
    heldout: float = 0.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenise a text set into the cache, or open what an earlier call left there.

    A document is held out by the hash of its text: equal documents fall on the same side in any order.

    Args:
        text: what to read.
        tokenizer: a transformers tokenizer; each document is framed as it frames it and ends with EOS.
        cache: directory of corpora; the copies `datasets` makes of hub datasets lie there too.
        heldout: share of the documents to keep out of training, in [0, 1).
        workers: processes that tokenise. With 1 a fast tokenizer uses threads of its own instead.
        progress: called as `progress(stage, done, total)` with stage `read` or `tokenise`, in bytes of text;
            `total` is None while it is not known.

    Raises:
        DataError: the source is missing, empty, malformed, or all on one side of the split.
        OutputError: the cache cannot be written.
    """
    making, source, key, target = _plan(text, tokenizer, cache, heldout, workers, progress)
    if not (target / META).is_file():
        units = enumerate(cut_units(chain.from_iterable(part.read() for part in source.parts)))
        _once(target, lambda: build_corpus(target, units, making, _meta(key, text, heldout)))
    return Corpus(target)


def prepare_piece(
    text: TextSet,
    tokenizer: Any,
    piece: Piece,
    *,
    cache: Path,
    heldout: float = 0.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Corpus | None:
    """Tokenise one piece of a text set, and join the pieces if they are all there.

    Pieces are independent: any process on any machine that sees the cache may make any of them, in any
    order, again after a kill; a piece already there is left as it is.

    Args:
        text: what to read.
        tokenizer: as for `prepare_corpus`, as are the other arguments.
        piece: which of how many.
        cache: the directory that all of them share.
        heldout: share of the documents to keep out of training.
        workers: processes that tokenise.
        progress: told how far it is.

    Returns:
        The corpus, equal to that of `prepare_corpus`, or None while pieces are missing.

    Raises:
        DataError: the source is missing, empty, malformed, or all on one side of the split.
        OutputError: the cache cannot be written.
    """
    making, source, key, target = _plan(text, tokenizer, cache, heldout, workers, progress)
    folder = cache / "pieces" / f"{key[:32]}-{piece.count}"
    meta = _meta(key, text, heldout)
    if not (target / META).is_file():
        place = folder / str(piece.number)
        if not (place / META).is_file():
            _once(place, lambda: build_corpus(place, take(piece, source.parts), making, meta, piece=True))
        if all((folder / str(i + 1) / META).is_file() for i in range(piece.count)):
            _once(target, lambda: join_pieces(folder, piece.count, target, meta))
    if not (target / META).is_file():
        return None
    remove_pieces(folder)
    return Corpus(target)


def _plan(
    text: TextSet, tokenizer: Any, cache: Path, heldout: float, workers: int, progress: Progress | None
) -> tuple[Making, OpenSource, str, Path]:
    """Open the source; return how it is built, its key and its place."""
    eos = end_of_text(tokenizer)
    _make(cache)
    source = open_source(text, cache)
    key = _key(source.contents, text, tokenizer, heldout)
    making = Making(
        tokenizer=tokenizer,
        eos=eos,
        dtype=token_dtype(tokenizer),
        heldout=heldout,
        workers=workers,
        progress=progress,
    )
    return making, source, key, cache / "corpora" / key[:32]


def _meta(key: str, text: TextSet, heldout: float) -> dict[str, Any]:
    source = text.path or text.hub
    return {"format_version": FORMAT_VERSION, "digest": key, "source": source, "heldout": heldout}


def _once(target: Path, work: Callable[[], None]) -> None:
    """Make a directory, unless another process is first."""
    try:
        work()
    except (DeepenError, OSError):  # pieces are removed when one process has joined them
        if not (target / META).is_file():
            raise


def _key(contents: list[list[str]], text: TextSet, tokenizer: Any, heldout: float) -> str:
    return digest_of(
        {
            "format": FORMAT_VERSION,
            "tokenizer": tokenizer_digest(tokenizer),
            "contents": contents,
            "cut": [text.field, text.template, text.separator],
            "heldout": heldout,
        }
    )


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{cache}: cannot hold the cache: {error.strerror}; choose another (data.cache)"
        ) from error


def _token_chunks(directory: Path) -> Iterator[npt.NDArray[Any]]:
    """Map the ids of each record batch; nothing is read until it is looked at."""
    for chunk in map_documents(directory):
        values = chunk.flatten().to_numpy(zero_copy_only=True)
        if len(values):
            yield values
