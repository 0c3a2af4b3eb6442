"""Which blocks of an expanded checkpoint are new, where nothing says so: held to the base, or by zeros."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from deepen.checkpoint import Tensor, tensor_digest, tensor_reader, workers
from deepen.errors import PackError
from deepen.expansion import Base
from deepen.expansion.apply import fill_bytes
from deepen.families import generic

Digests = dict[str, bytes]


def block_digests(base: Base) -> dict[int | None, Digests]:
    """Digest of every tensor (fast) by block and name inside it; those outside the blocks under None.

    What a live model computes itself is left out: not every tool writes it.
    """

    def digest(tensor: Tensor) -> bytes:
        with tensor_reader(tensor) as read:
            return tensor_digest("", tensor.dtype, tensor.shape, tensor.length, read, "fast")

    tensors = list(base.checkpoint.tensors.values())
    with ThreadPoolExecutor(workers()) as pool:
        hashed = list(pool.map(digest, tensors))
    found: dict[int | None, Digests] = {}
    for tensor, value in zip(tensors, hashed, strict=True):
        block, name = base.family.split(tensor.name) or (None, tensor.name)
        if block is None or not base.family.is_buffer(name):
            found.setdefault(block, {})[name] = value
    return found


def held_to(
    opened: Base, digests: Mapping[int | None, Digests], base: Base, asked: Collection[int]
) -> list[int]:
    """Find the base's blocks, in their order; the rest is new."""
    if base.family.name != opened.family.name:
        raise PackError(
            f"{opened.checkpoint.directory}: is a {opened.family.name}, not made from a {base.family.name}"
        )
    wanted = block_digests(base)
    _check_outside(opened, digests[None], base, wanted[None])
    new, block = [], 0
    for index in range(opened.depth):
        same = block < base.depth and digests[index] == wanted[block]
        if same and index not in asked:
            block += 1
        elif not asked or index in asked:
            new.append(index)
        else:
            break
    if block < base.depth:
        raise _nowhere(opened, base, block, opened.depth - base.depth)
    if not new:
        raise PackError(f"{opened.checkpoint.directory}: has no blocks besides the base's {base.depth}")
    return new


def _check_outside(opened: Base, held: Digests, base: Base, wanted: Digests) -> None:
    for name in sorted(held.keys() & wanted.keys()):
        if held[name] != wanted[name]:
            ours, theirs = (side.checkpoint.tensors[name] for side in (opened, base))
            raise PackError(
                f"{opened.checkpoint.directory}: tensor {name!r} is not the base's"
                f"{_other_kind(ours, theirs)}.\n"
                "It was trained too, or the base is another one: a record of new blocks would not say so"
            )


def _other_kind(ours: Tensor, theirs: Tensor) -> str:
    was, should = (f"{t.dtype} {list(t.shape)}" for t in (ours, theirs))
    return f" ({was}, the base's {should})" if was != should else ""


def _nowhere(opened: Base, base: Base, block: int, extra: int) -> PackError:
    where, name = opened.checkpoint.directory, min(base.block_tensors[block])
    theirs = base.checkpoint.tensors[base.family.join(block, name)]
    kinds = {t.dtype for t in opened.checkpoint.tensors.values()}
    why = (
        f"It is {theirs.dtype} there, and {', '.join(sorted(kinds))} here: saved again in another precision"
        if theirs.dtype not in kinds
        else "It was trained too, or the base is another one; then keep the whole checkpoint"
    )
    return PackError(
        f"{where}: block {block} of {base.checkpoint.directory} is nowhere in it, in order "
        f"({opened.depth} blocks, {max(extra, 0)} more than the base).\n{why}"
    )


def zero_blocks(opened: Base) -> list[int]:
    """Find blocks that add nothing: their residual writes at their fills, or their last matrices at zero."""
    found = [index for index in range(opened.depth) if filled_writes(opened, index)]
    if not found:
        raise PackError(
            f"{opened.checkpoint.directory}: no block has its last matrices zeroed: it has no new blocks, or "
            "they are trained.\nGive the base it was made from (--base), or say which are new (--new 4,9)"
        )
    if len(found) == opened.depth:
        raise PackError(f"{opened.checkpoint.directory}: every block adds nothing; none can be the base's")
    return found


def filled_writes(opened: Base, index: int) -> dict[str, float]:
    """Return what holds block `index` at adding nothing: tensor name -> constant; empty where nothing does.

    Biases alone say nothing: many a base has none but zeros.
    """
    for wanted in possible_fills(opened, index):
        held = {name: value for name, value in wanted.items() if _is_constant(opened, name, value)}
        weights = {name for name in wanted if not name.endswith("bias")}
        if weights and weights <= held.keys():
            return held
    return {}


def possible_fills(opened: Base, index: int) -> list[dict[str, float]]:
    """What the block may have been filled with: by other tools the last matrices, or what deepen fills."""
    family, names = opened.family, opened.block_tensors[index]
    ours = {family.join(index, n): value for n in names if (value := family.fill(n)) is not None}
    theirs = {family.join(index, n): 0.0 for n in names if generic(n) in family.projections}
    return [theirs, ours] if theirs else [ours]


def _is_constant(opened: Base, name: str, value: float) -> bool:
    tensor = opened.checkpoint.tensors[name]
    step = 1 << 20
    try:
        element = fill_bytes(tensor.dtype, value)
    except KeyError:  # a dtype without such a number
        return False
    with tensor_reader(tensor) as read:
        for offset in range(0, tensor.length, step):
            count = min(step, tensor.length - offset)
            if read(offset, count) != element * (count // len(element)):
                return False
    return True
