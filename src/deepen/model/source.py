"""The files a live model was loaded from."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from deepen.checkpoint import CONFIG, Checkpoint
from deepen.errors import CheckpointError


def source_directory(model: PreTrainedModel) -> Path | None:
    """Return the directory the model was loaded from, in the hub's cache for a hub id; None without one."""
    name = model.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, CONFIG, revision=getattr(model.config, "_commit_hash", None))
    except ValueError:  # not the form of a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


def source_checkpoint(model: PreTrainedModel) -> Checkpoint | None:
    """Return the files the model was loaded from; None where there are none."""
    directory = source_directory(model)
    try:
        return Checkpoint.open(directory) if directory else None
    except CheckpointError:
        return None
