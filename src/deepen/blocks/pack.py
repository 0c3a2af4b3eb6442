"""A block pack: the new blocks alone (`blocks.safetensors`) and the record of them (`expansion.json`)."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from deepen.blocks.hub import resolve_pack
from deepen.checkpoint import (
    Shard,
    Tensor,
    atomic_directory,
    byte_count,
    contained,
    fast_fingerprint,
    read_shard,
)
from deepen.errors import PackError
from deepen.expansion import (
    MANIFEST_NAME,
    ROWS_PREFIX,
    Base,
    Copy,
    Expansion,
    Layout,
    NewBlockRecord,
    PlannedTensor,
    Run,
    count_parameters,
    expanded_tensors,
    find_tables,
    held_tensor,
    open_base,
    read_expansion,
)
from deepen.families import Family, family_named

BLOCKS_NAME: Final = "blocks.safetensors"


@dataclass(frozen=True)
class Pack:
    """A block pack as it lies on disk; opening it reads headers only.

    Attributes:
        directory: the pack.
        expansion: the content of its `expansion.json`.
        shard: its `blocks.safetensors`.
    """

    directory: Path
    expansion: Expansion
    shard: Shard

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return count_parameters(self.shard.tensors)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of its tensors, each once."""
        return tuple(sorted({tensor.dtype for tensor in self.shard.tensors}))

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names of its tensors that are last rows of the base's tables, not parts of blocks."""
        rows = self.expansion.new_rows
        return tuple(ROWS_PREFIX + table for table in rows.tables) if rows else ()

    def check_names(self) -> None:
        """Refuse a pack whose tensors are not its new blocks', as far as can be said without its base.

        Raises:
            PackError: a tensor is in no new block, or a block has none.
        """
        prefixes = {
            block.index: block_prefix(block, self.directory) for block in self.expansion.latest_blocks
        }
        names = [tensor.name for tensor in self.shard.tensors]
        rows = self.row_names
        for name in names:
            if name not in rows and not name.startswith(tuple(prefixes.values())):
                raise PackError(
                    f"{self.shard.path}: tensor {name!r} belongs to no new block of {MANIFEST_NAME}"
                )
        for index, prefix in prefixes.items():
            if not any(name.startswith(prefix) for name in names):
                raise PackError(f"{self.shard.path}: has no tensor of new block {index}")


def block_prefix(block: NewBlockRecord, where: Path) -> str:
    """Return what the names of a new block's tensors begin with, by its record: `model.layers.4.`.

    Raises:
        PackError: the record names no tensor of the block.
    """
    number = f".{block.index}."
    for name in block.filled:
        head, found, _ = name.partition(number)
        if found:
            return head + number
    raise PackError(f"{where / MANIFEST_NAME}: new block {block.index}: filled names none of its tensors")


def pack_family(pack: Pack) -> Family:
    """Return the family, in the dialect of the pack's names: a pack has no config to ask."""
    first = pack.expansion.latest_blocks[0]
    where = f"{pack.directory / MANIFEST_NAME}: family"
    layers = block_prefix(first, pack.directory).removesuffix(f".{first.index}.")
    return replace(family_named(pack.expansion.family, where), layers=layers)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A pack was held to a base and fits.

    Attributes:
        base: the base's directory.
        pack: the pack's.
        layout: where the new blocks stand.
        fingerprint: the base's, which the pack names (fast).
        tensors: number of tensors compared by name, shape and dtype.
        parameters: number of their elements.
        dtypes: their dtypes.
    """

    base: Path
    pack: Path
    layout: Layout
    fingerprint: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]


def open_pack(pack: str | Path) -> Pack:
    """Open a block pack; what the hub has is downloaded, or found in its cache.

    Args:
        pack: a directory or a hub id such as `someone/law-blocks`.

    Raises:
        PackError: there is no `blocks.safetensors`.
        CheckpointError: one of its two files is malformed.
    """
    directory = resolve_pack(pack)
    if not os.path.lexists(directory / BLOCKS_NAME):
        inside = directory / "blocks"
        hint = f"; that of this run is {inside}" if os.path.lexists(inside / BLOCKS_NAME) else ""
        raise PackError(f"{directory}: has no {BLOCKS_NAME}; this is not a block pack{hint}")
    return Pack(directory, read_expansion(directory), read_shard(contained(directory, BLOCKS_NAME)))


def copy_pack(pack: Path, target: Path) -> Path:
    """Copy a block pack, whole or not at all, over what lies there; return `target`.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_directory(target, overwrite=True, inside=(pack,)) as staged:
        for name in (BLOCKS_NAME, MANIFEST_NAME):
            shutil.copyfile(pack / name, staged / name)
    return target


