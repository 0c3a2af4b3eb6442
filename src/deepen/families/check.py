from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from deepen.errors import CheckpointError
from deepen.families.family import Family


def check_tensors(family: Family, config: Mapping[str, Any], names: Iterable[str], where: str) -> int:
    """Account for every tensor of a checkpoint and return its number of blocks.

    Args:
        family: the description to hold it to.
        config: the parsed `config.json`.
        names: every tensor name of the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor has no place in the family, one is missing, or the number of blocks in
            the files is not the one the config states.
    """
    blocks, outside = _sort(family, names, where)
    depth = config.get(family.depth_key)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise CheckpointError(
            f"{where}: config.json: {family.depth_key} is {depth!r}, not a number of blocks"
        )
    if sorted(blocks) != list(range(depth)):
        raise CheckpointError(
            f"{where}: config.json says {family.depth_key} {depth}, the files hold blocks {_ranges(blocks)}"
        )
    _check_blocks(family, blocks, where)
    _check_outside(family, config, outside, where)
    return depth


def _sort(family: Family, names: Iterable[str], where: str) -> tuple[dict[int, set[str]], set[str]]:
    blocks: defaultdict[int, set[str]] = defaultdict(set)
    outside: set[str] = set()
    in_block = {*family.block_required, *family.block_optional}
    out_of_block = {*family.outside_required, *family.outside_optional}
    for name in names:
        place = family.split(name)
        if place and place[1] in in_block:
            blocks[place[0]].add(place[1])
        elif name in out_of_block:
            outside.add(name)
        else:
            raise CheckpointError(f"{where}: tensor {name!r} has no place in the {family.name} family")
    return dict(blocks), outside


def _check_blocks(family: Family, blocks: Mapping[int, set[str]], where: str) -> None:
    for index, held in sorted(blocks.items()):
        missing = set(family.block_required) - held
        if missing:
            raise CheckpointError(f"{where}: tensor {family.join(index, min(missing))!r} is missing")
        if held != blocks[0]:
            odd = min(held ^ blocks[0])
            raise CheckpointError(f"{where}: blocks 0 and {index} differ: only one of them has {odd!r}")


def _check_outside(family: Family, config: Mapping[str, Any], held: set[str], where: str) -> None:
    missing = set(family.outside_required) - held
    if not config.get("tie_word_embeddings", False):
        missing |= set(family.tied) - held
    if missing:
        raise CheckpointError(f"{where}: tensor {min(missing)!r} is missing")


def _ranges(blocks: Iterable[int]) -> str:
    numbers = sorted(blocks)
    if not numbers:
        return "none"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers[:12])) + (", …" if len(numbers) > 12 else "")
