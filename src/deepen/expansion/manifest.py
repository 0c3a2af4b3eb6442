"""`expansion.json`: the one record of which blocks are new."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from deepen.checkpoint import contained
from deepen.errors import CheckpointError
from deepen.expansion.layout import Layout, NewBlock

MANIFEST_NAME: Final = "expansion.json"
FORMAT_VERSION: Final = 1


class _Record(BaseModel):
    # Unknown keys are kept: a newer deepen may have written them.
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    # Left out where they say nothing.
    optional: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _compact(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            key: value
            for key, value in write(self).items()
            if value or value == 0 or key not in self.optional
        }


class Fingerprint(_Record):
    """What ties an expansion to its base.

    Attributes:
        fast: digest over every tensor's name, dtype, shape and sampled bytes.
        full: digest over all bytes, or None where it was never computed.
    """

    fast: str
    full: str | None = None


class FileRecord(_Record):
    """What it takes to write a file again, byte for byte.

    Attributes:
        digest: blake2b of its text; of a safetensors file, of its header.
        text: the text, or the header without its length, where it would not come out equal by itself.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"text"})

    digest: str
    text: str | None = None


Files = dict[str, FileRecord]


class AveragedPack(_Record):
    """A pack that went into an average.

    Attributes:
        share: its weight; those of all add up to 1.
        digest: SHA-256 of its `blocks.safetensors`.
    """

    share: float = Field(ge=0, le=1)
    digest: str


class NewBlockRecord(_Record):
    """One new block as recorded.

    Attributes:
        index: its position in the expanded model.
        after: the block of its stage's base it stands on (-1: the bottom).
        copy_of: the block of its stage's base it copies.
        filled: full tensor name -> the constant it was filled with.
        stage: number of the expansion that added it, from 0.
        pack: the block pack it came from, where several were stacked.
        damped: the factor on its residual writes since training, relative to what adds nothing; None: none.
        init: how it came to be, see `NewBlock`; None: as a copy.
        zero: what of it was filled, see `NewBlock`; None: its residual writes.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"pack", "damped", "init", "zero"})

    index: int = Field(ge=0)
    after: int = Field(ge=-1)
    copy_of: int = Field(ge=0)
    filled: dict[str, float]
    stage: int = Field(default=0, ge=0)
    pack: str | None = None
    damped: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    init: Literal["average", "transport"] | None = None
    zero: Literal["reads", "norms"] | None = None

    @property
    def placed(self) -> NewBlock:
        """The block as its stage's layout has it."""
        return NewBlock(
            index=self.index,
            after=self.after,
            copy_of=self.copy_of,
            init=self.init or "copy",
            zero=self.zero or "writes",
        )


class NewRows(_Record):
    """Rows of an extended vocabulary that were trained beside new blocks; the pack holds them.

    Attributes:
        first: number of rows before them.
        count: how many they are, the last of their tables.
        inputs: the base's tensors that are embeddings; with a tied head, the head too.
        outputs: a head of its own, and its bias.
    """

    first: int = Field(ge=1)
    count: int = Field(ge=1)
    inputs: tuple[str, ...] = Field(min_length=1, strict=False)
    outputs: tuple[str, ...] = Field(default=(), strict=False)

    @property
    def tables(self) -> tuple[str, ...]:
        """The tensors whose last rows they are."""
        return (*self.inputs, *self.outputs)


class EarlierStage(_Record):
    """What an earlier expansion was made from.

    Attributes:
        base: name or path of its base.
        base_fingerprint: its base's.
        base_blocks: number of blocks of its base.
        base_files: as in `Expansion`.
        packs: as in `Expansion`.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"base_files", "packs"})

    base: str
    base_fingerprint: Fingerprint
    base_blocks: int = Field(ge=1)
    base_files: Files = Field(default_factory=dict)
    packs: dict[str, Files] = Field(default_factory=dict)


class Expansion(_Record):
    """The content of `expansion.json`.

    A checkpoint can be expanded again. Then `base` is the expanded checkpoint it was made from, blocks of
    earlier stages are base blocks like any other, and `earlier` says what those stages were made from.

    Attributes:
        base: name or path of the base.
        base_fingerprint: what the base's tensors must hash to.
        family: name of the family file used.
        base_blocks: number of blocks of the base.
        new_blocks: the new blocks of all stages, by ascending index.
        earlier: the stages before this one, from the first.
        base_files: in an expanded checkpoint, what it takes to write the base's files again.
        packs: where several packs were stacked, by name from the bottom: the same of their files.
        averaged: where the blocks are an average of several packs', these by name.
        new_rows: in a pack, the rows that were trained beside its blocks; None: none were.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"earlier", "base_files", "packs", "averaged", "new_rows"})

    format_version: int = FORMAT_VERSION
    base: str
    base_fingerprint: Fingerprint
    family: str
    base_blocks: int = Field(ge=1)
    new_blocks: tuple[NewBlockRecord, ...] = Field(min_length=1, strict=False)
    earlier: tuple[EarlierStage, ...] = Field(default=(), strict=False)
    base_files: Files = Field(default_factory=dict)
    packs: dict[str, Files] = Field(default_factory=dict)
    averaged: dict[str, AveragedPack] = Field(default_factory=dict)
    new_rows: NewRows | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Expansion":
        indices = [block.index for block in self.new_blocks]
        if indices != sorted(set(indices)):
            raise ValueError("new_blocks are not in ascending order of index")
        if (highest := max(block.stage for block in self.new_blocks)) != self.stage:
            raise ValueError(f"new_blocks go up to stage {highest}, earlier has {len(self.earlier)} stages")
        stages = [*(stage.base_blocks for stage in self.earlier), self.base_blocks]
        places = {block.index: block for block in self.new_blocks}
        for stage in range(self.stage, -1, -1):
            places = _peeled(places, stage, stages[stage])
        return self

    @property
    def stage(self) -> int:
        """Number of this expansion, from 0."""
        return len(self.earlier)

    @property
    def latest_blocks(self) -> tuple[NewBlockRecord, ...]:
        """The blocks that are new to the base: those of this stage."""
        return tuple(block for block in self.new_blocks if block.stage == self.stage)

    @property
    def layout(self) -> Layout:
        """Where the blocks of this stage stand on the base."""
        return Layout(self.base_blocks, tuple(block.placed for block in self.latest_blocks))

    @property
    def portable(self) -> "Expansion":
        """The record as a block pack carries it: without what it takes to write the base again."""
        earlier = tuple(stage.model_copy(update={"base_files": {}}) for stage in self.earlier)
        return self.model_copy(update={"base_files": {}, "earlier": earlier})

    def to_json(self) -> str:
        """Return the text of `expansion.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def _peeled(places: Mapping[int, NewBlockRecord], stage: int, base_blocks: int) -> dict[int, NewBlockRecord]:
    """Check the blocks of a stage, the highest there is; return the others by their index in its base."""
    below, rest = 0, {}
    for index, block in sorted(places.items()):
        if block.stage != stage:
            rest[index - below] = block
            continue
        highest = max(block.after, block.copy_of + (block.init is not None))
        if index != block.after + 1 + below or highest >= base_blocks:
            raise ValueError(f"new block {block.index} contradicts its after {block.after}")
        below += 1
    if not below or any(index >= base_blocks for index in rest):
        raise ValueError(f"the blocks of stage {stage} do not fit a base of {base_blocks} blocks")
    return rest


def read_expansion(directory: Path) -> Expansion:
    """Read and check `directory/expansion.json`.

    Raises:
        CheckpointError: absent, not JSON, another format version, or inconsistent.
    """
    path = contained(directory, MANIFEST_NAME)
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
