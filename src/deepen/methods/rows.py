from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, Checkpoint, atomic_directory
from deepen.errors import TrainingError
from deepen.expansion import NewRows, Progress, carry, find_tables, open_base, write_weights
from deepen.methods.method import widen
from deepen.model import DTYPES
from deepen.model.rows import part_rows, parted_rows
from deepen.model.source import source_directory
from deepen.vocabulary import plan_rows, read_vocabulary


class Rows:
    """The rows of new pieces train, in embeddings and head; every other byte of what is saved is the base's.

    It is the first stage of Chinese-LLaMA (arXiv 2304.08177), which trains embeddings alone, without the old
    rows. New rows are parameters of their own, so optimiser and weight decay never meet an old one; beside
    them the tables stay as they are, frozen.
    """

    name: Final = "rows"
    keeps_base: Final = True

    def prepare(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Put the new rows beside the tables.

        Raises:
            TrainingError: the model's vocabulary was not extended.
        """
        rows = extended_rows(model, "train.method: rows")
        model.requires_grad_(False)
        return widen(part_rows(model, rows))

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Those of the tables."""
        return row_dtypes(model, rows_of(base), base)

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `model/`: the base's bytes, but for the new rows."""
        target, rows = run / "model", parted_rows(model, rows_of(base))
        with atomic_directory(target, overwrite=True, inside=(base.directory,)) as staged:
            carry(base.directory, staged)
            (staged / CONFIG).write_bytes((base.directory / CONFIG).read_bytes())
            files = {table: staged / f".{number}" for number, table in enumerate(rows)}
            for table, file in files.items():
                held = rows[table].detach().cpu().to(DTYPES[base.tensors[table].dtype]).contiguous()
                file.write_bytes(held.view(-1).view(torch.uint8).numpy().tobytes())
            write_weights(plan_rows(base, files, 0), staged)
            for file in files.values():
                file.unlink()
        return target

    def merge(
        self, model: PreTrainedModel, run: Path, base: Checkpoint, progress: Progress | None
    ) -> Path | None:
        """Return None: what is saved is an ordinary checkpoint."""
        return None


def extended_rows(model: PreTrainedModel, asked: str) -> NewRows:
    """Return which rows of a model's tables are new, by the files it was loaded from.

    Args:
        model: the model.
        asked: the key of the recipe that wants to know, for the message.

    Raises:
        TrainingError: its vocabulary was not extended.
    """
    directory = source_directory(model)
    if directory is None or read_vocabulary(directory) is None:
        raise TrainingError(
            f"{asked}: {directory or 'the model'} has no vocabulary.json, so no row is new\n"
            "(deepen vocabulary extend writes one)"
        )
    return rows_of(Checkpoint.open(directory))


def rows_of(base: Checkpoint) -> NewRows:
    """Return which rows of a base with an extended vocabulary are new."""
    record, tables = read_vocabulary(base.directory), find_tables(open_base(base.directory))
    assert record is not None
    return NewRows(
        first=record.base_rows,
        count=tables.rows - record.base_rows,
        inputs=tables.inputs,
        outputs=tables.outputs,
    )


def row_dtypes(model: PreTrainedModel, rows: NewRows, base: Checkpoint) -> dict[str, torch.dtype]:
    """Return the live name of each of the rows that were put beside tables -> the precision of its table."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: DTYPES[base.tensors[table].dtype]
        for table, parameter in parted_rows(model, rows).items()
    }
