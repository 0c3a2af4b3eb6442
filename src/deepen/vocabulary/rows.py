"""Rows for new pieces, in every tensor that has one a token.

Old rows are copied as bytes. A new row is the mean of the rows of the tokens the piece stands for; or, if
that is asked, in a head of its own the mean of all rows. Means are computed in float64 and rounded once.

The second bounds what the new rows take from the old ones: the logit of such a row is the mean of all V old
logits, so its probability is their geometric mean, at most 1 / V. P new rows then raise the loss on a text
without new pieces by at most log(1 + P / V) nats a token, whatever the model (J. Hewitt, "Initializing new
word embeddings for pretrained language models", 2021). For the first there is no such bound.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch

from deepen.checkpoint import Checkpoint, Tensor, byte_count, tensor_reader
from deepen.errors import CheckpointError
from deepen.expansion import (
    Base,
    Copy,
    Plan,
    PlannedFile,
    PlannedTensor,
    WrittenFile,
    held_tensors,
    plan_files,
)

Head = Literal["parts", "average"]

_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS_AT_ONCE: Final = 1024


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
        if tensor.dtype not in _DTYPES or tensor.shape[0] != rows:
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


def new_rows(tensor: Tensor, replaced: Sequence[Sequence[int]] | None, count: int) -> Iterator[bytes]:
    """Compute a table's new rows, little-endian in its own precision.

    Args:
        tensor: the table.
        replaced: for each new piece the old rows whose mean it takes; None: all rows.
        count: number of new pieces.
    """
    dtype, width = _DTYPES[tensor.dtype], tensor.length // tensor.shape[0]
    with tensor_reader(tensor) as read:

        def rows(first: int, number: int) -> torch.Tensor:
            data = bytearray(read(first * width, number * width))
            return torch.frombuffer(data, dtype=dtype).view(number, -1).double()

        if replaced is None:
            starts = range(0, tensor.shape[0], _ROWS_AT_ONCE)
            parts = [rows(at, min(_ROWS_AT_ONCE, tensor.shape[0] - at)).sum(0) for at in starts]
            yield from [_bytes(torch.stack(parts).sum(0) / tensor.shape[0], dtype)] * count
            return
        for numbers in replaced:
            yield _bytes(torch.cat([rows(number, 1) for number in numbers]).mean(0), dtype)


def _bytes(row: torch.Tensor, dtype: torch.dtype) -> bytes:
    return row.to(dtype).view(torch.uint8).numpy().tobytes()


def plan_rows(base: Checkpoint, added: Mapping[str, Path], longer: int) -> Plan:
    """Plan a checkpoint's weight files with other last rows in its tables.

    Args:
        base: gives everything else.
        added: table -> file that holds its last rows.
        longer: how many rows more than the checkpoint's the tables have; 0: the last ones are replaced.
    """
    held = held_tensors(base)
    tensors = tuple(_longer(tensor, longer) if tensor.name in added else tensor for tensor in held)
    plan = plan_files(base, tensors)
    return replace(plan, files=tuple(_in_runs(file, added) for file in plan.files))


def _longer(tensor: PlannedTensor, count: int) -> PlannedTensor:
    shape = (tensor.shape[0] + count, *tensor.shape[1:])
    return replace(tensor, shape=shape, length=byte_count(tensor.dtype, shape))


def _in_runs(file: PlannedFile, added: Mapping[str, Path]) -> WrittenFile:
    """Give a file whose header is done with the old and the new rows of a table as two runs of bytes."""
    runs: list[PlannedTensor] = []
    for tensor in file.tensors:
        if tensor.name not in added:
            runs.append(tensor)
            continue
        new = added[tensor.name]
        length = new.stat().st_size
        runs.append(replace(tensor, length=tensor.length - length))
        runs.append(replace(tensor, length=length, source=Copy(new, 0)))
    return WrittenFile(file.name, file.metadata, tuple(runs), file.header[8:])
