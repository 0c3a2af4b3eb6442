"""Block packs: the new blocks alone, a small directory tied to its base. No torch.

Read in this order: `pack` (what it is and whether it fits), `merge` (into a checkpoint, one or several),
`extract` and `unmerge` (out of one), `adopt` (checkpoints of other tools), `inspect`, `hub`.
"""

from deepen.blocks.adopt import AdoptResult, adopt
from deepen.blocks.extract import ExtractResult, extract_pack
from deepen.blocks.hub import pack_files, push_pack, resolve_pack
from deepen.blocks.inspect import BlockNorms, BlocksSummary, Norm, Stage, inspect_blocks
from deepen.blocks.merge import merge_pack, stack_packs
from deepen.blocks.pack import BLOCKS_NAME, Fit, Pack, check_pack, copy_pack, fit_pack, open_pack
from deepen.blocks.unmerge import UnmergeResult, unmerge

__all__ = [
    "BLOCKS_NAME",
    "AdoptResult",
    "BlockNorms",
    "BlocksSummary",
    "ExtractResult",
    "Fit",
    "Norm",
    "Pack",
    "Stage",
    "UnmergeResult",
    "adopt",
    "check_pack",
    "copy_pack",
    "extract_pack",
    "fit_pack",
    "inspect_blocks",
    "merge_pack",
    "open_pack",
    "pack_files",
    "push_pack",
    "resolve_pack",
    "stack_packs",
    "unmerge",
]
