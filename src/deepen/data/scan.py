"""One pass over a corpus: what each document shares with evaluation texts, and its MinHash signature."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepen.data.build import tokenizer_threads
from deepen.data.corpus import Corpus
from deepen.data.duplicates import ENTRIES, Signatures, signature
from deepen.data.hub import quiet_datasets
from deepen.data.tokens import decode
from deepen.data.words import EvaluationRuns, WordNumbers, split_words

FORMAT_VERSION: Final = 1

_DOCUMENTS_AT_ONCE: Final = 64
_DOCUMENTS_A_PART: Final = 8192


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a pass found; the arrays have one entry a document.

    Attributes:
        words: number of words.
        bytes: UTF-8 bytes, decoded.
        shared: places at which a run of an evaluation text begins.
        text: number of the evaluation text of the first of them, or -1.
        example: document -> the first shared run, of the documents that have one.
    """

    words: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    shared: npt.NDArray[np.int64]
    text: npt.NDArray[np.int64]
    example: dict[int, str]


def open_signatures(path: Path, documents: int) -> Signatures:
    """Create a file of signatures and map it: [documents, ENTRIES]."""
    shape = (documents, ENTRIES)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=shape)


def scan_documents(
    corpus: Corpus,
    tokenizer: Any,
    runs: EvaluationRuns | None,
    *,
    folder: Path,
    signatures: Signatures | None,
    workers: int,
    progress: Callable[[int], None],
) -> Scan:
    """Decode every document of a corpus and look at its words.

    Args:
        corpus: what to read.
        tokenizer: decodes it.
        runs: what to look for, if anything.
        folder: existing, for what is passed between processes.
        signatures: filled, if given: [documents, ENTRIES].
        workers: processes.
        progress: told the tokens done.
    """
    import datasets

    found: dict[str, list[Any]] = {name: [] for name in ("words", "bytes", "shared", "text")}
    example: dict[int, str] = {}
    arguments = {"tokenizer": tokenizer, "runs": runs, "signatures": signatures is not None}
    with quiet_datasets(), tokenizer_threads(allowed=workers == 1):
        files = sorted(corpus.directory.glob("tokens-*.arrow"))
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])
        rows = rows.with_format("arrow")
        for begin in range(0, corpus.documents, _DOCUMENTS_A_PART):
            end = min(begin + _DOCUMENTS_A_PART, corpus.documents)
            batches = -(-(end - begin) // _DOCUMENTS_AT_ONCE)
            part = rows.select(range(begin, end)).map(
                _scan_batch,
                batched=True,
                batch_size=_DOCUMENTS_AT_ONCE,
                fn_kwargs=arguments,
                remove_columns=["tokens"],
                num_proc=min(workers, batches) if workers > 1 else None,
                cache_file_name=str(folder / f"scan-{begin}.arrow"),
                load_from_cache_file=False,
                new_fingerprint=f"deepen-{begin}",
            )
            table = part.data.table
            for name, parts in found.items():
                parts.append(table.column(name).to_numpy())
            for place in np.flatnonzero(found["shared"][-1]).tolist():
                example[begin + place] = table.column("example")[place].as_py()
            if signatures is not None:
                drawn = [chunk.flatten().to_numpy() for chunk in table.column("signature").chunks]
                signatures[begin:end] = np.concatenate(drawn).reshape(-1, ENTRIES)
            progress(int(corpus.document_ends[end - 1]))
    return Scan(**{name: np.concatenate(parts) for name, parts in found.items()}, example=example)


_number = WordNumbers()
_NOTHING = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0)


def _scan_batch(
    table: pa.Table, *, tokenizer: Any, runs: EvaluationRuns | None, signatures: bool
) -> pa.Table:
    """Turn a batch of documents into a row of findings each."""
    ids = table.column("tokens").to_pylist()
    words, sizes, shared, texts, examples, drawn = [], [], [], [], [], []
    for document in decode(tokenizer, ids):
        written = split_words(document)
        numbers = _number(written)
        words.append(len(written))
        sizes.append(len(document.encode()))
        places, of, length = runs.find(numbers) if runs else _NOTHING
        shared.append(len(np.unique(places)))
        texts.append(int(of[0]) if len(of) else -1)
        examples.append(" ".join(written[places[0] : places[0] + length]) if len(places) else "")
        if signatures:
            drawn.append(signature(numbers))
    columns = {
        "words": pa.array(words, pa.int64()),
        "bytes": pa.array(sizes, pa.int64()),
        "shared": pa.array(shared, pa.int64()),
        "text": pa.array(texts, pa.int64()),
        "example": pa.array(examples, pa.large_string()),
    }
    if signatures:
        values = pa.array(np.concatenate(drawn))
        offsets = pa.array(np.arange(len(drawn) + 1, dtype=np.int64) * ENTRIES)
        columns["signature"] = pa.LargeListArray.from_arrays(offsets, values)
    return pa.table(columns)
