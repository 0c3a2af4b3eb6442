"""Rows for new pieces, in every tensor that has one a token.

Old rows are copied as bytes. A new row is the mean of the rows of the tokens the piece stands for; or, if
that is asked, in a head of its own the mean of all rows. Means are computed in float64 and rounded once.

The second bounds what the new rows take from the old ones: the logit of such a row is the mean of all V old
logits, so its probability is their geometric mean, at most 1 / V. P new rows then raise the loss on a text
without new pieces by at most log(1 + P / V) nats a token, whatever the model (J. Hewitt, "Initializing new
word embeddings for pretrained language models", 2021). For the first there is no such bound.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import torch

from deepen.checkpoint import Checkpoint, Tensor, byte_count, tensor_reader
from deepen.expansion import Copy, Plan, PlannedTensor, Run, held_tensors, plan_files, with_last_rows

Head = Literal["parts", "average"]

_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS_AT_ONCE: Final = 1024


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
    last = {name: Run(Copy(path, 0), path.stat().st_size) for name, path in added.items()}
    return with_last_rows(plan_files(base, tensors), last)


def _longer(tensor: PlannedTensor, count: int) -> PlannedTensor:
    shape = (tensor.shape[0] + count, *tensor.shape[1:])
    return replace(tensor, shape=shape, length=byte_count(tensor.dtype, shape))
