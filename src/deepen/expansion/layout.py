from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from deepen.errors import LayoutError
from deepen.families import Zero

Init = Literal["copy", "average", "transport"]
Placement = Literal["interleaved", "suffix", "prefix"]

# No model is so deep; a slip of the keyboard would fill the memory with a layout.
_MOST_BLOCKS: Final = 10_000


@dataclass(frozen=True, kw_only=True, order=True)
class NewBlock:
    """One inserted block.

    Attributes:
        index: its position in the expanded model.
        after: the base block it stands on; -1 for the bottom of the model.
        copy_of: the base block it copies, whose kind it has.
        init: `copy`; or the mean of that block and the base block above it, as they are (`average`) or
            with the units of the upper one put in the order of the lower one's (`transport`).
        zero: what of it is filled so that it adds nothing, see `deepen.families.Zero`.
    """

    index: int
    after: int
    copy_of: int
    init: Init = "copy"
    zero: Zero = "writes"


@dataclass(frozen=True)
class Layout:
    """Which new block stands where and which base block it copies: pure data.

    Attributes:
        base_blocks: number of blocks of the base.
        new_blocks: the new blocks, by ascending index.
    """

    base_blocks: int
    new_blocks: tuple[NewBlock, ...]

    @property
    def depth(self) -> int:
        """Number of blocks of the expanded model."""
        return self.base_blocks + len(self.new_blocks)

    @property
    def new_indices(self) -> frozenset[int]:
        """Positions of the new blocks in the expanded model."""
        return frozenset(block.index for block in self.new_blocks)

    @property
    def base_positions(self) -> tuple[int, ...]:
        """Position of each base block in the expanded model."""
        new = self.new_indices
        return tuple(index for index in range(self.depth) if index not in new)

    def position(self, base_block: int) -> int:
        """Return where a base block stands in the expanded model; what trails the base trails it still."""
        if base_block >= self.base_blocks:
            return base_block + len(self.new_blocks)
        return base_block + sum(block.after < base_block for block in self.new_blocks)

    def base_block(self, position: int) -> int | None:
        """Return which base block stands at a position of the expanded model; None for a new block."""
        if position in self.new_indices:
            return None
        return position - sum(block.index < position for block in self.new_blocks)

    @property
    def origins(self) -> tuple[int, ...]:
        """For each block of the expanded model, the base block it is or copies."""
        origin = {block.index: block.copy_of for block in self.new_blocks}
        origin |= {position: base for base, position in enumerate(self.base_positions)}
        return tuple(origin[index] for index in range(self.depth))

    def draw(self) -> str:
        """Return the layout as one line, bottom to top: `■` a base block, `□4` the new block at index 4."""
        new = self.new_indices
        drawn = "".join(f" □{index} " if index in new else "■" for index in range(self.depth))
        return " ".join(drawn.split())


def plan_layout(
    base_blocks: int,
    *,
    blocks: int | None = None,
    placement: Placement = "interleaved",
    groups: int | None = None,
    after: Sequence[int] | None = None,
    init: Init = "copy",
    zero: Zero = "writes",
) -> Layout:
    """Decide where new blocks go and what they are made from. Pure: nothing is read or written.

    The base's L blocks are cut into N groups and identity copies of the top P blocks of each group are
    stacked on the group (arXiv 2401.02415 section 3.1). Neither N nor P has to divide anything: groups and
    counts are made as even as they can be. `suffix` is one group; `prefix` puts copies of the bottom blocks
    below block 0.

    Args:
        base_blocks: number of blocks of the base, L.
        blocks: number of new blocks.
        placement: where they go.
        groups: number of groups for `interleaved`; default: one new block a group.
        after: explicit base blocks to stand on instead (-1: the bottom); repeats stack. Each new block
            copies the block it stands on.
        init: see `NewBlock`. A block that copies the topmost one is a copy in any case.
        zero: what of the new blocks is filled. Whether their family can have it is not known here.

    Raises:
        LayoutError: no blocks, an index out of range, or arguments that contradict each other.
    """
    if init not in get_args(Init):
        raise LayoutError(f"init is {init!r}; it can be copy, average or transport")
    if zero not in get_args(Zero):
        raise LayoutError(f"zero is {zero!r}; it can be writes, reads or norms")
    placed = _places(base_blocks, blocks, placement, groups, after)
    new = tuple(
        NewBlock(
            index=stands_on + 1 + below,
            after=stands_on,
            copy_of=copy_of,
            init=init if copy_of + 1 < base_blocks else "copy",
            zero=zero,
        )
        for below, (stands_on, copy_of) in enumerate(placed)
    )
    return Layout(base_blocks, new)


