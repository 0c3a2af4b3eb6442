from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from deepen.blocks import BLOCKS_NAME, check_pack, open_pack
from deepen.checkpoint import Checkpoint, atomic_directory, resolve_base, write_file
from deepen.errors import CheckpointError
from deepen.expansion import MANIFEST_NAME, open_base
from deepen.model.decision import Switch
from deepen.model.dtypes import file_dtypes
from deepen.model.names import file_names
from deepen.model.record import expansion_of, find_expansion, new_tensors
from deepen.model.rows import packed_rows
from deepen.model.source import source_checkpoint
from deepen.model.switch import attach_checked, state_for
from deepen.model.switch_file import read_switch, recorded_packs
from deepen.model.switched import set_switch
from deepen.model.tensors import save_tensors

_SAFE: Final = {"trust_remote_code": False, "local_files_only": True}


def save_blocks(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model's new blocks as a block pack: `blocks.safetensors` and `expansion.json`.

    Of a model with several packs attached, those that are active are written, as one pack.

    Args:
        model: an expanded model.
        directory: written whole or not at all.
        dtypes: tensor name, as in files -> precision on disk; default: that of the files the model was
            loaded from, otherwise the model's own.
        overwrite: replace an existing directory.

    Raises:
        PackError: the model has no active new blocks.
        OutputError: the directory exists, or overlaps the one the model was loaded from.
    """
    expansion, files = expansion_of(model), source_checkpoint(model)
    tensors = file_names(model).state(new_tensors(model))
    if expansion.new_rows:
        tensors |= packed_rows(model, expansion.new_rows)
    if dtypes is None and files is not None:
        dtypes = file_dtypes(model, files)
    inside = (files.directory,) if files else ()
    with atomic_directory(Path(directory), overwrite=overwrite, inside=inside) as staged:
        save_tensors(staged / BLOCKS_NAME, tensors, dtypes)
        write_file(staged / MANIFEST_NAME, expansion.portable.to_json())
    return Path(directory)


def load(
    base: str | Path,
    pack: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    switch: str | Path | Switch | None = None,
) -> PreTrainedModel:
    """Load a base and put a block pack on it, or load an expanded checkpoint.

    No code of the checkpoint's or the pack's is run.

    Args:
        base: directory or hub id of the base; without `pack`, of any checkpoint.
        pack: directory or hub id of a block pack.
        dtype: precision in memory; default: the checkpoint's.
        device: where the model goes.
        switch: lets the model decide for each row of a batch whether the pack takes part: `auto`, a switch,
            or the directory of one, whose packs are attached where no pack is given. See `set_switch`.

    Returns:
        A plain transformers model in eval mode.

    Raises:
        CheckpointError: the base cannot be read.
        PackError: the pack is malformed or was made for another base, or there is none to switch.
        SwitchError: the switch cannot be read, or was made for other packs.
    """
    if switch is None or isinstance(switch, Switch) or switch == "auto":
        model = _load(base, {} if pack is None else {Path(pack).name: pack}, dtype)
    else:
        directory = Path(switch)
        switch, record = read_switch(directory)
        model = _load(base, recorded_packs(directory, record, pack), dtype)
    if switch is not None:
        set_switch(model, switch)
    return model.to(device).eval()


def _load(base: str | Path, packs: Mapping[str, str | Path], dtype: torch.dtype | None) -> PreTrainedModel:
    directory = resolve_base(base)
    if not packs:
        model = pretrained(Checkpoint.open(directory), dtype)
        find_expansion(model)
        return model
    opened, held = open_base(directory), {name: open_pack(pack) for name, pack in packs.items()}
    for pack in held.values():
        check_pack(pack, opened)
    model = pretrained(opened.checkpoint, dtype)
    for name, pack in held.items():
        attach_checked(model, pack, state_for(model, pack), name)
    return model


def model_class(where: Path) -> tuple[PretrainedConfig, Any]:
    """Return a config as transformers reads it, and the auto class that makes its model.

    Args:
        where: a checkpoint's directory, or its `config.json` alone.
    """
    config = AutoConfig.from_pretrained(where, **_SAFE)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return config, AutoModelForCausalLM if causal else AutoModelForImageTextToText


def pretrained(checkpoint: Checkpoint, dtype: torch.dtype | None, **options: Any) -> PreTrainedModel:
    """Load by transformers, which only warns where it fills a missing tensor with random numbers.

    Args:
        checkpoint: what to load.
        dtype: precision in memory; None: the checkpoint's.
        options: more arguments of `from_pretrained`.

    Raises:
        CheckpointError: it cannot be loaded, or lacks a tensor.
    """
    where = checkpoint.directory
    try:
        _, auto = model_class(where)
        model, found = auto.from_pretrained(
            where, dtype=dtype or "auto", output_loading_info=True, **_SAFE, **options
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: transformers cannot load it: {reason[:300]}") from None
    if missing := found["missing_keys"]:
        raise CheckpointError(f"{where}: tensor {min(missing)!r} is missing")
    assert isinstance(model, PreTrainedModel)
    return model
