"""Tables that have one row a token, and checkpoints whose last rows are others."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from deepen.errors import CheckpointError
from deepen.expansion.base_files import WrittenFile
from deepen.expansion.plan import FLOATS, Base, Plan, PlannedFile, PlannedTensor
from deepen.expansion.sources import Source

ROWS_PREFIX: Final = "new_rows."
"""What the name of a table is preceded by where a block pack holds its last rows."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tensors of a base that have one row a token.

    Attributes:
        inputs: the embeddings; with tied embeddings they are the head too.
        outputs: a head of its own, and its bias.
        rows: how many rows each has.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Run:
    """So many bytes from somewhere."""

    source: Source
    length: int


def find_tables(base: Base) -> Tables:
    """Find them by the family's names and check their sizes against the config.

    Raises:
        CheckpointError: one is not a table of floats, or has other than `vocab_size` rows.
    """
    family, tensors = base.family, base.checkpoint.tensors
    where = base.checkpoint.directory
    inputs = tuple(dict.fromkeys(name for name in family.tied.values() if name in tensors))
    heads = [name for name in family.tied if name in tensors]
    biases = [bias for name in heads if (bias := name.removesuffix("weight") + "bias") in tensors]
    rows = family.text_config(base.checkpoint.config).get("vocab_size")
    for name in (*inputs, *heads, *biases):
        tensor = tensors[name]
        if tensor.dtype not in FLOATS or tensor.shape[0] != rows:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; "
                f"a table of floats with vocab_size = {rows} rows is needed"
            )
    if not inputs:
        raise CheckpointError(f"{where}: has no embeddings by the names of the family {family.name}")
    assert isinstance(rows, int)
    if family.is_tied(base.checkpoint.config):
        return Tables(inputs=(*inputs, *heads), outputs=tuple(biases), rows=rows)
    return Tables(inputs=inputs, outputs=(*heads, *biases), rows=rows)


def with_last_rows(plan: Plan, last: Mapping[str, Run]) -> Plan:
    """Let the last rows of tables come from elsewhere.

    Args:
        plan: what to write.
        last: table -> where the bytes of its last rows lie.
    """
    return replace(plan, files=tuple(_in_runs(file, last) for file in plan.files))


def _in_runs(file: PlannedFile, last: Mapping[str, Run]) -> WrittenFile:
    """Give a file whose header is done with the first and the last rows of a table as two runs of bytes."""
    runs: list[PlannedTensor] = []
    for tensor in file.tensors:
        if tensor.name not in last:
            runs.append(tensor)
            continue
        new = last[tensor.name]
        runs.append(replace(tensor, length=tensor.length - new.length))
        runs.append(replace(tensor, length=new.length, source=new.source))
    return WrittenFile(file.name, file.metadata, tuple(runs), file.header[8:])
