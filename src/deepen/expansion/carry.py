"""The files an expansion takes over unchanged: tokenizer, templates, generation defaults, licence."""

import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from deepen.checkpoint import CONFIG, contained
from deepen.errors import CheckpointError
from deepen.expansion.manifest import MANIFEST_NAME

# Weights in any form (other copies than those written would be the base's), code, the base's own card.
_LEFT: Final = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.npz", "*.pkl", "*.ot", "*.tflite"),
    *("*.py", "README.md", CONFIG, MANIFEST_NAME, ".*"),
)
_FOLDERS: Final = ("additional_chat_templates",)


def carried_files(directory: Path) -> tuple[str, ...]:
    """Return the files to copy verbatim, relative to `directory`, by name.

    Raises:
        CheckpointError: one is a link out of the model.
    """
    found = []
    for folder in ("", *_FOLDERS):
        if (directory / folder).is_dir():
            found += [os.path.join(folder, name) for name in os.listdir(directory / folder)]
    kept = [name for name in found if not any(fnmatch(os.path.basename(name), left) for left in _LEFT)]
    return tuple(sorted(name for name in kept if contained(directory, name).is_file()))


def carry(directory: Path, target: Path, names: Iterable[str] | None = None) -> None:
    """Copy them; modes are the umask's.

    Args:
        directory: where from.
        target: where to.
        names: some of `carried_files(directory)`; default: all of them.

    Raises:
        CheckpointError: one cannot be read.
    """
    for name in carried_files(directory) if names is None else names:
        (target / name).parent.mkdir(exist_ok=True)
        try:
            shutil.copyfile(directory / name, target / name)
        except PermissionError as error:
            raise CheckpointError(f"{directory / name}: cannot be read: {error.strerror}") from None
