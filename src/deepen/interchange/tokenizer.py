"""llama2.c's `tokenizer.bin` and SentencePiece's `tokenizer.model` as a Hugging Face `tokenizer.json`.

Both merge, again and again, the neighbouring pair whose union is the token of the highest score, the
leftmost first among equals; a character that is no token becomes its UTF-8 bytes. `tokenizer.json` has no
scores: it holds the pairs in the order of their priority. The two say the same where no two tokens that can
be merged have equal scores, or where such tokens repeat one character (Llama 2's runs of spaces): then the
longer left half goes first, and a run is cut from the left in both. Other ties are refused.

As everywhere in Hugging Face's Llama, `<s>` and its like written out in a text are taken for the token.
"""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepen.errors import CheckpointError
from deepen.interchange.files import open_regular, read_at

_LARGEST: Final = 16 << 20  # bytes; Gemma's 256,000 tokens are 4 MB
_LONGEST: Final = 1024  # characters; SentencePiece's default is 16
_SPACE: Final = "▁"
_SPECIAL: Final = ("<unk>", "<s>", "</s>")
_BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
_RESERVED: Final = _SPECIAL + _BYTES


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer as files of a Hugging Face directory.

    Attributes:
        vocab_size: number of tokens.
        contents: file name -> content.
        warnings: what the user should know.
    """

    vocab_size: int
    contents: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id, with `▁` for a space, and their scores; ids 0 to 258 are `_RESERVED`.

    `collapse`: runs of spaces count as one, and none stand at the ends of a text.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    collapse: bool = False


def read_tokenizer(path: Path, *, context: int) -> TokenizerFiles:
    """Read a tokenizer and write it anew; a SentencePiece model is also kept as it is.

    A SentencePiece model that `tokenizer.json` cannot hold exactly goes without one, with a warning.

    Args:
        path: a `tokenizer.bin` or a `tokenizer.model`.
        context: the model's longest context in tokens.

    Raises:
        CheckpointError: neither of the two, malformed, or a `tokenizer.bin` with tokens that are tied.
    """
    with open_regular(path) as (descriptor, size):
        if size > _LARGEST:
            raise CheckpointError(f"{path}: {size} bytes long, too long for a tokenizer")
        data = read_at(descriptor, size, 0, path)
    # A number below 65536 in four bytes; in a SentencePiece model these two bytes begin its first token.
    if data[2:4] == b"\0\0":
        return _from_bin(data, path, context)
    if data.startswith(b"\n"):
        return _from_sentencepiece(data, path, context)
    raise CheckpointError(
        f"{path}: neither llama2.c's tokenizer.bin nor a SentencePiece tokenizer.model; name one of these"
    )


def _from_bin(data: bytes, path: Path, context: int) -> TokenizerFiles:
    vocabulary = _parse_bin(data, path)
    if fault := _fault(vocabulary):
        raise CheckpointError(f"{path}: {fault}; give the SentencePiece tokenizer.model instead")
    contents = {"tokenizer.json": _tokenizer_json(vocabulary), "tokenizer_config.json": _config(context)}
    return TokenizerFiles(vocab_size=len(vocabulary.tokens), contents=contents)


def _parse_bin(data: bytes, path: Path) -> _Vocabulary:
    """Read `max_token_length`, then score (float32), length (int32) and UTF-8 bytes of every token."""
    longest, offset = int.from_bytes(data[:4], "little"), 4
    tokens: list[str] = []
    scores: list[float] = []
    while offset < len(data):
        place = f"{path}: token {len(tokens)}"
        if offset + 8 > len(data):
            raise CheckpointError(f"{place}: the file ends inside it; fetch it again")
        score, length = struct.unpack_from("<fi", data, offset)
        if not 0 < length <= longest:
            raise CheckpointError(f"{place}: states {length} bytes; the longest token has {longest}")
        text = data[offset + 8 : offset + 8 + length]
        if len(text) != length:
            raise CheckpointError(f"{place}: the file ends inside it; fetch it again")
        try:
            tokens.append(text.decode().replace(" ", _SPACE))
        except UnicodeDecodeError:
            raise CheckpointError(f"{place}: {text[:40]!r} is not UTF-8") from None
        scores.append(score)
        offset += 8 + length
    # llama2.c writes them as text that marks the ends of a story; they never come from merging.
    tokens[:3] = [token.strip("\n") for token in tokens[:3]]
    return _Vocabulary(tokens, scores)


def _from_sentencepiece(data: bytes, path: Path, context: int) -> TokenizerFiles:
    vocabulary, fault = _parse_sentencepiece(data, path)
    fault = fault or _fault(vocabulary)
    if fault is None:
        contents = {"tokenizer.json": _tokenizer_json(vocabulary), "tokenizer_config.json": _config(context)}
        warnings: tuple[str, ...] = ()
    else:
        contents = {"tokenizer_config.json": _config(context, "LlamaTokenizer")}
        said = f"{path}: no tokenizer.json is written, it would not be exact ({fault}); "
        warnings = (said + "transformers converts tokenizer.model itself and may cut text differently",)
    contents = {"tokenizer.model": data, **contents}
    return TokenizerFiles(vocab_size=len(vocabulary.tokens), contents=contents, warnings=warnings)


def _parse_sentencepiece(data: bytes, path: Path) -> tuple[_Vocabulary, str | None]:
    """Return the vocabulary and, if tokenizer.json cannot follow this model, the reason."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2 as schema

    model: Any = schema.ModelProto()  # type: ignore[attr-defined]  # generated at import
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise CheckpointError(f"{path}: not readable as a SentencePiece model; fetch it again") from None
    normal, trainer, kind = model.normalizer_spec, model.trainer_spec, model.SentencePiece
    others = {piece.type for piece in model.pieces[len(_RESERVED) :]} - {kind.NORMAL}
    faults = {
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it normalises text": bool(normal.precompiled_charsmap) or bool(model.denormalizer_spec.ByteSize()),
        "it does not put a space first": not normal.add_dummy_prefix or trainer.treat_whitespace_as_suffix,
        "it leaves spaces as they are": not normal.escape_whitespaces,
        "it has tokens of its user's or unused ones": bool(others),
    }
    vocabulary = _Vocabulary(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        normal.remove_extra_whitespaces,
    )
    return vocabulary, next((reason for reason, present in faults.items() if present), None)


