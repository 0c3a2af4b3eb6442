"""How a document becomes token ids: the tokenizer's own frame, then the end-of-text token exactly once."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepen.errors import DataError


def end_of_text(tokenizer: Any) -> int:
    """Return the id of the token that ends a document.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise DataError(
            f"tokenizer {name}: has no end-of-text token to part documents with; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def encode(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    """Tokenise documents as the tokenizer frames them (BOS, prefixes); none is truncated or padded."""
    ids: list[list[int]] = tokenizer(
        list(documents),
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return ids


def decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    """Return the text of some documents' ids, special tokens left out."""
    if tokenizer.is_fast:  # past transformers' look at every id, which takes longer than to decode it
        return list(tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=True))
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True))


def close(ids: list[int], eos: int) -> list[int]:
    """End a document's ids with `eos` exactly once, whether or not the tokenizer or the text did already."""
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]


def token_dtype(tokenizer: Any) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every id of the tokenizer."""
    largest = max(max(tokenizer.get_vocab().values(), default=0), len(tokenizer) - 1)
    return np.min_scalar_type(largest)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash what decides which ids a text gets, wherever the tokenizer was loaded from.

    For a fast tokenizer its serialised pipeline (without truncation and padding, which a call sets and
    unsets); for a slow one its class, vocabulary and vocabulary files. In both the special tokens besides.
    """
    behaviour = _fast_behaviour(tokenizer) if tokenizer.is_fast else _slow_behaviour(tokenizer)
    behaviour["special"] = {
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "all": sorted(tokenizer.all_special_ids),
        "split": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    return digest_of(behaviour)


def digest_of(value: Any) -> str:
    """Hash a JSON value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _fast_behaviour(tokenizer: Any) -> dict[str, Any]:
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "pipeline": {name: part for name, part in pipeline.items() if name not in ("truncation", "padding")}
    }


def _slow_behaviour(tokenizer: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(name) for name in tokenizer.save_vocabulary(directory) or ()]
        contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab(), "files": contents}
