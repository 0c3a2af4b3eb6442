"""The vocabulary stage: pieces for another language or domain, added to a base before it is expanded.

Read in this order: `words` (a corpus as the base's tokens), `learn` (which pieces are worth most), `files`
(the tokenizer with them), `rows` (the model with them), `measure` (what is saved, and the proof), `extend`
(all of it).
"""

from deepen.vocabulary.corpus import Text
from deepen.vocabulary.extend import ExtendResult, extend_vocabulary
from deepen.vocabulary.record import (
    VOCABULARY_NAME,
    MeasuredText,
    PieceRecord,
    VocabularyRecord,
    read_vocabulary,
)
from deepen.vocabulary.rows import plan_rows

__all__ = [
    "VOCABULARY_NAME",
    "ExtendResult",
    "MeasuredText",
    "PieceRecord",
    "Text",
    "VocabularyRecord",
    "extend_vocabulary",
    "plan_rows",
    "read_vocabulary",
]
