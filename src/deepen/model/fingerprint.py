"""The fingerprint of the base inside a live model, by the same digests as the files'."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from deepen.checkpoint import Checkpoint, combine_digests, fast_fingerprint, tensor_digest, workers
from deepen.errors import PackError
from deepen.expansion.layout import Layout
from deepen.model.dtypes import DTYPE_NAMES, DTYPES, written_dtypes
from deepen.model.names import FileNames, file_names
from deepen.model.packed import packed_layers, plain_state
from deepen.model.record import find_expansion
from deepen.model.source import source_checkpoint
from deepen.model.state import base_tables
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
    return _fingerprint(_base_parts(model, repeated=dtypes is not None), strength, dtypes)


def live_fingerprint(model: PreTrainedModel) -> str:
    """Return the fast fingerprint of a live model as it stands, new blocks and all.

    The model may be held in another precision than its files, and lack tensors of theirs that it computes
    itself: then the files' counts, if the model still is them. Of a model expanded since, that of the files
    in which its pack would be merged, unless what its blocks have learned would be rounded there.
    """
    files = source_checkpoint(model)
    if files and _equals(_parts(model, None, repeated=False), files):
        return fast_fingerprint(files)
    return _fingerprint(_parts(model, None, repeated=False), "fast", _merged_dtypes(model, files))


def _merged_dtypes(model: PreTrainedModel, files: Checkpoint | None) -> dict[str, str] | None:
    expansion = find_expansion(model)
    if expansion is None or files is None:
        return None
    held = {n: t.dtype for part in _parts(model, None, repeated=False) for n, t in part.items()}
    state = _without_adapters(model.state_dict())
    written = written_dtypes(expansion, file_names(model, files), files, state)
    return {name: DTYPE_NAMES[written.get(name, dtype)] for name, dtype in held.items()}


def base_tensors(model: PreTrainedModel, *, repeated: bool = False) -> dict[str, torch.Tensor]:
    """Return the base's tensors of a live model under the names, and in the form, that the base's files have.

    Args:
        model: expanded or not.
        repeated: give a tied tensor under both names, as some files do; default: once.
    """
    return {name: t for named in _base_parts(model, repeated=repeated) for name, t in named.items()}


def model_tensors(model: PreTrainedModel, *, repeated: bool = False) -> dict[str, torch.Tensor]:
    """Return all tensors of a live model, new blocks' too, as `base_tensors` does the base's."""
    parts = _parts(model, None, repeated=repeated)
    return {name: tensor for named in parts for name, tensor in named.items()}


def base_names(model: PreTrainedModel, *, packed: bool = True) -> set[str]:
    """Return the names of `base_tensors`, tied ones under both, at no cost.

    Args:
        model: expanded or not.
        packed: also those of quantised layers, which are no longer what the files hold.
    """
    return {name for named in _base_parts(model, repeated=True, meta=True, packed=packed) for name in named}


def packed_fingerprint(model: PreTrainedModel) -> str:
    """Return a digest over all bytes of the model's quantised layers: codes, scales and biases."""

    def digest(layer: tuple[str, nn.Module]) -> dict[str, bytes]:
        held = layer[1].state_dict(prefix=f"{layer[0]}.").items()
        # A bias follows the precision of what it is added to.
        wide = {key: tensor.float() if key.endswith(".bias") else tensor for key, tensor in held}
        return {key: _digest(key, tensor.detach().cpu(), "full") for key, tensor in wide.items()}

    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(workers()) as pool:
        for found in pool.map(digest, packed_layers(model).items()):
            digests |= found
    return combine_digests(digests, "full")


