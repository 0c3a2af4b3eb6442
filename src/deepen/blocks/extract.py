"""New blocks out of an expanded checkpoint, as a pack."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from deepen.blocks.expanded import Opened, open_expanded
from deepen.blocks.merge import single_pack
from deepen.blocks.pack import BLOCKS_NAME
from deepen.checkpoint import atomic_directory, check_free
from deepen.expansion import (
    MANIFEST_NAME,
    Expansion,
    NewBlockRecord,
    Plan,
    PlannedFile,
    Progress,
    aligned,
    check_space,
    count_parameters,
    held_tensors,
    recorded_text,
    restored_file,
    write_weights,
)


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What was written.

    Attributes:
        directory: the pack.
        new_blocks: as recorded in its `expansion.json`.
        parameters: number of elements.
        bytes_written: size of `blocks.safetensors`.
        seconds: how long it took.
    """

    directory: Path
    new_blocks: tuple[NewBlockRecord, ...]
    parameters: int
    bytes_written: int
    seconds: float


def extract_pack(
    expanded: str | Path,
    out: str | Path,
    *,
    pack: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractResult:
    """Write the new blocks of an expanded checkpoint as a pack.

    Args:
        expanded: the expanded checkpoint, trained or not.
        out: the directory to create, whole or not at all.
        pack: only the blocks of this one of the packs that were stacked; default: all new blocks.
        overwrite: replace `out`.
        progress: called with (bytes done, bytes in all).

    Raises:
        PackError: its base tensors are no longer the base's, so that a pack would lose their changes, or
            there is no such pack in it.
        CheckpointError: it is malformed, or not an expanded checkpoint.
        OutputError: `out` exists, overlaps the input, or does not fit the disk.
    """
    start = time.perf_counter()
    check_free(Path(out), overwrite=overwrite)
    opened = open_expanded(expanded, "a pack of the new blocks would lose that")
    expansion = opened.expansion
    record = expansion if pack is None else single_pack(expansion, pack, opened.family)
    file, text = _pack_files(opened, record.portable, pack)
    plan = Plan((file,), None)
    check_space(Path(out), plan.bytes_needed)
    with atomic_directory(Path(out), overwrite=overwrite, inside=(opened.checkpoint.directory,)) as partial:
        write_weights(plan, partial, progress)
        (partial / MANIFEST_NAME).write_bytes(text.encode())
    return ExtractResult(
        directory=Path(out),
        new_blocks=record.new_blocks,
        parameters=count_parameters(file.tensors),
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - start,
    )


def _pack_files(opened: Opened, record: Expansion, pack: str | None) -> tuple[PlannedFile, str]:
    """Return `blocks.safetensors` and the text of `expansion.json`, as they were before stacking if known."""
    moved = _renumbered(opened.expansion, record, pack)
    tensors = []
    for tensor in held_tensors(opened.checkpoint):
        place = opened.family.split(tensor.name)
        if place and place[0] in moved:
            name = opened.family.join(moved[place[0]], place[1])
            tensors.append(replace(tensor, name=name, beside=BLOCKS_NAME))
    file = PlannedFile(BLOCKS_NAME, opened.checkpoint.shards[0].metadata, aligned(tensors))
    known = opened.expansion.packs.get(pack, {}) if pack else {}
    if (recorded := known.get(BLOCKS_NAME)) is not None:
        file = restored_file(BLOCKS_NAME, recorded, file, {t.name: t for t in tensors}) or file
    text, _ = recorded_text(known.get(MANIFEST_NAME), record.to_json())
    return file, text or record.to_json()


def _renumbered(expansion: Expansion, record: Expansion, pack: str | None) -> dict[int, int]:
    """Index in the checkpoint -> index in the pack."""
    chosen = [block.index for block in expansion.latest_blocks if pack is None or block.pack == pack]
    return dict(zip(chosen, (block.index for block in record.latest_blocks), strict=True))
