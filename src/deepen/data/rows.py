"""Records that hold text: JSON, JSON lines, Parquet and datasets of the hub."""

import itertools
import json
import string
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.config import TextSet
from deepen.data.files import decode, open_bytes
from deepen.errors import DataError, in_a_line

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Selector:
    """How a record becomes text: one field as it is, or a template filled from several.

    Attributes:
        parts: pairs of literal text and the key whose value follows it (None: nothing follows).
        template: whether numbers are welcome besides strings.
    """

    parts: tuple[tuple[str, str | None], ...]
    template: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys a record must have, each once."""
        return tuple(dict.fromkeys(key for _, key in self.parts if key is not None))

    def text(self, record: Any, where: str) -> str:
        """Build the text of one record; `where` begins the message of a DataError."""
        if not isinstance(record, dict):
            raise DataError(f"{where}: is {json_type(record)}, not an object with keys")
        self.require(record, where)
        return "".join(
            literal + ("" if key is None else self._value(record, key, where)) for literal, key in self.parts
        )

    def require(self, found: Collection[str], where: str) -> None:
        """Raise DataError unless every key is among those found."""
        for key in self.keys:
            if key not in found:
                raise DataError(f"{where}: no field {key!r}; found {listed(found)}")

    def _value(self, record: dict[str, Any], key: str, where: str) -> str:
        value = record[key]
        if isinstance(value, str):
            return encodable(value, key, where)
        if self.template and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise DataError(f"{where}: field {key!r} is {json_type(value)}, not text")


def select(text: TextSet) -> Selector:
    """Read `field` or `template` of a text set.

    Raises:
        DataError: the template is malformed or names no key.
    """
    if text.template is None:
        return Selector(parts=(("", text.field or "text"),), template=False)
    try:
        parts = list(string.Formatter().parse(text.template))
    except ValueError as error:
        raise DataError(f"{text.label}: template {text.template!r}: {error}") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise DataError(
            f"{text.label}: template {text.template!r}: formats such as {{a:>8}} or {{a!r}} are not allowed"
        )
    if not any(key for _, key, _, _ in parts) or any(key == "" for _, key, _, _ in parts):
        raise DataError(
            f"{text.label}: template {text.template!r}: name keys as in {{question}}\\n{{answer}}"
        )
    return Selector(parts=tuple((literal, key) for literal, key, _, _ in parts), template=True)


def read_json_lines(path: Path, selector: Selector) -> Iterator[str]:
    """Read one record a line; empty lines are passed over."""
    return (selector.text(record, where) for where, record in json_line_records(path))


def read_json(path: Path, selector: Selector) -> Iterator[str]:
    """Read a list of records, a single record, or (as many a .json holds) one record a line."""
    return (selector.text(record, where) for where, record in json_records(path))


def read_parquet(path: Path, selector: Selector) -> Iterator[str]:
    """Read the columns needed of a Parquet file, some hundred rows at a time."""
    return (selector.text(record, where) for where, record in parquet_records(path, selector))


def json_line_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each record of a file of JSON lines stands, and the record."""
    offset = 0
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            content = decode(line, path, offset)
            offset += len(line)
            if content.strip():
                where = f"{path}: line {number}"
                yield where, _parse(content, where)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each record of a JSON file stands, and the record."""
    with open_bytes(path) as stream:
        content = decode(stream.read(), path, 0)
    if _has_record_a_line(content):
        yield from json_line_records(path)
        return
    if not content.strip():
        return
    value = _parse(content, str(path))
    records = value if isinstance(value, list) else [value]
    yield from ((f"{path}: record {number}", record) for number, record in enumerate(records, start=1))


def parquet_records(path: Path, selector: Selector | None = None) -> Iterator[tuple[str, Any]]:
    """Yield where each record of a Parquet file stands, and the columns selected of it; default: all."""
    import pyarrow.parquet

    with _arrow_errors(path):
        file = pyarrow.parquet.ParquetFile(path)
    with file:
        if selector:
            selector.require(file.schema_arrow.names, str(path))
        columns = list(selector.keys) if selector else None
        number = 0
        with _arrow_errors(path):
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", record


def read_dataset(dataset: Any, selector: Selector, label: str) -> Iterator[str]:
    """Read the rows of a `datasets.Dataset`."""
    selector.require(dataset.column_names, label)
    rows = dataset.select_columns(list(selector.keys))
    for number, record in enumerate(rows, start=1):
        yield selector.text(record, f"{label}: record {number}")


def read_stream(dataset: Any, selector: Selector, label: str) -> Iterator[str]:
    """Read the rows of a `datasets.IterableDataset` as they arrive.

    Raises:
        DataError: a row lacks the text, or the stream breaks.
    """
    rows = iter(dataset)
    for number in itertools.count(1):
        try:
            record = next(rows, None)
        except Exception as error:  # the library's own, its readers' and its network stack's
            said = in_a_line(error)
            raise DataError(
                f"{label}: the stream broke at record {number}: {said}; start again, nothing is left behind"
            ) from error
        if record is None:
            return
        yield selector.text(record, f"{label}: record {number}")


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as Parquet: {reason}") from error


def _has_record_a_line(content: str) -> bool:
    first, _, rest = content.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        # `where` names the line of a file of one record a line.
        line = f"line {error.lineno} " if "\n" in content.strip() else ""
        # Python's scanner looks for a value behind the blanks at the end, on what is no line of the file.
        column = error.colno if line else min(error.pos, len(content.rstrip())) + 1
        raise DataError(f"{where}: not JSON: {error.msg} at {line}column {column}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error


def encodable(value: str, key: str, where: str) -> str:
    """Refuse half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: field {key!r} is not Unicode: unpaired surrogate at character {error.start}"
            ) from error
    return value


def json_type(value: Any) -> str:
    """Say in words what a JSON value is."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def listed(found: Collection[str]) -> str:
    """List names for a message, the first dozen."""
    names = [str(name) for name in found]
    return (", ".join(names[:12]) + (", …" if len(names) > 12 else "")) or "no keys"
