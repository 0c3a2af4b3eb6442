"""What is known of the new blocks of a pack or an expanded checkpoint, and how far they have moved."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from deepen.blocks.hub import is_hub_id, resolve_pack
from deepen.blocks.pack import BLOCKS_NAME, block_prefix, check_pack, open_pack
from deepen.checkpoint import CONFIG, Checkpoint, Tensor, fast_fingerprint
from deepen.errors import PackError
from deepen.expansion import (
    Base,
    Expansion,
    Layout,
    NewBlockRecord,
    base_name,
    count_parameters,
    earlier_stages,
    open_base,
    read_expansion,
)
from deepen.families import family_for, generic

if TYPE_CHECKING:
    from deepen.blocks.norms import Compared, Squares


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The size of one kind of tensor of a new block, or of what became of it.

    Attributes:
        name: inside the block; `*` for the numbers of experts.
        parameters: number of elements.
        frobenius: root of the sum of squares: of what was filled, of its distance from its fill; of another
            tensor, of its distance from the one it copies.
        rms: root of their mean.
        relative: `frobenius` divided by the norm of the tensor of the block it copies; None where that block
            is not at hand.
    """

    name: str
    parameters: int
    frobenius: float
    rms: float
    relative: float | None


@dataclass(frozen=True, kw_only=True)
class BlockNorms:
    """What one new block has learned.

    Attributes:
        block: its record.
        writes: what was filled in it: its residual writes, unless its record's `zero` says otherwise.
        others: its other tensors, which began as copies; empty where the copied block is not at hand.
        changed: all of `others` taken together.
    """

    block: NewBlockRecord
    writes: tuple[Norm, ...]
    others: tuple[Norm, ...]
    changed: Norm | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One expansion in the history of a model.

    Attributes:
        stage: its number, from 0.
        base: name or path of what was expanded.
        fingerprint: its fast fingerprint.
        layout: which new block stood where.
    """

    stage: int
    base: str
    fingerprint: str
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class BlocksSummary:
    """What a directory says of its new blocks.

    Attributes:
        kind: `block pack` or `expanded checkpoint`.
        expansion: the content of its `expansion.json`, as a pack has it.
        layout: the layout of the latest stage, drawn.
        lineage: every expansion it went through, from the first.
        packs: names of the packs that were stacked, from the bottom.
        parameters: number of elements of the new blocks.
        dtypes: their dtypes, joined by commas.
        bytes: their size.
        reference: the directory whose blocks the new ones are compared with; None if there is none at hand.
        base_unchanged: whether an expanded checkpoint's base tensors are the base's still (by the fast
            fingerprint); None for a pack.
        blocks: norms of the new blocks of the latest stage, by ascending index.
    """

    kind: str
    expansion: Expansion
    layout: str
    lineage: tuple[Stage, ...]
    packs: tuple[str, ...]
    parameters: int
    dtypes: str
    bytes: int
    reference: Path | None
    base_unchanged: bool | None
    blocks: tuple[BlockNorms, ...]


def inspect_blocks(path: str | Path, base: str | Path | None = None) -> BlocksSummary:
    """Summarise the new blocks of a block pack or an expanded checkpoint; streams their tensors.

    What was filled (residual writes, as a rule) began at a constant, so that the block added nothing: its
    distance from it, relative to the norm of the copied block's own, says how much the block writes by now.
    The other tensors began as copies: their distance from these says how far they have moved.

    Args:
        path: directory of either, or hub id of a pack.
        base: the base's directory, to compare with; default: an expanded checkpoint's own base blocks, of a
            pack nothing.

    Raises:
        PackError: the base is another one.
        CheckpointError: it is neither, or malformed.
    """
    directory = resolve_pack(path) if is_hub_id(path) else Path(path)
    opened = open_base(base) if base is not None else None
    if os.path.lexists(directory / BLOCKS_NAME):
        pack = open_pack(directory)
        if opened:
            check_pack(pack, opened)
        pack.check_names()
        return _summary(directory, "block pack", pack.expansion, pack.shard.tensors, _of_base(opened), None)
    expansion, checkpoint = read_expansion(directory), Checkpoint.open(directory)
    family = family_for(checkpoint.config, checkpoint.tensors, f"{directory}/{CONFIG}")

    def in_base(name: str) -> str | None:
        return base_name(expansion, family, name)

    if opened and fast_fingerprint(opened.checkpoint) != expansion.base_fingerprint.fast:
        raise PackError(f"{directory}: was made from {expansion.base}, and {base} has another fingerprint")
    named = {name: in_base(name) for name in checkpoint.tensors}
    own = {inside: checkpoint.tensors[name] for name, inside in named.items() if inside is not None}
    new = [checkpoint.tensors[name] for name, inside in named.items() if inside is None]
    unchanged = fast_fingerprint(checkpoint, in_base) == expansion.base_fingerprint.fast
    reference = _of_base(opened) or (directory, own)
    return _summary(directory, "expanded checkpoint", expansion, new, reference, unchanged)


_Reference = tuple[Path, Mapping[str, Tensor]] | None


def _of_base(base: Base | None) -> _Reference:
    return (base.checkpoint.directory, base.checkpoint.tensors) if base else None


def _summary(
    where: Path,
    kind: str,
    expansion: Expansion,
    new: Iterable[Tensor],
    reference: _Reference,
    unchanged: bool | None,
) -> BlocksSummary:
    tensors = tuple(new)
    directory, originals = reference or (None, {})
    return BlocksSummary(
        kind=kind,
        expansion=expansion.portable.model_copy(update={"packs": {}}),
        layout=expansion.layout.draw(),
        lineage=_lineage(expansion),
        packs=tuple(expansion.packs),
        parameters=count_parameters(tensors),
        dtypes=", ".join(sorted({tensor.dtype for tensor in tensors})),
        bytes=sum(tensor.length for tensor in tensors),
        reference=directory,
        base_unchanged=unchanged,
        blocks=tuple(_measure(where, block, tensors, originals) for block in expansion.latest_blocks),
    )


def _lineage(expansion: Expansion) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            stage=number,
            base=stage.base,
            fingerprint=stage.base_fingerprint.fast,
            layout=_layout(stage.base_blocks, [b for b in expansion.new_blocks if b.stage == number]),
        )
        for number, stage in enumerate(earlier_stages(expansion))
    )


def _layout(base_blocks: int, blocks: Iterable[NewBlockRecord]) -> Layout:
    """The layout of a stage by itself: later stages have moved its blocks, not what they stand on."""
    placed = (replace(block.placed, index=block.after + 1 + below) for below, block in enumerate(blocks))
    return Layout(base_blocks, tuple(placed))


def _measure(
    where: Path, block: NewBlockRecord, tensors: Iterable[Tensor], originals: Mapping[str, Tensor]
) -> BlockNorms:
    from deepen.blocks.norms import DECODED, Squares, sum_squares

    prefix = block_prefix(block, where)
    stem = prefix.removesuffix(f"{block.index}.")
    held = [t for t in tensors if t.name.startswith(prefix) and t.dtype in DECODED]
    pairs = [_pair(t, block, originals.get(f"{stem}{block.copy_of}.{t.name[len(prefix) :]}")) for t in held]
    writes: dict[str, Squares] = {}
    others: dict[str, Squares] = {}
    for tensor, pair, squares in zip(held, pairs, sum_squares(pairs), strict=True):
        if tensor.name in block.filled:
            group = writes
        elif pair.origin is not None:
            group = others
        else:
            continue
        name = generic(tensor.name[len(prefix) :])
        group[name] = group.get(name, Squares()) + squares
    known = bool(originals)
    return BlockNorms(
        block=block,
        writes=tuple(_norm(name, s.written, s, known) for name, s in writes.items()),
        others=tuple(_norm(name, s.change, s, known) for name, s in others.items()),
        changed=_total(others.values()),
    )


def _pair(tensor: Tensor, block: NewBlockRecord, original: Tensor | None) -> "Compared":
    from deepen.blocks.norms import DECODED, Compared

    same = original and original.shape == tensor.shape and original.dtype in DECODED
    return Compared(tensor=tensor, fill=block.filled.get(tensor.name, 0.0), origin=original if same else None)


def _total(squares: Iterable["Squares"]) -> Norm | None:
    from deepen.blocks.norms import Squares

    total = sum(squares, Squares())
    return _norm("all other tensors", total.change, total, known=True) if total.count else None


def _norm(name: str, part: float, squares: "Squares", known: bool) -> Norm:
    from deepen.blocks.norms import ratio

    return Norm(
        name=name,
        parameters=squares.count,
        frobenius=sqrt(part),
        rms=sqrt(part / max(squares.count, 1)),
        relative=ratio(part, squares.origin) if known else None,
    )
