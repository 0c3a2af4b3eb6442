"""What to write, decided before anything is: pure data from headers, no tensor is read.

Expanding a base and merging a pack into it are one plan: a tensor of the result is a run of bytes of the
base, a constant, the mean of two tensors of the base, or a run of bytes of the pack.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import ITEM_BYTES, SINGLE, Checkpoint, Shard, Tensor, not_finite, write_header
from deepen.errors import CheckpointError, LayoutError
from deepen.expansion.layout import Layout
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, read_expansion
from deepen.expansion.neighbours import mean_sources
from deepen.expansion.sources import Copy, Fill, Source
from deepen.families import Family, check_quantised, check_tensors, family_for

_CACHE_LINE: Final = 64
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
# 8-bit floats have scales beside them, but a zero byte is zero whatever the scale.
ZEROABLE: Final = FLOATS | {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """One tensor of the result.

    Attributes:
        name: its full name.
        dtype: safetensors' name of its type.
        shape: its dimensions.
        length: number of bytes.
        source: where the bytes come from.
        beside: the file of the base whose counterpart in the result will hold it.
        block: its block in the result; None outside the blocks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int
    source: Source
    beside: str
    block: int | None


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file to write.

    Attributes:
        name: its name.
        metadata: its string metadata.
        tensors: its tensors in the order of their bytes.
        phase: where its data begin in a cache line. A tensor used where it is mapped gives results that
            differ in their last bits from those of one that lies otherwise.
    """

    name: str
    metadata: Mapping[str, str]
    tensors: tuple[PlannedTensor, ...]
    phase: int = field(default=0, kw_only=True)

    @cached_property
    def header(self) -> bytes:
        """Length and header, as the file begins."""
        head = write_header([(t.name, t.dtype, t.shape) for t in self.tensors], self.metadata)
        text = head[8:] + b" " * ((self.phase - len(head)) % _CACHE_LINE)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Number of bytes of the whole file."""
        return len(self.header) + sum(tensor.length for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """All weight files of a checkpoint to write, and the metadata of their index.

    Attributes:
        files: the files.
        index: `metadata` of the index file; None for a single file, which has no index.
    """

    files: tuple[PlannedFile, ...]
    index: Mapping[str, Any] | None

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every tensor, in the order of the files."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def bytes_written(self) -> int:
        """Size of the weight files."""
        return sum(file.size for file in self.files)

    @property
    def bytes_needed(self) -> int:
        """What they take on the disk at least: zeros are left as holes."""
        holes = sum(t.length for t in self.tensors if isinstance(t.source, Fill) and not t.source.value)
        return self.bytes_written - holes

    def index_text(self) -> str | None:
        """Return the text of the index file; None for a single file."""
        if self.index is None:
            return None
        places = {tensor.name: file.name for file in self.files for tensor in file.tensors}
        return (
            json.dumps({"metadata": dict(self.index), "weight_map": dict(sorted(places.items()))}, indent=2)
            + "\n"
        )


@dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint that was found fit for expansion.

    Attributes:
        checkpoint: the files.
        family: what its tensors mean, in its dialect.
        depth: its number of blocks.
        previous: its own record, if it was expanded before: its new blocks are base now.
    """

    checkpoint: Checkpoint
    family: Family
    depth: int
    previous: Expansion | None = None

    @property
    def block_tensors(self) -> dict[int, tuple[str, ...]]:
        """Names inside each block, by block."""
        held: dict[int, list[str]] = {block: [] for block in range(self.depth)}
        for name in self.checkpoint.tensors:
            if (place := self.family.split(name)) and place[0] < self.depth:
                held[place[0]].append(place[1])
        return {block: tuple(names) for block, names in held.items()}

    @property
    def parameters(self) -> int:
        """Number of elements in its files."""
        return count_parameters(self.checkpoint.tensors.values())


def open_base(directory: str | Path) -> Base:
    """Open a checkpoint as a base and account for each of its tensors.

    Raises:
        CheckpointError: malformed, packed, or not what its config, its family and its own record say.
        FamilyError: its family is unknown, or cannot be expanded exactly.
    """
    checkpoint = Checkpoint.open(directory)
    check_quantised(checkpoint.config, f"{directory}/config.json")
    family = family_for(checkpoint.config, checkpoint.tensors, f"{directory}/config.json")
    depth = check_tensors(family, checkpoint.config, checkpoint.tensors, str(directory))
    return Base(checkpoint=checkpoint, family=family, depth=depth, previous=_previous(checkpoint, depth))


def _previous(checkpoint: Checkpoint, depth: int) -> Expansion | None:
    path = checkpoint.directory / MANIFEST_NAME
    if not path.exists():
        return None
    previous = read_expansion(checkpoint.directory)
    if previous.layout.depth != depth:
        raise CheckpointError(f"{path}: describes {previous.layout.depth} blocks, the checkpoint has {depth}")
    return previous


def expanded_tensors(base: Base, layout: Layout) -> tuple[PlannedTensor, ...]:
    """Return every tensor of the freshly expanded checkpoint: the base's in its order, then the new blocks'.

    Raises:
        LayoutError: the layout is of another depth.
            Or two neighbours that a new block is to be made from are of different kinds.
        CheckpointError: what is to be filled has a dtype that cannot hold its fill.
        FamilyError: it is not known to be exact in the family.
    """
    if layout.base_blocks != base.depth:
        raise LayoutError(f"the layout is for {layout.base_blocks} blocks, the base has {base.depth}")
    family, tensors = base.family, base.checkpoint.tensors
    planned = []
    for tensor in tensors.values():
        place = family.split(tensor.name)
        moved = _copied(tensor, layout.position(place[0]), family, place[1]) if place else held_tensor(tensor)
        planned.append(moved)
    names = base.block_tensors
    for block in layout.new_blocks:
        means = mean_sources(family, base.checkpoint.config, base.depth, block, tensors)
        for rest in names[block.copy_of]:
            source = tensors[family.join(block.copy_of, rest)]
            copied = _copied(source, block.index, family, rest)
            value = family.fill(rest, block.zero)
            made = replace(copied, source=means.get(rest, copied.source))
            planned.append(made if value is None else _filled(copied, value, source.name))
    return tuple(planned)


def plan_files(base: Checkpoint, tensors: Sequence[PlannedTensor], *, shard_size: int | None = None) -> Plan:
    """Distribute tensors over files: as the base's are, or anew by size.

    A new block's tensors go into the file of the block they copy, after that file's base tensors, so that a
    whole run of base tensors is one copy.

    Args:
        base: gives names, metadata and index.
        tensors: what to write.
        shard_size: cut anew so that no file holds more bytes of tensors (unless a single one is larger).
    """
    if shard_size is not None:
        return _regroup(base, tensors, shard_size)
    files = tuple(
        PlannedFile(
            shard.path.name,
            shard.metadata,
            aligned(t for t in tensors if t.beside == shard.path.name),
            phase=_phase(shard),
        )
        for shard in base.shards
    )
    return Plan(files, None if base.index is None else _index(base.index, tensors))


def _phase(shard: Shard) -> int:
    phase = min((tensor.offset for tensor in shard.tensors), default=0) % _CACHE_LINE
    return phase if phase % 8 == 0 else 0


def count_parameters(tensors: Iterable[Tensor | PlannedTensor]) -> int:
    """Return the number of elements."""
    return sum(tensor.length // ITEM_BYTES[tensor.dtype] for tensor in tensors)


def not_finite_tensors(base: Checkpoint) -> tuple[str, ...]:
    """Return the names of tensors in which NaN or infinity was seen (large ones are sampled)."""
    return tuple(name for name, tensor in base.tensors.items() if not_finite(tensor))


def held_tensor(tensor: Tensor) -> PlannedTensor:
    """Give a tensor as something to copy, outside all blocks."""
    return PlannedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        length=tensor.length,
        source=Copy(tensor.file, tensor.offset),
        beside=tensor.file.name,
        block=None,
    )


def _copied(tensor: Tensor, block: int, family: Family, rest: str) -> PlannedTensor:
    return replace(held_tensor(tensor), name=family.join(block, rest), block=block)


def _filled(tensor: PlannedTensor, value: float, origin: str) -> PlannedTensor:
    """Put its fill in the place of a tensor copied from `origin`."""
    if tensor.dtype not in (FLOATS if value else ZEROABLE):
        raise CheckpointError(
            f"{tensor.beside}: tensor {origin!r} is {tensor.dtype}, for which there is no exact fill.\n"
            "Expand the unquantised model; the expanded one can be quantised afterwards"
        )
    return replace(tensor, source=Fill(float(value)))


def aligned(tensors: Iterable[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """As given, or else wide elements first: readers map a tensor only where its offset is a multiple."""
    given, offset = tuple(tensors), 0
    for tensor in given:
        if offset % ITEM_BYTES[tensor.dtype]:
            break
        offset += tensor.length
    else:
        return given
    return tuple(sorted(given, key=lambda tensor: -ITEM_BYTES[tensor.dtype]))


def _index(metadata: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    changed = {"total_size": sum(tensor.length for tensor in tensors)}
    if "total_parameters" in metadata:
        changed["total_parameters"] = count_parameters(tensors)
    return {**metadata, **changed}


def _regroup(base: Checkpoint, tensors: Sequence[PlannedTensor], shard_size: int) -> Plan:
    if shard_size < 1:
        raise LayoutError(f"shard size is {shard_size}: at least 1 byte is needed")
    groups: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensor in sorted(tensors, key=lambda tensor: -1 if tensor.block is None else tensor.block):
        if groups[-1] and held + tensor.length > shard_size:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.length
    metadata = base.shards[0].metadata
    if len(groups) == 1:
        return Plan((PlannedFile(SINGLE, metadata, aligned(groups[0])),), None)
    files = tuple(
        PlannedFile(f"model-{number:05}-of-{len(groups):05}.safetensors", metadata, aligned(group))
        for number, group in enumerate(groups, 1)
    )
    return Plan(files, _index(base.index or {}, tensors))
