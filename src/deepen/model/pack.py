from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepen.blocks import BLOCKS_NAME, Pack, check_pack, open_pack
from deepen.checkpoint import Checkpoint, atomic_directory, resolve_base, write_file
from deepen.errors import CheckpointError, PackError
from deepen.expansion import MANIFEST_NAME, open_base
from deepen.model.dtypes import file_dtypes
from deepen.model.insert import insert_blocks
from deepen.model.record import attach_record, expansion_of, find_expansion, new_parameters, source_checkpoint
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
        dtypes: parameter name -> precision on disk; default: that of the files the model was loaded from,
            otherwise the model's own.
        overwrite: replace an existing directory.

    Raises:
        PackError: the model has no record of new blocks.
        OutputError: the directory exists, or overlaps the one the model was loaded from.
    """
    expansion, files = expansion_of(model), source_checkpoint(model)
    tensors = new_parameters(model)
    if dtypes is None and files is not None:
        dtypes = file_dtypes(model, files)
    inside = (files.directory,) if files else ()
    with atomic_directory(Path(directory), overwrite=overwrite, inside=inside) as staged:
        save_tensors(staged / BLOCKS_NAME, tensors, dtypes)
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
    directory = resolve_base(base)
    if pack is None:
        model = _pretrained(Checkpoint.open(directory), dtype)
        find_expansion(model)
    else:
        opened, held = open_base(directory), open_pack(pack)
        check_pack(held, opened)
        model = _pretrained(opened.checkpoint, dtype)
        _attach(model, held, str(base))
    return model.to(device).eval()


def _pretrained(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load by transformers, which only warns where it fills a missing tensor with random numbers."""
    where = checkpoint.directory
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype or "auto",
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: transformers cannot load it: {reason[:300]}") from None
    if missing := found["missing_keys"]:
        raise CheckpointError(f"{where}: tensor {min(missing)!r} is missing")
    assert isinstance(model, PreTrainedModel)
    return model


def _attach(model: PreTrainedModel, pack: Pack, base: str) -> None:
    """Put the blocks of a pack that fits on its base."""
    insert_blocks(model, pack.expansion.layout, base=base, fingerprint=pack.expansion.base_fingerprint)
    attach_record(model, pack.expansion)
    try:
        tensors = load_file(pack.shard.path)
    except (OSError, SafetensorError) as error:
        raise PackError(f"{pack.shard.path}: cannot be read ({error})") from None
    with torch.no_grad():
        for name, parameter in new_parameters(model).items():
            parameter.copy_(tensors[name])
