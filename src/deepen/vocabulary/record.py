"""`vocabulary.json`: which rows of a checkpoint are new, what they stand for, and what that saves."""

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deepen.checkpoint import contained
from deepen.errors import CheckpointError, in_a_line
from deepen.records import Provenance

VOCABULARY_NAME: Final = "vocabulary.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class PieceRecord(_Record):
    """One new piece.

    Attributes:
        id: its row.
        text: as the vocabulary spells it.
        replaces: ids of the base's tokens in whose place it stands; its row is the mean of theirs.
        saves: tokens of the corpus it saves, of those that better pieces leave.
    """

    id: int
    text: str
    replaces: list[int]
    saves: int


class MeasuredText(_Record):
    """A text before and after.

    Attributes:
        path: as it was named.
        learned: whether pieces were learned from it.
        digest: SHA-256 of its documents, each closed by a zero byte.
        documents: number of documents.
        documents_changed: of those, how many have other tokens now.
        characters: Unicode characters.
        tokens_before: the base's tokens.
        tokens_after: tokens with the new pieces.
    """

    path: str
    learned: bool
    digest: str
    documents: int = 0
    documents_changed: int = 0
    characters: int = 0
    tokens_before: int = 0
    tokens_after: int = 0

    @property
    def saved(self) -> float:
        """Share of the tokens that is saved; tokens per character fall by as much."""
        return 1 - self.tokens_after / self.tokens_before if self.tokens_before else 0.0


class VocabularyRecord(_Record):
    """The content of `vocabulary.json`.

    Attributes:
        format_version: 1.
        base: the base, as it was named.
        base_fingerprint: fast fingerprint of its tensors.
        base_rows: its rows; the new ones follow.
        head: how the rows of a head of its own began; null where the head is the embeddings.
        pieces: the new rows, in order.
        texts: what was learned from and measured.
        provenance: who made it, when and with what.
    """

    format_version: Literal[1] = 1
    base: str
    base_fingerprint: str
    base_rows: int
    head: Literal["parts", "average"] | None
    pieces: list[PieceRecord]
    texts: list[MeasuredText]
    provenance: Provenance

    def to_json(self) -> str:
        """Return the text of the file."""
        return self.model_dump_json(indent=1) + "\n"


def read_vocabulary(directory: Path) -> VocabularyRecord | None:
    """Read the record of a checkpoint; None where its vocabulary was not extended.

    Raises:
        CheckpointError: it is malformed, or of another format version.
    """
    path = contained(directory, VOCABULARY_NAME)
    if not path.exists():
        return None
    try:
        return VocabularyRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        said = in_a_line(error)
        raise CheckpointError(f"{path}: is not the record of an extended vocabulary: {said}") from None
