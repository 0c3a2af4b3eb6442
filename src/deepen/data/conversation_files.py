"""Conversations read from files and datasets, with a word on the form they have."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from deepen.config import ConversationSet
from deepen.data.conversations import Conversation, Detected, convert, detect
from deepen.data.files import find_files, kind_of
from deepen.data.hub import load_hub
from deepen.data.rows import json_line_records, json_records, parquet_records
from deepen.errors import DataError

Records = Iterator[tuple[str, Any]]


def read_conversations(
    asked: ConversationSet, note: Callable[[str], None], *, cache: Path | None = None
) -> Iterator[Conversation]:
    """Read a set of conversations in the order of its files.

    Args:
        asked: where they lie and what form they have.
        note: told, once a file, which form was seen and by what.
        cache: where `datasets` keeps its copy of a hub dataset; default: its own place.

    Raises:
        DataError: nothing is there, or a record is not of the form; names file, line and key.
    """
    for name, records in _open(asked, cache):
        first = next(records, None)
        if first is None:
            note(f"{name}: holds no records")
            continue
        form = _form(asked, first[1], first[0])
        note(f"{name}: {form.format} ({form.why})")
        for where, record in chain([first], records):
            yield convert(record, form.format, where)


def _form(asked: ConversationSet, record: Any, where: str) -> Detected:
    if asked.format == "auto":
        return detect(record, where)
    return Detected(asked.format, "as the recipe says")


def _open(asked: ConversationSet, cache: Path | None) -> Iterator[tuple[str, Records]]:
    if asked.hub is not None:
        rows = enumerate(load_hub(asked, cache), start=1)
        yield asked.hub, ((f"{asked.hub}: record {number}", record) for number, record in rows)
        return
    for path in find_files(asked):
        yield path.name, _read(path)


def _read(path: Path) -> Records:
    kind = kind_of(path)
    if kind == "jsonl":
        return json_line_records(path)
    if kind == "json":
        return json_records(path)
    if kind == "parquet":
        return parquet_records(path)
    raise DataError(f"{path}: conversations are read from .json, .jsonl or .parquet files, not from text")
