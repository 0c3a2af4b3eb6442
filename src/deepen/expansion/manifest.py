"""`expansion.json`: the one record of which blocks are new."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepen.errors import CheckpointError
from deepen.expansion.layout import Layout, NewBlock
from deepen.families import Family

MANIFEST_NAME: Final = "expansion.json"
FORMAT_VERSION: Final = 1


class _Record(BaseModel):
    # Unknown keys are kept: a newer deepen may have written them.
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class Fingerprint(_Record):
    """What ties an expansion to its base.

    Attributes:
        fast: digest over every tensor's name, dtype, shape and sampled bytes.
        full: digest over all bytes, or None where it was never computed.
    """

    fast: str
    full: str | None = None


class NewBlockRecord(_Record):
    """One new block as recorded.

    Attributes:
        index: its position in the expanded model.
        after: the base block it stands on (-1: the bottom).
        copy_of: the base block it copies.
        filled: full tensor name -> the constant it was filled with.
        stage: number of the expansion that added it, from 0.
    """

    index: int = Field(ge=0)
    after: int = Field(ge=-1)
    copy_of: int = Field(ge=0)
    filled: dict[str, float]
    stage: int = Field(default=0, ge=0)


class Expansion(_Record):
    """The content of `expansion.json`.

    Attributes:
        base: name or path of the base.
        base_fingerprint: what the base's tensors must hash to.
        family: name of the family file used.
        base_blocks: number of blocks of the base.
        new_blocks: the new blocks, by ascending index.
    """

    format_version: int = FORMAT_VERSION
    base: str
    base_fingerprint: Fingerprint
    family: str
    base_blocks: int = Field(ge=1)
    new_blocks: tuple[NewBlockRecord, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _consistent(self) -> "Expansion":
        indices = [block.index for block in self.new_blocks]
        if indices != sorted(set(indices)):
            raise ValueError("new_blocks are not in ascending order of index")
        if indices[-1] >= self.base_blocks + len(indices):
            raise ValueError(f"new block {indices[-1]} lies outside the expanded model")
        for below, block in enumerate(self.new_blocks):
            if block.index != block.after + 1 + below or block.copy_of >= self.base_blocks:
                raise ValueError(f"new block {block.index} contradicts its after {block.after}")
        return self

    @property
    def layout(self) -> Layout:
        """The layout this record describes."""
        blocks = (NewBlock(index=b.index, after=b.after, copy_of=b.copy_of) for b in self.new_blocks)
        return Layout(self.base_blocks, tuple(blocks))

    def to_json(self) -> str:
        """Return the text of `expansion.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def describe_expansion(
    layout: Layout,
    family: Family,
    block_tensors: Mapping[int, tuple[str, ...]],
    base: str,
    fingerprint: Fingerprint,
) -> Expansion:
    """Build the record of a fresh expansion.

    Args:
        layout: which block goes where.
        family: says which tensors are residual writes.
        block_tensors: names inside each base block, by base block index.
        base: name or path of the base.
        fingerprint: the base's.
    """
    records = tuple(
        NewBlockRecord(
            index=block.index,
            after=block.after,
            copy_of=block.copy_of,
            filled={
                family.join(block.index, name): float(family.residual_writes[name])
                for name in block_tensors[block.copy_of]
                if name in family.residual_writes
            },
        )
        for block in layout.new_blocks
    )
    return Expansion(
        base=base,
        base_fingerprint=fingerprint,
        family=family.name,
        base_blocks=layout.base_blocks,
        new_blocks=records,
    )


def base_name(expansion: Expansion, family: Family, name: str) -> str | None:
    """Return what tensor `name` of the expanded model is called in the base; None for a new block's."""
    place = family.split(name)
    if place is None:
        return name
    positions = expansion.layout.base_positions
    if place[0] not in positions:
        return None
    return family.join(positions.index(place[0]), place[1])


def expand_config(config: Mapping[str, Any], family: Family, layout: Layout) -> dict[str, Any]:
    """Return the `config.json` of the expanded model: its depth, and every per-layer list extended."""
    expanded = dict(config)
    expanded[family.depth_key] = layout.depth
    for key in family.per_layer_keys:
        if isinstance(values := config.get(key), list):
            expanded[key] = [values[origin] for origin in layout.origins]
    return expanded


def read_expansion(directory: Path) -> Expansion:
    """Read and check `directory/expansion.json`.

    Raises:
        CheckpointError: absent, not JSON, another format version, or inconsistent.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        found = "is not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: {found}; give an expanded checkpoint or a block pack")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not found; this is not an expanded checkpoint or block pack of deepen's"
        )
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}; this deepen reads format_version {FORMAT_VERSION}"
        )
    try:
        return Expansion.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "expansion"
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None
