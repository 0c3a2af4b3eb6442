"""How a set of conversations becomes a corpus of them."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from deepen.checkpoint import atomic_directory
from deepen.config import ConversationSet
from deepen.data.batches import Mixture
from deepen.data.chat import ChatTemplate, Encoded, Laid, encode_conversations, lay_out
from deepen.data.conversation_corpus import (
    ENDS,
    FORMAT_VERSION,
    IDS,
    LEARNED,
    META,
    ConversationCorpus,
    ConversationCounts,
)
from deepen.data.conversation_files import read_conversations
from deepen.data.conversations import Conversation
from deepen.data.digests import file_digests, file_stamp
from deepen.data.files import find_files
from deepen.data.hub import load_hub
from deepen.data.tokens import digest_of, token_dtype, tokenizer_digest
from deepen.errors import DataError, OutputError

_AT_ONCE: Final = 256


def prepare_conversations(
    asked: ConversationSet,
    tokenizer: Any,
    template: ChatTemplate,
    length: int,
    *,
    cache: Path,
    progress: Callable[[int], None] | None = None,
) -> ConversationCorpus:
    """Tokenise a set of conversations into the cache, or open what an earlier call left there.

    A conversation longer than a window is cut at its end, and counted.

    Args:
        asked: where they lie and what form they have.
        tokenizer: a fast transformers tokenizer.
        template: how messages become one text.
        length: ids predicted in a window.
        cache: where tokenised sets lie, and the copies `datasets` makes of hub datasets.
        progress: called with the number of conversations read.

    Raises:
        DataError: a record is malformed, the template cannot be exact, or nothing is left.
        OutputError: the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{cache}: cannot hold the cache: {error.strerror}; choose another") from error
    how = [FORMAT_VERSION, asked.format, tokenizer_digest(tokenizer), template.source, length]
    key = digest_of([*how, _contents(asked, cache)])
    target = cache / "conversations" / key[:32]
    if not (target / META).is_file():
        _build(target, key, asked, tokenizer, template, length, cache, progress or _ignore)
    return ConversationCorpus(target)


def mix_conversations(corpora: Sequence[tuple[ConversationCorpus, float]], length: int, seed: int) -> Mixture:
    """Pack conversations whole into windows, where none sees another, and mix the sets by weight."""
    return Mixture(corpora, length, seed, packing="best_fit", document_masks=True)


def _contents(asked: ConversationSet, cache: Path) -> list[list[str]]:
    """Return the name and the digest of each file."""
    if asked.hub is None:
        files = find_files(asked)
        names = [path.name for path in files]
    else:
        dataset = load_hub(asked, cache / "hub")
        files = tuple(Path(file["filename"]) for file in dataset.cache_files)
        names = [asked.hub] * len(files)
        if not files:
            return [[asked.hub, str(dataset._fingerprint)]]
    return [list(pair) for pair in zip(names, file_digests(files, cache), strict=True)]


def _build(
    target: Path,
    key: str,
    asked: ConversationSet,
    tokenizer: Any,
    template: ChatTemplate,
    length: int,
    cache: Path,
    progress: Callable[[int], None],
) -> None:
    files = find_files(asked) if asked.hub is None else ()
    stamps = [file_stamp(path) for path in files]
    forms: list[str] = []
    conversations = read_conversations(asked, forms.append, cache=cache / "hub")
    dtype = token_dtype(tokenizer)
    with atomic_directory(target, overwrite=target.exists()) as partial:
        with ExitStack() as stack:
            ids, learned = (
                cast(BinaryIO, stack.enter_context((partial / name).open("wb"))) for name in (IDS, LEARNED)
            )
            pile = _Pile(length, dtype, ids, learned)
            while some := list(itertools.islice(conversations, _AT_ONCE)):
                pile.add(len(some), _encode(some, template, tokenizer))
                progress(pile.read)
        counts = pile.counts()
        if not counts.kept:
            raise DataError(f"{asked.label}: nothing to learn in its {counts.read:,} conversations")
        (partial / ENDS).write_bytes(np.cumsum(np.asarray(pile.sizes, dtype=np.int64)).tobytes())
        meta = {"format_version": FORMAT_VERSION, "digest": key, "dtype": dtype.name, "forms": forms}
        (partial / META).write_text(json.dumps({**meta, "counts": asdict(counts)}, indent=1) + "\n")
        for path, stamp in zip(files, stamps, strict=True):
            if file_stamp(path) != stamp:
                raise DataError(f"{path}: changed while it was read; start again when it is complete")


def _encode(some: list[Conversation], template: ChatTemplate, tokenizer: Any) -> list[Encoded]:
    laid: Iterator[Laid | None] = (lay_out(one, template, tokenizer) for one in some)
    answered = [one for one in laid if one is not None]
    return encode_conversations(answered, template, tokenizer) if answered else []


class _Pile:
    """Conversations as they come, written one after another."""

    def __init__(self, length: int, dtype: np.dtype[Any], ids: BinaryIO, learned: BinaryIO) -> None:
        self._most, self._dtype, self._ids, self._learned = length + 1, dtype, ids, learned
        self.sizes: list[int] = []
        self._lengths: list[int] = []
        self.read = self._trained = self._cut = self._cut_tokens = self._lost = self._torn = 0

    def add(self, read: int, encoded: list[Encoded]) -> None:
        self.read += read
        for one in encoded:
            ids, learned = one.ids[: self._most], one.trained[: self._most]
            self._lengths.append(len(one.ids))
            self._torn += one.torn
            self._cut += len(one.ids) > self._most
            kept = bool(learned[1:].any())
            self._cut_tokens += len(one.ids) - len(ids) * kept
            self._lost += not kept
            if kept:
                self._ids.write(ids.astype(self._dtype).tobytes())
                self._learned.write(learned.tobytes())
                self._trained += int(learned.sum())
                self.sizes.append(len(ids))

    def counts(self) -> ConversationCounts:
        lengths = np.sort(np.asarray(self._lengths or [0]))
        last = len(lengths) - 1
        return ConversationCounts(
            read=self.read,
            kept=len(self.sizes),
            unanswered=self.read - len(self._lengths),
            cut=self._cut,
            cut_tokens=self._cut_tokens,
            lost=self._lost,
            torn=self._torn,
            tokens=sum(self.sizes),
            trained=self._trained,
            median=int(lengths[last // 2]),
            most=int(lengths[int(last * 0.95)]),
            longest=int(lengths[last]),
        )


def _ignore(_: int) -> None:
    """What is done with progress no one asked for."""
