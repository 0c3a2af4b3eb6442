"""A text set as a stream of documents.

A document is what is tokenised as one: a plain-text file, a piece of one between separators, or the text of
one record. Documents of nothing but white space are dropped; others are passed on character for character.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deepen.config import TextSet
from deepen.data.files import decode, find_files, kind_of, open_bytes
from deepen.data.hub import load_hub, stream_hub
from deepen.data.rows import (
    Selector,
    read_dataset,
    read_json,
    read_json_lines,
    read_parquet,
    read_stream,
    select,
)
from deepen.errors import DataError

__all__ = ["find_files", "read_documents", "read_files", "with_text"]

_BLOCK = 1 << 20


def read_documents(text: TextSet, *, cache: Path | None = None) -> Iterator[str]:
    """Read a text set document by document; at most one file is in memory at a time.

    Args:
        text: files on disk or a dataset of the hub.
        cache: where `datasets` keeps its copy of a hub dataset; default: its own place.

    Raises:
        DataError: nothing is there, or it cannot be read as asked.
    """
    if text.hub is None:
        return read_files(find_files(text), text)
    if text.stream:
        return with_text(read_stream(stream_hub(text, cache)[0], select(text), text.hub))
    return with_text(read_dataset(load_hub(text, cache), select(text), text.hub))


def read_files(files: tuple[Path, ...], text: TextSet) -> Iterator[str]:
    """Read the documents of some files, in order."""
    selector = select(text)
    for path in files:
        yield from with_text(_read_file(path, text.separator, selector))


def with_text(documents: Iterator[str]) -> Iterator[str]:
    """Drop documents of nothing but white space."""
    return (document for document in documents if document and not document.isspace())


def _read_file(path: Path, separator: str | None, selector: Selector) -> Iterator[str]:
    kind = kind_of(path)
    if kind == "jsonl":
        return read_json_lines(path, selector)
    if kind == "json":
        return read_json(path, selector)
    if kind == "parquet":
        return read_parquet(path, selector)
    return _read_plain(path, separator)


def _read_plain(path: Path, separator: str | None) -> Iterator[str]:
    if separator == "":
        raise DataError(f"{path}: separator is empty; leave it out to take each file as one document")
    with open_bytes(path) as stream:
        if separator is None:
            yield decode(stream.read(), path, 0)
            return
        offset = 0
        mark = separator.encode()
        for piece in _pieces(stream, mark):
            yield decode(piece, path, offset)
            offset += len(piece) + len(mark)


def _pieces(stream: BinaryIO, mark: bytes) -> Iterator[bytes]:
    """Cut a stream at `mark`; in UTF-8 no character begins inside another, so bytes cut as characters do."""
    rest = b""
    while block := stream.read(_BLOCK):
        *whole, rest = (rest + block).split(mark)
        yield from whole
    yield rest
