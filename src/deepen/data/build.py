"""Writes a corpus: documents into Arrow on disk, then tokenised batch by batch through `datasets`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepen.checkpoint import atomic_directory
from deepen.data.hub import quiet_datasets
from deepen.data.tokens import close, encode
from deepen.errors import DataError

FORMAT_VERSION = 1
META = "corpus.json"

Progress = Callable[[str, int, int | None], None]

_BATCH_BYTES = 1 << 20
_TEXTS = "texts.arrow"
_TEXT_BATCHES = pa.schema([("documents", pa.large_list(pa.large_string())), ("bytes", pa.int64())])
_HELDOUT = pa.schema([("text", pa.large_string())])


@dataclass(kw_only=True)
class _Counts:
    documents: int = 0
    bytes: int = 0
    heldout_documents: int = 0


def build_corpus(
    target: Path,
    documents: Iterator[str],
    tokenizer: Any,
    *,
    eos: int,
    dtype: np.dtype[Any],
    heldout: float,
    workers: int,
    progress: Progress | None,
    meta: dict[str, Any],
) -> None:
    """Write the directory described in `deepen.data.corpus`, whole or not at all.

    The text lies on disk a second time, inside the unfinished directory, until it is tokenised.
    """
    report = progress or (lambda stage, done, total: None)
    with atomic_directory(target, overwrite=target.exists()) as partial:
        counts = _write_texts(partial, documents, heldout, report)
        _check_sides(counts, heldout, str(meta["source"]))
        arguments = {"tokenizer": tokenizer, "eos": eos, "dtype": dtype.name}
        tokens = _tokenise(partial, arguments, workers, report)
        (partial / _TEXTS).unlink()
        meta = meta | vars(counts) | {"tokens": tokens, "dtype": dtype.name}
        (partial / META).write_text(json.dumps(meta, indent=1))


def is_heldout(document: str, share: float) -> bool:
    """Decide by the hash of the text alone."""
    digest = hashlib.blake2b(document.encode(), digest_size=8, person=b"deepen-heldout").digest()
    return int.from_bytes(digest) < share * 2**64


def _write_texts(partial: Path, documents: Iterator[str], heldout: float, report: Progress) -> _Counts:
    """Write the training documents in batches of about a megabyte, the held-out ones beside them."""
    counts = _Counts()
    batch: list[str] = []
    size = 0
    with (
        pa.OSFile(str(partial / _TEXTS), "wb") as texts,
        pa.OSFile(str(partial / "heldout.arrow"), "wb") as kept,
        pa.ipc.new_stream(texts, _TEXT_BATCHES) as training,
        pa.ipc.new_stream(kept, _HELDOUT) as held,
    ):
        for document in documents:
            if heldout and is_heldout(document, heldout):
                counts.heldout_documents += 1
                held.write_batch(pa.record_batch([[document]], schema=_HELDOUT))
                continue
            batch.append(document)
            size += len(document.encode())
            if size >= _BATCH_BYTES:
                _flush(training, batch, size, counts)
                report("read", counts.bytes, None)
                batch, size = [], 0
        if batch:
            _flush(training, batch, size, counts)
    return counts


def _flush(training: Any, batch: list[str], size: int, counts: _Counts) -> None:
    training.write_batch(pa.record_batch([[batch], [size]], schema=_TEXT_BATCHES))
    counts.documents += len(batch)
    counts.bytes += size


def _check_sides(counts: _Counts, heldout: float, source: str) -> None:
    total = counts.documents + counts.heldout_documents
    if total == 0:
        raise DataError(f"{source}: holds no text: every document is empty or white space")
    advice = "cut it into more documents (separator) or change data.heldout"
    if counts.documents == 0:
        raise DataError(f"{source}: all {total} documents fall to the held-out side at {heldout}; {advice}")
    if heldout and counts.heldout_documents == 0:
        raise DataError(
            f"{source}: none of {total} documents falls to the held-out side at {heldout}; {advice}"
        )


def _tokenise(partial: Path, arguments: dict[str, Any], workers: int, report: Progress) -> int:
    """Map batches of documents to `tokens-….arrow`; return the number of tokens."""
    import datasets

    with quiet_datasets(), _tokenizer_threads(allowed=workers == 1):
        batches = datasets.Dataset.from_file(str(partial / _TEXTS)).with_format("arrow")
        features = datasets.Features({"tokens": datasets.LargeList(datasets.Value(arguments["dtype"]))})
        sizes = np.cumsum(batches.data.column("bytes").to_numpy())
        # A hundred parts at most: each starts its processes anew, and reports when it is done.
        part = max(len(batches) // 100 + 1, 16 * workers if workers > 1 else 1)
        tokens = 0
        for number, start in enumerate(range(0, len(batches), part)):
            stop = min(start + part, len(batches))
            mapped = batches.select(range(start, stop)).map(
                _tokenise_batch,
                batched=True,
                batch_size=1,
                fn_kwargs=arguments,
                remove_columns=batches.column_names,
                features=features,
                num_proc=min(workers, stop - start) if workers > 1 else None,
                cache_file_name=str(partial / f"tokens-{number:03d}.arrow"),
                load_from_cache_file=False,
                new_fingerprint=f"deepen-{number}",
            )
            tokens += sum(len(chunk.values) for chunk in mapped.data.column("tokens").chunks)
            report("tokenise", int(sizes[stop - 1]), int(sizes[-1]))
    return tokens


def _tokenise_batch(table: pa.Table, *, tokenizer: Any, eos: int, dtype: str) -> pa.Table:
    """Turn one row of documents into one row of ids a document."""
    documents = table.column("documents")[0].as_py()
    rows = [np.asarray(close(ids, eos), dtype=dtype) for ids in encode(tokenizer, documents)]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
    return pa.table({"tokens": column})


@contextmanager
def _tokenizer_threads(*, allowed: bool) -> Iterator[None]:
    """Keep fast tokenizers from threading inside forked processes, where their thread pool can hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if not allowed:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
