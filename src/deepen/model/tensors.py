import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from deepen.errors import OutputError


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write a safetensors file with the umask's mode (the library's own writer leaves 0600).

    Args:
        path: file to write.
        tensors: name -> tensor on any device.
        dtypes: name -> dtype on disk; default: the tensor's own.

    Raises:
        OutputError: the file cannot be written.
    """
    wanted = dtypes or {}
    on_disk: dict[str, torch.Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        held = tensor.detach().to("cpu", wanted.get(name, tensor.dtype)).contiguous()
        # The library refuses two names for one tensor, as a tied head and its embeddings.
        on_disk[name] = held.clone() if held.data_ptr() in places else held
        places.add(held.data_ptr())
    try:
        save_file(on_disk, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from None
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