def _fingerprint(
    parts: Iterable[Mapping[str, torch.Tensor]],
    strength: Literal["fast", "full"],
    dtypes: Mapping[str, str] | None,
) -> str:
    digests: dict[str, bytes] = {}

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        if tensor.is_meta:
            raise PackError(f"the model's tensor {name!r} is quantised: it is not what the base's file holds")
        dtype = DTYPES[dtypes[name]] if dtypes is not None else tensor.dtype
        return _digest(name, _as_stored(tensor.detach().cpu(), dtype), strength)

    with ThreadPoolExecutor(workers()) as pool:
        for named in parts:
            chosen = [(name, t) for name, t in named.items() if dtypes is None or name in dtypes]
            digests |= zip((name for name, _ in chosen), pool.map(digest, chosen), strict=True)
    if dtypes is not None and (missing := dtypes.keys() - digests.keys()):
        raise PackError(f"the model lacks the base's tensor {min(missing)!r}")
    return combine_digests(digests, strength)


def _base_parts(
    model: PreTrainedModel, *, repeated: bool, meta: bool = False, packed: bool = True
) -> Iterator[dict[str, torch.Tensor]]:
    expansion = find_expansion(model)
    layout = expansion.layout if expansion else None
    tables = {} if meta else base_tables(model)
    return _parts(model, layout, repeated=repeated, meta=meta, packed=packed, tables=tables)


def _parts(
    model: PreTrainedModel,
    layout: Layout | None,
    *,
    repeated: bool,
    meta: bool = False,
    packed: bool = True,
    tables: Mapping[int, torch.Tensor] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """`base_tensors` block by block: of fused experts, the form they have in files is a copy.

    What lies at the address of one of `tables` is taken for that one.
    """
    names, family = file_names(model), family_of(model)
    parts: dict[int | None, dict[str, torch.Tensor]] = {}
    for name, tensor in _without_adapters(plain_state(model)).items():
        if tensor.is_meta and not packed:
            continue
        tensor = (tables or {}).get(tensor.data_ptr(), tensor)
        place = family.split(name)
        block = place[0] if place else None
        if layout is None or block not in layout.new_indices:
            parts.setdefault(block, {})[name] = tensor.to("meta") if meta else tensor
    for part in parts.values():
        named = {_in_base(name, layout, names): tensor for name, tensor in names.state(part).items()}
        yield named if repeated else _once(named, names.family.tied)


def _once(named: dict[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Leave out a head that is the embeddings."""
    held = [(n, o) for n, o in tied.items() if {n, o} <= named.keys()]
    again = {name for name, other in held if named[name].data_ptr() == named[other].data_ptr()}
    return {name: tensor for name, tensor in named.items() if name not in again}


def _in_base(name: str, layout: Layout | None, names: FileNames) -> str:
    place = names.family.split(name)
    block = layout.base_block(place[0]) if layout and place else None
    return names.family.join(block, place[1]) if place and block is not None else name


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


def _equals(parts: Iterable[Mapping[str, torch.Tensor]], files: Checkpoint) -> bool:
    """Whether live tensors are what the files hold, cast to the precision in memory."""
    with ExitStack() as stack:
        held: dict[str, Any] = {}
        for shard in files.shards:
            opened = stack.enter_context(safe_open(shard.path, "pt"))
            held |= {tensor.name: opened for tensor in shard.tensors}
        for named in parts:
            for name, live in named.items():
                if name not in held:
                    return False
                if live.is_meta:  # quantised: taken for what it was made from
                    continue
                stored = held[name].get_tensor(name).to(live.device, live.dtype)
                if not torch.equal(stored, live):
                    return False
    return True


def _without_adapters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state without what peft's adapters have added to it, under the names it had before them."""
    plain = {}
    for name, tensor in state.items():
        if any(added in name for added in (".lora_", ".adaption_", ".modules_to_save.")):
            continue
        # Where peft keeps the layer that it wraps: LoRA's, a module saved whole, LLaMA-Adapter's attention.
        for kept in (".base_layer.", ".original_module."):
            name = name.replace(kept, ".")
        plain[name.replace(".self_attn.model.", ".self_attn.")] = tensor
    return plain
