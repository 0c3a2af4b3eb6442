"""Packs of one base and one layout made one pack: the weighted average of their tensors.

New blocks of such packs began as the same copies, so what lies between them may be of use, as between
fine-tuned models of one start (model soups, arXiv 2203.05482). Residual writes began at their fill, so they
are averaged about it: with a pack that was never trained, an average is damped.
"""

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from deepen.blocks.merge import name_packs
from deepen.blocks.pack import BLOCKS_NAME, Pack, open_pack
from deepen.checkpoint import ITEM_BYTES, Tensor, atomic_directory, check_free
from deepen.errors import PackError
from deepen.expansion import MANIFEST_NAME, AveragedPack, Expansion, Layout, check_space

_CHUNK: Final = 1 << 20  # elements


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """What was written.

    Attributes:
        directory: the pack.
        layout: where its blocks stand.
        shares: name of each pack -> its share; they add up to 1.
        parameters: number of elements.
    """

    directory: Path
    layout: Layout
    shares: dict[str, float]
    parameters: int


def average_packs(
    packs: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> AverageResult:
    """Write a pack whose every tensor is the weighted average of those of several packs.

    Computed in float64 and rounded once, to nearest, ties to even. The record names the packs, their shares
    and the digests of their tensors.

    Args:
        packs: directories or hub ids, two or more, of one base and with blocks in the same places.
        out: the directory to create, whole or not at all.
        weights: one of each pack, from 0; divided by their sum. Default: all the same.
        overwrite: replace `out`.

    Raises:
        PackError: they are of different bases or layouts, a tensor is missing or of another form, or a weight
            is no number from 0.
        CheckpointError: a file is malformed.
        OutputError: `out` exists, overlaps an input, or does not fit the disk.
    """
    check_free(Path(out), overwrite=overwrite)
    shares = _shares(len(packs), weights)
    named = name_packs([open_pack(pack) for pack in packs])
    held = list(named.values())
    first = held[0]
    for pack in held:
        pack.check_names()
        _check_alike(first, pack)
    check_space(Path(out), first.shard.path.stat().st_size)
    inside = tuple(pack.directory for pack in held)
    with atomic_directory(Path(out), overwrite=overwrite, inside=inside) as staged, ExitStack() as stack:
        shutil.copyfile(first.shard.path, staged / BLOCKS_NAME)
        target = stack.enter_context((staged / BLOCKS_NAME).open("r+b"))
        files = [stack.enter_context(pack.shard.path.open("rb")) for pack in held]
        places = [{tensor.name: tensor for tensor in pack.shard.tensors} for pack in held]
        for tensor in first.shard.tensors:
            _average(target, tensor, files, [each[tensor.name].offset for each in places], shares)
        record = _record(named, shares)
        (staged / MANIFEST_NAME).write_bytes(record.to_json().encode())
    return AverageResult(
        directory=Path(out),
        layout=record.layout,
        shares=dict(zip(named, shares, strict=True)),
        parameters=first.parameters,
    )


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count < 2:
        raise PackError("average: name two packs or more")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise PackError(f"average: {len(given)} weights for {count} packs; give one of each")
    for weight in given:
        if not 0 <= weight < math.inf:
            raise PackError(f"average: a weight is {weight:g}; give numbers from 0 on")
    if not (total := sum(given)):
        raise PackError("average: every weight is 0")
    return [weight / total for weight in given]


def _check_alike(first: Pack, pack: Pack) -> None:
    """Refuse a pack whose tensors are not in the places of the first one's."""
    from deepen.blocks.scaling import DAMPED

    ours, theirs = first.expansion, pack.expansion
    if (ours.family, ours.base_fingerprint.fast) != (theirs.family, theirs.base_fingerprint.fast):
        raise PackError(
            f"{pack.directory}: belongs to {theirs.base}, {first.directory} to {ours.base}, "
            "which is not the same base"
        )
    if (ours.stage, ours.layout) != (theirs.stage, theirs.layout):
        if ours.layout.draw() == theirs.layout.draw():
            raise PackError(
                f"{pack.directory}: its blocks began otherwise than those of {first.directory} "
                "(copy_of, init or zero):\nstack them instead (deepen blocks stack)"
            )
        raise PackError(
            f"{pack.directory}: its blocks stand at {theirs.layout.draw()},\n"
            f"those of {first.directory} at {ours.layout.draw()}: stack them instead (deepen blocks stack)"
        )
    if theirs.new_rows:
        raise PackError(f"{pack.directory}: brings new rows of the vocabulary, which are not averaged")
    forms, others = _forms(first), _forms(pack)
    for name in sorted(forms.keys() | others.keys()):
        if forms.get(name) != others.get(name):
            raise PackError(f"{pack.shard.path}: tensor {name!r} is not as in {first.directory}")
        if forms[name][0] not in DAMPED:
            raise PackError(f"{pack.shard.path}: tensor {name!r} is {forms[name][0]}, which has no average")


def _forms(pack: Pack) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in pack.shard.tensors}


def _average(
    target: BinaryIO,
    tensor: Tensor,
    files: Sequence[BinaryIO],
    offsets: Sequence[int],
    shares: Sequence[float],
) -> None:
    """Write a tensor's average over its first version in a copy of that file."""
    from deepen.blocks.scaling import averaged_bytes

    step = _CHUNK * ITEM_BYTES[tensor.dtype]
    for begin in range(0, tensor.length, step):
        parts = []
        for file, offset in zip(files, offsets, strict=True):
            file.seek(offset + begin)
            parts.append(file.read(min(step, tensor.length - begin)))
        try:
            averaged = averaged_bytes(tensor.dtype, parts, shares)
        except OverflowError as error:
            raise PackError(f"{tensor.file}: tensor {tensor.name!r}: averaged, {error}") from None
        target.seek(tensor.offset + begin)
        target.write(averaged)


def _record(packs: Mapping[str, Pack], shares: Sequence[float]) -> Expansion:
    """The record of the average: where all agree, that of the first."""
    first = next(iter(packs.values())).expansion
    of = [pack.expansion.new_blocks for pack in packs.values()]
    blocks = tuple(
        block if len({each.damped for each in same}) == 1 else block.model_copy(update={"damped": None})
        for block, *same in zip(first.new_blocks, *of, strict=True)
    )
    averaged = {
        name: AveragedPack(share=share, digest=_digest(pack.shard.path))
        for (name, pack), share in zip(packs.items(), shares, strict=True)
    }
    return first.model_copy(update={"new_blocks": blocks, "packs": {}, "averaged": averaged})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
