"""Which files a text set names, and how their bytes are opened."""

import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

from deepen.config import Place
from deepen.errors import DataError

Kind = Literal["plain", "jsonl", "json", "parquet"]

SUPPORTED = ".txt, .md, .jsonl, .json (each also as .gz) or .parquet"

_KINDS: dict[str, Kind] = {
    ".txt": "plain",
    ".md": "plain",
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}


def find_files(text: Place) -> tuple[Path, ...]:
    """Resolve `text.path` (a file, a directory with all below it, or a glob with `**`), sorted by path.

    Hidden files are not looked at. In a directory or a glob, files of other kinds are passed over.

    Raises:
        DataError: nothing matches, or nothing that matches is of a supported kind.
    """
    if text.path is None:
        raise DataError(f"{text.label}: names a hub dataset, not files")
    found = _named(text.path)
    if not found:
        raise DataError(
            f"{text.path}: no file matches; give a file, a directory or a glob such as data/**/*.txt"
        )
    files = tuple(sorted({path for path in found if kind_of(path)}))
    if not files:
        raise DataError(f"{text.path}: found only {_suffixes(found)}; supported are {SUPPORTED}")
    return files


def passed_over(text: Place) -> str | None:
    """Say which files of other kinds `find_files` leaves out; None where there are none."""
    others = [path for path in _named(text.path) if not kind_of(path)] if text.path else []
    if not others:
        return None
    kinds = _suffixes(others)
    return f"{text.path}: {len(others):,} of other kinds not read ({kinds}); supported are {SUPPORTED}"


def _named(path: str) -> list[Path]:
    pattern = os.path.expanduser(path)
    named = Path(pattern)
    if named.is_file():
        return [named]
    if named.is_dir():
        return list(_below(named))
    return [Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def kind_of(path: Path) -> Kind | None:
    """Tell by its name how a file is read; None for a kind that is not supported."""
    name = path.name.lower()
    plain_name = name.removesuffix(".gz")
    kind = _KINDS.get(os.path.splitext(plain_name)[1])
    return None if kind == "parquet" and plain_name != name else kind


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacking .gz.

    Raises:
        DataError: it cannot be read, also when that shows only later on.
    """
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def decode(data: bytes, path: Path, offset: int) -> str:
    """Decode UTF-8 from byte `offset` of the unpacked `path`; a leading byte order mark is dropped.

    Raises:
        DataError: it is not UTF-8; names the byte.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8: byte {offset + error.start} is 0x{data[error.start]:02x}; "
            "convert the file (for example with iconv -t utf-8)"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _below(directory: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(directory):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _suffixes(paths: Iterable[Path]) -> str:
    kinds = sorted({"".join(path.suffixes[-2:]) or f"'{path.name}'" for path in paths})
    return ", ".join(kinds[:5]) + (", …" if len(kinds) > 5 else "")
