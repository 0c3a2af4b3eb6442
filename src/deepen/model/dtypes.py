"""Precisions, by torch and by safetensors."""

from collections.abc import Mapping
from typing import Final

import torch
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.expansion import ROWS_PREFIX
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, read_expansion
from deepen.expansion.stages import previous_expansion
from deepen.families import Family
from deepen.model.names import FileNames, State, file_names
from deepen.model.record import expansion_of, new_tensors

FLOAT_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    **FLOAT_NAMES,
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FLOATS: Final = frozenset(FLOAT_NAMES.values())


def file_dtypes(model: PreTrainedModel, files: Checkpoint) -> dict[str, torch.dtype]:
    """Return tensor of a pack, by its name in files -> the precision in which files hold it, or its table.

    Args:
        model: an expanded model.
        files: its base's, or the base's base's, which hold the tensor it copies, or an expanded checkpoint's.
    """
    expansion = expansion_of(model)
    dtypes = written_dtypes(expansion, file_names(model, files), files, new_tensors(model))
    tables = expansion.new_rows.tables if expansion.new_rows else ()
    held = {table: files.tensors[table].dtype for table in tables if table in files.tensors}
    return dtypes | {ROWS_PREFIX + table: DTYPES[dtype] for table, dtype in held.items()}


def written_dtypes(
    expansion: Expansion, names: FileNames, files: Checkpoint, tensors: State
) -> dict[str, torch.dtype]:
    """Return tensor, by its name in files -> the precision in which files hold it, or what it copies.

    Args:
        expansion: the model's record.
        names: how its tensors are called.
        files: a checkpoint of this stage, or of an earlier one's base.
        tensors: live name -> tensor.
    """
    held, dtypes = _expansion_in(files), {}
    same = held is not None and held.portable == expansion.portable
    origins = _origins(expansion, names.family, held)
    for name in names.of(tensors):
        place = names.family.split(name)
        origin = name if same or place is None else names.family.join(origins[place[0]], place[1])
        source = files.tensors.get(origin)
        if source is not None and source.dtype in _FLOATS:
            dtypes[name] = DTYPES[source.dtype]
    return dtypes


def _origins(expansion: Expansion, family: Family, held: Expansion | None) -> list[int]:
    """Return for each block the block it is or copies in files with the record `held`, None of a base."""
    origins, stage = list(expansion.layout.origins), held.stage if held else -1
    if held and stage == expansion.stage:
        return [held.layout.position(origin) for origin in origins]
    below = previous_expansion(expansion, family)
    while below and below.stage > stage:
        origins = [below.layout.origins[origin] for origin in origins]
        below = previous_expansion(below, family)
    return origins


def parameter_dtypes(
    model: PreTrainedModel, dtypes: Mapping[str, torch.dtype], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.dtype]:
    """Return parameter, by its name in the model -> the precision in which its values are written.

    Args:
        model: the model.
        dtypes: name in files -> precision.
        parameters: live name -> parameter. One of several experts has the widest precision of theirs.
    """
    names, found = file_names(model), {}
    for name, parameter in parameters.items():
        written = [dtypes[each] for each in names.of({name: parameter}) if each in dtypes]
        if written:
            found[name] = max(written, key=lambda dtype: dtype.itemsize)
    return found


def _expansion_in(files: Checkpoint) -> Expansion | None:
    present = (files.directory / MANIFEST_NAME).exists()
    return read_expansion(files.directory) if present else None
