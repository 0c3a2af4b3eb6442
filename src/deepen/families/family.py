import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, get_args

from deepen.errors import FamilyError
from deepen.families.names import generic, spell_out
from deepen.families.per_layer import PerLayer

Zero = Literal["writes", "reads", "norms"]
"""What of a new block is filled so that it adds nothing: its residual writes; the values and the ungated half
of the feed-forward, which these write; or the gains of the norms before both (Shen et al. 2022)."""

REFUSALS: Final = "refused.toml"
TOWERS: Final = "towers.toml"
# Where the text model of a model with several towers stands, in files old and new and in memory:
# (what its base model's prefix becomes, what stands before its head).
_TOWERS: Final = (("model.language_model.", ""), ("language_model.model.", "language_model."))


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Tensors that come together in a block; a block has one alternative of each part.

    Attributes:
        part: what they are an alternative for, e.g. `mlp`.
        required: names a block of this kind always has, relative to `<layers>.<i>.`; `*` is a number.
        optional: names some checkpoints have.
    """

    part: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A config value with which new blocks cannot be exact, and why."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How llama.cpp runs a family, where deepen writes its GGUF files itself.

    Attributes:
        architecture: llama.cpp's name of it.
        model_types: the family's model types that are exactly this architecture.
        paired: block tensor -> config key with its number of heads. transformers rotates a head's two
            halves against each other, llama.cpp here neighbouring rows, so these rows change places.
    """

    architecture: str
    model_types: frozenset[str]
    paired: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What must be known of a model family to expand it exactly.

    Names of tensors are those of the dialect it was asked for, see `family_for`: some checkpoints leave the
    base model's prefix away, and models of several towers put one more before it.

    Attributes:
        name: the family's name, as recorded in `expansion.json`.
        model_types: the `model_type` values of `config.json` it covers.
        prefix: what the names of the base model begin with, e.g. `model.`.
        layers: prefix of the blocks, e.g. `model.layers`.
        tower: whether it is one tower of several: tensors of the others stand beside its own.
        section: key of `config.json` that holds this model's config, where it is not the whole.
        depth_key: config key that holds the number of blocks.
        trailing_key: config key that holds a number of further blocks behind the last, which predict tokens
            further ahead and are no part of the model that transformers loads.
        numbered: name before a number -> config key that says how many there are, e.g. of experts.
        per_layer: config values that depend on a block's number.
        block: the tensors of a block.
        buffers: those of them that a live model computes itself: never trained, so not in a pack.
        residual_writes: block tensor -> constant that makes its sub-layer add nothing. Names in memory stand
            beside those of the files where they differ.
        instead: `reads` and `norms`, where filling these in place of the residual writes is known to be
            exact too: each block tensor -> constant.
        projections: the last matrices of the sub-layers, where the residual writes are others: what other
            tools fill with zeros.
        outside_required: tensors outside the blocks that every checkpoint has.
        outside_optional: tensors outside the blocks that some checkpoints have.
        tied: tensor -> the tensor it repeats when embeddings are tied.
        tied_by_default: whether they are tied where the config does not say.
        section_ties: the same of the config in `section`; None where that has no say.
        refusals: config values with which it cannot be expanded.
        gguf: how its GGUF files are written; None where only llama.cpp's own converter can.
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    layers: str
    tower: bool = False
    section: str | None = None
    depth_key: str
    trailing_key: str | None
    numbered: Mapping[str, str]
    per_layer: PerLayer
    block: tuple[Alternative, ...]
    buffers: frozenset[str]
    residual_writes: Mapping[str, float]
    instead: Mapping[str, Mapping[str, float]]
    projections: frozenset[str]
    outside_required: tuple[str, ...]
    outside_optional: tuple[str, ...]
    tied: Mapping[str, str]
    tied_by_default: bool
    section_ties: bool | None = None
    refusals: tuple[Refusal, ...]
    gguf: Gguf | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a block, of each of which it has one alternative."""
        return tuple(dict.fromkeys(alternative.part for alternative in self.block))

    def split(self, tensor: str) -> tuple[int, str] | None:
        """Return (block index, name inside the block), or None for a tensor outside the blocks.

        The full prefix is matched, so `model.layers.3.` is never mistaken for `model.layers.30.`, nor a
        block's number for an expert's.
        """
        head = self.layers + "."
        if not tensor.startswith(head):
            return None
        number, dot, rest = tensor[len(head) :].partition(".")
        plain = number == "0" or (number.isascii() and number.isdigit() and number[0] != "0")
        # No model is deeper than nine digits, and Python refuses to read thousands of them.
        if not dot or not rest or not plain or len(number) > 9:
            return None
        return int(number), rest

    def join(self, block: int, rest: str) -> str:
        """Return the full name of tensor `rest` of block `block`."""
        return f"{self.layers}.{block}.{rest}"

    def fills(self, zero: Zero) -> Mapping[str, float]:
        """Return what is filled in a new block: block tensor -> constant, so that no sub-layer adds anything.

        Raises:
            FamilyError: it is not known to be exact in this family.
        """
        if zero == "writes":
            return self.residual_writes
        if zero not in self.instead:
            known = ", ".join(family.name for family in load_families() if zero in family.instead)
            raise FamilyError(
                f"zero {zero}: not known to be exact in the {self.name} family; choose zero writes\n"
                f"(known for {known})"
            )
        return self.instead[zero]

    def fill(self, rest: str, zero: Zero = "writes") -> float | None:
        """Return the constant with which tensor `rest` of a new block is filled; None for those that are not.

        Raises:
            FamilyError: see `fills`.
        """
        return self.fills(zero).get(generic(rest))

    def is_buffer(self, rest: str) -> bool:
        """Return whether a live model computes tensor `rest` of a block itself."""
        return generic(rest) in self.buffers

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the part of `config.json` that describes this model's blocks."""
        found = config[self.section] if self.section else config
        assert isinstance(found, Mapping)
        return found

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Return whether head and embeddings are one matrix, as transformers has it.

        It asks the whole config. Some models of several towers once had the value in their text config, and
        are tied if either says so.
        """
        if _said(config, "tie_word_embeddings", self.tied_by_default):
            return True
        if self.section_ties is None:
            return False
        return _said(self.text_config(config), "tie_word_embeddings", self.section_ties)

    def in_dialect(self, prefix: str, head: str) -> "Family":
        """Return the family with other prefixes before the names of the base model and of the head."""

        def rename(name: str) -> str:
            inside = name.startswith(self.prefix)
            return prefix + name[len(self.prefix) :] if inside else head + name

        return replace(
            self,
            prefix=prefix,
            layers=rename(self.layers),
            outside_required=tuple(map(rename, self.outside_required)),
            outside_optional=tuple(map(rename, self.outside_optional)),
            tied={rename(name): rename(other) for name, other in self.tied.items()},
        )


def _parse(text: str) -> Family:
    raw = tomllib.loads(text)
    outside = raw["outside"]
    return Family(
        name=raw["name"],
        model_types=tuple(raw["model_types"]),
        prefix=raw["prefix"],
        layers=raw["prefix"] + raw["layers"],
        depth_key=raw["depth_key"],
        trailing_key=raw.get("trailing_key"),
        numbered=raw.get("numbered", {}),
        per_layer=PerLayer.parse(raw.get("per_layer", {})),
        block=tuple(_alternative(part) for part in raw["block"]),
        buffers=frozenset(spell_out(raw.get("buffers", ()))),
        residual_writes=_constants(raw["residual_writes"]),
        instead={zero: _constants(raw[zero]) for zero in get_args(Zero) if zero in raw},
        projections=frozenset(spell_out(raw.get("projections", ()))),
        outside_required=spell_out(outside["required"]),
        outside_optional=spell_out(outside.get("optional", ())),
        tied=raw.get("tied", {}),
        tied_by_default=raw["tied_by_default"],
        refusals=tuple(Refusal(**refusal) for refusal in raw.get("refuse", ())),
        gguf=_gguf(raw["gguf"]) if "gguf" in raw else None,
    )


def _constants(raw: Mapping[str, float]) -> dict[str, float]:
    return {name: value for pattern, value in raw.items() for name in spell_out([pattern])}


def _alternative(raw: Mapping[str, Any]) -> Alternative:
    return Alternative(
        part=raw["part"],
        required=spell_out(raw.get("required", ())),
        optional=spell_out(raw.get("optional", ())),
    )


def _gguf(raw: Mapping[str, Any]) -> Gguf:
    paired = raw.get("paired", {})
    return Gguf(
        architecture=raw["architecture"],
        model_types=frozenset(raw["model_types"]),
        paired={name: key for pattern, key in paired.items() for name in spell_out([pattern])},
    )


@cache
def load_families() -> tuple[Family, ...]:
    """Read every family file of the package, by name."""
    folder = files("deepen.families")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return tuple(_load(name) for name in names if name not in (REFUSALS, TOWERS))


@cache
def _load(name: str) -> Family:
    return _parse((files("deepen.families") / name).read_text())


@cache
def load_refusals() -> Mapping[str, Any]:
    """Read the models that cannot be expanded exactly: `model_types` and `keys`, each with the reason."""
    return tomllib.loads((files("deepen.families") / REFUSALS).read_text())


@cache
def load_towers() -> Mapping[str, Any]:
    """Read the models of several towers whose text tower can be expanded, by `model_type`."""
    return tomllib.loads((files("deepen.families") / TOWERS).read_text())


def family_for(config: Mapping[str, Any], names: Iterable[str] = (), where: str = "config.json") -> Family:
    """Return the family of a model, in the dialect of its tensors.

    Args:
        config: the parsed `config.json`.
        names: the names of its tensors; default: those that transformers uses in memory.
        where: the config, for messages.

    Raises:
        FamilyError: deepen does not describe `model_type`, or knows that new blocks cannot be exact in it.
    """
    _refuse_known(config, where)
    family = _family_of(config)
    if family is None:
        known = ", ".join(
            sorted([*load_towers(), *(t for each in load_families() for t in each.model_types)])
        )
        raise FamilyError(f"{where}: {_model_types(config)} is not a family deepen knows\n(known: {known})")
    _refuse_values(family, config, where)
    return _in_dialect_of(family, names)


def family_named(name: str, where: str) -> Family:
    """Return the family of a name, as `expansion.json` has it, in the dialect of memory.

    Args:
        name: of the family.
        where: what names it, for messages.

    Raises:
        FamilyError: there is none.
    """
    found = next((family for family in load_families() if family.name == name), None)
    if found is None:
        raise FamilyError(f"{where}: {name!r} is not a family deepen knows")
    return found


def _family_of(config: Mapping[str, Any]) -> Family | None:
    model_type = config.get("model_type")
    tower = load_towers().get(model_type) if isinstance(model_type, str) else None
    if tower is None:
        return _by_model_type(model_type)
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        family = _by_model_type(inner.get("model_type", tower["text"]))
        return family and _as_tower(family, tower, "text_config")
    family = _by_model_type(tower["text"]) if tower.get("flat") else None
    return family and _as_tower(family, tower, None)


def _as_tower(family: Family, tower: Mapping[str, Any], section: str | None) -> Family:
    return replace(
        family,
        tower=True,
        section=section,
        tied_by_default=tower["tied_by_default"],
        section_ties=family.tied_by_default if section and tower.get("text_may_tie") else None,
    )


def _by_model_type(model_type: Any) -> Family | None:
    if isinstance(model_type, str) and model_type.isidentifier():
        # Most files have the name of their type; reading all takes a tenth of a second.
        own = files("deepen.families") / f"{model_type}.toml"
        if own.is_file() and model_type in (family := _load(own.name)).model_types:
            return family
    return next((f for f in load_families() if model_type in f.model_types), None)


def _said(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


def _parts(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The config and, in it, that of the text tower."""
    text = config.get("text_config")
    return (config, text) if isinstance(text, Mapping) else (config,)


