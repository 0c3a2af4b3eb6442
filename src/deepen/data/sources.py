"""A text set opened for building: what identifies its content, and its parts in the order of the text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepen.config import TextSet
from deepen.data.digests import Stamp, file_digests, file_stamp
from deepen.data.documents import find_files, read_files, with_text
from deepen.data.files import kind_of
from deepen.data.hub import load_hub, stream_hub
from deepen.data.rows import read_dataset, read_stream, select
from deepen.errors import DataError

# Small files are read together: a part of its own for each of a million would cost more than its text.
_PART_BYTES = 8 << 20


@dataclass(frozen=True)
class Part:
    """A stretch of a source that can be read alone.

    Attributes:
        size: bytes on disk, or 1 where they are not known.
        read: gives its documents, in order.
    """

    size: int
    read: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class OpenSource:
    """A source before anything of it is read.

    Attributes:
        contents: kind and digest of each file; for a streamed dataset, its files at their commit.
        parts: the whole of it, in order.
    """

    contents: list[list[str]]
    parts: list[Part]


def open_source(text: TextSet, cache: Path) -> OpenSource:
    """Find a text set's files or dataset and hash what identifies it.

    Raises:
        DataError: it is missing or cannot be read.
        OutputError: the cache cannot be written.
    """
    if text.hub is None:
        return _open_files(text, cache)
    return _open_stream(text, cache) if text.stream else _open_hub(text, cache)


def _open_files(text: TextSet, cache: Path) -> OpenSource:
    files = find_files(text)
    stamps = [file_stamp(path) for path in files]
    digests = file_digests(files, cache)
    contents = [
        [f"{kind_of(path)}{path.suffix == '.gz'}", digest]
        for path, digest in zip(files, digests, strict=True)
    ]
    parts = []
    for begin, end in _runs([stamp[0] for stamp in stamps]):
        size = sum(stamp[0] for stamp in stamps[begin:end])
        parts.append(Part(size, partial(_unchanged, files[begin:end], stamps[begin:end], text)))
    return OpenSource(contents, parts)


def _runs(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a row of files into runs of at least `_PART_BYTES`, the last but for."""
    begin = held = 0
    for end, size in enumerate(sizes, start=1):
        held += size
        if held >= _PART_BYTES or end == len(sizes):
            yield begin, end
            begin, held = end, 0


def _unchanged(files: tuple[Path, ...], stamps: list[Stamp], text: TextSet) -> Iterator[str]:
    """Read the files, and fail at the end if one is no longer what was hashed."""
    yield from read_files(files, text)
    for path, stamp in zip(files, stamps, strict=True):
        if file_stamp(path) != stamp:
            raise DataError(f"{path}: changed while it was read; start again when it is complete")


def _open_hub(text: TextSet, cache: Path) -> OpenSource:
    dataset = load_hub(text, cache / "hub")
    copies = [Path(file["filename"]) for file in dataset.cache_files]
    contents = [["hub", digest] for digest in file_digests(copies, cache)] or [["hub", dataset._fingerprint]]

    def read() -> Iterator[str]:
        return with_text(read_dataset(dataset, select(text), str(text.hub)))

    return OpenSource(contents, [Part(max(1, dataset.num_rows), read)])


def _open_stream(text: TextSet, cache: Path) -> OpenSource:
    dataset, files = stream_hub(text, cache / "hub")
    local = [Path(name) for name in files if "://" not in name]
    digests = iter(file_digests(local, cache))
    # A file of the hub is named with its commit, which stands for its bytes.
    contents = [["stream" + Path(name).suffix, name if "://" in name else next(digests)] for name in files]
    contents += [["set", str(text.subset), text.split]]
    count = dataset.num_shards
    return OpenSource(
        contents, [Part(1, partial(_read_shard, dataset, text, i, count)) for i in range(count)]
    )


def _read_shard(dataset: Any, text: TextSet, index: int, count: int) -> Iterator[str]:
    return with_text(read_stream(dataset.shard(count, index), select(text), f"{text.hub} file {index + 1}"))
