import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write a safetensors file with the umask's mode (the library's own writer leaves 0600).

    Args:
        path: file to write.
        tensors: name -> tensor on any device.
        dtypes: name -> dtype on disk; default: the tensor's own.
    """
    wanted = dtypes or {}
    on_disk = {
        name: tensor.detach().to("cpu", wanted.get(name, tensor.dtype)).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(on_disk, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