def _model_types(config: Mapping[str, Any]) -> str:
    whole, *text = (repr(part.get("model_type"))[:80] for part in _parts(config))
    return f"model_type {whole}" + (f" with a text_config of {text[0]}" if text else "")


def _refuse_known(config: Mapping[str, Any], where: str) -> None:
    refused = load_refusals()
    for part in _parts(config):
        for key, why in refused["keys"].items():
            if part.get(key):
                raise FamilyError(f"{where}: {key}: {why}")
        model_type = part.get("model_type")
        if isinstance(model_type, str) and (why := refused["model_types"].get(model_type)):
            raise FamilyError(f"{where}: model_type {model_type!r} cannot be expanded exactly: {why}")


def _refuse_values(family: Family, config: Mapping[str, Any], where: str) -> None:
    text = family.text_config(config)
    for refusal in family.refusals:
        if text.get(refusal.key) == refusal.value:
            raise FamilyError(f"{where}: {refusal.key} is {refusal.value!r}: {refusal.why}")


def _in_dialect_of(family: Family, names: Iterable[str]) -> Family:
    """Choose the prefixes under which the names hold blocks; the usual ones where none do."""
    names = list(names)
    towers = _TOWERS if family.tower else ()
    for prefix, head in ((family.prefix, ""), *towers, ("", "")):
        spoken = family.in_dialect(prefix, head)
        if any(map(spoken.split, names)):
            return spoken
    return family.in_dialect(*towers[0]) if towers else family
