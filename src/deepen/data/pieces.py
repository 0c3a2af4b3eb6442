"""A corpus made in pieces, by processes that share nothing but the cache directory.

::

    CACHE/pieces/KEY-n/i/     piece i of n: a corpus directory whose `corpus.json` also lists its `units`

A unit is a run of about a megabyte of documents with a number that does not depend on who reads it: the part
of the source and the place in it. A part no larger than a piece's share belongs to one piece and is not read
by the others; of a larger one (a single huge file, say) every piece reads all and tokenises every n-th unit.
Joined in the order of their numbers, the units are the stream of the whole.
"""

import heapq
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepen.checkpoint import atomic_directory
from deepen.data.build import HELDOUT, HELDOUT_SCHEMA, META, Unit, check_sides, cut_units
from deepen.data.sources import Part
from deepen.errors import DataError, RecipeError

_UNITS_IN_A_PART = 1 << 32
_BATCH_TOKENS = 1 << 22


@dataclass(frozen=True)
class Piece:
    """One piece of several.

    Attributes:
        number: from 1.
        count: of all pieces.
    """

    number: int
    count: int


def parse_piece(text: str) -> Piece:
    """Read `i/n`, counted from 1/n to n/n.

    Raises:
        RecipeError: it is not of that form.
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise RecipeError(f"--shard {text}: not a piece of several; pieces are counted 1/n to n/n, as in 1/4")
    return Piece(int(found[1]), int(found[2]))


def take(piece: Piece, parts: Sequence[Part]) -> Iterator[Unit]:
    """Read the units of one piece; parts that are another's are not opened."""
    owners = _owners([part.size for part in parts], piece.count)
    for number, (part, owner) in enumerate(zip(parts, owners, strict=True)):
        if owner not in (None, piece.number):
            continue
        for index, documents in enumerate(cut_units(part.read())):
            if owner is not None or index % piece.count == piece.number - 1:
                yield number * _UNITS_IN_A_PART + index, documents


def _owners(sizes: Sequence[int], count: int) -> list[int | None]:
    """Deal the parts out, the largest first, each to the piece that has least; None: dealt out by units."""
    share = sum(sizes) / count
    owners: list[int | None] = [None] * len(sizes)
    loads = [(0, number) for number in range(1, count + 1)]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        if count > 1 and sizes[index] > share:
            continue
        load, owner = heapq.heappop(loads)
        owners[index] = owner
        heapq.heappush(loads, (load + sizes[index], owner))
    return owners


def join_pieces(folder: Path, count: int, target: Path, meta: dict[str, Any]) -> None:
    """Write the corpus of which all pieces lie in `folder`, whole or not at all; its memory is one batch.

    Raises:
        DataError: a piece is damaged, or all that they hold is on one side of the split.
        OutputError: the target cannot be written, or exists by now.
    """
    pieces = [folder / str(number + 1) for number in range(count)]
    metas = [_read_piece(piece) for piece in pieces]
    sums = {
        key: sum(each[key] for each in metas) for key in ("documents", "bytes", "heldout_documents", "tokens")
    }
    check_sides(sums["documents"], sums["heldout_documents"], meta["heldout"], meta["source"])
    order = sorted((*unit, piece) for piece, each in enumerate(metas) for unit in each["units"])
    with atomic_directory(target, overwrite=target.exists()) as partial:
        tables = [_documents(piece) for piece in pieces]
        write_documents(partial / "tokens-000.arrow", _in_order(tables, [(p, n) for _, n, _, p in order]))
        held = [_heldout(piece) for piece in pieces]
        with pa.OSFile(str(partial / HELDOUT), "wb") as file, pa.ipc.new_stream(file, HELDOUT_SCHEMA) as out:
            for texts in _in_order(held, [(p, n) for _, _, n, p in order]):
                out.write_batch(pa.record_batch([texts], schema=HELDOUT_SCHEMA))
        whole = meta | sums | {"dtype": metas[0]["dtype"]}
        (partial / META).write_text(json.dumps(whole, indent=1))


def remove_pieces(folder: Path) -> None:
    """Remove pieces whose whole is there; another process may be doing the same."""
    shutil.rmtree(folder, ignore_errors=True)


def map_documents(directory: Path) -> Iterator[Any]:
    """Map the documents of a corpus: Arrow lists of ids, one a record batch; nothing is read yet."""
    for path in sorted(directory.glob("tokens-*.arrow")):
        with pa.memory_map(str(path)) as source:
            yield from pa.ipc.open_stream(source).read_all().column("tokens").chunks


def write_documents(path: Path, documents: Iterator[Any]) -> None:
    """Write Arrow lists of ids, of which there is at least one, as one file of large record batches."""
    first = next(documents)
    schema = pa.schema([("tokens", first.type)])
    waiting, tokens = [first], len(first.flatten())
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as out:
        for chunk in documents:
            waiting.append(chunk)
            tokens += len(chunk.flatten())
            if tokens >= _BATCH_TOKENS:
                out.write_batch(pa.record_batch([pa.concat_arrays(waiting)], schema=schema))
                waiting, tokens = [], 0
        if waiting:
            out.write_batch(pa.record_batch([pa.concat_arrays(waiting)], schema=schema))


def _in_order(columns: list[Any], counts: list[tuple[int, int]]) -> Iterator[Any]:
    """Take the next rows of one column after another, as Arrow arrays."""
    taken = [0] * len(columns)
    for column, rows in counts:
        if rows:
            yield from columns[column].slice(taken[column], rows).chunks
            taken[column] += rows


def _documents(piece: Path) -> Any:
    chunks = list(map_documents(piece))
    return pa.chunked_array(chunks, type=chunks[0].type if chunks else pa.null())


def _heldout(piece: Path) -> Any:
    with pa.memory_map(str(piece / HELDOUT)) as source:
        return pa.ipc.open_stream(source).read_all().column("text")


def _read_piece(piece: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((piece / META).read_bytes()))
    except (OSError, ValueError) as error:
        raise DataError(f"{piece}: cannot be read: {error}; remove it and make it again") from error
