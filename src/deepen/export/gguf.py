"""A model as one GGUF file, for llama.cpp and what is built on it.

Families whose file says so (`[gguf]` in `deepen/families/*.toml`) are written here, with the `gguf` package;
the rest by llama.cpp's own converter, where the user has it. An expanded model is an ordinary deeper one to
both, with one trap: where llama.cpp works out a block's kind (sliding or full attention, rotary embedding or
none) from its number, new blocks shift the numbers, and the file would be of another model.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from deepen.checkpoint import atomic_file
from deepen.errors import CheckpointError, FamilyError, OutputError, in_a_line
from deepen.expansion import Base, Progress, open_base
from deepen.export.converter import run_converter
from deepen.export.gguf_metadata import add_metadata, rotary_factors
from deepen.export.gguf_tensors import Outgoing, plan_tensors
from deepen.export.gguf_tokenizer import add_tokenizer
from deepen.export.whole import whole_checkpoint
from deepen.families import Family, Gguf

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
_KINDS: Final = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_FLOAT: Final = np.dtype(np.float32)
_ALIGNMENT: Final = 32


@dataclass(frozen=True, kw_only=True)
class GgufResult:
    """What was written.

    Attributes:
        path: the file.
        type: the precision of its matrices.
        architecture: llama.cpp's name of the model's.
        tensors: number of tensors; None where llama.cpp's converter wrote it.
        bytes_written: size of the file.
        seconds: it took.
    """

    path: str
    type: str
    architecture: str
    tensors: int | None
    bytes_written: int
    seconds: float


def export_gguf(
    model: str,
    out: str | Path,
    *,
    base: str | None = None,
    type: GgufType = "auto",
    converter: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GgufResult:
    """Write a model as a GGUF file, whole or not at all.

    Args:
        model: a checkpoint (a directory or a hub id), a block pack, or the directory of a finished run.
        out: the file to create.
        base: where a pack's base is; default: where the pack says.
        type: precision of the matrices; `auto` is the checkpoint's own, so that no number changes.
        converter: llama.cpp's `convert_hf_to_gguf.py`, to have it write the file.
        overwrite: replace `out`.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the model cannot be read, or llama.cpp could not compute what it does.
        FamilyError: deepen does not write this family, and no converter was given.
        OutputError: `out` exists or cannot be written.
    """
    start, out = time.perf_counter(), Path(out)
    if os.path.lexists(out) and (not overwrite or out.is_dir()):
        raise OutputError(f"{out}: exists already; choose another output or say --overwrite")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the directory {out.parent} does not exist; create it first")
    with whole_checkpoint(model, base, out.parent, progress) as directory, atomic_file(out) as partial:
        opened = open_base(directory)
        _check_kinds(opened, model)
        chosen = _own_type(opened) if type == "auto" else type
        if converter is not None:
            run_converter(Path(converter), directory, partial, chosen)
            architecture, tensors = str(opened.checkpoint.config.get("model_type")), None
        else:
            gguf = _gguf_of(opened.family, opened.checkpoint.config.get("model_type"), model)
            architecture = gguf.architecture
            tensors = _write(opened, gguf, chosen, Path(model).name, partial, progress)
    return GgufResult(
        path=str(out),
        type=chosen,
        architecture=architecture,
        tensors=tensors,
        bytes_written=out.stat().st_size,
        seconds=round(time.perf_counter() - start, 3),
    )


def _check_kinds(opened: Base, model: str) -> None:
    """Refuse a model whose blocks are not of the kinds their numbers give them.

    Raises:
        CheckpointError: it is such a model.
    """
    family = opened.family
    config = family.text_config(opened.checkpoint.config)
    if off := family.per_layer.off_index(config, opened.depth):
        raise CheckpointError(
            f"{model}: {', '.join(off)}: not what llama.cpp works out from the blocks' numbers: "
            "the file would be of another model.\n"
            "Add new blocks in whole periods of the base's pattern, or serve it as it is"
        )


def _gguf_of(family: Family, model_type: Any, model: str) -> Gguf:
    if family.gguf is None or model_type not in family.gguf.model_types:
        raise FamilyError(
            f"{model}: deepen does not write GGUF files of model_type {model_type}; llama.cpp itself may:\n"
            "give its converter, --converter PATH/convert_hf_to_gguf.py"
        )
    return family.gguf


def _own_type(opened: Base) -> GgufType:
    dtypes = {tensor.dtype for tensor in opened.checkpoint.tensors.values() if len(tensor.shape) > 1}
    return "bf16" if dtypes == {"BF16"} else "f16" if dtypes == {"F16"} else "f32"


def _write(opened: Base, gguf: Gguf, type: str, name: str, path: Path, progress: Progress | None) -> int:
    config = _config(opened.checkpoint.directory)
    kind, file_type = _KINDS[type]
    outgoing = list(plan_tensors(opened.checkpoint, opened.family, gguf, config, kind))
    if (factors := rotary_factors(config)) is not None:
        single = GGMLQuantizationType.F32
        outgoing.append(Outgoing(name="rope_freqs.weight", shape=factors.shape, kind=single, values=factors))
    writer = GGUFWriter(path, gguf.architecture)
    add_metadata(writer, config, name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    add_tokenizer(writer, opened.checkpoint.directory, config.vocab_size)
    for tensor in outgoing:
        writer.add_tensor_info(tensor.name, tensor.shape, _FLOAT, tensor.size, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        _append(file, outgoing, progress)
    return len(outgoing)


def _append(file: IO[bytes], outgoing: Sequence[Outgoing], progress: Progress | None) -> None:
    """Write the tensors behind the header, each at a multiple of the alignment."""
    total, done = sum(tensor.size for tensor in outgoing), 0
    file.write(bytes(-file.tell() % _ALIGNMENT))
    for tensor in outgoing:
        for chunk in tensor.chunks():
            file.write(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers' strict configs raise whatever they find wrong
        reason = in_a_line(error)
        raise CheckpointError(f"{directory}: transformers cannot read its config ({reason})") from None
