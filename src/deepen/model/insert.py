import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint, fast_fingerprint
from deepen.errors import FamilyError, LayoutError
from deepen.expansion.layout import Layout
from deepen.expansion.manifest import Fingerprint, describe_expansion, expand_config
from deepen.families import Family
from deepen.model.dtypes import DTYPES
from deepen.model.fingerprint import base_fingerprint, base_tensors
from deepen.model.record import attach_record, find_expansion, is_bypassed, source_checkpoint
from deepen.model.structure import blocks_of, depth_config, family_of, install_blocks


def insert_blocks(
    model: PreTrainedModel,
    layout: Layout,
    *,
    base: str | Path | None = None,
    fingerprint: Fingerprint | None = None,
) -> PreTrainedModel:
    """Add new blocks to a live model, in place; it computes exactly what it did before.

    Each new block is a copy of a base block whose residual writes (W^O and the feed-forward output, with
    their biases) are filled so that it adds nothing (arXiv 2401.02415 section 3.1).

    Args:
        model: a causal LM of a known family, not yet expanded.
        layout: from `deepen.plan_layout`.
        base: name or path recorded as the base; default: where the model was loaded from.
        fingerprint: the base's; default: that of its files when the model still equals them, else of the
            live tensors.

    Returns:
        The same model, `layout.depth` blocks deep, with its record attached.

    Raises:
        FamilyError: the family is unknown, or its weights are quantised.
        LayoutError: the layout is for another number of blocks, or the model is expanded already.
    """
    family = family_of(model)
    blocks = blocks_of(model, family)
    if is_bypassed(model) or find_expansion(model) is not None:
        raise LayoutError("the model is expanded already; expand its base: deepen cannot expand twice yet")
    if len(blocks) != layout.base_blocks:
        raise LayoutError(f"the layout is for {layout.base_blocks} base blocks, the model has {len(blocks)}")
    _check_fillable(blocks, family)
    fingerprint = fingerprint or Fingerprint(fast=_fast_fingerprint(model))
    names = {index: tuple(blocks[index].state_dict()) for index in range(len(blocks))}
    expansion = describe_expansion(
        layout, family, names, str(base or model.name_or_path or "unnamed"), fingerprint
    )
    expanded = [
        _identity_copy(blocks[origin], family) if index in layout.new_indices else blocks[origin]
        for index, origin in enumerate(layout.origins)
    ]
    install_blocks(model, family, expanded, expand_config(depth_config(model, family), family, layout))
    attach_record(model, expansion)
    return model


def _check_fillable(blocks: nn.ModuleList, family: Family) -> None:
    """Refuse packed weights: zero bytes of a quantised matrix need not mean zero."""
    for index, block in enumerate(blocks):
        for name, tensor in block.state_dict().items():
            if family.fill(name) is not None and tensor.dtype not in DTYPES.values():
                raise FamilyError(
                    f"tensor {family.join(index, name)!r} is {str(tensor.dtype).removeprefix('torch.')}: "
                    "a quantised model cannot be expanded; load it unquantised"
                )


def _fast_fingerprint(model: PreTrainedModel) -> str:
    """The model may be held in another precision than its files: then theirs counts, if it still is them."""
    files = source_checkpoint(model)
    unchanged = files is not None and _equals(base_tensors(model), files)
    return fast_fingerprint(files) if files and unchanged else base_fingerprint(model, "fast")


def _equals(live: Mapping[str, torch.Tensor], files: Checkpoint) -> bool:
    """Whether live tensors are the files', cast to the precision in memory."""
    if not live.keys() <= files.tensors.keys():
        return False
    for shard in files.shards:
        with safe_open(shard.path, "pt") as held:
            for name in live.keys() & {tensor.name for tensor in shard.tensors}:
                stored = held.get_tensor(name).to(live[name].device, live[name].dtype)
                if not torch.equal(stored, live[name]):
                    return False
    return True


def _identity_copy(block: nn.Module, family: Family) -> nn.Module:
    new = copy.deepcopy(block)
    with torch.no_grad():
        for name, tensor in new.state_dict(keep_vars=True).items():
            if (value := family.fill(name)) is not None:
                tensor.fill_(value)
    return new
