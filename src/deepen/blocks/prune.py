"""Some new blocks of a pack dropped: what is left is a pack of the same base."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from deepen.blocks.pack import BLOCKS_NAME, Pack, open_pack, pack_family
from deepen.checkpoint import atomic_directory, check_free
from deepen.errors import PackError
from deepen.expansion import (
    MANIFEST_NAME,
    Layout,
    NewBlockRecord,
    Plan,
    PlannedFile,
    aligned,
    check_space,
    count_parameters,
    held_tensor,
    with_blocks,
    write_weights,
)


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What was written.

    Attributes:
        directory: the pruned pack.
        layout: where its blocks stand, numbered anew.
        removed: indices of the blocks that were dropped, as they were.
        kept: index of each other block, as it was -> as it is.
        parameters: number of elements left.
    """

    directory: Path
    layout: Layout
    removed: tuple[int, ...]
    kept: dict[int, int]
    parameters: int


def prune_pack(
    pack: str | Path, out: str | Path, *, without: Collection[int], overwrite: bool = False
) -> PruneResult:
    """Write a pack without some of its new blocks; the others' tensors are copied byte for byte.

    Args:
        pack: directory or hub id of the pack.
        out: the directory to create, whole or not at all.
        without: indices of the blocks to drop, as `expansion.json` has them.
        overwrite: replace `out`.

    Raises:
        PackError: it is malformed, has no such block, or would have none left.
        CheckpointError: one of its files is malformed.
        OutputError: `out` exists, overlaps the input, or does not fit the disk.
    """
    check_free(Path(out), overwrite=overwrite)
    held = open_pack(pack)
    held.check_names()
    blocks = _left(held, without)
    family = pack_family(held)
    # Digests of the packs it was stacked from would no longer be its own.
    expansion = with_blocks(held.expansion, blocks, family).model_copy(update={"packs": {}})
    moved = dict(zip((b.index for b in blocks), (b.index for b in expansion.latest_blocks), strict=True))
    tensors = []
    for tensor in held.shard.tensors:
        if tensor.name in held.row_names:
            tensors.append(held_tensor(tensor))
        place = family.split(tensor.name)
        if place and place[0] in moved:
            tensors.append(replace(held_tensor(tensor), name=family.join(moved[place[0]], place[1])))
    file = PlannedFile(BLOCKS_NAME, held.shard.metadata, aligned(tensors))
    plan = Plan((file,), None)
    check_space(Path(out), plan.bytes_needed)
    with atomic_directory(Path(out), overwrite=overwrite, inside=(held.directory,)) as staged:
        write_weights(plan, staged)
        (staged / MANIFEST_NAME).write_bytes(expansion.to_json().encode())
    return PruneResult(
        directory=Path(out),
        layout=expansion.layout,
        removed=tuple(sorted(set(without))),
        kept=moved,
        parameters=count_parameters(file.tensors),
    )


def _left(pack: Pack, without: Collection[int]) -> list[NewBlockRecord]:
    blocks = pack.expansion.latest_blocks
    check_blocks(pack, without)
    left = [block for block in blocks if block.index not in without]
    if not left:
        raise PackError(f"{pack.directory}: without {_listed(without)} no new block is left, only the base")
    if len(left) == len(blocks):
        raise PackError(f"{pack.directory}: no block is named that should be dropped")
    return left


def check_blocks(pack: Pack, named: Collection[int]) -> None:
    """Refuse indices that are not those of new blocks of the pack.

    Raises:
        PackError: one is not.
    """
    new = [block.index for block in pack.expansion.latest_blocks]
    if unknown := sorted(set(named).difference(new)):
        raise PackError(f"{pack.directory}: block {unknown[0]} is no new block of it; it has {_listed(new)}")


def _listed(indices: Collection[int]) -> str:
    return ", ".join(map(str, sorted(indices)))
