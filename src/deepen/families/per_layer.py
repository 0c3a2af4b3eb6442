"""Config values that depend on a block's number, and what becomes of them when blocks are added.

Three forms occur in the configs of transformers: a list with one entry a block (`layer_types`), a list of
block numbers (`mlp_only_layers`), and a number of leading blocks (`first_k_dense_replace`). Where a list is
absent, transformers makes it from each block's number; then it has to be written out, because new blocks
shift the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from deepen.errors import CheckpointError, LayoutError

# Lists that transformers gives a meaning in any family; one that stands in a config is always extended.
_LISTS: Final = ("layer_types", "mlp_layer_types")


@dataclass(frozen=True)
class Setting:
    """A number of a family: that of a config key where the config has it, else a default."""

    default: Any
    key: str | None = None

    @classmethod
    def parse(cls, raw: Any) -> "Setting":
        """Read `4`, or `{key = "sliding_window_pattern", default = 6}`."""
        return cls(raw["default"], raw["key"]) if isinstance(raw, Mapping) else cls(raw)

    def of(self, config: Mapping[str, Any]) -> Any:
        """Return its value in a config."""
        return self.default if self.key is None else config.get(self.key, self.default)

    def number_of(self, config: Mapping[str, Any], least: int = 0) -> int:
        """Return its value in a config, which must be a whole number of at least `least`.

        Raises:
            CheckpointError: it is none.
        """
        value = self.of(config)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CheckpointError(f"config.json: {self.key} is {value!r:.80}, not a number from {least}")
        return value


@dataclass(frozen=True, kw_only=True)
class Predicate:
    """Which blocks a rule singles out: those, by number i from 0, for which everything given holds.

    Attributes:
        every: (i + 1) is a multiple of it.
        not_every: (i + 1) is no multiple of it.
        start: i is at least it.
        below: i is less than it.
        when: config values that must all be set (neither false, 0 nor null).
        unless: another list of the config, whose entry i must be 0 or false.
    """

    every: Setting | None = None
    not_every: Setting | None = None
    start: Setting | None = None
    below: Setting | None = None
    when: tuple[Setting, ...] = ()
    unless: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Predicate":
        """Read it from a table of a family file."""
        numbers = {k: Setting.parse(raw[k]) for k in ("every", "not_every", "start", "below") if k in raw}
        when = tuple(Setting(default, key) for key, default in raw.get("when", {}).items())
        return cls(**numbers, when=when, unless=raw.get("unless"))

    def holds(self, block: int, config: Mapping[str, Any]) -> bool:
        """Return whether it holds for a block under a config."""
        tests = (
            self.every is None or (block + 1) % self.every.number_of(config, 1) == 0,
            self.not_every is None or (block + 1) % self.not_every.number_of(config, 1) != 0,
            self.start is None or block >= self.start.number_of(config),
            self.below is None or block < self.below.number_of(config),
            self.unless is None or not config[self.unless][block],
        )
        return all(tests) and all(setting.of(config) for setting in self.when)


@dataclass(frozen=True, kw_only=True)
class PerLayerList:
    """A config list with one entry a block: `value` where the predicate holds, else `otherwise`."""

    key: str
    value: Any
    otherwise: Any
    predicate: Predicate

    def derive(self, config: Mapping[str, Any], depth: int) -> list[Any]:
        """Return the list transformers makes where the config has none."""
        return [
            self.value if self.predicate.holds(block, config) else self.otherwise for block in range(depth)
        ]


@dataclass(frozen=True, kw_only=True)
class BlockNumbers:
    """A config list of block numbers; a block is meant, too, where the predicate holds.

    `reset` are the config values that make the predicate hold nowhere.
    """

    key: str
    predicate: Predicate
    reset: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LeadingBlocks:
    """A config value that says how many of the lowest blocks are of one kind."""

    key: str
    default: int


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """Everything of a family's config that depends on block numbers, in the order it is worked out."""

    lists: tuple[PerLayerList, ...] = ()
    numbers: tuple[BlockNumbers, ...] = ()
    leading: tuple[LeadingBlocks, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "PerLayer":
        """Read the `[per_layer]` table of a family file."""
        lists = tuple(
            PerLayerList(key=key, value=r["value"], otherwise=r["otherwise"], predicate=Predicate.parse(r))
            for key, r in raw.get("lists", {}).items()
        )
        numbers = tuple(
            BlockNumbers(key=key, predicate=Predicate.parse(r), reset=r.get("reset", {}))
            for key, r in raw.get("numbers", {}).items()
        )
        leading = tuple(LeadingBlocks(key=key, default=d) for key, d in raw.get("leading", {}).items())
        return cls(lists=lists, numbers=numbers, leading=leading)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys concerned."""
        numbers, leading = (rule.key for rule in self.numbers), (rule.key for rule in self.leading)
        return (*(rule.key for rule in self.lists), *numbers, *leading)

    def off_index(self, config: Mapping[str, Any], depth: int) -> tuple[str, ...]:
        """Return the lists of a config that say of some block other than its number would.

        They cannot be left out: a reader that works the kinds out from the numbers would be wrong.
        """
        known = {key: value for key, value in config.items() if key not in self.keys}
        found = []
        for rule in self.lists:
            known[rule.key] = rule.derive(known, depth)
            if isinstance(stands := config.get(rule.key), list) and stands != known[rule.key]:
                found.append(rule.key)
        return tuple(found)

    def reorder(self, config: Mapping[str, Any], depth: int, origins: Sequence[int]) -> dict[str, Any]:
        """Return the values that change when block j of a new model is block `origins[j]` of this one.

        Args:
            config: the values of the model as it is.
            depth: its number of blocks.
            origins: for each block of the new model, the block whose kind it has.

        Raises:
            CheckpointError: a list is none, or has not one entry a block.
            LayoutError: the new model cannot be written in these terms.
        """
        known, after, changed = dict(config), dict(config), dict[str, Any]()
        for key in (*(r.key for r in self.lists), *(r.key for r in self.numbers), *_LISTS):
            if not isinstance(value := config.get(key, []), list | None):
                raise CheckpointError(f"config.json: {key} is {value!r:.80}, not a list")
        for rule in self.lists:
            stands = isinstance(known.get(rule.key), list)
            values = known[rule.key] if stands else rule.derive(known, depth)
            moved = _reordered(rule.key, values, depth, origins)
            if stands or len(set(values)) > 1 or moved != rule.derive(after, len(origins)):
                changed[rule.key] = moved
            known[rule.key], after[rule.key] = values, moved
        for key in _LISTS:
            if isinstance(values := config.get(key), list) and key not in changed:
                changed[key] = _reordered(key, values, depth, origins)
        for numbers in self.numbers:
            changed |= _renumbered(numbers, config, depth, origins)
        for leading in self.leading:
            changed |= _recounted(leading, config, origins)
        return changed


def _reordered(key: str, values: list[Any], depth: int, origins: Sequence[int]) -> list[Any]:
    if len(values) != depth:
        raise CheckpointError(f"config.json: {key} has {len(values)} entries for {depth} blocks")
    return [values[origin] for origin in origins]


def _renumbered(
    rule: BlockNumbers, config: Mapping[str, Any], depth: int, origins: Sequence[int]
) -> dict[str, Any]:
    listed = {block for block in config.get(rule.key) or () if isinstance(block, int)}
    derived = {block for block in range(depth) if rule.predicate.holds(block, config)}
    found = [block for block, origin in enumerate(origins) if origin in listed | derived]
    if not found and not config.get(rule.key):
        return {}
    return {rule.key: found, **(rule.reset if derived else {})}


def _recounted(rule: LeadingBlocks, config: Mapping[str, Any], origins: Sequence[int]) -> dict[str, Any]:
    before = config.get(rule.key, rule.default)
    before = 0 if before is None else Setting(before, rule.key).number_of(config)
    kinds = [origin < before for origin in origins]
    count = sum(kinds)
    if kinds != [True] * count + [False] * (len(kinds) - count):
        odd = kinds.index(False)
        raise LayoutError(
            f"{rule.key}: a copy of one of the lowest {before} blocks would stand above block {odd}, of "
            "another kind,\nand the config can only count the lowest blocks: place new blocks with --after"
        )
    return {rule.key: count} if count != before or rule.key in config else {}
