"""New pieces from a corpus: byte-pair encoding (arXiv 1508.07909) continued from where the base stopped.

A piece is worth the tokens it saves. A character that the base spells in n bytes saves n - 1 of them
wherever it stands; two neighbouring tokens that become one save one. The pieces worth most are taken.

The library's trainer counts and merges. It is given words whose letters are the base's tokens (and the
characters it lacks), so its first merges are the base's next ones. What it does not say, how often a merge
was made, is read off the words it has merged. As a merge is made no more often than its parts occur, and a
lacking character is worth more than it occurs, the pieces worth most hardly ever lack a part; one that does
is left out.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from json import loads
from typing import Any, Final

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from deepen.vocabulary.words import Words, spelled_in_bytes

LONGEST: Final = 16  # symbols in a piece, as SentencePiece's trainer has it for characters


@dataclass(frozen=True, kw_only=True)
class NewPiece:
    """One piece to add.

    Attributes:
        text: as the vocabulary spells it.
        replaces: the base's tokens in whose place it stands, in their order.
        saves: tokens of the corpus it saves, of those that better pieces leave.
    """

    text: str
    replaces: tuple[str, ...]
    saves: int


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned.

    Attributes:
        pieces: in the order of their ids; a piece stands behind those it is made of.
        merges: pairs of tokens that become one, in the order in which they are tried, after the base's own.
    """

    pieces: tuple[NewPiece, ...]
    merges: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Merge:
    """Two neighbours that were made one, each a run of symbols, and how often they were."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    count: int

    @property
    def text(self) -> str:
        return "".join(self.left + self.right)

    @property
    def pair(self) -> tuple[str, str]:
        return "".join(self.left), "".join(self.right)


def learn_pieces(words: Words, most: int, vocabulary: Collection[str], *, in_characters: bool) -> Learned:
    """Choose the pieces that save most tokens.

    Args:
        words: the corpus.
        most: how many; fewer come back if nothing else occurs twice.
        vocabulary: every token of the base.
        in_characters: whether its tokens are runs of characters; otherwise of bytes.
    """
    characters = _characters(words, vocabulary)
    merges = _merges(words, 2 * most)  # twice, as some are refused
    refused = set(vocabulary)
    if in_characters:
        refused |= _completing(vocabulary, [*characters, *(merge.text for merge in merges)])
    taken = _best(characters, merges, refused, vocabulary, most)
    made = dict.fromkeys(merge.text for merge in merges)
    return Learned(
        pieces=tuple(taken[text] for text in (*characters, *made) if text in taken),
        merges=tuple(
            merge.pair
            for merge in merges
            if merge.text in taken
            and _is_there(merge.left, taken, vocabulary)
            and _is_there(merge.right, taken, vocabulary)
        ),
    )


def _characters(words: Words, vocabulary: Collection[str]) -> dict[str, NewPiece]:
    """The characters that are spelled in bytes and occur twice, those worth most first."""
    found = []
    for symbol, count in words.symbol_counts().items():
        if symbol not in vocabulary and count > 1:
            spelled = spelled_in_bytes(symbol)
            found.append(NewPiece(text=symbol, replaces=spelled, saves=count * (len(spelled) - 1)))
    return {piece.text: piece for piece in sorted(found, key=lambda piece: -piece.saves) if piece.saves}


def _merges(words: Words, most: int) -> list[_Merge]:
    """Let the trainer merge, and say how often it made each merge."""
    trained: Any = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(words) + most, min_frequency=2, max_token_length=LONGEST, show_progress=False
    )
    trained.train_from_iterator((" ".join([word] * n) for word, n in words.counts.items()), trainer)
    made: dict[str, tuple[str, str]] = {}
    pairs = [(left, right) for left, right in loads(trained.to_str())["model"]["merges"]]
    for left, right in pairs:
        made.setdefault(left + right, (left, right))
    counts = _tokens(words, trained)
    # A piece that was merged further was made before: from the last to the first, wholes count their parts.
    for whole, parts in reversed(made.items()):
        for part in parts:
            counts[part] += counts[whole]
    return [_Merge(words.symbols(a), words.symbols(b), counts[a + b]) for a, b in pairs]


def _tokens(words: Words, trained: Tokenizer) -> Counter[str]:
    """Count the tokens of all words in a tokenizer that was trained on them."""
    counts: Counter[str] = Counter()
    for word, count in words.counts.items():
        for token in trained.model.tokenize(word):
            counts[token.value] += count
    return counts


def _completing(vocabulary: Collection[str], candidates: Iterable[str]) -> set[str]:
    """What would make an old piece together with another one.

    A SentencePiece model has no list of merges: any two neighbours whose union is a piece may become it. Such
    a new piece would let an old one appear where the base had other tokens.
    """
    found, known = set(), {*vocabulary, *candidates}
    for old in vocabulary:
        for cut in range(1, len(old)):
            left, right = old[:cut], old[cut:]
            if left in known and right in known:
                found |= {left, right}
    return found


def _best(
    characters: dict[str, NewPiece],
    merges: list[_Merge],
    refused: Collection[str],
    vocabulary: Collection[str],
    most: int,
) -> dict[str, NewPiece]:
    """Take pieces by what they save, each after its parts."""
    ranked: list[tuple[NewPiece, tuple[tuple[str, ...], ...]]] = [(c, ()) for c in characters.values()]
    for merge in merges:
        replaces = _tokens_of(merge.left + merge.right, vocabulary)
        new = NewPiece(text=merge.text, replaces=replaces, saves=merge.count)
        ranked.append((new, (merge.left, merge.right)))
    taken: dict[str, NewPiece] = {}
    for piece, parts in sorted(ranked, key=lambda each: -each[0].saves):
        if len(taken) == most:
            break
        if piece.text not in refused and all(_is_there(part, taken, vocabulary) for part in parts):
            taken.setdefault(piece.text, piece)
    return taken


def _is_there(part: tuple[str, ...], taken: Collection[str], vocabulary: Collection[str]) -> bool:
    """Whether a run of symbols is a token: a run that merely reads like an old piece is not that piece."""
    return "".join(part) in taken or (len(part) == 1 and part[0] in vocabulary)


def _tokens_of(symbols: tuple[str, ...], vocabulary: Collection[str]) -> tuple[str, ...]:
    spelled: Iterator[tuple[str, ...]] = (
        (symbol,) if symbol in vocabulary else spelled_in_bytes(symbol) for symbol in symbols
    )
    return tuple(token for tokens in spelled for token in tokens)
