"""Sets of conversations, tokenised and ready to be packed."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deepen.config import ConversationSet
from deepen.data.batches import Mixture
from deepen.data.chat import ChatTemplate, Encoded, Laid, encode_conversations, lay_out
from deepen.data.conversation_files import read_conversations
from deepen.data.conversations import Conversation
from deepen.data.corpus import Tokens
from deepen.data.tokens import digest_of, token_dtype, tokenizer_digest
from deepen.errors import DataError

_AT_ONCE: Final = 256


@dataclass(frozen=True, kw_only=True)
class ConversationCounts:
    """What became of a set of conversations.

    Attributes:
        read: conversations read.
        kept: of them, those that are trained on.
        unanswered: left out, as the assistant says nothing in them that is to be learned.
        cut: longer than a window, and so cut at its end.
        cut_tokens: ids lost by that, whole conversations left out for it included.
        lost: left out, as nothing that is learned stands before the cut.
        torn: the assistant's turns of which the first token also holds the end of what stands before.
        tokens: ids of what is kept.
        trained: of them, those that are learned.
        median: ids of the middle conversation by length, before any is cut.
        most: ids of the one that 95% are no longer than.
        longest: ids of the longest.
    """

    read: int
    kept: int
    unanswered: int
    cut: int
    cut_tokens: int
    lost: int
    torn: int
    tokens: int
    trained: int
    median: int
    most: int
    longest: int

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{self.kept:,} conversations, {self.tokens:,} tokens, {self.trained:,} learned"]
        parts += [f"{self.unanswered:,} without an answer left out"] if self.unanswered else []
        cut = f"{self.cut:,} cut at the end of the window ({self.cut_tokens:,} tokens lost)"
        parts += [cut] if self.cut else []
        parts += [f"{self.lost:,} left out, the answer behind the cut"] if self.lost else []
        torn = f"{self.torn:,} answers begin inside a token of the prompt"
        parts += [torn] if self.torn else []
        return "; ".join(parts)


class ConversationCorpus:
    """Conversations end to end, in memory: the smallest type for an id, and a byte for whether it is learned.

    Attributes:
        tokens: ids of all conversations.
        documents: conversations.
        document_ends: where each ends: int64 [conversations].
        digest: key of the content.
        counts: what was made of what was read.
    """

    def __init__(
        self,
        ids: npt.NDArray[Any],
        learned: npt.NDArray[np.bool_],
        sizes: Sequence[int],
        digest: str,
        counts: ConversationCounts,
    ) -> None:
        self._ids, self._learned = ids, learned
        self.tokens, self.documents = len(ids), len(sizes)
        self.document_ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.digest, self.counts = digest, counts

    def read(self, position: int, count: int) -> Tokens:
        """Return `count` ids from `position` on, read in a circle."""
        return self._ids.take(np.arange(position, position + count), mode="wrap").astype(np.int64)

    def learned(self, position: int, count: int) -> npt.NDArray[np.bool_]:
        """Return which of `count` ids from `position` on the assistant says."""
        return self._learned[position : position + count]


def prepare_conversations(
    asked: ConversationSet,
    tokenizer: Any,
    template: ChatTemplate,
    length: int,
    *,
    note: Callable[[str], None],
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> ConversationCorpus:
    """Read and tokenise a set of conversations; one longer than a window is cut at its end, and counted.

    Args:
        asked: where they lie and what form they have.
        tokenizer: a fast transformers tokenizer.
        template: how messages become one text.
        length: ids predicted in a window.
        note: told the form of each file.
        cache: where `datasets` keeps its copy of a hub dataset; default: its own place.
        progress: called with the number of conversations read.

    Raises:
        DataError: a record is malformed, the template cannot be exact, or nothing is left.
    """
    conversations = read_conversations(asked, note, cache=cache)
    pile = _Pile(length, token_dtype(tokenizer))
    while some := list(itertools.islice(conversations, _AT_ONCE)):
        pile.add(len(some), _encode(some, template, tokenizer))
        if progress:
            progress(pile.read)
    corpus = pile.corpus([tokenizer_digest(tokenizer), template.source, length])
    if not corpus.documents:
        raise DataError(f"{asked.label}: nothing to learn in its {corpus.counts.read:,} conversations")
    return corpus


def mix_conversations(corpora: Sequence[tuple[ConversationCorpus, float]], length: int, seed: int) -> Mixture:
    """Pack conversations whole into windows, where none sees another, and mix the sets by weight."""
    return Mixture(corpora, length, seed, packing="best_fit", document_masks=True)


def _encode(some: list[Conversation], template: ChatTemplate, tokenizer: Any) -> list[Encoded]:
    laid: Iterator[Laid | None] = (lay_out(one, template, tokenizer) for one in some)
    answered = [one for one in laid if one is not None]
    return encode_conversations(answered, template, tokenizer) if answered else []


class _Pile:
    """Conversations as they come."""

    def __init__(self, length: int, dtype: np.dtype[Any]) -> None:
        self._most, self._dtype = length + 1, dtype
        self._ids: list[npt.NDArray[Any]] = []
        self._learned: list[npt.NDArray[np.bool_]] = []
        self._lengths: list[int] = []
        self.read = self._cut = self._cut_tokens = self._lost = self._torn = 0

    def add(self, read: int, encoded: list[Encoded]) -> None:
        self.read += read
        for one in encoded:
            ids, learned = one.ids[: self._most], one.trained[: self._most]
            self._lengths.append(len(one.ids))
            self._torn += one.torn
            self._cut += len(one.ids) > self._most
            if learned[1:].any():
                self._cut_tokens += len(one.ids) - len(ids)
                self._ids.append(ids.astype(self._dtype))
                self._learned.append(learned)
            else:
                self._cut_tokens += len(one.ids)
                self._lost += 1

    def corpus(self, how: list[Any]) -> ConversationCorpus:
        ids = np.concatenate([np.empty(0, self._dtype), *self._ids])
        learned = np.concatenate([np.empty(0, np.bool_), *self._learned])
        sizes = [len(one) for one in self._ids]
        content = [hashlib.sha256(part.tobytes()).hexdigest() for part in (ids, learned, np.asarray(sizes))]
        counts = self._counts(len(ids), int(learned.sum()))
        return ConversationCorpus(ids, learned, sizes, digest_of([*how, content]), counts)

    def _counts(self, tokens: int, trained: int) -> ConversationCounts:
        lengths = np.sort(np.asarray(self._lengths or [0]))
        last = len(lengths) - 1
        return ConversationCounts(
            read=self.read,
            kept=len(self._ids),
            unanswered=self.read - len(self._lengths),
            cut=self._cut,
            cut_tokens=self._cut_tokens,
            lost=self._lost,
            torn=self._torn,
            tokens=tokens,
            trained=trained,
            median=int(lengths[last // 2]),
            most=int(lengths[int(last * 0.95)]),
            longest=int(lengths[last]),
        )
