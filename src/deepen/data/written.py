"""Text that a model wrote, kept as ids in a directory that opens as a corpus does."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepen.checkpoint import atomic_directory
from deepen.data.build import FORMAT_VERSION, HELDOUT, HELDOUT_SCHEMA, META
from deepen.data.pieces import write_documents


def write_written(
    target: Path, documents: Iterator[Sequence[int]], dtype: np.dtype[Any], digest: str, source: str
) -> None:
    """Write documents of ids as a corpus directory, whole or not at all.

    They are kept as they were written: one that was cut off has no end-of-text token.

    Args:
        target: the directory.
        documents: ids of each, at least one document in all.
        dtype: of the ids on disk.
        digest: of all that decides the text, see `deepen.data.corpus`.
        source: what `corpus.json` says wrote it.

    Raises:
        OutputError: the disk refuses it.
    """
    with atomic_directory(target, overwrite=target.exists()) as partial:
        rows = [np.asarray(ids, dtype=dtype) for ids in documents]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
        write_documents(partial / "tokens-000.arrow", iter([column]))
        with pa.OSFile(str(partial / HELDOUT), "wb") as kept, pa.ipc.new_stream(kept, HELDOUT_SCHEMA):
            pass
        meta = {
            "format_version": FORMAT_VERSION,
            "digest": digest,
            "source": source,
            "heldout": 0.0,
            "documents": len(rows),
            "bytes": 0,
            "heldout_documents": 0,
            "tokens": int(offsets[-1]),
            "dtype": dtype.name,
        }
        (partial / META).write_text(json.dumps(meta, indent=1))
