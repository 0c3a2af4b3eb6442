"""Records from records: of a fresh expansion, of the base below it, of other blocks on the same base."""

from collections.abc import Iterable, Mapping

from deepen.expansion.layout import Layout
from deepen.expansion.manifest import EarlierStage, Expansion, Fingerprint, NewBlockRecord
from deepen.families import Family


def describe_expansion(
    layout: Layout,
    family: Family,
    block_tensors: Mapping[int, tuple[str, ...]],
    base: str,
    fingerprint: Fingerprint,
    previous: Expansion | None = None,
) -> Expansion:
    """Build the record of a fresh expansion.

    Args:
        layout: which block goes where.
        family: says which tensors are filled.
        block_tensors: names inside each base block, by base block index.
        base: name or path of the base.
        fingerprint: the base's.
        previous: the base's own record, if it was expanded before.

    Raises:
        FamilyError: what is to be filled is not known to be exact in the family.
    """
    earlier = earlier_stages(previous)
    records = [
        NewBlockRecord(
            index=block.index,
            after=block.after,
            copy_of=block.copy_of,
            filled={
                family.join(block.index, name): float(value)
                for name in block_tensors[block.copy_of]
                if (value := family.fill(name, block.zero)) is not None
            },
            stage=len(earlier),
            init=None if block.init == "copy" else block.init,
            zero=None if block.zero == "writes" else block.zero,
        )
        for block in layout.new_blocks
    ]
    kept = previous.new_blocks if previous else ()
    records += [moved_block(block, layout.position(block.index), family) for block in kept]
    return Expansion(
        base=base,
        base_fingerprint=fingerprint,
        family=family.name,
        base_blocks=layout.base_blocks,
        new_blocks=tuple(sorted(records, key=lambda record: record.index)),
        earlier=earlier,
    )


def previous_expansion(expansion: Expansion, family: Family) -> Expansion | None:
    """Return the record of the base itself, where that was expanded before."""
    if not expansion.earlier:
        return None
    *earlier, last = expansion.earlier
    kept = []
    for block in expansion.new_blocks:
        position = expansion.layout.base_block(block.index)
        if position is not None:
            kept.append(moved_block(block, position, family))
    return Expansion(
        **{key: getattr(last, key) for key in EarlierStage.model_fields},
        family=expansion.family,
        new_blocks=tuple(kept),
        earlier=tuple(earlier),
    )


def with_blocks(expansion: Expansion, blocks: Iterable[NewBlockRecord], family: Family) -> Expansion:
    """Return the record of other new blocks on the same base.

    Args:
        expansion: says what the base is.
        blocks: the blocks of its stage, at equal positions bottom to top; they are numbered anew.
        family: in the dialect of the names.
    """
    previous = previous_expansion(expansion, family)
    placed = sorted(blocks, key=lambda block: block.after)
    records = [moved_block(block, block.after + 1 + below, family) for below, block in enumerate(placed)]
    layout = Layout(expansion.base_blocks, tuple(record.placed for record in records))
    kept = previous.new_blocks if previous else ()
    records += [moved_block(block, layout.position(block.index), family) for block in kept]
    ordered = tuple(sorted(records, key=lambda record: record.index))
    return expansion.model_copy(update={"new_blocks": ordered})


def earlier_stages(previous: Expansion | None) -> tuple[EarlierStage, ...]:
    """Return the stages before the expansion of a base with this record."""
    if previous is None:
        return ()
    last = {key: getattr(previous, key) for key in EarlierStage.model_fields}
    return (*previous.earlier, EarlierStage(**last))


def moved_block(block: NewBlockRecord, index: int, family: Family) -> NewBlockRecord:
    """Give a block of an earlier stage another index, and its tensors the names that go with it."""
    filled = {}
    for name, value in block.filled.items():
        place = family.split(name)
        filled[family.join(index, place[1]) if place else name] = value
    return block.model_copy(update={"index": index, "filled": filled})


def base_name(expansion: Expansion, family: Family, name: str) -> str | None:
    """Return what tensor `name` of the expanded model is called in the base; None for a new block's."""
    place = family.split(name)
    if place is None:
        return name
    block = expansion.layout.base_block(place[0])
    return None if block is None else family.join(block, place[1])
