"""The header of a safetensors file, read with suspicion.

Layout of the format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the header's length N
as a little-endian integer; N bytes of JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`; then
the data, which the offsets must cover without hole or overlap.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from deepen.errors import CheckpointError

MAX_HEADER: Final = 100_000_000
MAX_NAME: Final = 1000
ITEM_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4}
    | {"BF16": 2, "F16": 2, "I16": 2, "U16": 2, "BOOL": 1, "I8": 1, "U8": 1}
    | {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1}
)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """Where one tensor's bytes lie.

    Attributes:
        name: its full name.
        dtype: safetensors' name of its type, e.g. `BF16`.
        shape: its dimensions.
        file: the file that holds it.
        offset: first byte, from the start of the file.
        length: number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its path, its string metadata, and its tensors by ascending offset."""

    path: Path
    metadata: Mapping[str, str]
    tensors: tuple[Tensor, ...]


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: absent, no regular file, or malformed in any way; names file and tensor.
    """
    text, size = _read_header(path)
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    start = 8 + len(text)
    tensors = sorted(
        (_tensor(name, entry, path, start) for name, entry in header.items()),
        key=lambda tensor: (tensor.offset, tensor.length),
    )
    _check_covered(tensors, start, size, path)
    return Shard(path, metadata, tuple(tensors))


def write_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file holding `(name, dtype, shape)` in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + byte_count(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Return the number of bytes of a tensor."""
    count = ITEM_BYTES[dtype]
    for dimension in shape:
        count *= dimension
    return count


def read_json(path: Path, hint: str = "") -> Any:
    """Read a JSON file; see `parse_json`.

    Args:
        path: the file.
        hint: what to say besides if there is none.

    Raises:
        CheckpointError: absent, no regular file, over 100 MB, or malformed.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        if found.st_size > MAX_HEADER:
            raise CheckpointError(f"{path}: {found.st_size} bytes are too many for a file of its kind")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        more = hint if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{more}") from None


def parse_json(text: str | bytes, path: Path) -> Any:
    """Parse JSON in UTF-8 that must not repeat a key.

    Raises:
        CheckpointError: not JSON, nested too deeply, a key stands twice, or a string is no valid Unicode.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: a string in its JSON holds a lone surrogate") from None
    except _RepeatedKey as error:
        raise CheckpointError(f"{path}: {error.args[0][:200]!r} stands twice in its JSON") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({str(error)[:120]})") from None


class _RepeatedKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKey(counts.most_common(1)[0][0])
    return result


def _read_header(path: Path) -> tuple[bytes, int]:
    """Return the header's text and the size of the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            _check_length(path, length, size)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) != length:
        raise CheckpointError(f"{path}: ends inside its header; fetch the file again")
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: its header does not start with '{{'; this is not a safetensors file")
    return text, size


def _check_length(path: Path, length: int, size: int) -> None:
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes long, too short for a safetensors file; fetch it again")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: states a header of {length} bytes, more than {MAX_HEADER}; not a safetensors file?"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: states a header of {length} bytes but the file ends after {size}; fetch it again"
        )


def _metadata(raw: Any, path: Path) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a map of strings to strings")
    return raw


def _tensor(name: str, entry: Any, path: Path, start: int) -> Tensor:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name[:200]!r}: {what}")

    if len(name) > MAX_NAME:
        raise fault(f"its name has {len(name)} characters, more than {MAX_NAME}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault("its header entry is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise fault(f"unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > 64:
        raise fault("its shape is not a list of whole numbers from 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault("its data_offsets are not [begin, end] with 0 <= begin <= end")
    length, expected = offsets[1] - offsets[0], byte_count(dtype, shape)
    if length != expected:
        raise fault(
            f"shape {shape} of {dtype} needs {_short(expected)} bytes, its data_offsets hold {length}"
        )
    return Tensor(
        name=name, dtype=dtype, shape=tuple(shape), file=path, offset=start + offsets[0], length=length
    )


def _naturals(value: Any) -> bool:
    # Beyond 63 bits no file can follow, and a product of such numbers is only good for exhausting memory.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(number: int) -> str:
    return str(number) if number < 2**64 else "more than 2^64"


def _check_covered(tensors: Sequence[Tensor], start: int, size: int, path: Path) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {tensor.name!r} {what} (offset {tensor.offset - start})")
        end += tensor.length
    if end > size:
        last = tensors[-1].name
        raise CheckpointError(
            f"{path}: truncated: tensor {last!r} ends at byte {end} of {size}; fetch it again"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor; fetch it again")