def _fault(vocabulary: _Vocabulary) -> str | None:
    """Say why a `tokenizer.json` would not be exact."""
    tokens = vocabulary.tokens
    for index, expected in enumerate(_RESERVED):
        if index >= len(tokens) or tokens[index] != expected:
            found = repr(tokens[index][:40]) if index < len(tokens) else "missing"
            return f"token {index} is {found}, not {expected!r}"
    seen: set[str] = set()
    for index, (token, score) in enumerate(zip(tokens, vocabulary.scores, strict=True)):
        if token in seen:
            return f"token {index} repeats {token[:40]!r}"
        if not math.isfinite(score):
            return f"token {index} has the score {score}"
        if len(token) > _LONGEST:
            return f"token {index} has {len(token)} characters"
        seen.add(token)
    if tied := _tied(vocabulary):
        return f"the tokens {tied[0][:40]!r} and {tied[1][:40]!r} have equal scores"
    return None


def _tied(vocabulary: _Vocabulary) -> tuple[str, str] | None:
    """Return two tokens of equal score whose order of merging is the order of the text."""
    groups: dict[float, set[str]] = defaultdict(set)
    for left, right, score in _pairs(vocabulary):
        groups[score].add(left + right)
    for group in groups.values():
        if len(group) > 1 and len(set().union(*group)) > 1:
            first, second, *_ = sorted(group)
            return first, second
    return None


def _pairs(vocabulary: _Vocabulary) -> Iterator[tuple[str, str, float]]:
    """Give every (left, right, score of their union) where all three are tokens that merging can reach."""
    scores = dict(list(zip(vocabulary.tokens, vocabulary.scores, strict=True))[len(_RESERVED) :])
    for token, score in scores.items():
        for cut in range(1, len(token)):
            if token[:cut] in scores and token[cut:] in scores:
                yield token[:cut], token[cut:], score


def _merges(vocabulary: _Vocabulary) -> list[list[str]]:
    ranked = sorted(_pairs(vocabulary), key=lambda pair: (-pair[2], -len(pair[0]), -len(pair[1])))
    return [[left, right] for left, right, _ in ranked]


def _tokenizer_json(vocabulary: _Vocabulary) -> bytes:
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token) for index, token in enumerate(_SPECIAL)],
        "normalizer": _normalizer(vocabulary.collapse),
        "pre_tokenizer": None,
        "post_processor": _POST_PROCESSOR,
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": _merges(vocabulary),
        },
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _added(index: int, token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": token, **flags}


def _normalizer(collapse: bool) -> dict[str, Any]:
    # \A and \z are the text's ends; ^ and $ would be every line's.
    replaced = [({"Regex": r"\A +| +\z"}, ""), ({"Regex": " {2,}"}, " ")] if collapse else []
    before = [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in replaced]
    prepend = {"type": "Prepend", "prepend": _SPACE}
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return {"type": "Sequence", "normalizers": [*before, prepend, escape]}


_BOS: Final = {"SpecialToken": {"id": "<s>", "type_id": 0}}
_POST_PROCESSOR: Final = {
    "type": "TemplateProcessing",
    "single": [_BOS, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [_BOS, {"Sequence": {"id": "A", "type_id": 0}}, _BOS, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
_DECODER: Final = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def _config(context: int, tokenizer_class: str = "PreTrainedTokenizerFast") -> bytes:
    content = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(content, indent=2) + "\n").encode()
