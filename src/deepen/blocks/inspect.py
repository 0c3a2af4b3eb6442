from dataclasses import dataclass
from pathlib import Path

from deepen.blocks.pack import BLOCKS_NAME, open_pack
from deepen.checkpoint import Checkpoint
from deepen.expansion import Expansion, base_name, count_parameters, read_expansion
from deepen.families import family_for


@dataclass(frozen=True, kw_only=True)
class BlocksSummary:
    """What a directory says of its new blocks.

    Attributes:
        kind: `block pack` or `expanded checkpoint`.
        expansion: the content of its `expansion.json`.
        parameters: number of elements of the new blocks.
        dtypes: their dtypes, joined by commas.
        bytes: their size.
    """

    kind: str
    expansion: Expansion
    parameters: int
    dtypes: str
    bytes: int


def inspect_blocks(directory: str | Path) -> BlocksSummary:
    """Summarise the new blocks of a block pack or an expanded checkpoint; reads headers only.

    Raises:
        CheckpointError: it is neither, or malformed.
    """
    directory = Path(directory)
    expansion = read_expansion(directory)
    if (directory / BLOCKS_NAME).exists():
        kind, tensors = "block pack", list(open_pack(directory).shard.tensors)
    else:
        kind, checkpoint = "expanded checkpoint", Checkpoint.open(directory)
        family = family_for(checkpoint.config, checkpoint.tensors, f"{directory}/config.json")
        tensors = [t for t in checkpoint.tensors.values() if base_name(expansion, family, t.name) is None]
    return BlocksSummary(
        kind=kind,
        expansion=expansion,
        parameters=count_parameters(tensors),
        dtypes=", ".join(sorted({tensor.dtype for tensor in tensors})),
        bytes=sum(tensor.length for tensor in tensors),
    )
