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
HELDOUT = "heldout.arrow"
HELDOUT_SCHEMA = pa.schema([("text", pa.large_string())])


Unit = tuple[int, list[str]]


@dataclass(kw_only=True)
class _Counts:
    documents: int = 0
    bytes: int = 0
    heldout_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class Making:
    """How text becomes a corpus.

    Attributes:
        tokenizer: a transformers tokenizer.
        eos: the token that ends a document.
        dtype: of the ids on disk.
        heldout: share of the documents kept out.
        workers: processes that tokenise.
        progress: told how far it is.
    """

    tokenizer: Any
    eos: int
    dtype: np.dtype[Any]
    heldout: float
    workers: int
    progress: Progress | None


def cut_units(documents: Iterator[str]) -> Iterator[list[str]]:
    """Cut a run of documents into runs of about a megabyte, always at the same places."""
    unit: list[str] = []
    size = 0
    for document in documents:
        unit.append(document)
        size += len(document.encode())
        if size >= _BATCH_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def build_corpus(
    target: Path, units: Iterator[Unit], making: Making, meta: dict[str, Any], *, piece: bool = False
) -> None:
    """Write the directory described in `deepen.data.corpus`, whole or not at all.

    The text lies on disk a second time, inside the unfinished directory, until it is tokenised.

    Args:
        target: the directory; an unfinished one there is replaced.
        units: numbered runs of documents (see `cut_units`).
        making: how.
        meta: what `corpus.json` says besides the counts.
        piece: it is one piece of a corpus: it may be empty, and the numbers of its units are kept.
    """
    report = making.progress or (lambda stage, done, total: None)
    with atomic_directory(target, overwrite=target.exists()) as partial:
        counts, written = _write_texts(partial, units, making.heldout, report)
        if not piece:
            check_sides(counts.documents, counts.heldout_documents, making.heldout, str(meta["source"]))
        tokens = _tokenise(partial, making, report) if counts.documents else 0
        (partial / _TEXTS).unlink()
        meta = meta | vars(counts) | {"tokens": tokens, "dtype": making.dtype.name}
        if piece:
            meta["units"] = written
        (partial / META).write_text(json.dumps(meta, indent=None if piece else 1))


def is_heldout(document: str, share: float) -> bool:
    """Decide by the hash of the text alone."""
    digest = hashlib.blake2b(document.encode(), digest_size=8, person=b"deepen-heldout").digest()
    return int.from_bytes(digest) < share * 2**64


def _write_texts(
    partial: Path, units: Iterator[Unit], heldout: float, report: Progress
) -> tuple[_Counts, list[list[int]]]:
    """Write the training documents, a batch a unit, and the held-out ones beside them.

    Returns:
        The counts in all, and of each unit its number, training documents and held-out ones.
    """
    counts, written = _Counts(), []
    with (
        pa.OSFile(str(partial / _TEXTS), "wb") as texts,
        pa.OSFile(str(partial / HELDOUT), "wb") as kept,
        pa.ipc.new_stream(texts, _TEXT_BATCHES) as training,
        pa.ipc.new_stream(kept, HELDOUT_SCHEMA) as held,
    ):
        for number, documents in units:
            trained: list[str] = []
            for document in documents:
                if heldout and is_heldout(document, heldout):
                    held.write_batch(pa.record_batch([[document]], schema=HELDOUT_SCHEMA))
                else:
                    trained.append(document)
            if trained:
                size = sum(len(document.encode()) for document in trained)
                training.write_batch(pa.record_batch([[trained], [size]], schema=_TEXT_BATCHES))
                counts.bytes += size
            counts.documents += len(trained)
            counts.heldout_documents += len(documents) - len(trained)
            written.append([number, len(trained), len(documents) - len(trained)])
            report("read", counts.bytes, None)
    return counts, written


def check_sides(
    documents: int,
    heldout_documents: int,
    heldout: float,
    source: str,
    advice: str = "cut it into more documents (separator) or change data.heldout",
) -> None:
    """Refuse a corpus without text, or with nothing on one side of the split.

    Raises:
        DataError: it is so.
    """
    total = documents + heldout_documents
    if total == 0:
        raise DataError(f"{source}: holds no text: every document is empty or white space")
    if documents == 0:
        raise DataError(f"{source}: all {total} documents fall to the held-out side at {heldout}; {advice}")
    if heldout and heldout_documents == 0:
        raise DataError(
            f"{source}: none of {total} documents falls to the held-out side at {heldout}; {advice}"
        )


def _tokenise(partial: Path, making: Making, report: Progress) -> int:
    """Map batches of documents to `tokens-….arrow`; return the number of tokens."""
    import datasets

    workers = making.workers
    arguments = {"tokenizer": making.tokenizer, "eos": making.eos, "dtype": making.dtype.name}
    with quiet_datasets(), tokenizer_threads(allowed=workers == 1):
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
def tokenizer_threads(*, allowed: bool) -> Iterator[None]:
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
