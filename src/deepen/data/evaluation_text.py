"""What held-out evaluation scores: windows of documents, and the bytes of text each of them predicts."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deepen.data.corpus import Tokens
from deepen.data.tokens import encode
from deepen.errors import DataError

# Text read per token wanted, so that the first tokens of a huge document do not cost tokenising all of it.
_CHARACTERS_PER_TOKEN = 16
_MARGIN = 256


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A text cut for scoring; the columns have one entry a window.

    Attributes:
        task: name in results.
        role: `general` (must be kept) or `domain` (must be learned).
        windows: int64 ids; `window[1:]` are predicted from what precedes them in the window.
        document: number of the document a window is from, in reading order.
        bytes: UTF-8 bytes of the text a window predicts; over a whole document they sum to its size.
        digest: hash of the ids and their cut.
        counted: which of `window[1:]` are scored, bool; None: all of them.
    """

    task: str
    role: Literal["general", "domain"]
    windows: list[Tokens]
    document: list[int]
    bytes: list[int]
    digest: str
    counted: list[npt.NDArray[np.bool_]] | None = None

    @property
    def predicted(self) -> list[int]:
        """Predicted tokens of each window."""
        if self.counted is not None:
            return [int(np.count_nonzero(counted)) for counted in self.counted]
        return [len(window) - 1 for window in self.windows]

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(self.predicted)

    def share(self, rank: int, size: int) -> "EvaluationText":
        """Return every `size`-th window from number `rank` on, for one of several processes to score."""
        counted = None if self.counted is None else self.counted[rank::size]
        return replace(self, windows=self.windows[rank::size], counted=counted)

    def beginning(self, tokens: int) -> "EvaluationText":
        """Return the first windows, up to the one that reaches this number of predicted tokens.

        The digest stays the whole text's.
        """
        reached = np.cumsum(self.predicted)
        first = slice(1 + int(np.searchsorted(reached, min(tokens, self.tokens))))
        return replace(
            self,
            windows=self.windows[first],
            document=self.document[first],
            bytes=self.bytes[first],
            counted=None if self.counted is None else self.counted[first],
        )


def load_evaluation_text(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    task: str,
    role: Literal["general", "domain"],
    sequence_length: int,
    max_tokens: int,
) -> EvaluationText:
    """Cut documents into windows in which every token but a document's first is predicted exactly once.

    A document is framed as the tokenizer frames it: where that adds a BOS, the whole text is predicted. No
    end-of-text token is added, so what is scored is text alone. No window crosses documents. A document of
    one token predicts nothing and is passed over.

    Args:
        documents: texts in a fixed order.
        tokenizer: a transformers tokenizer. With one that has no character offsets (a slow one) a document's
            bytes are shared out evenly over its predicted tokens.
        task: name in results.
        role: what the text stands for.
        sequence_length: most tokens one window predicts.
        max_tokens: reading stops with the window that reaches this number of predicted tokens.

    Raises:
        DataError: there is nothing to predict.
    """
    windows: list[Tokens] = []
    numbers: list[int] = []
    sizes: list[int] = []
    left = max_tokens
    for number, document in enumerate(documents):
        for window, size in _cut(document, tokenizer, sequence_length, left):
            windows.append(window)
            numbers.append(number)
            sizes.append(size)
            left -= len(window) - 1
        if left <= 0:
            break
    if not windows:
        raise DataError(f"{task}: nothing to evaluate: no document has two tokens")
    return EvaluationText(
        task=task, role=role, windows=windows, document=numbers, bytes=sizes, digest=_digest(windows, numbers)
    )


def score_answers(
    conversations: Iterable[tuple[Tokens, npt.NDArray[np.bool_]]],
    tokenizer: Any,
    *,
    task: str,
    max_tokens: int,
) -> EvaluationText:
    """Make a text of conversations of which the answers alone are scored, a window each.

    Args:
        conversations: ids of each, and which of them the assistant says.
        tokenizer: tells how many bytes of text the answers are.
        task: name in results; the role is `domain`.
        max_tokens: reading stops with the conversation that reaches this number of ids.
    """
    windows: list[Tokens] = []
    counted: list[npt.NDArray[np.bool_]] = []
    sizes: list[int] = []
    for ids, learned in conversations:
        if sum(map(len, windows)) >= max_tokens:
            break
        windows.append(ids)
        counted.append(learned[1:])
        answers = tokenizer.decode(ids[1:][learned[1:]].tolist(), skip_special_tokens=True)
        sizes.append(len(answers.encode()))
    numbers = list(range(len(windows)))
    flags = [counts.astype(np.int64) for counts in counted]
    return EvaluationText(
        task=task,
        role="domain",
        windows=windows,
        document=numbers,
        bytes=sizes,
        digest=_digest([*windows, *flags], [*numbers, *numbers]),
        counted=counted,
    )


def _cut(document: str, tokenizer: Any, length: int, wanted: int) -> Iterator[tuple[Tokens, int]]:
    """Cut the windows of one document that are needed to predict `wanted` tokens."""
    ids, positions, total = _encode_enough(document, tokenizer, wanted + length)
    targets = range(1, len(ids), length)  # the first predicted token of each window
    edges = [0, *(positions[token] for token in targets[1:]), total]
    for token, (begin, end) in zip(targets, pairwise(edges), strict=False):
        if wanted <= 0:
            return
        window = np.asarray(ids[token - 1 : token + length], dtype=np.int64)
        wanted -= len(window) - 1
        yield window, int(end - begin)


def _encode_enough(document: str, tokenizer: Any, wanted: int) -> tuple[list[int], Tokens, int]:
    """Encode the document, or so much of its beginning that `wanted` tokens are safe from the cut."""
    beginning = document[: _CHARACTERS_PER_TOKEN * (wanted + _MARGIN)]
    encoded = _encode(beginning, tokenizer)
    if len(beginning) == len(document) or len(encoded[0]) > wanted + _MARGIN:
        return encoded
    return _encode(document, tokenizer)


def _encode(text: str, tokenizer: Any) -> tuple[list[int], Tokens, int]:
    """Return the ids, the byte of the text at which each begins (never falling), and the text's bytes."""
    if not tokenizer.is_fast:
        ids = encode(tokenizer, [text])[0]
        total = len(text.encode())
        return ids, np.arange(-1, len(ids) - 1) * total // max(len(ids) - 1, 1), total
    encoded = tokenizer(text, truncation=False, verbose=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    positions = _byte_positions(text)
    return list(encoded["input_ids"]), positions[_starts(offsets)], int(positions[-1])


def _starts(offsets: Tokens) -> Tokens:
    """Return the character at which each token begins: [tokens], never falling, from [tokens, 2] offsets.

    A token of no text (special ones stand at 0, 0) begins where the text before it ends. A normaliser may
    reorder characters; then a token begins no earlier than those before it.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    reached = np.concatenate([[0], np.maximum.accumulate(ends)])[:-1]
    return np.maximum.accumulate(np.where(starts == ends, reached, starts))


def _byte_positions(text: str) -> Tokens:
    """Return the UTF-8 byte at which each character begins, and at last their number: [characters + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)


def _digest(windows: list[Tokens], document: list[int]) -> str:
    digest = hashlib.sha256()
    for window, number in zip(windows, document, strict=True):
        digest.update(np.asarray([number, len(window), *window], dtype="<i8").tobytes())
    return digest.hexdigest()
