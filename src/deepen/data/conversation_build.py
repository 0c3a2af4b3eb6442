"""How a set of conversations becomes a corpus of them."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from deepen.checkpoint import atomic_directory
from deepen.config import ConversationSet
from deepen.data.batches import Mixture
from deepen.data.build import check_sides, is_heldout
from deepen.data.chat import ChatTemplate, Encoded, Laid, encode_conversations, lay_out
from deepen.data.conversation_corpus import (
    ENDS,
    FORMAT_VERSION,
    HELDOUT,
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
    heldout: float = 0.0,
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
        heldout: share of the conversations to keep out, chosen by the hash of their text alone.
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
    key = digest_of([*how, *([heldout] if heldout else []), conversation_contents(asked, cache)])
    target = cache / "conversations" / key[:32]
    if not (target / META).is_file():
        _build(target, key, asked, tokenizer, template, length, heldout, cache, progress or _ignore)
    return ConversationCorpus(target)


def mix_conversations(corpora: Sequence[tuple[ConversationCorpus, float]], length: int, seed: int) -> Mixture:
    """Pack conversations whole into windows, where none sees another, and mix the sets by weight."""
    return Mixture(corpora, length, seed, packing="best_fit", document_masks=True)


def conversation_contents(asked: ConversationSet, cache: Path) -> list[list[str]]:
    """Return the name and the digest of each file.

    Raises:
        DataError: there is none, or the dataset cannot be loaded.
    """
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
    heldout: float,
    cache: Path,
    progress: Callable[[int], None],
) -> None:
    files = find_files(asked) if asked.hub is None else ()
    stamps = [file_stamp(path) for path in files]
    forms: list[str] = []
    conversations = read_conversations(asked, forms.append, cache=cache / "hub")
    dtype, read = token_dtype(tokenizer), 0
    with atomic_directory(target, overwrite=target.exists()) as partial:
        with ExitStack() as stack:
            trained = stack.enter_context(_piling(partial, length, dtype))
            held = stack.enter_context(_piling(partial / HELDOUT, length, dtype)) if heldout else None
            while some := list(itertools.islice(conversations, _AT_ONCE)):
                answered = _lay_out(some, template, tokenizer)
                trained.unanswered += len(some) - len(answered)
                for pile, laid in (
                    (trained, _side(answered, heldout, False)),
                    (held, _side(answered, heldout, True)),
                ):
                    if pile is not None and laid:
                        pile.add(encode_conversations(laid, template, tokenizer))
                progress(read := read + len(some))
        meta = {"format_version": FORMAT_VERSION, "digest": key, "dtype": dtype.name, "forms": forms}
        trained.write(partial, meta)
        if held is not None:
            held.write(partial / HELDOUT, meta | {"digest": f"{key}/{HELDOUT}"})
        _check(asked.label, trained, held, heldout)
        for path, stamp in zip(files, stamps, strict=True):
            if file_stamp(path) != stamp:
                raise DataError(f"{path}: changed while it was read; start again when it is complete")


def _side(laid: list[Laid], heldout: float, kept_out: bool) -> list[Laid]:
    """Choose what is kept out, or what is not."""
    return [one for one in laid if (bool(heldout) and is_heldout(one.text, heldout)) == kept_out]


def _check(label: str, trained: "_Pile", held: "_Pile | None", heldout: float) -> None:
    if not trained.sizes and not (held and held.sizes):
        raise DataError(f"{label}: nothing to learn in its {trained.counts().read:,} conversations")
    if held is not None:
        check_sides(len(trained.sizes), len(held.sizes), heldout, label, "change sft.heldout")


def _lay_out(some: list[Conversation], template: ChatTemplate, tokenizer: Any) -> list[Laid]:
    laid: Iterator[Laid | None] = (lay_out(one, template, tokenizer) for one in some)
    return [one for one in laid if one is not None]


@contextmanager
def _piling(directory: Path, length: int, dtype: np.dtype[Any]) -> Iterator["_Pile"]:
    directory.mkdir(exist_ok=True)
    with (directory / IDS).open("wb") as ids, (directory / LEARNED).open("wb") as learned:
        yield _Pile(length, dtype, ids, learned)


class _Pile:
    """Conversations as they come, written one after another."""

    def __init__(self, length: int, dtype: np.dtype[Any], ids: BinaryIO, learned: BinaryIO) -> None:
        self._most, self._dtype, self._ids, self._learned = length + 1, dtype, ids, learned
        self.sizes: list[int] = []
        self._lengths: list[int] = []
        self.unanswered = self._trained = self._cut = self._cut_tokens = self._lost = self._torn = 0

    def add(self, encoded: list[Encoded]) -> None:
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

    def write(self, directory: Path, meta: dict[str, Any]) -> None:
        """Write what the ids and flags, which lie there already, are."""
        (directory / ENDS).write_bytes(np.cumsum(np.asarray(self.sizes, dtype=np.int64)).tobytes())
        counts = {"counts": asdict(self.counts())}
        (directory / META).write_text(json.dumps(meta | counts, indent=1) + "\n")

    def counts(self) -> ConversationCounts:
        lengths = np.sort(np.asarray(self._lengths or [0]))
        last = len(lengths) - 1
        return ConversationCounts(
            read=self.unanswered + len(self._lengths),
            kept=len(self.sizes),
            unanswered=self.unanswered,
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
