import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, Checkpoint, atomic_directory
from deepen.errors import TrainingError
from deepen.expansion import Progress, carry, open_base, write_weights
from deepen.methods.method import widen
from deepen.model import DTYPES
from deepen.model.source import source_directory
from deepen.vocabulary import find_tables, plan_rows, read_vocabulary


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
        directory = source_directory(model)
        record = read_vocabulary(directory) if directory else None
        if record is None:
            raise TrainingError(
                f"train.method: rows: {directory or 'the model'} has no vocabulary.json, so no row is new\n"
                "(deepen vocabulary extend writes one)"
            )
        model.requires_grad_(False)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        first = record.base_rows
        rows = _new_part(embeddings, first)
        embeddings.register_forward_hook(_look_up(first))
        if head is not None:
            ends = _new_part(head, first)
            if head.weight is embeddings.weight:
                ends.weight = rows.weight
            head.register_forward_hook(_append(first))
        return widen({name: p for name, p in model.named_parameters() if p.requires_grad})

    def saved_dtypes(self, model: PreTrainedModel, base: Checkpoint) -> Mapping[str, torch.dtype]:
        """Those of the tables."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {
            names[id(parameter)]: DTYPES[base.tensors[table].dtype]
            for table, parameter in _new_rows(model, base).items()
        }

    def save(self, model: PreTrainedModel, run: Path, base: Checkpoint) -> Path:
        """Write `model/`: the base's bytes, but for the new rows."""
        target, rows = run / "model", _new_rows(model, base)
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


def _new_part(table: nn.Module, first: int) -> Any:
    """Give a table a part of its own kind for its rows from `first`: what it does to rows, that does too."""
    part: Any = copy.copy(table)
    part._parameters = {
        name: None if held is None else nn.Parameter(held.detach()[first:].clone())
        for name, held in table._parameters.items()
    }
    part._modules, part._forward_hooks, part.padding_idx = {}, type(table._forward_hooks)(), None
    table.add_module("new", part)
    return part


def _look_up(first: int) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    """Return a hook that gives ids from `first` on their vectors by the new part."""

    def hook(table: Any, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        ids = given[0]
        fresh = table.new((ids - first).clamp(min=0)).to(found.dtype)
        return torch.where((ids >= first)[..., None], fresh, found)

    return hook


def _append(first: int) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    """Return a hook that takes the logits from `first` on by the new part."""

    def hook(table: Any, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
        fresh = table.new(given[0].to(table.new.weight.dtype)).to(found.dtype)
        return torch.cat([found[..., :first], fresh], dim=-1)

    return hook


def _new_rows(model: PreTrainedModel, base: Checkpoint) -> dict[str, nn.Parameter]:
    """Return the trained rows by the names of the tables in the files."""
    tables = find_tables(open_base(base.directory))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = dict.fromkeys(tables.inputs, embeddings.new.weight)
    return found | {name: head.new.get_parameter(name.rpartition(".")[2]) for name in tables.outputs}
