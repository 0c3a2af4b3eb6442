"""Block packs: the new blocks alone, a small directory tied to its base. No torch.

Read in this order: `pack` (what it is and whether it fits), `merge` (into a checkpoint, one or several),
`extract` and `unmerge` (out of one), `adopt` (checkpoints of other tools), `prune`, `damp` and
`average` (after training), `inspect`, `hub`.
"""

from deepen.blocks.adopt import AdoptResult, adopt
from deepen.blocks.average import AverageResult, average_packs
from deepen.blocks.damp import Alphas, DampResult, check_alpha, damp_pack
from deepen.blocks.extract import ExtractResult, extract_pack
from deepen.blocks.hub import pack_files, push_pack, resolve_pack
from deepen.blocks.inspect import BlockNorms, BlocksSummary, Norm, Stage, inspect_blocks
from deepen.blocks.merge import merge_pack, stack_packs
from deepen.blocks.pack import BLOCKS_NAME, Fit, Pack, check_pack, copy_pack, fit_pack, open_pack
from deepen.blocks.prune import PruneResult, prune_pack
from deepen.blocks.unmerge import UnmergeResult, unmerge

__all__ = [
    "BLOCKS_NAME",
    "AdoptResult",
    "Alphas",
    "AverageResult",
    "BlockNorms",
    "BlocksSummary",
    "DampResult",
    "ExtractResult",
    "Fit",
    "Norm",
    "Pack",
    "PruneResult",
    "Stage",
    "UnmergeResult",
    "adopt",
    "average_packs",
    "check_alpha",
    "check_pack",
    "copy_pack",
    "damp_pack",
    "extract_pack",
    "fit_pack",
    "inspect_blocks",
    "merge_pack",
    "open_pack",
    "pack_files",
    "prune_pack",
    "push_pack",
    "resolve_pack",
    "stack_packs",
    "unmerge",
]
