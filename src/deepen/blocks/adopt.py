"""Expanded checkpoints of other tools: find which blocks are new, and write the record they lack.

TencentARC's script, LLaMA-Factory (`scripts/llama_pro.py`) and ms-swift all insert copies of blocks with the
last matrices of their sub-layers zeroed, and record nothing.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepen.blocks.search import Digests, block_digests, filled_writes, held_to, possible_fills, zero_blocks
from deepen.checkpoint import (
    CONFIG,
    Checkpoint,
    fast_fingerprint,
    write_file,
)
from deepen.errors import CheckpointError, LayoutError, OutputError
from deepen.expansion import (
    MANIFEST_NAME,
    Base,
    Expansion,
    Fingerprint,
    Layout,
    NewBlock,
    NewBlockRecord,
    base_name,
    describe_expansion,
    open_base,
    record_adopted_files,
)
from deepen.families import check_tensors, family_for


@dataclass(frozen=True, kw_only=True)
class AdoptResult:
    """What was found and written.

    Attributes:
        directory: the expanded checkpoint, now with an `expansion.json`.
        new_blocks: as recorded in it.
        layout: where they stand.
        base: name or path of the base, as recorded.
        found_by: `base` (held to it), `zeros` (untrained blocks) or `list` (the user's).
        warnings: what the user should know.
    """

    directory: Path
    new_blocks: tuple[NewBlockRecord, ...]
    layout: Layout
    base: str
    found_by: str
    warnings: tuple[str, ...]


def adopt(
    expanded: str | Path,
    base: str | Path | None = None,
    new: Sequence[int] | None = None,
    name: str | None = None,
    *,
    overwrite: bool = False,
) -> AdoptResult:
    """Write the `expansion.json` of an expanded checkpoint that another tool made; no other file is touched.

    Which blocks are new is found against the base, block by block in order; else by zeros, which only works
    before training; or it is said.

    Args:
        expanded: the checkpoint.
        base: the directory of the base it was made from.
        new: the positions of the new blocks, from 0.
        name: how to record the base; default: `base`, else what the config says it was loaded from.
        overwrite: replace an `expansion.json`.

    Raises:
        PackError: the base's blocks are not all in it, unchanged and in order; or no new blocks are found.
        LayoutError: `new` cannot be.
        OutputError: there is an `expansion.json` already.
        CheckpointError: one of the two is malformed or of a family deepen does not know.
    """
    directory = Path(expanded)
    opened = _open(directory)
    if os.path.lexists(directory / MANIFEST_NAME) and not overwrite:
        raise OutputError(f"{directory}: has an {MANIFEST_NAME} already; say --overwrite to replace it")
    known = open_base(base) if base is not None else None
    digests = block_digests(opened)
    if known:
        positions = held_to(opened, digests, known, _checked(new, opened.depth))
    else:
        positions = _checked(new, opened.depth) or zero_blocks(opened)
    layout = _layout(opened, digests, positions)
    said = name or (str(base) if base is not None else str(_loaded_from(opened.checkpoint)))
    expansion = _record(opened, layout, said, known)
    write_file(directory / MANIFEST_NAME, expansion.to_json())
    return AdoptResult(
        directory=directory,
        new_blocks=expansion.new_blocks,
        layout=layout,
        base=said,
        found_by="list" if new is not None else "base" if known else "zeros",
        warnings=(*_config_warnings(opened), *_base_warnings(expansion, known)),
    )


def _open(directory: Path) -> Base:
    """Open the checkpoint as it is, whatever a record in it says."""
    checkpoint = Checkpoint.open(directory)
    family = family_for(checkpoint.config, checkpoint.tensors, f"{directory}/{CONFIG}")
    depth = check_tensors(family, checkpoint.config, checkpoint.tensors, str(directory))
    return Base(checkpoint=checkpoint, family=family, depth=depth)


def _loaded_from(checkpoint: Checkpoint) -> str:
    said = checkpoint.config.get("_name_or_path")
    return said if isinstance(said, str) and said else "unknown"


def _checked(new: Sequence[int] | None, depth: int) -> list[int]:
    """The user's list, in order; empty where there is none."""
    if new is None:
        return []
    for index in new:
        if not 0 <= index < depth:
            raise LayoutError(
                f"new: block {index} is out of range; the checkpoint has blocks 0 to {depth - 1}"
            )
        if new.count(index) > 1:
            raise LayoutError(f"new: block {index} is named twice")
    if not 0 < len(new) < depth:
        raise LayoutError(f"new: names {len(new)} of {depth} blocks; some must be new and some the base's")
    return sorted(new)


def _layout(opened: Base, digests: Mapping[int | None, Digests], new: Iterable[int]) -> Layout:
    positions = set(new)
    kept = [index for index in range(opened.depth) if index not in positions]
    blocks = []
    for index in sorted(positions):
        after = sum(position < index for position in kept) - 1
        alike = [_equal(digests[index], digests[position]) for position in kept]
        # The block it stands on comes first, then the nearest.
        distance = [(-alike[block], abs(block - max(after, 0)), block) for block in range(len(kept))]
        blocks.append(NewBlock(index=index, after=after, copy_of=min(distance)[2]))
    return Layout(len(kept), tuple(blocks))


def _equal(first: Digests, second: Digests) -> int:
    return sum(second.get(name) == value for name, value in first.items())


def _record(opened: Base, layout: Layout, name: str, known: Base | None) -> Expansion:
    """Describe the expansion; the fingerprint is that of the blocks that are not new."""
    family, checkpoint = opened.family, opened.checkpoint
    previous = known.previous if known else None
    tensors = dict.fromkeys(range(layout.base_blocks), ())
    draft = describe_expansion(layout, family, tensors, name, Fingerprint(fast=""), previous)
    fast = fast_fingerprint(checkpoint, lambda tensor: base_name(draft, family, tensor))
    blocks = [
        block.model_copy(
            update={"filled": filled_writes(opened, block.index) or possible_fills(opened, block.index)[0]}
        )
        if block.stage == draft.stage
        else block
        for block in draft.new_blocks
    ]
    update = {"base_fingerprint": Fingerprint(fast=fast), "new_blocks": tuple(blocks)}
    expansion = draft.model_copy(update=update)
    if known is None or fast != fast_fingerprint(known.checkpoint):
        return expansion
    files = record_adopted_files(replace(known, family=family), expansion, checkpoint, family)
    return expansion.model_copy(update={"base_files": files})


def _config_warnings(opened: Base) -> tuple[str, ...]:
    """Other tools leave lists with one entry a block as they were."""
    config = opened.family.text_config(opened.checkpoint.config)
    try:
        opened.family.per_layer.reorder(config, opened.depth, range(opened.depth))
    except CheckpointError as error:
        return (
            f"{opened.checkpoint.directory}: {error}: it is not the base's function. Extract its pack and "
            "merge that into the base, which writes the list anew",
        )
    return ()


def _base_warnings(expansion: Expansion, known: Base | None) -> tuple[str, ...]:
    if known is None or fast_fingerprint(known.checkpoint) == expansion.base_fingerprint.fast:
        return ()
    return (
        f"{known.checkpoint.directory} holds other tensors too (a repeated head, or buffers): "
        "packs of this checkpoint fit the base as it stands in here, not that directory",
    )
