from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from deepen.errors import CheckpointError
from deepen.families.family import Alternative, Family
from deepen.families.names import generic, number_in

# What quantisation to 8-bit floats puts beside a weight.
_SCALES: Final = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")


def check_tensors(family: Family, config: Mapping[str, Any], names: Iterable[str], where: str) -> int:
    """Account for every tensor of a checkpoint and return its number of blocks.

    Args:
        family: the description to hold it to, in the checkpoint's dialect.
        config: the parsed `config.json`.
        names: every tensor name of the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor has no place in the family, one is missing, or the number of blocks in
            the files is not the one the config states.
    """
    blocks, outside = _sort(family, names, where)
    text = family.text_config(config)
    depth = _depth(family, text, len(blocks), where)
    last = depth + trailing_blocks(family, config)
    if not any(len(blocks) == count and blocks.keys() == set(range(count)) for count in (depth, last)):
        raise CheckpointError(
            f"{where}: config.json says {family.depth_key} {depth}, the files hold blocks {_ranges(blocks)}"
        )
    _check_blocks(family, text, {index: blocks[index] for index in range(depth)}, where)
    _check_outside(family, config, outside, where)
    return depth


def _depth(family: Family, text: Mapping[str, Any], found: int, where: str) -> int:
    key, general = family.depth_key, "num_hidden_layers"
    depth = text.get(key)
    if family.tower and depth is None:
        depth = found  # the class has a default, which the files agree with or they would not load
    if key != general and general in text:  # which transformers then takes instead
        raise CheckpointError(f"{where}: config.json: {general} overrides {key}; write {key} alone")
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise CheckpointError(f"{where}: config.json: {key} is {depth!r}, not a number of blocks")
    return depth


def trailing_blocks(family: Family, config: Mapping[str, Any]) -> int:
    """Return how many blocks may stand behind the last one of the model, to predict further ahead."""
    count = family.text_config(config).get(family.trailing_key) if family.trailing_key else 0
    return count if isinstance(count, int) else 0


def _sort(family: Family, names: Iterable[str], where: str) -> tuple[dict[int, set[str]], set[str]]:
    blocks: defaultdict[int, set[str]] = defaultdict(set)
    outside: set[str] = set()
    for name in names:
        if place := family.split(name):
            blocks[place[0]].add(place[1])
        elif _has_place(family, name):
            outside.add(name)
        else:
            raise _unplaced(family, name, where)
    return dict(blocks), outside


def _has_place(family: Family, name: str) -> bool:
    """Whether a tensor outside the blocks belongs here; of the other towers of a model anything does."""
    known = {*family.outside_required, *family.outside_optional}
    return generic(name) in known or (family.tower and not name.startswith(family.prefix))


def _check_blocks(
    family: Family, config: Mapping[str, Any], blocks: Mapping[int, set[str]], where: str
) -> None:
    seen: dict[tuple[Alternative, ...], tuple[int, set[str]]] = {}
    for index, held in sorted(blocks.items()):
        kinds = {generic(name) for name in held}
        chosen = tuple(_choose(family, part, kinds) for part in family.parts)
        for name in (name for alternative in chosen for name in alternative.required):
            if name not in kinds:
                raise CheckpointError(f"{where}: tensor {family.join(index, name)!r} is missing")
        _check_places(family, index, held, chosen, where)
        weights = {name for name in held if name.rpartition(".")[2] not in _SCALES}  # some blocks have none
        _check_numbers(family, config, index, weights, where)
        other, names = seen.setdefault(chosen, (index, weights))
        if weights != names:
            odd = min(weights ^ names)
            raise CheckpointError(f"{where}: blocks {other} and {index} differ: only one of them has {odd!r}")


def _choose(family: Family, part: str, kinds: set[str]) -> Alternative:
    """Return the alternative a block has of a part: the least is missing of it, then the most is held."""
    return max(
        (alternative for alternative in family.block if alternative.part == part),
        key=lambda each: (-len(set(each.required) - kinds), len(kinds & {*each.required, *each.optional})),
    )


def _check_places(
    family: Family, index: int, held: set[str], chosen: tuple[Alternative, ...], where: str
) -> None:
    known = {name for each in chosen for name in (*each.required, *each.optional)}
    for name in sorted(held):
        if generic(name) in known:
            continue
        stem, _, last = name.rpartition(".")
        if last not in _SCALES or not {generic(f"{stem}.weight"), generic(stem)} & known:
            raise _unplaced(family, family.join(index, name), where)


def _check_numbers(family: Family, config: Mapping[str, Any], index: int, held: set[str], where: str) -> None:
    """Of what is numbered inside a block, such as experts, each must be there with all its tensors."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for name in held:
        if (number := number_in(name)) is not None:
            found[generic(name)].add(number)
    for kind, numbers in sorted(found.items()):
        stem = kind.partition(".*")[0]
        wanted = config.get(family.numbered.get(stem, ""), len(numbers))
        if isinstance(wanted, int) and (odd := numbers ^ set(range(wanted))):
            name = family.join(index, kind.replace("*", str(min(odd)), 1))
            what = "is missing" if min(odd) < wanted else f"is one of more than {wanted}"
            raise CheckpointError(f"{where}: tensor {name!r} {what}")


def _check_outside(family: Family, config: Mapping[str, Any], held: set[str], where: str) -> None:
    missing = set(family.outside_required) - held
    # A checkpoint of the base model alone has no head; transformers would make one up where it is not tied.
    # Where the head has two names, of files and in memory, one of them is there.
    if not family.is_tied(config) and not held & family.tied.keys():
        missing |= family.tied.keys()
    if missing:
        raise CheckpointError(f"{where}: tensor {min(missing)!r} is missing")


def _unplaced(family: Family, name: str, where: str) -> CheckpointError:
    return CheckpointError(f"{where}: tensor {name!r} has no place in the {family.name} family")


def _ranges(blocks: Iterable[int]) -> str:
    numbers = sorted(blocks)
    if not numbers:
        return "none"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers[:12])) + (", …" if len(numbers) > 12 else "")
