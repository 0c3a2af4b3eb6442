"""A llama2.c file becomes a Hugging Face Llama, tensor by tensor and never whole in memory."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from deepen.checkpoint import CONFIG, SINGLE, atomic_directory, check_apart, check_free, write_header
from deepen.errors import CheckpointError
from deepen.expansion import check_space
from deepen.interchange.files import open_regular, read_at
from deepen.interchange.layout import Header, Source, check_size, parse_header, rotary_offset, sources
from deepen.interchange.tokenizer import TokenizerFiles, read_tokenizer

_STEP: Final = 16 << 20
_THETA: Final = 10000.0


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What was written.

    Attributes:
        directory: the Hugging Face directory.
        version: of the llama2.c file, 0 or 1.
        parameters: number of elements in its files.
        bytes_written: size of its weight file.
        tokenizer: names of the tokenizer's files; empty if none was given.
        seconds: how long it took.
        warnings: what the user should know.
    """

    directory: Path
    version: int
    parameters: int
    bytes_written: int
    tokenizer: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]


def import_llama2c(
    model: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportResult:
    """Write a llama2.c model (https://github.com/karpathy/llama2.c, float32, version 0 or 1) as a Llama.

    The weights keep every bit; rows of W^Q and W^K change places, because llama2.c rotates neighbouring
    rows of a head and transformers rotates rows half a head apart. What llama2.c fixes in its code is
    written to the config: rotary base 10000, norm epsilon 1e-5, `<s>` 1, `</s>` 2.

    Args:
        model: the `.bin` file; it is only read.
        out: the directory to create, whole or not at all.
        tokenizer: llama2.c's `tokenizer.bin` or a SentencePiece `tokenizer.model`.
        overwrite: replace `out`.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: a file is malformed, of another version, or they do not fit each other.
        OutputError: `out` exists, holds an input, or does not fit the disk.
    """
    start = time.perf_counter()
    model, out = Path(model), Path(out)
    inputs = (model,) if tokenizer is None else (model, Path(tokenizer))
    check_free(out, overwrite=overwrite)
    check_apart(out, inputs)
    with open_regular(model) as (descriptor, size):
        header = _read_header(descriptor, size, model)
        files = _tokenizer(header, model, tokenizer)
        tensors = tuple(sources(header))
        head = write_header([(t.name, "F32", t.shape) for t in tensors], {"format": "pt"})
        total = len(head) + sum(tensor.length for tensor in tensors)
        check_space(out, total)
        with atomic_directory(out, overwrite=overwrite, inside=inputs) as partial:
            with (partial / SINGLE).open("xb") as file:
                file.write(head)
                _write_tensors(file, tensors, descriptor, model, progress)
            (partial / CONFIG).write_text(json.dumps(_config(header), indent=2) + "\n", "utf-8")
            for name, content in files.contents.items():
                (partial / name).write_bytes(content)
    return ImportResult(
        directory=out,
        version=header.version,
        parameters=(total - len(head)) // 4,
        bytes_written=total,
        tokenizer=tuple(files.contents),
        seconds=time.perf_counter() - start,
        warnings=files.warnings,
    )


def _read_header(descriptor: int, size: int, path: Path) -> Header:
    header = parse_header(read_at(descriptor, min(size, 256), 0, path), path)
    check_size(header, size, path)
    if header.version == 0:
        _check_rotary(header, descriptor, path)
    return header


def _check_rotary(header: Header, descriptor: int, path: Path) -> None:
    """Refuse a version 0 file whose stored angles are not those of rotary base 10000.

    llama2.c once read these tables and now computes them. Some writers therefore leave them zero.
    """
    half = header.head_dim // 2
    offset = rotary_offset(header)
    if header.seq_len < 2:
        return
    stored = np.concatenate(
        [
            np.frombuffer(read_at(descriptor, 4 * half, offset + 4 * half * row, path), "<f4")
            for row in (1, header.seq_len + 1)  # position 1 of the cosines, then of the sines
        ]
    )
    angles = [_THETA ** (-2 * i / header.head_dim) for i in range(half)]
    expected = np.array([*map(math.cos, angles), *map(math.sin, angles)])
    if stored.any() and not np.allclose(stored, expected, rtol=0, atol=1e-4):
        raise CheckpointError(
            f"{path}: its rotary angles are not those of base 10000, the only one llama2.c has;\n"
            "its weights were trained with other positions, or the file is damaged"
        )


def _tokenizer(header: Header, model: Path, path: str | Path | None) -> TokenizerFiles:
    if path is None:
        return TokenizerFiles(vocab_size=header.vocab_size, contents={})
    files = read_tokenizer(Path(path), context=header.seq_len)
    if files.vocab_size != header.vocab_size:
        raise CheckpointError(
            f"{path}: has {files.vocab_size} tokens, {model} has {header.vocab_size}; "
            "name the tokenizer the model was trained with"
        )
    return files


def _write_tensors(
    file: BinaryIO,
    tensors: tuple[Source, ...],
    descriptor: int,
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(tensor.length for tensor in tensors), 0
    for tensor in tensors:
        for offset, length in _cuts(tensor):
            data = read_at(descriptor, length, offset, path)
            file.write(_half_split(data, tensor.shape) if tensor.heads else data)
            done += length
            if progress:
                progress(done, total)


def _cuts(tensor: Source) -> Iterator[tuple[int, int]]:
    """Give (offset, length) of pieces that fit in memory; a piece to be permuted is one head."""
    step = tensor.length // tensor.heads if tensor.heads else _STEP
    end = tensor.offset + tensor.length
    for offset in range(tensor.offset, end, step):
        yield offset, min(step, end - offset)


def _half_split(head: bytes, shape: tuple[int, ...]) -> bytes:
    """Put the rows of one head (pairs 2j, 2j+1) into Hugging Face's order (pairs j, j + half)."""
    rows = np.frombuffer(head, "<u4").reshape(-1, shape[1])
    return np.concatenate([rows[0::2], rows[1::2]]).tobytes()


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "vocab_size": header.vocab_size,
        "max_position_embeddings": header.seq_len,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": header.shared,
        "rope_theta": _THETA,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
