"""A block pack: the new blocks alone (`blocks.safetensors`) and the record of them (`expansion.json`)."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from deepen.checkpoint import (
    Checkpoint,
    Shard,
    Tensor,
    atomic_directory,
    check_free,
    contained,
    fast_fingerprint,
    read_shard,
)
from deepen.errors import PackError
from deepen.expansion import (
    MANIFEST_NAME,
    Base,
    Copy,
    ExpandResult,
    Expansion,
    NewBlockRecord,
    Plan,
    PlannedFile,
    PlannedTensor,
    PreparedCheckpoint,
    Progress,
    aligned,
    base_name,
    check_space,
    count_parameters,
    expanded_tensors,
    open_base,
    plan_files,
    read_expansion,
    write_checkpoint,
    write_weights,
)
from deepen.families import family_for

BLOCKS_NAME: Final = "blocks.safetensors"


@dataclass(frozen=True)
class Pack:
    """A block pack as it lies on disk; opening it reads headers only.

    Attributes:
        directory: the pack.
        expansion: the content of its `expansion.json`.
        shard: its `blocks.safetensors`.
    """

    directory: Path
    expansion: Expansion
    shard: Shard

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return count_parameters(self.shard.tensors)


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What was written.

    Attributes:
        directory: the pack.
        new_blocks: as recorded in its `expansion.json`.
        parameters: number of elements.
        bytes_written: size of `blocks.safetensors`.
        seconds: how long it took.
    """

    directory: Path
    new_blocks: tuple[NewBlockRecord, ...]
    parameters: int
    bytes_written: int
    seconds: float


def open_pack(directory: str | Path) -> Pack:
    """Open a block pack.

    Raises:
        PackError: there is no `blocks.safetensors`.
        CheckpointError: one of its two files is malformed.
    """
    directory = Path(directory)
    if not (directory / BLOCKS_NAME).exists():
        raise PackError(f"{directory}: has no {BLOCKS_NAME}; this is not a block pack")
    return Pack(directory, read_expansion(directory), read_shard(contained(directory, BLOCKS_NAME)))


def check_pack(pack: Pack, base: Base) -> None:
    """Refuse a pack that was not made for this base; reads headers and the base's fingerprint only.

    Raises:
        PackError: it belongs to another base, or its tensors are not those of its new blocks.
    """
    _check_base(pack, base)
    path, new = pack.shard.path, pack.expansion.layout.new_indices
    held = {tensor.name: tensor for tensor in pack.shard.tensors}
    needed = {t.name: t for t in expanded_tensors(base, pack.expansion.layout) if t.block in new}
    if unused := held.keys() - needed.keys():
        raise PackError(f"{path}: tensor {min(unused)!r} belongs to no new block of {MANIFEST_NAME}")
    for name, planned in needed.items():
        place = base.family.split(name)
        if name not in held and place and not base.family.is_buffer(place[1]):
            raise PackError(f"{path}: tensor {name!r} is missing")
        if name in held and held[name].shape != planned.shape:
            raise _misfit(planned, held[name])


