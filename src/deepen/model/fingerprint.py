"""The fingerprint of the base inside a live model, by the same digests as the files'."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from transformers import PreTrainedModel

from deepen.checkpoint import combine_digests, tensor_digest, workers
from deepen.errors import PackError
from deepen.expansion.manifest import base_name
from deepen.model.dtypes import DTYPE_NAMES, DTYPES
from deepen.model.record import find_expansion
from deepen.model.structure import family_of


def base_fingerprint(
    model: PreTrainedModel, strength: Literal["fast", "full"], dtypes: Mapping[str, str] | None = None
) -> str:
    """Return the fingerprint of the base inside a live model, expanded or not.

    Args:
        model: the model; where it lies and in which precision does not matter, see `dtypes`.
        strength: `fast` samples large tensors, `full` reads all bytes.
        dtypes: base tensor name -> safetensors dtype of the checkpoint's file; a model held in wider
            precision is narrowed to it, unless that would lose bits: then it is not what the file held.
            Default: the tensors' own. Only tensors named are hashed.

    Raises:
        PackError: the model lacks a tensor of `dtypes`.
    """
    base = base_tensors(model, repeated=dtypes is not None)
    if dtypes is not None and (missing := dtypes.keys() - base.keys()):
        raise PackError(f"the model lacks the base's tensor {min(missing)!r}")
    names = list(dtypes if dtypes is not None else base)

    def digest(name: str) -> bytes:
        dtype = DTYPES[dtypes[name]] if dtypes is not None else base[name].dtype
        return _digest(name, _as_stored(base[name].detach().cpu(), dtype), strength)

    with ThreadPoolExecutor(workers()) as pool:
        return combine_digests(dict(zip(names, pool.map(digest, names), strict=True)), strength)


def _as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in its file's precision, or as it is where that would hide that it has moved."""
    stored = tensor.to(dtype)
    same = (stored.to(tensor.dtype) == tensor) | (stored.isnan() & tensor.isnan())
    return stored if same.all() else tensor


def _digest(name: str, tensor: torch.Tensor, strength: Literal["fast", "full"]) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor_digest(
        name,
        DTYPE_NAMES[tensor.dtype],
        tensor.shape,
        data.size,
        lambda offset, count: data[offset : offset + count].data,
        strength,
    )


def base_tensors(model: PreTrainedModel, *, repeated: bool = False) -> dict[str, torch.Tensor]:
    """Return the base's tensors of a live model under the base's names.

    Args:
        model: expanded or not.
        repeated: give a tied tensor under both names, as some files do; default: once.
    """
    expansion, family = find_expansion(model), family_of(model)
    tied = family.tied if family.is_tied(model.config.to_dict()) and not repeated else {}
    named = {}
    for name, tensor in without_adapters(model.state_dict()).items():
        original = base_name(expansion, family, name) if expansion else name
        if original is not None and original not in tied:
            named[original] = tensor
    return named


def without_adapters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state without what peft's adapters have added to it, under the names it had before them."""
    plain = {}
    for name, tensor in state.items():
        if ".lora_" in name or ".adaption_" in name:
            continue
        # Where peft keeps the layer that it wraps: LoRA's, and LLaMA-Adapter's attention.
        plain[name.replace(".base_layer.", ".").replace(".self_attn.model.", ".self_attn.")] = tensor
    return plain
