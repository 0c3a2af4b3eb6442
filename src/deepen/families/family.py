import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from deepen.errors import FamilyError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What must be known of a model family to expand it exactly.

    Attributes:
        name: the family's name, as recorded in `expansion.json`.
        model_types: the `model_type` values of `config.json` it covers.
        layers: prefix of the blocks, both in the files and in memory, e.g. `model.layers`.
        depth_key: config key that holds the number of blocks.
        per_layer_keys: config keys whose value is a list with one entry a block.
        block_required: block tensors every block has, relative to `<layers>.<i>.`.
        block_optional: block tensors that some checkpoints have.
        block_buffers: those of them that a live model computes itself: never trained, so not in a pack.
        residual_writes: block tensor -> constant that makes its sub-layer add nothing.
        outside_required: tensors outside the blocks that every checkpoint has.
        outside_optional: tensors outside the blocks that some checkpoints have.
        tied: tensor -> the tensor it repeats when embeddings are tied.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    depth_key: str
    per_layer_keys: tuple[str, ...]
    block_required: tuple[str, ...]
    block_optional: tuple[str, ...]
    block_buffers: tuple[str, ...]
    residual_writes: Mapping[str, float]
    outside_required: tuple[str, ...]
    outside_optional: tuple[str, ...]
    tied: Mapping[str, str]

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


def _parse(text: str) -> Family:
    raw = tomllib.loads(text)
    return Family(
        name=raw["name"],
        model_types=tuple(raw["model_types"]),
        layers=raw["layers"],
        depth_key=raw["depth_key"],
        per_layer_keys=tuple(raw["per_layer_keys"]),
        block_required=tuple(raw["block"]["required"]),
        block_optional=tuple(raw["block"]["optional"]),
        block_buffers=tuple(raw["block"]["buffers"]),
        residual_writes=raw["residual_writes"],
        outside_required=tuple(raw["outside"]["required"]),
        outside_optional=tuple(raw["outside"]["optional"]),
        tied=raw["tied"],
    )


@cache
def load_families() -> tuple[Family, ...]:
    """Read every family file of the package, by name."""
    folder = files("deepen.families")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return tuple(_parse((folder / name).read_text()) for name in names)


def family_for(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """Return the family of a parsed `config.json`.

    Raises:
        FamilyError: `model_type` is absent or not one deepen describes.
    """
    model_type = config.get("model_type")
    if config.get("per_layer_config"):
        raise FamilyError(
            f"{where}: per_layer_config: models whose blocks differ in config are not supported"
        )
    for family in load_families():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for family in load_families() for t in family.model_types))
    raise FamilyError(f"{where}: model_type {model_type!r} is not a family deepen knows\n(known: {known})")
