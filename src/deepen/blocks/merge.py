"""Packs into an ordinary checkpoint: one merged, or several stacked on one base."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepen.blocks.pack import BLOCKS_NAME, Pack, check_pack, last_rows, open_pack, sourced_tensors
from deepen.checkpoint import Shard, check_free
from deepen.errors import PackError
from deepen.expansion import (
    MANIFEST_NAME,
    Base,
    ExpandResult,
    Expansion,
    Files,
    PreparedCheckpoint,
    Progress,
    expanded_tensors,
    file_header,
    open_base,
    plan_files,
    record_file,
    with_blocks,
    with_last_rows,
    write_checkpoint,
)
from deepen.families import Family


def merge_pack(
    base: str | Path,
    pack: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> ExpandResult:
    """Write base and pack as one expanded checkpoint: the base's bytes, and the pack's for the new blocks.

    A pack's rows replace the base's last ones. As those are then in no file any more, the checkpoint has no
    `expansion.json`: it is an ordinary one of as many blocks, from which the base does not come back.

    Args:
        base: the base the pack was trained on.
        pack: directory or hub id of the pack.
        out: the directory to create, whole or not at all.
        overwrite: replace `out`.
        shard_size: cut the weights into files of at most so many bytes; default: as the base's are.
        progress: called with (bytes done, bytes in all).

    Raises:
        PackError: the pack belongs to another base, or its tensors are not those of its new blocks.
        CheckpointError: the base or the pack is malformed.
        OutputError: `out` exists, overlaps an input, or does not fit the disk.
    """
    start = time.perf_counter()
    check_free(Path(out), overwrite=overwrite)
    opened, held = open_base(base), open_pack(pack)
    check_pack(held, opened)
    sourced = sourced_tensors(expanded_tensors(opened, held.expansion.layout), held)
    plan = plan_files(opened.checkpoint, sourced, shard_size=shard_size)
    if held.expansion.new_rows:
        plan = with_last_rows(plan, last_rows(held, opened))
    prepared = PreparedCheckpoint(base=opened, plan=plan, expansion=held.expansion)
    return write_checkpoint(
        prepared, Path(out), overwrite=overwrite, inside=(held.directory,), progress=progress, start=start
    )


def stack_packs(
    base: str | Path,
    packs: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> ExpandResult:
    """Write base and several packs of it as one expanded checkpoint.

    Every block keeps the base block it stands on. Where blocks of several packs stand on the same one, the
    first pack's are lowest. `new_blocks` says of each block which pack it came from, by the name of the
    pack's directory; `extract_pack(out, …, pack=name)` gives it back.

    Each pack was trained without the others: what they do together has to be measured.

    Args:
        base: the base all packs were trained on.
        packs: their directories or hub ids, bottom to top.
        out: the directory to create, whole or not at all.
        overwrite: replace `out`.
        shard_size: cut the weights into files of at most so many bytes; default: as the base's are.
        progress: called with (bytes done, bytes in all).

    Raises:
        PackError: no packs, or one does not fit the base.
        CheckpointError: the base or a pack is malformed.
        OutputError: `out` exists, overlaps an input, or does not fit the disk.
    """
    start = time.perf_counter()
    if not packs:
        raise PackError("no packs to stack: name at least one")
    check_free(Path(out), overwrite=overwrite)
    opened, held = open_base(base), [open_pack(pack) for pack in packs]
    for pack in held:
        check_pack(pack, opened)
        if pack.expansion.new_rows:
            raise PackError(f"{pack.directory}: brings new rows of the vocabulary; merge it alone")
    named = name_packs(held)
    expansion = _stacked(named, opened.family)
    tensors = expanded_tensors(opened, expansion.layout)
    for name, pack in named.items():
        tensors = sourced_tensors(tensors, _in_place(pack, name, expansion, opened))
    prepared = PreparedCheckpoint(
        base=opened, plan=plan_files(opened.checkpoint, tensors, shard_size=shard_size), expansion=expansion
    )
    inside = tuple(pack.directory for pack in held)
    return write_checkpoint(
        prepared, Path(out), overwrite=overwrite, inside=inside, progress=progress, start=start
    )


def single_pack(expansion: Expansion, name: str, family: Family) -> Expansion:
    """Return the record of one of the packs that were stacked, as it was before, where nothing else is known.

    Raises:
        PackError: there is none of that name.
    """
    blocks = [block for block in expansion.latest_blocks if block.pack == name]
    if not blocks:
        known = ", ".join(dict.fromkeys(b.pack for b in expansion.latest_blocks if b.pack))
        held = f"it has {known}" if known else "none was stacked"
        raise PackError(f"no block of {expansion.base}'s expansion is of a pack {name!r}; {held}")
    alone = [block.model_copy(update={"pack": None}) for block in blocks]
    return with_blocks(expansion, alone, family).model_copy(update={"packs": {}})


def name_packs(packs: Sequence[Pack]) -> dict[str, Pack]:
    """Name packs by their directories; of a hub's cache, by the repository."""
    named: dict[str, Pack] = {}
    for pack in packs:
        where = pack.directory.resolve()
        in_cache = where.parent.name == "snapshots"
        stem = name = where.parent.parent.name.rpartition("--")[2] if in_cache else where.name
        count = 1
        while name in named:
            count += 1
            name = f"{stem}-{count}"
        named[name] = pack
    return named


def _stacked(packs: Mapping[str, Pack], family: Family) -> Expansion:
    first = next(iter(packs.values())).expansion
    blocks = []
    for name, pack in packs.items():
        if pack.expansion.stage != first.stage:
            raise PackError(
                f"{pack.directory}: its blocks are of stage {pack.expansion.stage}, the first pack's of "
                f"{first.stage}: they were not made on one base"
            )
        blocks += [block.model_copy(update={"pack": name}) for block in pack.expansion.latest_blocks]
    whole = with_blocks(first, blocks, family).model_copy(update={"averaged": {}})
    files = {name: _record_pack(pack, name, whole, family) for name, pack in packs.items()}
    return whole.model_copy(update={"packs": files})


def _record_pack(pack: Pack, name: str, whole: Expansion, family: Family) -> Files:
    """What it takes to write the pack again: the order of its tensors is no other file's, so it is kept."""
    alone = single_pack(whole, name, family).to_json().encode()
    return {
        MANIFEST_NAME: record_file((pack.directory / MANIFEST_NAME).read_bytes(), [alone]),
        BLOCKS_NAME: record_file(file_header(pack.shard.path)),
    }


def _in_place(pack: Pack, name: str, expansion: Expansion, base: Base) -> Pack:
    """The pack with its tensors named as they are called in the stack."""
    ours = [block.index for block in expansion.latest_blocks if block.pack == name]
    moved = dict(zip((block.index for block in pack.expansion.latest_blocks), ours, strict=True))
    tensors = []
    for tensor in pack.shard.tensors:
        place = base.family.split(tensor.name)
        assert place is not None  # check_pack has seen it
        tensors.append(replace(tensor, name=base.family.join(moved[place[0]], place[1])))
    return replace(pack, shard=Shard(pack.shard.path, pack.shard.metadata, tuple(tensors)))
