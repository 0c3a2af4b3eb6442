from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepen.blocks import BLOCKS_NAME
from deepen.checkpoint import Checkpoint, atomic_directory, fast_fingerprint, resolve_base, write_file
from deepen.errors import CheckpointError, PackError
from deepen.expansion.manifest import MANIFEST_NAME, read_expansion
from deepen.model.dtypes import file_dtypes
from deepen.model.insert import insert_blocks
from deepen.model.record import attach_record, expansion_of, new_parameters
from deepen.model.tensors import save_tensors


def save_blocks(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model's new blocks as a block pack: `blocks.safetensors` and `expansion.json`.

    Args:
        model: an expanded model.
        directory: written whole or not at all.
        dtypes: parameter name -> precision on disk; default: that of the base's files where the model was
            loaded from a directory, otherwise the model's own.
        overwrite: replace an existing directory.

    Raises:
        PackError: the model has no record of new blocks.
        OutputError: the directory exists.
    """
    expansion = expansion_of(model)
    tensors = new_parameters(model)
    with atomic_directory(Path(directory), overwrite=overwrite) as staged:
        save_tensors(staged / BLOCKS_NAME, tensors, dtypes or _source_dtypes(model))
        write_file(staged / MANIFEST_NAME, expansion.to_json())
    return Path(directory)


def load(
    base: str | Path,
    pack: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load a base and put a block pack on it, or load an expanded checkpoint.

    No code of the checkpoint's or the pack's is run.

    Args:
        base: directory or hub id of the base; without `pack`, of any checkpoint.
        pack: directory of a block pack.
        dtype: precision in memory; default: the checkpoint's.
        device: where the model goes.

    Returns:
        A plain transformers model in eval mode.

    Raises:
        CheckpointError: the base cannot be read.
        PackError: the pack is malformed or was made for another base.
    """
    directory = resolve_base(str(base))
    checkpoint = Checkpoint.open(directory)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype or "auto", trust_remote_code=False, local_files_only=True
    )
    if pack is not None:
        _attach(model, checkpoint, Path(pack), str(base))
    elif (directory / MANIFEST_NAME).exists():
        attach_record(model, read_expansion(directory))
    return model.to(device).eval()


def _source_dtypes(model: PreTrainedModel) -> Mapping[str, torch.dtype] | None:
    try:
        return file_dtypes(model, Checkpoint.open(model.name_or_path))
    except CheckpointError:
        return None


def _attach(model: PreTrainedModel, checkpoint: Checkpoint, pack: Path, base: str) -> None:
    expansion = read_expansion(pack)
    found = fast_fingerprint(checkpoint)
    if found != expansion.base_fingerprint.fast:
        raise PackError(
            f"{pack}: was made for another base ({expansion.base}, fingerprint "
            f"{expansion.base_fingerprint.fast[:16]}…)\n{base} has fingerprint {found[:16]}…"
        )
    try:
        tensors = load_file(pack / BLOCKS_NAME)
    except (OSError, SafetensorError) as error:
        raise PackError(f"{pack / BLOCKS_NAME}: cannot be read ({error})") from None
    insert_blocks(model, expansion.layout, base=base)
    attach_record(model, expansion)
    parameters = new_parameters(model)
    if tensors.keys() != parameters.keys():
        raise PackError(
            f"{pack / BLOCKS_NAME}: tensor {min(tensors.keys() ^ parameters.keys())!r} does not match"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise PackError(
                    f"{pack / BLOCKS_NAME}: tensor {name!r} has shape {list(tensors[name].shape)}, "
                    f"the base's blocks want {list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
