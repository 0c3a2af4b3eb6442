"""Is an expanded checkpoint exactly its base, byte by byte? It is held to the plan that would write it."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.checkpoint import (
    CHUNK,
    ITEM_BYTES,
    Checkpoint,
    Tensor,
    decode,
    fast_fingerprint,
    full_fingerprint,
    max_abs_difference,
    tensor_reader,
    workers,
)
from deepen.expansion.apply import Progress, fill_bytes
from deepen.expansion.config_json import expand_config
from deepen.expansion.manifest import Expansion, read_expansion
from deepen.expansion.plan import Base, PlannedTensor, expanded_tensors, open_base
from deepen.expansion.sources import Copy, Fill, Mean
from deepen.expansion.stages import describe_expansion

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The answer.

    Attributes:
        identical: nothing differs.
        first_difference: one line that says where and what; None if identical.
        differing: names of the tensors that are missing, unexpected, or not what they must be.
        max_abs_difference: the largest difference in the first tensor whose bytes differ; 0 if none do, None
            where there is no number to give (a missing tensor, another shape or dtype).
        tensors: number of tensors compared.
        bytes: number of bytes compared.
        base_only: whether only base tensors were compared.
        full_fingerprint: the base's, where it was asked for.
    """

    identical: bool
    first_difference: str | None
    differing: tuple[str, ...]
    max_abs_difference: float | None
    tensors: int
    bytes: int
    base_only: bool
    full_fingerprint: str | None = None


