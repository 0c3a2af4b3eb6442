"""A checkpoint's tensors as llama.cpp wants them: its names, its order of rows, one precision."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH_NAMES
from numpy.typing import NDArray

from deepen.checkpoint import Checkpoint, Tensor, tensor_reader
from deepen.errors import CheckpointError
from deepen.families import Family, Gguf

_CHUNK: Final = 64 << 20
_WIDTH: Final = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """One tensor of the file to be.

    Attributes:
        name: llama.cpp's.
        shape: rows first, as in the checkpoint.
        kind: how its numbers are stored.
        source: where they are now; None for those in `values`.
        heads: of attention, whose rows change from halves to pairs; 0: none do.
        values: numbers that are no tensor of the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    source: Tensor | None = None
    heads: int = 0
    values: NDArray[np.float32] | None = None

    @property
    def size(self) -> int:
        """Its size in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes in the file, some rows at a time, so that a large matrix is never held whole.

        Raises:
            CheckpointError: a number is beyond what the precision holds.
        """
        if self.source is None:
            assert self.values is not None
            yield self.values.tobytes()
            return
        for stored in _rows(self.source, whole=bool(self.heads)):
            rows = _as_pairs(stored, self.heads) if self.heads else stored
            if self.source.dtype == self.kind.name:
                yield rows.tobytes()
            else:
                yield _converted(_widened(rows, self.source.dtype), self.kind, self.source).tobytes()


def plan_tensors(
    checkpoint: Checkpoint, family: Family, gguf: Gguf, config: Any, kind: GGMLQuantizationType
) -> Iterator[Outgoing]:
    """Yield every tensor of the file, in the order of the checkpoint.

    Vectors are stored in float32, as llama.cpp computes with them. Rows too short for blocks of 32 numbers
    are stored in float16 where the file is otherwise q8_0.

    Raises:
        CheckpointError: llama.cpp's architecture has no such tensor, or one is of a type it cannot be
            converted from.
    """
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == gguf.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = _tied(checkpoint, family)
    for name, tensor in checkpoint.tensors.items():
        inside = family.split(name)
        if name in tied or (inside and family.is_buffer(inside[1])):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None or tensor.dtype not in _WIDTH:
            found = "no such tensor in" if known is None else f"{tensor.dtype}, not a float type, for"
            raise CheckpointError(f"{checkpoint.directory}: tensor {name}: {found} {gguf.architecture}")
        heads = gguf.paired.get(inside[1]) if inside else None
        yield Outgoing(
            name=known,
            shape=tensor.shape,
            kind=_kind(tensor, kind),
            source=tensor,
            heads=getattr(config, heads) if heads else 0,
        )


def _tied(checkpoint: Checkpoint, family: Family) -> Mapping[str, str]:
    """Return the tensors that repeat another one: llama.cpp takes the embeddings where it finds no head."""
    return family.tied if family.is_tied(checkpoint.config) else {}


def _kind(tensor: Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[kind]
    return GGMLQuantizationType.F16 if tensor.shape[-1] % block else kind


def _rows(tensor: Tensor, *, whole: bool) -> Iterator[NDArray[Any]]:
    """Yield a tensor's rows as they are stored, about 64 MiB at a time or all at once."""
    count = tensor.shape[0]
    row = tensor.length // max(1, count)
    step = count if whole or len(tensor.shape) == 1 else max(1, _CHUNK // row)
    with tensor_reader(tensor) as read:
        for at in range(0, count, step):
            rows = min(step, count - at)
            data = np.frombuffer(read(at * row, rows * row), dtype=_WIDTH[tensor.dtype])
            yield data.reshape(rows, *tensor.shape[1:])


def _as_pairs(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Put row i of a head's first half beside row i of its second half."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _widened(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _converted(values: NDArray[np.float32], kind: GGMLQuantizationType, source: Tensor) -> NDArray[Any]:
    if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(values).max(initial=0))) > 65504:
        raise CheckpointError(
            f"{source.file}: tensor {source.name}: {largest:g} is beyond float16; write --type bf16 instead"
        )
    return values if kind == GGMLQuantizationType.F32 else quants.quantize(values, kind)
