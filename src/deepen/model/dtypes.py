"""Precisions, by torch and by safetensors."""

from collections.abc import Mapping
from typing import Final

import torch
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.expansion.manifest import MANIFEST_NAME
from deepen.model.record import expansion_of, new_parameters
from deepen.model.structure import family_of

DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def file_dtypes(model: PreTrainedModel, files: Checkpoint) -> dict[str, torch.dtype]:
    """Return new parameter -> the precision in which files hold it.

    Args:
        model: an expanded model.
        files: its base's, which hold the tensor it copies, or an expanded checkpoint's.
    """
    origins, family = expansion_of(model).layout.origins, family_of(model)
    expanded = (files.directory / MANIFEST_NAME).exists()
    dtypes = {}
    for name in new_parameters(model):
        place = family.split(name)
        assert place is not None, name
        source = files.tensors.get(name if expanded else family.join(origins[place[0]], place[1]))
        if source is not None and source.dtype in DTYPES:
            dtypes[name] = DTYPES[source.dtype]
    return dtypes
