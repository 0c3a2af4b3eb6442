"""A tokenised text on disk, prepared once and then opened in no time.

::

    CACHE/corpora/KEY/
      tokens-….arrow    column `tokens`: the ids of one document a row, in the smallest unsigned type
      heldout.arrow     column `text`: the documents kept out of training
      corpus.json       what the directory holds

KEY hashes all that decides the content: the bytes of the files, how documents are cut from them, the
tokenizer's behaviour and the held-out share. Where the files lie and when they were touched does not matter.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepen.config.recipe import TextSet
from deepen.data.build import FORMAT_VERSION, META, Progress, build_corpus
from deepen.data.digests import file_digests, file_stamp
from deepen.data.documents import find_files, read_files
from deepen.data.files import kind_of
from deepen.data.hub import load_hub
from deepen.data.rows import read_dataset, select
from deepen.data.tokens import digest_of, end_of_text, token_dtype, tokenizer_digest
from deepen.errors import DataError, OutputError

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
        meta = _read_meta(directory)
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
        result = np.empty(length + 1, dtype=np.int64)
        position = index * length % self.tokens
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

    def heldout_texts(self) -> Iterator[str]:
        """Read the held-out documents in the order of the source."""
        with pa.memory_map(str(self.directory / "heldout.arrow")) as source:
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
    eos = end_of_text(tokenizer)
    _make(cache)
    contents, documents = _open_source(text, cache)
    key = _key(contents, text, tokenizer, heldout)
    target = cache / "corpora" / key[:32]
    if not (target / META).is_file():
        meta = {
            "format_version": FORMAT_VERSION,
            "digest": key,
            "source": text.path or text.hub,
            "heldout": heldout,
        }
        try:
            build_corpus(
                target,
                documents,
                tokenizer,
                eos=eos,
                dtype=token_dtype(tokenizer),
                heldout=heldout,
                workers=workers,
                progress=progress,
                meta=meta,
            )
        except OutputError:
            if not (target / META).is_file():  # else another process was first
                raise
    return Corpus(target)


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


def _open_source(text: TextSet, cache: Path) -> tuple[list[list[str]], Iterator[str]]:
    """Return what identifies the content, file by file, and the documents themselves."""
    if text.hub is not None:
        dataset = load_hub(text, cache / "hub")
        copies = [Path(file["filename"]) for file in dataset.cache_files]
        contents = [["hub", digest] for digest in file_digests(copies, cache)] or [
            ["hub", dataset._fingerprint]
        ]
        rows = read_dataset(dataset, select(text), text.hub)
        return contents, (document for document in rows if document and not document.isspace())
    files = find_files(text)
    stamps = [file_stamp(path) for path in files]
    digests = file_digests(files, cache)
    contents = [
        [f"{kind_of(path)}{path.suffix == '.gz'}", digest]
        for path, digest in zip(files, digests, strict=True)
    ]
    return contents, _unchanged(files, stamps, text)


def _unchanged(files: tuple[Path, ...], stamps: list[tuple[int, int, int]], text: TextSet) -> Iterator[str]:
    """Read the files, and fail at the end if one is no longer what was hashed."""
    yield from read_files(files, text)
    for path, stamp in zip(files, stamps, strict=True):
        if file_stamp(path) != stamp:
            raise DataError(f"{path}: changed while it was read; start again when it is complete")


def _read_meta(directory: Path) -> dict[str, Any]:
    path = directory / META
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove the directory to build it anew") from error
    if meta.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {meta.get('format_version')}; this deepen reads {FORMAT_VERSION}"
        )
    return dict(meta)


def _token_chunks(directory: Path) -> Iterator[npt.NDArray[Any]]:
    """Map the ids of each record batch; nothing is read until it is looked at."""
    for path in sorted(directory.glob("tokens-*.arrow")):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        for chunk in table.column("tokens").chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=True)
            if len(values):
                yield values
