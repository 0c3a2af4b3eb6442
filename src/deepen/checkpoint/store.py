"""A checkpoint directory: config.json and safetensors files, each tensor accounted for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint.header import Shard, Tensor, read_json, read_shard
from deepen.errors import CheckpointError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hugging Face checkpoint as it lies on disk; opening it reads headers only.

    Attributes:
        directory: the directory.
        config: the parsed `config.json`, keys in the file's order.
        shards: its safetensors files; one without an index, otherwise the index's, by name.
        index: the parsed index's `metadata`, or None for a single file.
    """

    directory: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Open a checkpoint and check everything that can be checked without reading its tensors.

        Raises:
            CheckpointError: missing, malformed, unsafe to follow or pickled; names the place.
        """
        directory = Path(directory)
        if not os.path.isdir(directory):
            found = "is not a directory" if os.path.exists(directory) else "no such directory"
            raise CheckpointError(f"{directory}: {found}; give a checkpoint's directory")
        config = read_config(directory)
        if os.path.lexists(directory / SINGLE):
            shard = read_shard(contained(directory, SINGLE))
            return cls(directory=directory, config=config, shards=(shard,), index=None)
        if os.path.lexists(directory / INDEX):
            shards, index = _open_index(directory)
            return cls(directory=directory, config=config, shards=shards, index=index)
        raise _no_weights(directory)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in the order of the files."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        CheckpointError: absent, or not a JSON object.
    """
    path = contained(directory, CONFIG)
    config = read_json(path, hint="; a checkpoint is a directory with config.json in it")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return config


def contained(directory: Path, name: str) -> Path:
    """Return `directory/name`, refusing a link that leads out of the model.

    The hub's cache is the exception: `snapshots/<revision>/<file>` links to `blobs/` of the same model.

    Raises:
        CheckpointError: the file is a link to somewhere else.
    """
    root, path = Path(os.path.realpath(directory)), directory / name
    real = Path(os.path.realpath(path))
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path}: is a link out of the model, to {real}; copy the file in instead")
    return path


def _open_index(directory: Path) -> tuple[tuple[Shard, ...], dict[str, Any]]:
    path = contained(directory, INDEX)
    raw = read_json(path)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for tensor, name in weight_map.items():
        _check_name(name, tensor, path)
    names = sorted(set(weight_map.values()))
    shards = tuple(read_shard(_shard_path(directory, name, path)) for name in names)
    for shard in shards:
        _check_shard(shard, weight_map, path)
    metadata = raw.get("metadata", {})
    return shards, metadata if isinstance(metadata, dict) else {}


def _check_name(name: Any, tensor: str, path: Path) -> None:
    text = name if isinstance(name, str) else ""
    if len(text) > 255 or not text.endswith(".safetensors") or {"/", "\\", "\0"} & set(text):
        raise CheckpointError(
            f"{path}: tensor {tensor[:200]!r}: {str(name)[:200]!r} is not "
            "the name of a safetensors file beside it"
        )


def _shard_path(directory: Path, name: str, index: Path) -> Path:
    path = contained(directory, name)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: this shard is named in {index.name} but missing; fetch it")
    return path


def _check_shard(shard: Shard, weight_map: Mapping[str, str], index: Path) -> None:
    held = {tensor.name for tensor in shard.tensors}
    for name in sorted(held):
        if name not in weight_map:
            raise CheckpointError(f"{shard.path}: tensor {name!r} is not in {index.name}")
        if weight_map[name] != shard.path.name:
            raise CheckpointError(
                f"{shard.path}: tensor {name!r} stands in {weight_map[name]} too, by {index.name}"
            )
    for name, file in weight_map.items():
        if file == shard.path.name and name not in held:
            raise CheckpointError(
                f"{shard.path}: tensor {name[:200]!r} is missing; {index.name} says it is here"
            )


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}")
    return CheckpointError(
        f"{directory}: only pickled weights ({pickles[0]}), which can run code when opened.\n"
        "If you trust them, AutoModelForCausalLM.from_pretrained(…).save_pretrained(NEW) converts them"
    )
