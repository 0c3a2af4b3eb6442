"""A Hugging Face tokenizer in llama.cpp's terms, or a refusal where they cannot be made to agree.

llama.cpp has two algorithms that matter here. `llama` merges the neighbours whose union is the piece of
highest score (SentencePiece's own); `gpt2` merges by rank, after cutting the text by a pattern which it knows
by name only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf import GGUFWriter, TokenType

from deepen.errors import CheckpointError, in_a_line

_GPT2: Final = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # tokenizers' ByteLevel
)
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level tokenizer cuts text -> llama.cpp's name of that.
_CUTS: Final[Mapping[tuple[str, ...], str]] = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "starcoder",
    (_WORDS.replace("DIGITS", r"\p{N}{1,3}"),): "llama-bpe",
    (_WORDS.replace("DIGITS", r"\p{N}"),): "qwen2",
}
_BYTE: Final = frozenset(f"<0x{value:02X}>" for value in range(256))


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """What llama.cpp is told of every id."""

    model: str
    texts: list[str]
    scores: list[float]
    types: list[int]


def add_tokenizer(writer: GGUFWriter, directory: Path, rows: int) -> None:
    """Write a checkpoint's tokenizer.

    Args:
        writer: of the file.
        directory: of the checkpoint.
        rows: rows of its embeddings; ids beyond the tokenizer's are marked as unused.

    Raises:
        CheckpointError: it has none, or llama.cpp would cut text in another way.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises whatever the tokenizer's own files lead it to
        reason = in_a_line(error)
        raise CheckpointError(f"{directory}: has no tokenizer that can be read ({reason})") from None
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unknown(directory, f"its model is {model.get('type')}, not BPE")
    if model.get("byte_fallback"):
        pieces = _scored(content, directory, rows)
    else:
        pieces = _ranked(content, rows)
        writer.add_tokenizer_pre(_cut_name(content, directory))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    writer.add_tokenizer_model(pieces.model)
    writer.add_token_list(pieces.texts)
    writer.add_token_scores(pieces.scores)
    writer.add_token_types(pieces.types)
    _add_specials(writer, tokenizer, rows)


def _add_specials(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < rows:
            add(number)
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    writer.add_add_bos_token(len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _scored(content: Mapping[str, Any], directory: Path, rows: int) -> _Pieces:
    """Pieces whose score is the rank of the merge that makes them: the best merge is the first."""
    model = content["model"]
    merges = _merges(model)
    _check_merges(model["vocab"], set(merges), directory)
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    texts, types = _listed(content, rows)
    scores = [float(-rank[text]) if text in rank else -1e9 for text in texts]
    return _Pieces(model="llama", texts=texts, scores=scores, types=types)


def _ranked(content: Mapping[str, Any], rows: int) -> _Pieces:
    texts, types = _listed(content, rows)
    return _Pieces(model="gpt2", texts=texts, scores=[0.0] * len(texts), types=types)


def _listed(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return text and type of every id, of `rows` ids at least as many as the tokenizer has."""
    texts = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, number in content["model"]["vocab"].items():
        if number < rows:
            texts[number] = text
            types[number] = TokenType.BYTE if text in _BYTE else TokenType.NORMAL
    for added in content["added_tokens"]:
        if added["id"] < rows:
            texts[added["id"]] = added["content"]
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = content["model"].get("unk_token")
    if unknown in content["model"]["vocab"]:
        types[content["model"]["vocab"][unknown]] = TokenType.UNKNOWN
    return texts, [int(kind) for kind in types]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]  # type: ignore[misc]


def _check_merges(vocabulary: Mapping[str, int], merges: set[tuple[str, str]], directory: Path) -> None:
    """Refuse merges that are fewer than the pieces allow: llama.cpp joins whatever makes a piece."""
    for text in vocabulary:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in merges and text not in _BYTE:
                raise _unknown(directory, f"{text!r} is a piece, but {pair} do not merge into it")


def _cut_name(content: Mapping[str, Any], directory: Path) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer cuts text before merging."""
    cut = content["pre_tokenizer"] or {}
    patterns: list[str] = []
    for step in cut.get("pretokenizers", [cut]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                patterns.append(_GPT2)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                pass
            case {"type": "Digits", "individual_digits": True}:
                patterns.append("digits")
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
                patterns.append(pattern)
            case _:
                raise _unknown(directory, f"its pre-tokenizer {json.dumps(step)[:120]}")
    if tuple(patterns) not in _CUTS:
        raise _unknown(directory, f"its pattern {patterns[-1][:120] if patterns else '(none)'}")
    return _CUTS[tuple(patterns)]


def _unknown(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{directory}: llama.cpp would not cut text as this tokenizer does ({what});\n"
        "if its own converter knows the tokenizer, use that: --converter convert_hf_to_gguf.py"
    )
