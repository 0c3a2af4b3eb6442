"""A base held in 4 or 8 bits by bitsandbytes; its new blocks are copies of what its files hold."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import safe_open
from transformers import BitsAndBytesConfig, PreTrainedModel

from deepen.checkpoint import Checkpoint
from deepen.checkpoint.header import Tensor
from deepen.errors import CheckpointError, FamilyError, TrainingError
from deepen.expansion.layout import Layout
from deepen.model.dtypes import DTYPES
from deepen.model.names import file_names, put_tensors
from deepen.model.pack import model_class, pretrained
from deepen.model.packed import packed_layers
from deepen.model.record import new_tensors
from deepen.model.source import source_checkpoint
from deepen.model.structure import blocks_of, family_of

Quantisation = Literal["8bit", "4bit"]

_NEEDED: Final = ("bitsandbytes", "accelerate")


def check_quantisation() -> None:
    """Check that what quantises is installed.

    Raises:
        TrainingError: it is not.
    """
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        raise TrainingError(f"quantising the base needs {missing[0]}: pip install {' '.join(_NEEDED)}")


def load_quantised(
    base: Path,
    quantisation: Quantisation,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
) -> PreTrainedModel:
    """Load a base with the linear layers of its blocks packed: one tensor at a time is read unpacked.

    `8bit` is LLM.int8 (arXiv 2208.07339); `4bit` is NF4 with its scales quantised again (QLoRA, arXiv
    2305.14314 section 3). Embeddings, norms, head and what a class fuses into one tensor (experts) stay.

    Args:
        base: directory of an unquantised checkpoint.
        quantisation: how many bits.
        dtype: precision of what is not packed, and of the compute in what is; default: the checkpoint's,
            computing in bf16.
        device: where the model goes.

    Returns:
        The model, in eval mode and frozen.

    Raises:
        CheckpointError: the base cannot be read, is quantised, or has nothing that can be packed.
        TrainingError: bitsandbytes or accelerate is not installed.
    """
    check_quantisation()
    checkpoint, compute = Checkpoint.open(base), dtype or torch.bfloat16
    _check_unpacked(checkpoint)
    config = _config(checkpoint, quantisation, compute)
    model = pretrained(checkpoint, dtype, quantization_config=config, device_map={"": device})
    layers = packed_layers(model)
    if not layers:
        raise CheckpointError(f"{base}: its blocks have no linear layer that can be quantised")
    for layer in layers.values():
        _settle(layer, compute)
    return model.requires_grad_(False).eval()


def _check_unpacked(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint.directory}: is quantised already (quantization_config); give the unquantised base"
        )


def _config(checkpoint: Checkpoint, quantisation: Quantisation, compute: torch.dtype) -> BitsAndBytesConfig:
    config, auto = model_class(checkpoint.directory)
    with torch.device("meta"):
        layers = family_of(auto.from_config(config)).layers
    # transformers reads these as patterns for names that are left as they are: whatever is no block's.
    others = [rf"(?!{re.escape(layers)}\.).*"]
    if quantisation == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=others,
    )


def _settle(layer: Any, compute: torch.dtype) -> None:
    """Leave nothing of a layer to change later."""
    # On CPUs with AVX512-BF16 the matrix would be packed anew outside training, and round otherwise.
    layer.support_avx512bf16_for_cpu = False
    if layer.bias is not None:  # is cast to the precision of compute at the first use
        layer.bias.data = layer.bias.data.to(compute)


def unpacked_files(model: PreTrainedModel) -> Checkpoint | None:
    """Return the files from which blocks of a packed model can be copied; None where nothing is packed.

    Raises:
        FamilyError: there are none, or their blocks are not the model's.
    """
    family = family_of(model)
    blocks = blocks_of(model, family)
    if not packed_layers(blocks):
        return None
    files = source_checkpoint(model)
    if files is None or files.config.get("quantization_config"):
        raise FamilyError(
            f"{type(model).__name__} is quantised, and new blocks are copies of what is not: "
            "load it from unquantised files"
        )
    depth = family.text_config(files.config).get(family.depth_key)
    if depth != len(blocks):
        raise FamilyError(
            f"{files.directory}: has {depth} blocks, the quantised model {len(blocks)}: "
            "expand it as it was loaded"
        )
    return files


def fill_from_files(model: PreTrainedModel, layout: Layout, files: Checkpoint) -> None:
    """Give new blocks the values of the base blocks they copy, but for what is filled, tensor by tensor.

    Raises:
        PackError: the files lack a tensor of theirs.
    """
    names = file_names(model, files)
    family, new = names.family, new_tensors(model)
    for block in layout.new_blocks:
        places = ((tensor, family.split(tensor.name)) for tensor in files.tensors.values())
        copied = [(tensor, place[1]) for tensor, place in places if place and place[0] == block.copy_of]
        tensors = {
            family.join(block.index, rest): _read(tensor, family.fill(rest, block.zero))
            for tensor, rest in copied
            if not family.is_buffer(rest)
        }
        wanted = {name for name in new if (names.live.split(name) or (None,))[0] == block.index}
        put_tensors(model, tensors, wanted, str(files.directory))


def _read(tensor: Tensor, value: float | None) -> torch.Tensor:
    if value is not None:
        return torch.full(tuple(tensor.shape), value, dtype=DTYPES[tensor.dtype])
    with safe_open(tensor.file, "pt") as file:
        # Copied: what is mapped from a file may lie unaligned, and sums come out in other last bits.
        held: torch.Tensor = file.get_tensor(tensor.name)
    return held.clone()
