"""Block packs: the new blocks alone, a small directory tied to its base. No torch."""

from deepen.blocks.inspect import BlocksSummary, inspect_blocks
from deepen.blocks.pack import (
    BLOCKS_NAME,
    ExtractResult,
    Pack,
    check_pack,
    extract_pack,
    merge_pack,
    open_pack,
)

__all__ = [
    "BLOCKS_NAME",
    "BlocksSummary",
    "ExtractResult",
    "Pack",
    "check_pack",
    "extract_pack",
    "inspect_blocks",
    "merge_pack",
    "open_pack",
]