def merge_pack(
    base: str | Path,
    pack: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> ExpandResult:
    """Write base and pack as one expanded checkpoint: the base's bytes, and the pack's for the new blocks.

    Args:
        base: the base the pack was trained on.
        pack: the pack.
        out: the directory to create, whole or not at all.
        overwrite: replace `out`.
        shard_size: cut the weights into files of at most so many bytes; default: as the base's are.
        progress: called with (bytes done, bytes in all).

    Raises:
        PackError: the pack belongs to another base, or its tensors are not those of its new blocks.
        CheckpointError: the base or the pack is malformed.
        OutputError: `out` exists, overlaps an input, or does not fit the disk.
    """
    start = time.perf_counter()
    check_free(Path(out), overwrite=overwrite)
    opened, held = open_base(base), open_pack(pack)
    check_pack(held, opened)
    sourced = _sourced(expanded_tensors(opened, held.expansion.layout), held)
    prepared = PreparedCheckpoint(
        base=opened,
        plan=plan_files(opened.checkpoint, sourced, shard_size=shard_size),
        expansion=held.expansion,
    )
    return write_checkpoint(
        prepared, Path(out), overwrite=overwrite, inside=(held.directory,), progress=progress, start=start
    )


def extract_pack(
    expanded: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> ExtractResult:
    """Write the new blocks of an expanded checkpoint as a pack.

    Args:
        expanded: the expanded checkpoint, trained or not.
        out: the directory to create, whole or not at all.
        overwrite: replace `out`.
        progress: called with (bytes done, bytes in all).

    Raises:
        PackError: its base tensors are no longer the base's, so that a pack would lose their changes.
        CheckpointError: it is malformed, or not an expanded checkpoint.
        OutputError: `out` exists, overlaps the input, or does not fit the disk.
    """
    start = time.perf_counter()
    check_free(Path(out), overwrite=overwrite)
    expansion, checkpoint = read_expansion(Path(expanded)), Checkpoint.open(expanded)
    family = family_for(checkpoint.config, checkpoint.tensors, f"{expanded}/config.json")

    def in_base(name: str) -> str | None:
        return base_name(expansion, family, name)

    if fast_fingerprint(checkpoint, in_base) != expansion.base_fingerprint.fast:
        raise PackError(
            f"{expanded}: its base blocks differ from {expansion.base}'s (by fingerprint).\n"
            "They were trained too, and a pack of the new blocks would lose that: keep the whole checkpoint"
        )
    new = [tensor for name, tensor in checkpoint.tensors.items() if in_base(name) is None]
    plan = Plan((_pack_file(new, checkpoint.shards[0].metadata),), None)
    check_space(Path(out), plan.bytes_needed)
    with atomic_directory(Path(out), overwrite=overwrite, inside=(checkpoint.directory,)) as partial:
        write_weights(plan, partial, progress)
        (partial / MANIFEST_NAME).write_text(expansion.to_json(), "utf-8")
    return ExtractResult(
        directory=Path(out),
        new_blocks=expansion.new_blocks,
        parameters=count_parameters(new),
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - start,
    )


def _check_base(pack: Pack, base: Base) -> None:
    recorded, where = pack.expansion, pack.directory
    if recorded.family != base.family.name or recorded.base_blocks != base.depth:
        raise PackError(
            f"{where}: belongs to a {recorded.family} of {recorded.base_blocks} blocks ({recorded.base}), "
            f"not to {base.checkpoint.directory}, a {base.family.name} of {base.depth}"
        )
    found = fast_fingerprint(base.checkpoint)
    if found != recorded.base_fingerprint.fast:
        raise PackError(
            f"{where}: belongs to {recorded.base} with fingerprint {recorded.base_fingerprint.fast[:16]}…,\n"
            f"not to {base.checkpoint.directory} with fingerprint {found[:16]}…"
        )


def _sourced(planned: Iterable[PlannedTensor], pack: Pack) -> tuple[PlannedTensor, ...]:
    """Let the new blocks' tensors come from the pack, as bytes."""
    held = {tensor.name: tensor for tensor in pack.shard.tensors}
    return tuple(_from_pack(t, held[t.name]) if t.name in held else t for t in planned)


def _from_pack(planned: PlannedTensor, tensor: Tensor) -> PlannedTensor:
    if tensor.dtype != planned.dtype:
        raise _misfit(planned, tensor)
    return replace(planned, source=Copy(tensor.file, tensor.offset))


def _misfit(planned: PlannedTensor, tensor: Tensor) -> PackError:
    return PackError(
        f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
        f"the base needs {planned.dtype} {list(planned.shape)}"
    )


def _pack_file(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> PlannedFile:
    planned = (
        PlannedTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            length=tensor.length,
            source=Copy(tensor.file, tensor.offset),
            beside=BLOCKS_NAME,
            block=None,
        )
        for tensor in tensors
    )
    return PlannedFile(BLOCKS_NAME, metadata, aligned(planned))