def least_important(scores: Sequence[float], blocks: int) -> list[int]:
    """Return the base blocks that new ones stand on: those of lowest score, each once before any twice.

    Args:
        scores: how much each base block matters to what must be kept.
        blocks: number of new blocks.

    Returns:
        For `plan_layout(after=…)`, ascending.
    """
    order = sorted(range(len(scores)), key=lambda block: (scores[block], block))
    return sorted(order[index % len(order)] for index in range(blocks))


def _places(
    base_blocks: int,
    blocks: int | None,
    placement: Placement,
    groups: int | None,
    after: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """Return (stands on, copies) of each new block, sorted by the first."""
    if groups is not None and (after is not None or placement != "interleaved"):
        raise LayoutError(f"groups is {groups}, but only interleaved placement has groups; leave it out")
    if after is not None:
        if blocks is not None and blocks != len(after):
            raise LayoutError(f"blocks is {blocks} but after names {len(after)}; leave one of them out")
        return _explicit(base_blocks, after)
    if blocks is None:
        raise LayoutError("neither blocks nor after is given: say how many new blocks, or where they stand")
    if blocks < 1:
        raise LayoutError(f"blocks is {blocks}: at least 1 new block is needed")
    if blocks > _MOST_BLOCKS:
        raise LayoutError(f"blocks is {blocks}: more than {_MOST_BLOCKS} new blocks cannot be added")
    if placement == "suffix":
        return _grouped(base_blocks, blocks, 1)
    if placement == "prefix":
        return [(-1, index % base_blocks) for index in range(blocks)]
    if placement != "interleaved":
        raise LayoutError(f"placement is {placement!r}; it can be interleaved, suffix or prefix")
    groups = min(blocks, base_blocks) if groups is None else groups
    if not 1 <= groups <= min(blocks, base_blocks):
        raise LayoutError(
            f"groups is {groups}; with {base_blocks} base blocks and {blocks} new ones it can be 1 to "
            f"{min(blocks, base_blocks)}"
        )
    return _grouped(base_blocks, blocks, groups)


def _explicit(base_blocks: int, after: Sequence[int]) -> list[tuple[int, int]]:
    if not after:
        raise LayoutError("after is empty: at least 1 new block is needed")
    for index in after:
        if not -1 <= index < base_blocks:
            raise LayoutError(
                f"after: block {index} is out of range; the base has blocks 0 to {base_blocks - 1} "
                "(-1: the bottom)"
            )
    return [(index, max(index, 0)) for index in sorted(after)]


def _grouped(base_blocks: int, blocks: int, groups: int) -> list[tuple[int, int]]:
    placed = []
    for group in range(groups):
        bottom, top = group * base_blocks // groups, (group + 1) * base_blocks // groups
        count = (group + 1) * blocks // groups - group * blocks // groups
        placed += [(top - 1, source) for source in _top(range(bottom, top), count)]
    return placed


def _top(group: range, count: int) -> Iterator[int]:
    """The top `count` blocks of a group in order; a group smaller than `count` is repeated."""
    size = min(len(group), count)
    for index in range(count):
        yield group[len(group) - size + index % size]
