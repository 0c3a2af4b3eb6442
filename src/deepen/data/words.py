"""Runs of words as 64-bit numbers, and which of them an evaluation text holds.

A word is a run of letters, digits and underscores, or one Chinese or Japanese character; case, punctuation
and white space do not count. Numbers do not depend on the process or the machine. Two different runs share a
number with probability 2⁻⁶⁴: a million evaluation runs and 10⁹ words meet by chance in one check of 18,000.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SHORTEST_RUN: Final = 8

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+")
_MOST_KNOWN: Final = 1 << 20
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)


def split_words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.casefold())


class WordNumbers:
    """Numbers words; remembers about a million of them, some 100 MB."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: Sequence[str]) -> Hashes:
        """Return the number of each word."""
        known = self._known
        if len(known) > _MOST_KNOWN:
            known.clear()
        for word in set(words).difference(known):
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter(map(known.__getitem__, words), dtype=np.uint64, count=len(words))


def runs(words: Hashes, length: int) -> Hashes:
    """Return the number of each run of `length` words, in order: none if there are fewer words."""
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    # A polynomial of random 64-bit numbers: other words, or the same in another order, give another value.
    result = words[:count].copy()
    for place in range(1, length):
        result *= _FACTOR
        result += words[place : place + count]
    return scatter(result)


def scatter(words: Hashes) -> Hashes:
    """Spread 64 bits evenly: the finaliser of SplitMix64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(kw_only=True)
class EvaluationRuns:
    """The runs of words of evaluation texts: ten bytes in memory a word.

    A document of fewer than `length` words, but at least eight, counts as one run. Shorter ones are not
    looked for: they would be found everywhere.

    Attributes:
        length: words in a run.
        names: of the texts.
        documents: of each text.
        words: of each text.
        unchecked: documents of each text that are too short to be looked for.
        runs: length -> runs of that length, sorted, and the text each is of.
    """

    length: int
    names: list[str] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    unchecked: list[int] = field(default_factory=list)
    runs: dict[int, tuple[Hashes, npt.NDArray[np.int16]]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of the runs."""
        digest = hashlib.sha256()
        for length, (known, of) in sorted(self.runs.items()):
            digest.update(np.asarray([length, len(known)], dtype="<i8").tobytes())
            digest.update(known.astype("<u8").tobytes() + of.astype("<i2").tobytes())
        return digest.hexdigest()

    def find(self, words: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        """Look a document up.

        Returns:
            Where in it runs of an evaluation text begin, the text of each, and the length of the first run.
        """
        places, texts, first = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)], 0
        for length, (known, of) in sorted(self.runs.items(), reverse=True):
            found = runs(words, length)
            at = np.minimum(np.searchsorted(known, found), len(known) - 1)
            here = np.flatnonzero(known[at] == found)
            first = first or (length if len(here) else 0)
            places.append(here)
            texts.append(of[at[here]].astype(np.int64))
        return np.concatenate(places), np.concatenate(texts), first


def collect_runs(texts: Iterable[tuple[str, Iterable[str]]], length: int, most_words: int) -> EvaluationRuns:
    """Number the runs of evaluation texts.

    Args:
        texts: name and documents of each.
        length: words in a run.
        most_words: reading a text stops with the document that reaches it.
    """
    result, number = EvaluationRuns(length=length), WordNumbers()
    gathered: dict[int, list[tuple[Hashes, Any]]] = {}
    for index, (name, documents) in enumerate(texts):
        read = total = unchecked = 0
        for document in documents:
            words = number(split_words(document))
            size = min(length, len(words))
            read, total = read + 1, total + len(words)
            if size >= min(SHORTEST_RUN, length):
                found = runs(words, size)
                gathered.setdefault(size, []).append((found, np.full(len(found), index, dtype=np.int16)))
            else:
                unchecked += 1
            if total >= most_words:
                break
        for counts, value in zip(
            (result.documents, result.words, result.unchecked), (read, total, unchecked), strict=True
        ):
            counts.append(value)
        result.names.append(name)
    for size, pairs in gathered.items():
        known, first = np.unique(np.concatenate([pair[0] for pair in pairs]), return_index=True)
        result.runs[size] = known, np.concatenate([pair[1] for pair in pairs])[first]
    return result
