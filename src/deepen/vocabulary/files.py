"""The files of a tokenizer with new pieces in them; what was there keeps its id and its place.

A byte-level tokenizer and the `tokenizer.json` of a SentencePiece model are a vocabulary and a list of
merges in the order of their priority; `tokenizer.model` has a score a piece instead, and merges whatever
makes a piece. New merges come last, or have the lowest scores, so the base's tokens are found first and
exactly as before; only then are some of them joined.

`tokenizers` numbers an added token by the size of the vocabulary unless the vocabulary names it. So that
none moves, added tokens are entered there under their ids, and rows of the model without a token get an
empty name.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from deepen.checkpoint import contained, read_json
from deepen.errors import CheckpointError
from deepen.vocabulary.learn import Learned

JSON: Final = "tokenizer.json"
SENTENCEPIECE: Final = "tokenizer.model"
_VOCABULARY: Final = "vocab.json"
_MERGES: Final = "merges.txt"
_OTHERS: Final = ("*.tiktoken", "tekken.json", "vocab.txt", "spiece.model", "*.bpe.model", "*.spm", "*.vocab")


@dataclass(frozen=True, kw_only=True)
class Extension:
    """New pieces on a base's vocabulary.

    Attributes:
        old: every token of the base, added ones too, and its id.
        closed: those of them that no merge makes or takes: added ones, and bytes.
        rows: rows of the base's embeddings; the first new piece has this id.
        learned: the pieces.
        in_characters: whether tokens are runs of characters (SentencePiece); otherwise of bytes.
    """

    old: Mapping[str, int]
    closed: frozenset[str]
    rows: int
    learned: Learned
    in_characters: bool

    @cached_property
    def new(self) -> dict[str, int]:
        """The new pieces and their ids."""
        return {piece.text: self.rows + number for number, piece in enumerate(self.learned.pieces)}

    @cached_property
    def names(self) -> dict[int, str]:
        """Every row's token; rows without one have a name that no text leads to."""
        named = {number: token for token, number in (*self.old.items(), *self.new.items())}
        return {row: named.get(row, f"<unused_{row}>") for row in range(self.rows + len(self.new))}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """What becomes a new piece, in order; in SentencePiece all that could."""
        return list(self._splits()) if self.in_characters else list(self.learned.merges)

    def _splits(self) -> Iterator[tuple[str, str]]:
        known = (self.old.keys() | self.new.keys()) - self.closed
        for text in self.new:
            for cut in range(len(text) - 1, 0, -1):
                if text[:cut] in known and text[cut:] in known:
                    yield text[:cut], text[cut:]


def extended_files(directory: Path, extension: Extension) -> dict[str, bytes]:
    """Return the files of a directory that hold its tokenizer's vocabulary, with the new pieces.

    Raises:
        CheckpointError: one is malformed, of a kind that is not known, or says other than the tokenizer does.
    """
    others = [path.name for pattern in _OTHERS for path in sorted(directory.glob(pattern))]
    if others:
        raise CheckpointError(
            f"{directory / others[0]}: holds the vocabulary too, in a format that cannot be extended; "
            f"if {JSON} says all, remove it"
        )
    writers = {JSON: _json, SENTENCEPIECE: _model, _VOCABULARY: _vocabulary, _MERGES: _merges}
    present = [name for name in writers if (directory / name).exists()]
    if not {JSON, SENTENCEPIECE, _VOCABULARY} & set(present):
        raise CheckpointError(f"{directory}: has neither {JSON} nor {SENTENCEPIECE} nor {_VOCABULARY}")
    return {name: writers[name](contained(directory, name), extension) for name in present}


def _json(path: Path, extension: Extension) -> bytes:
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: its model has no vocabulary")
    merges = model.get("merges", [])
    written_as_text = bool(merges) and isinstance(merges[0], str)
    more = [f"{a} {b}" if written_as_text else [a, b] for a, b in extension.merges]
    model |= {"vocab": _filled(model["vocab"], path, extension), "merges": [*merges, *more]}
    return _dump(content, indent=2)


def _vocabulary(path: Path, extension: Extension) -> bytes:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object of tokens and ids")
    return _dump(_filled(content, path, extension), indent=None)


def _merges(path: Path, extension: Extension) -> bytes:
    held = path.read_text("utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in extension.merges)
    return (held + ("" if held.endswith("\n") else "\n") + lines).encode()


def _filled(vocabulary: Mapping[str, int], path: Path, extension: Extension) -> dict[str, int]:
    """Add every token that a vocabulary lacks."""
    for token, number in vocabulary.items():
        if extension.old.get(token) != number:
            raise _other(path, token, number, extension)
    return {**vocabulary, **{name: row for row, name in extension.names.items() if name not in vocabulary}}


def _model(path: Path, extension: Extension) -> bytes:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2 as schema

    model: Any = schema.ModelProto()  # type: ignore[attr-defined]  # generated at import
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise CheckpointError(f"{path}: not readable as a SentencePiece model; fetch it again") from None
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise CheckpointError(f"{path}: is not a BPE model, so no piece can be added without moving others")
    for number, piece in enumerate(model.pieces):
        if piece.type == piece.NORMAL and extension.old.get(piece.piece) != number:
            raise _other(path, piece.piece, number, extension)
    lowest = min(piece.score for piece in model.pieces)
    # Scores are float32: of two that round to one, the text's order would decide. (Llama 2's lowest is -1e9.)
    step = max(1.0, 4 * float(np.spacing(np.float32(abs(lowest)))))
    kinds = model.SentencePiece
    for row in range(len(model.pieces), len(extension.names)):
        new = row - extension.rows
        kind, score = (kinds.UNUSED, 0.0) if new < 0 else (kinds.NORMAL, lowest - (new + 1) * step)
        model.pieces.add(piece=extension.names[row], type=kind, score=score)
    model.trainer_spec.vocab_size = len(model.pieces)
    data: bytes = model.SerializeToString()
    return data


def _other(path: Path, token: str, number: int, extension: Extension) -> CheckpointError:
    loaded = extension.old.get(token, "none")
    return CheckpointError(
        f"{path}: token {token[:40]!r} has the id {number}; the tokenizer as transformers loads it gives "
        f"it {loaded}.\nMake the files of the tokenizer agree first"
    )


def _dump(content: Mapping[str, Any], indent: int | None) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()
