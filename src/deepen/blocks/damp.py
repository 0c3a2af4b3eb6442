"""What new blocks write to the residual stream made smaller or larger: a pack between base and model.

A residual write w that adds nothing at f becomes f + α (w − f): at α = 0 the block adds nothing, at 1 it is
as it was. Moving all weights between two models this way is WiSE-FT (arXiv 2109.01903, section 3); here only
the writes move, which is enough for the base to lie at 0.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from deepen.blocks.pack import BLOCKS_NAME, Pack, block_prefix, open_pack, pack_family
from deepen.blocks.prune import check_blocks
from deepen.checkpoint import ITEM_BYTES, Tensor, atomic_directory, check_free
from deepen.errors import PackError
from deepen.expansion import MANIFEST_NAME, Expansion, NewBlockRecord, check_space

Alphas = float | Mapping[int, float]
"""One factor for all new blocks, or index -> factor; a block that is not named keeps 1."""

_CHUNK: Final = 1 << 20  # elements


@dataclass(frozen=True, kw_only=True)
class DampResult:
    """What was written.

    Attributes:
        directory: the damped pack.
        alphas: index of each new block -> its factor.
        scaled: number of elements of the residual writes.
    """

    directory: Path
    alphas: dict[int, float]
    scaled: int


def damp_pack(pack: str | Path, out: str | Path, *, alpha: Alphas, overwrite: bool = False) -> DampResult:
    """Write a pack whose residual writes w are f + α (w − f), f being what adds nothing; its record says so.

    Computed in float64 and rounded once, to nearest, ties to even. At α = 1 nothing changes; at α = 0 the
    model is the base.

    Args:
        pack: directory or hub id of the pack.
        out: the directory to create, whole or not at all.
        alpha: the factor, of all blocks or by index.
        overwrite: replace `out`.

    Raises:
        PackError: it is malformed or has no such block, a factor is no number from 0, or a residual write is
            of a dtype that cannot be scaled, or would overflow it.
        CheckpointError: one of its files is malformed.
        OutputError: `out` exists, overlaps the input, or does not fit the disk.
    """
    check_free(Path(out), overwrite=overwrite)
    held = open_pack(pack)
    held.check_names()
    check_dampable(held.expansion, str(held.directory))
    alphas = _alphas(held, alpha)
    tensors = {tensor.name: tensor for tensor in held.shard.tensors}
    writes = {block.index: _writes(held, block, tensors) for block in held.expansion.latest_blocks}
    check_space(Path(out), held.shard.path.stat().st_size)
    with atomic_directory(Path(out), overwrite=overwrite, inside=(held.directory,)) as staged:
        shutil.copyfile(held.shard.path, staged / BLOCKS_NAME)
        with (staged / BLOCKS_NAME).open("r+b") as file:
            for index, fills in writes.items():
                for name, fill in fills.items():
                    _rewrite(file, tensors[name], fill, alphas[index])
        record = damped_record(held.expansion, alphas)
        (staged / MANIFEST_NAME).write_bytes(record.to_json().encode())
    written = [tensors[name] for fills in writes.values() for name in fills]
    scaled = sum(tensor.length // ITEM_BYTES[tensor.dtype] for tensor in written)
    return DampResult(directory=Path(out), alphas=alphas, scaled=scaled)


def damped_record(expansion: Expansion, alphas: Mapping[int, float]) -> Expansion:
    """Return the record of damped blocks: factors of blocks damped before are multiplied."""
    blocks = []
    for block in expansion.new_blocks:
        factor = alphas.get(block.index, 1.0) if block.stage == expansion.stage else 1.0
        if factor != 1:
            before = 1.0 if block.damped is None else block.damped
            block = block.model_copy(update={"damped": factor * before})
        blocks.append(block)
    # Digests of the packs it was stacked from would no longer be its own.
    return expansion.model_copy(update={"new_blocks": tuple(blocks), "packs": {}})


def check_dampable(expansion: Expansion, where: str) -> None:
    """Refuse blocks that came with rows of new tokens: at 0 the model would not be the base.

    Raises:
        PackError: they did.
    """
    if expansion.new_rows:
        raise PackError(f"{where}: brings new rows of the vocabulary too, which have no factor")


def check_alpha(alpha: float, where: str) -> None:
    """Raise `PackError` for a factor that is no finite number from 0."""
    if not 0 <= alpha < math.inf:
        raise PackError(f"{where}: alpha is {alpha:g}; give a number from 0 (the base) on, 1 changes nothing")


def _alphas(pack: Pack, alpha: Alphas) -> dict[int, float]:
    new = [block.index for block in pack.expansion.latest_blocks]
    if isinstance(alpha, Mapping):
        check_blocks(pack, alpha)
        found = {index: float(alpha.get(index, 1.0)) for index in new}
    else:
        found = dict.fromkeys(new, float(alpha))
    for each in found.values():
        check_alpha(each, str(pack.directory))
    return found


def _writes(pack: Pack, block: NewBlockRecord, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the residual writes of a block, whatever of it was filled: tensor name -> what adds nothing."""
    from deepen.blocks.scaling import DAMPED

    if lost := sorted(block.filled.keys() - tensors.keys()):
        raise PackError(f"{pack.shard.path}: tensor {lost[0]!r} is missing")
    family, prefix = pack_family(pack), block_prefix(block, pack.directory)
    inside = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    fills = {name: value for name, rest in inside.items() if (value := family.fill(rest)) is not None}
    for name in fills:
        if (dtype := tensors[name].dtype) not in DAMPED:
            raise PackError(f"{pack.shard.path}: tensor {name!r} is {dtype}, which cannot be scaled")
    return fills


def _rewrite(file: BinaryIO, tensor: Tensor, fill: float, alpha: float) -> None:
    """Scale a tensor in a copy of its file."""
    from deepen.blocks.scaling import damped_bytes

    step = _CHUNK * ITEM_BYTES[tensor.dtype]
    for begin in range(0, tensor.length, step):
        file.seek(tensor.offset + begin)
        data = file.read(min(step, tensor.length - begin))
        try:
            scaled = damped_bytes(tensor.dtype, data, fill, alpha)
        except OverflowError as error:
            raise PackError(f"{tensor.file}: tensor {tensor.name!r}: with alpha {alpha:g} {error}") from None
        file.seek(tensor.offset + begin)
        file.write(scaled)
