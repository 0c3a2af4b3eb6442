"""The texts a vocabulary is learned from or measured on: plain text, records with text, conversations."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepen.config import ConversationSet, TextSet
from deepen.data.conversation_files import read_conversations
from deepen.data.conversations import detect
from deepen.data.documents import read_files, with_text
from deepen.data.files import find_files, kind_of
from deepen.data.rows import json_line_records, json_records
from deepen.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as it is named on the command line.

    Attributes:
        path: a file, a directory or a glob.
        field: key that holds the text in a record.
        learned: whether pieces are learned from it; it is measured in any case.
    """

    path: str
    field: str | None = None
    learned: bool = True

    def documents(self) -> Iterator[str]:
        """Read it. Records without the field are read as conversations (alpaca and the other forms).

        Raises:
            DataError: nothing is there, or a record has neither text nor a known form.
        """
        asked = TextSet(path=self.path, field=self.field)
        for path in find_files(asked):
            if self.field is None and _holds_conversations(path):
                yield from with_text(_turns(path))
            else:
                yield from read_files((path,), asked)


def _holds_conversations(path: Path) -> bool:
    """Tell by the first record: one with `text` is a text."""
    kind = kind_of(path)
    if kind not in ("json", "jsonl"):
        return False
    where, record = next(json_records(path) if kind == "json" else json_line_records(path), ("", None))
    if not isinstance(record, dict) or "text" in record:
        return False
    try:
        detect(record, where)
    except DataError:
        return False  # read as text, which says which field is missing
    return True


def _turns(path: Path) -> Iterator[str]:
    """What is said in each conversation, one turn a paragraph."""
    for conversation in read_conversations(ConversationSet(path=str(path)), lambda _: None):
        contents = (message["content"] for message in conversation.messages)
        yield "\n".join(content for content in contents if isinstance(content, str))


class Digest:
    """SHA-256 over documents, in order, each closed by a zero byte."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def through(self, documents: Iterator[str]) -> Iterator[str]:
        """Pass documents on and take them in."""
        for document in documents:
            self._hash.update(document.encode() + b"\0")
            yield document

    def hex(self) -> str:
        """Return the digest of what has passed."""
        return self._hash.hexdigest()