def verify_bytes(
    base: str | Path,
    expanded: str | Path,
    *,
    base_only: bool = False,
    full: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Compare an expanded checkpoint with its base: tensors, config and record.

    Every base tensor must be there unchanged, what is filled in a new block hold its fill, its other tensors
    equal the block they copy, or be what its record says they were made as, and nothing else be
    there. The config must be the base's but for what expansion changes.

    Args:
        base: the base's directory.
        expanded: the expanded checkpoint's.
        base_only: compare only the base's tensors, for a model whose new blocks have been trained.
        full: compute the base's full fingerprint too, and hold it to the recorded one if there is one.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: one of the two cannot be read, or `expanded` has no `expansion.json`.
        FamilyError: what the record says of filling is not known of the family.
    """
    opened, checkpoint, expansion = open_base(base), Checkpoint.open(expanded), read_expansion(Path(expanded))
    if (family := expansion.family) != opened.family.name or expansion.base_blocks != opened.depth:
        what = f"it was made from a {family} of {expansion.base_blocks} blocks"
        found = f"the base is a {opened.family.name} of {opened.depth}"
        return _verdict(base_only, faults=[f"expansion.json: {what}, {found}"])
    planned = expanded_tensors(opened, expansion.layout)
    new = expansion.layout.new_indices
    compared = [t for t in planned if not (base_only and t.block in new)]
    digest = full_fingerprint(opened.checkpoint) if full else None
    faults = _record_faults(opened, expansion, digest)
    if not base_only:
        faults += _config_faults(opened, checkpoint.config, expansion)
    return _compare(compared, planned, checkpoint.tensors, faults, base_only, digest, progress)


def _compare(
    compared: list[PlannedTensor],
    planned: tuple[PlannedTensor, ...],
    held: Mapping[str, Tensor],
    faults: list[str],
    base_only: bool,
    digest: str | None,
    progress: Progress | None,
) -> Verification:
    wanted = {tensor.name for tensor in planned}
    lost = [t.name for t in planned if t.name not in held]
    extra = [name for name in held if name not in wanted]
    pairs = [(tensor, held[tensor.name]) for tensor in compared if tensor.name in held]
    moved = _differing(pairs, progress)
    said, distance = _describe(*moved[0]) if moved else (None, 0.0)
    structure = [f"tensor {name!r} is missing" for name in lost]
    structure += [f"tensor {name!r} is unexpected" for name in extra]
    return _verdict(
        base_only,
        faults=[*([said] if said else []), *structure, *faults],
        differing=(*(tensor.name for tensor, _ in moved), *lost, *extra),
        distance=distance if moved or not (structure or faults) else None,
        tensors=len(pairs),
        size=sum(tensor.length for tensor, _ in pairs),
        digest=digest,
    )


def _verdict(
    base_only: bool,
    *,
    faults: list[str],
    differing: tuple[str, ...] = (),
    distance: float | None = None,
    tensors: int = 0,
    size: int = 0,
    digest: str | None = None,
) -> Verification:
    return Verification(
        identical=not faults,
        first_difference=faults[0] if faults else None,
        differing=differing,
        max_abs_difference=distance,
        tensors=tensors,
        bytes=size,
        base_only=base_only,
        full_fingerprint=digest,
    )


def _record_faults(base: Base, expansion: Expansion, digest: str | None) -> list[str]:
    """Where `expansion.json` disagrees with the base it names."""
    recorded = expansion.base_fingerprint
    described = describe_expansion(
        expansion.layout, base.family, base.block_tensors, expansion.base, recorded, base.previous
    )
    if len(expansion.new_blocks) != len(described.new_blocks):
        return ["expansion.json: the new blocks of earlier stages are not the base's"]
    faults = []
    for was, should in zip(expansion.new_blocks, described.new_blocks, strict=True):
        if (was.index, was.stage) != (should.index, should.stage):
            faults.append(f"expansion.json: new block {was.index}: the base's own record says otherwise")
        if was.filled != should.filled:
            faults.append(
                f"expansion.json: new block {was.index}: filled is not the family's {was.placed.zero} "
                "that make it add nothing"
            )
    if recorded.fast != fast_fingerprint(base.checkpoint):
        faults.append(
            "expansion.json: base_fingerprint.fast is not the base's: it was made from another base"
        )
    if digest and recorded.full not in (None, digest):
        faults.append(
            "expansion.json: base_fingerprint.full is not the base's: it was made from another base"
        )
    return faults


def _config_faults(base: Base, config: Mapping[str, Any], expansion: Expansion) -> list[str]:
    wanted = expand_config(base.checkpoint.config, base.family, expansion.layout)
    keys = [*wanted, *(key for key in config if key not in wanted)]
    return [
        f"config.json: {key} is {config.get(key)!r:.80}, should be {wanted.get(key)!r:.80}"
        for key in keys
        if (key in config) != (key in wanted) or config.get(key) != wanted.get(key)
    ]


def _differing(
    pairs: list[tuple[PlannedTensor, Tensor]], progress: Progress | None
) -> list[tuple[PlannedTensor, Tensor]]:
    total, done, found = sum(tensor.length for tensor, _ in pairs), 0, []
    with ThreadPoolExecutor(workers()) as pool:
        for pair, differs in zip(pairs, pool.map(_differs, pairs), strict=True):
            if differs:
                found.append(pair)
            done += pair[0].length
            if progress:
                progress(done, total)
    return found


def _differs(pair: tuple[PlannedTensor, Tensor]) -> bool:
    planned, tensor = pair
    if (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
        return True
    return any(wanted != found for _, wanted, found in _chunks(planned, tensor))


def _chunks(planned: PlannedTensor, tensor: Tensor) -> Iterator[tuple[int, bytes, bytes]]:
    """Both tensors' bytes side by side: (offset, should be, is)."""
    with _planned_reader(planned) as wanted, tensor_reader(tensor) as found:
        for offset in range(0, tensor.length, CHUNK):
            count = min(CHUNK, tensor.length - offset)
            yield offset, wanted(offset, count), found(offset, count)


@contextmanager
def _planned_reader(planned: PlannedTensor) -> Iterator[Read]:
    with ExitStack() as stack:
        if isinstance(planned.source, Copy):
            yield stack.enter_context(tensor_reader(_as_tensor(planned, planned.source)))
        elif isinstance(planned.source, Mean):
            from deepen.expansion.fusion import mean_reader

            yield stack.enter_context(mean_reader(planned.source))
        else:
            element = fill_bytes(planned.dtype, planned.source.value)
            yield lambda offset, count: element * (count // len(element))


def _as_tensor(planned: PlannedTensor, source: Copy) -> Tensor:
    return Tensor(
        name=planned.name,
        dtype=planned.dtype,
        shape=planned.shape,
        file=source.file,
        offset=source.offset,
        length=planned.length,
    )


def _describe(planned: PlannedTensor, tensor: Tensor) -> tuple[str, float | None]:
    """Return one line on how a tensor differs, and the largest difference over its elements."""
    name = f"tensor {planned.name!r}"
    if (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
        was, should = (f"{t.dtype} {list(t.shape)}" for t in (tensor, planned))
        return f"{name} is {was}, should be {should}", None
    said, distances = "", []
    for offset, wanted, found in _chunks(planned, tensor):
        if wanted != found:
            said = said or f"{name}{_first(planned, offset, wanted, found)}"
            distances.append(max_abs_difference(planned.dtype, wanted, found))
    numbers = [distance for distance in distances if distance is not None]
    return said, max(numbers) if numbers else None


def _first(planned: PlannedTensor, offset: int, wanted: bytes, found: bytes) -> str:
    low, high = 0, len(wanted)
    while high - low > 1:  # the first difference lies in [low, high)
        middle = (low + high) // 2
        low, high = (low, middle) if wanted[low:middle] != found[low:middle] else (middle, high)
    item = ITEM_BYTES[planned.dtype]
    begin = low - low % item
    should, was = (decode(planned.dtype, data[begin : begin + item]) for data in (wanted, found))
    origin = {Fill: "its fill", Mean: "its neighbours' mean"}.get(type(planned.source), "the base's")
    values = ": {}, should be {} {}".format(*_apart(was[0], origin, should[0])) if was and should else ""
    return f" differs from element {(offset + begin) // item}{values}"


def _apart(was: float, origin: str, should: float) -> tuple[str, str, str]:
    """Write two numbers with as many digits as it takes to tell them apart."""
    written = [(f"{was:.{digits}g}", origin, f"{should:.{digits}g}") for digits in (6, 9, 17)]
    return next((each for each in written if each[0] != each[2]), written[-1])