def check_pack(pack: Pack, base: Base) -> None:
    """Refuse a pack that was not made for this base; reads headers and the base's fingerprint only.

    Precision is not looked at: in memory a pack is converted. `fit_pack` does.

    Raises:
        PackError: it belongs to another base, or its tensors are not those of its new blocks.
    """
    _check_base(pack, base)
    path, new = pack.shard.path, pack.expansion.layout.new_indices
    held = {tensor.name: tensor for tensor in pack.shard.tensors}
    needed = {t.name: t for t in expanded_tensors(base, pack.expansion.layout) if t.block in new}
    needed |= {tensor.name: tensor for tensor in _planned_rows(pack, base)}
    if unused := held.keys() - needed.keys():
        raise PackError(f"{path}: tensor {min(unused)!r} belongs to no new block of {MANIFEST_NAME}")
    for name, planned in needed.items():
        place = base.family.split(name)
        if name not in held and not (place and base.family.is_buffer(place[1])):
            raise PackError(f"{path}: tensor {name!r} is missing")
        if name in held and held[name].shape != planned.shape:
            raise _misfit(planned, held[name])


def fit_pack(base: str | Path, pack: str | Path) -> Fit:
    """Hold a pack to a base and write nothing: family, depth, fingerprint, every tensor's shape and dtype.

    Args:
        base: the base's directory.
        pack: directory or hub id of the pack.

    Raises:
        PackError: it does not fit; says why.
        CheckpointError: one of the two is malformed.
    """
    opened, held = open_base(base), open_pack(pack)
    check_pack(held, opened)
    planned = (*expanded_tensors(opened, held.expansion.layout), *_planned_rows(held, opened))
    sourced_tensors(planned, held)
    return Fit(
        base=opened.checkpoint.directory,
        pack=held.directory,
        layout=held.expansion.layout,
        fingerprint=held.expansion.base_fingerprint.fast,
        tensors=len(held.shard.tensors),
        parameters=held.parameters,
        dtypes=held.dtypes,
    )


def sourced_tensors(planned: Iterable[PlannedTensor], pack: Pack) -> tuple[PlannedTensor, ...]:
    """Let the new blocks' tensors come from the pack, as bytes.

    Raises:
        PackError: one is of another dtype than the base's.
    """
    held = {tensor.name: tensor for tensor in pack.shard.tensors}
    return tuple(_from_pack(t, held[t.name]) if t.name in held else t for t in planned)


def _planned_rows(pack: Pack, base: Base) -> Iterable[PlannedTensor]:
    """Return what the rows of the pack must be on this base.

    Raises:
        PackError: the base's tables are others.
    """
    if (rows := pack.expansion.new_rows) is None:
        return []
    tables = find_tables(base)
    if (rows.inputs, rows.outputs, rows.first + rows.count) != (tables.inputs, tables.outputs, tables.rows):
        raise PackError(
            f"{pack.directory / MANIFEST_NAME}: new_rows are of {', '.join(rows.tables)} with "
            f"{rows.first + rows.count} rows; the base has {tables.rows} of "
            f"{', '.join((*tables.inputs, *tables.outputs))}"
        )
    whole = [held_tensor(base.checkpoint.tensors[table]) for table in rows.tables]
    each = [(table, (rows.count, *table.shape[1:])) for table in whole]
    return [
        replace(table, name=ROWS_PREFIX + table.name, shape=shape, length=byte_count(table.dtype, shape))
        for table, shape in each
    ]


def last_rows(pack: Pack, base: Base) -> dict[str, Run]:
    """Return table of the base -> where the bytes of the last rows lie that a pack brings for it.

    Raises:
        PackError: they are not of the tables' shape or dtype.
    """
    rows = sourced_tensors(_planned_rows(pack, base), pack)
    return {row.name.removeprefix(ROWS_PREFIX): Run(row.source, row.length) for row in rows}


def _check_base(pack: Pack, base: Base) -> None:
    recorded, where = pack.expansion, pack.directory
    if recorded.family != base.family.name or recorded.base_blocks != base.depth:
        raise PackError(
            f"{where}: belongs to a {recorded.family} of {recorded.base_blocks} blocks ({recorded.base}), "
            f"not to {base.checkpoint.directory}, a {base.family.name} of {base.depth}"
        )
    found = fast_fingerprint(base.checkpoint)
    if found != recorded.base_fingerprint.fast:
        raise PackError(
            f"{where}: belongs to {recorded.base} with fingerprint {recorded.base_fingerprint.fast[:16]}…,\n"
            f"not to {base.checkpoint.directory} with fingerprint {found[:16]}…"
        )


def _from_pack(planned: PlannedTensor, tensor: Tensor) -> PlannedTensor:
    if tensor.dtype != planned.dtype:
        raise _misfit(planned, tensor)
    return replace(planned, source=Copy(tensor.file, tensor.offset))


def _misfit(planned: PlannedTensor, tensor: Tensor) -> PackError:
    return PackError(
        f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
        f"the base needs {planned.dtype} {list(planned.shape)}"
    )
