"""Other new blocks on the same base: some of an expansion's, or those of several."""

from collections.abc import Iterable

from deepen.expansion.layout import Layout, NewBlock
from deepen.expansion.manifest import Expansion, NewBlockRecord, moved_block, previous_expansion
from deepen.families import Family


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
    new = (NewBlock(index=b.index, after=b.after, copy_of=b.copy_of) for b in records)
    layout = Layout(expansion.base_blocks, tuple(new))
    kept = previous.new_blocks if previous else ()
    records += [moved_block(block, layout.position(block.index), family) for block in kept]
    ordered = tuple(sorted(records, key=lambda record: record.index))
    return expansion.model_copy(update={"new_blocks": ordered})
