"""A corpus as the base's tokenizer sees it: words that are rows of its tokens.

New pieces are learned on top of the base's tokens, not beside them. A symbol is therefore a token of the
base, spelled as in its vocabulary, or a character that the base can only spell in bytes.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

from tokenizers import Encoding, Tokenizer

SPACE: Final = "▁"
BYTES: Final[Mapping[str, int]] = MappingProxyType({f"<0x{byte:02X}>": byte for byte in range(256)})
# Above everything with a meaning for those who cut words; a million code points follow.
_FIRST: Final = 0x10000
_DOCUMENTS: Final = 64


@dataclass
class Words:
    """Counts of words, written with one code point a symbol: a trainer takes symbols for letters.

    Attributes:
        counts: word -> how often it occurs.
    """

    counts: Counter[str] = field(default_factory=Counter)
    _codes: dict[str, str] = field(default_factory=dict)
    _symbols: list[str] = field(default_factory=list)

    def add(self, word: Iterable[str]) -> None:
        """Count one word, given as symbols."""
        self.counts["".join(map(self._code, word))] += 1

    def symbols(self, coded: str) -> tuple[str, ...]:
        """Return the symbols of a word or a part of one."""
        return tuple(self._symbols[ord(code) - _FIRST] for code in coded)

    def symbol_counts(self) -> Counter[str]:
        """Return how often each symbol occurs."""
        found: Counter[str] = Counter()
        for word, count in self.counts.items():
            for symbol in self.symbols(word):
                found[symbol] += count
        return found

    def __len__(self) -> int:
        """Return the number of different symbols."""
        return len(self._symbols)

    def _code(self, symbol: str) -> str:
        if symbol not in self._codes:
            self._codes[symbol] = chr(_FIRST + len(self._symbols))
            self._symbols.append(symbol)
        return self._codes[symbol]


def count_words(tokenizer: Tokenizer, documents: Iterable[str], *, in_characters: bool) -> Words:
    """Tokenise documents and cut them where no new piece may cross.

    Args:
        tokenizer: the base's.
        documents: the corpus.
        in_characters: whether its tokens are runs of characters (SentencePiece); otherwise they are runs of
            bytes, and its own rule cuts words.
    """
    words = Words()
    closed = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    cut = _between_spaces if in_characters else _own_words
    rest = iter(documents)
    while some := list(islice(rest, _DOCUMENTS)):
        for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
            for word in cut(encoding):
                if closed.isdisjoint(word):
                    words.add(word)
    return words


def _own_words(encoding: Encoding) -> Iterator[tuple[str, ...]]:
    """Cut where the tokenizer does before it looks for tokens."""
    word: list[str] = []
    last: Any = None
    for token, number in zip(encoding.tokens, encoding.word_ids, strict=True):
        if number != last and word:
            yield tuple(word)
            word = []
        word.append(token)
        last = number
    if word:
        yield tuple(word)


def _between_spaces(encoding: Encoding) -> Iterator[tuple[str, ...]]:
    """Cut before a space, and around digits, ends of lines and the like."""
    word: list[str] = []
    for symbol in characters(encoding.tokens):
        joins = _may_join(symbol)
        if word and (symbol.startswith(SPACE) or not joins):
            yield tuple(word)
            word = []
        if joins:
            word.append(symbol)
        else:
            yield (symbol,)
    if word:
        yield tuple(word)


def characters(tokens: Iterable[str]) -> Iterator[str]:
    """Put characters back in the place of their bytes."""
    held = bytearray()
    for token in tokens:
        if token in BYTES:
            held.append(BYTES[token])
            continue
        yield from held.decode(errors="replace")
        held.clear()
        yield token
    yield from held.decode(errors="replace")


def spelled_in_bytes(character: str) -> tuple[str, ...]:
    """Return the tokens of a character's bytes."""
    return tuple(f"<0x{byte:02X}>" for byte in character.encode())


@cache
def _may_join(symbol: str) -> bool:
    """Whether a symbol is nothing but letters, punctuation and signs, with a space before them or none."""
    return all(unicodedata.category(sign)[0] in "LMPS" for sign in symbol.removeprefix(SPACE))
