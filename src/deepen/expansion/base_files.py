"""Taking blocks off again, byte for byte: what of the base's files is recorded, and how they are planned.

Most of a base's files follows from the expanded checkpoint's: the tensors lie in files of the same names in
the same order. What does not (a header in another style, files cut anew) is kept as text, and a digest of
everything, so that a file that came out differently is noticed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import CONFIG, INDEX, ITEM_BYTES, Checkpoint, Shard, write_header
from deepen.expansion.carry import carried_files
from deepen.expansion.config_json import reordered_config
from deepen.expansion.layout import Layout
from deepen.expansion.manifest import MANIFEST_NAME, Expansion, FileRecord, Files
from deepen.expansion.plan import Base, Plan, PlannedFile, PlannedTensor, held_tensor, plan_files
from deepen.expansion.stages import base_name, previous_expansion
from deepen.families import Family

_DIGEST_BYTES: Final = 16


@dataclass(frozen=True)
class WrittenFile(PlannedFile):
    """A safetensors file whose header is given: that of the file it is to equal."""

    text: bytes

    @cached_property
    def header(self) -> bytes:
        """Length and header, as the file begins."""
        return len(self.text).to_bytes(8, "little") + self.text


def digest_of(data: bytes) -> str:
    """Return the digest by which a file's text is recognised."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _hash).hexdigest()


def _hash() -> Any:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def record_file(data: bytes, regenerated: Iterable[bytes] = ()) -> FileRecord:
    """Return what to record of a file; its text only if none of what comes by itself equals it."""
    text = None if data in regenerated else data.decode()
    return FileRecord(digest=digest_of(data), text=text)


def file_header(path: Path) -> bytes:
    """Return the header of a safetensors file, without its length."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def plan_base(
    expanded: Checkpoint, tensors: Iterable[PlannedTensor], expansion: Expansion, family: Family
) -> Plan:
    """Plan the files of the base from those of an expanded checkpoint, as far as they follow from them.

    Args:
        expanded: gives the names of the files, their metadata and their index.
        tensors: its tensors; `beside` is the file each lies in.
        expansion: which blocks to leave out.
        family: in the checkpoint's dialect.
    """
    named = ((base_name(expansion, family, tensor.name), tensor) for tensor in tensors)
    plan = plan_files(expanded, [replace(t, name=name, block=None) for name, t in named if name is not None])
    return replace(plan, files=tuple(file for file in plan.files if file.tensors))


def held_tensors(expanded: Checkpoint) -> Iterator[PlannedTensor]:
    """Give the tensors of a checkpoint as something to copy."""
    return map(held_tensor, expanded.tensors.values())


def _ways(file: PlannedFile) -> Iterator[WrittenFile]:
    """The file as deepen or the safetensors library would write it.

    That is, with its tensors in their order or the library's, and with as many spaces after the header as let
    the data begin anywhere in a cache line.
    """
    library = sorted(file.tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    for tensors in (file.tensors, tuple(library)):
        text = write_header([(t.name, t.dtype, t.shape) for t in tensors], file.metadata)[8:]
        for spaces in range(0, 64, 8):
            yield WrittenFile(file.name, file.metadata, tensors, text + b" " * spaces)


def reduce_config(config: Mapping[str, Any], family: Family, layout: Layout) -> dict[str, Any]:
    """Return a `config.json` of the base from the expanded model's: it means the same, the text may differ.

    Raises:
        CheckpointError: a per-layer list has not one entry a block.
        LayoutError: the config has no words for the kinds of blocks in this order.
    """
    return reordered_config(config, family, layout.depth, layout.base_positions)


def record_base_files(base: Base, expansion: Expansion, plan: Plan) -> Files:
    """Return what it takes to write the base's files again from an expanded checkpoint about to be written.

    Args:
        base: the base.
        expansion: the record of its expansion.
        plan: the expanded checkpoint's weight files.
    """
    names = (Shard(Path(file.name), file.metadata, ()) for file in plan.files)
    written = replace(base.checkpoint, shards=tuple(names), index=plan.index)
    tensors = [replace(tensor, beside=file.name) for file in plan.files for tensor in file.tensors]
    return _record(base, expansion, plan_base(written, tensors, expansion, base.family))


def record_adopted_files(base: Base, expansion: Expansion, expanded: Checkpoint, family: Family) -> Files:
    """Do the same for an expanded checkpoint that was written by others."""
    return _record(base, expansion, plan_base(expanded, held_tensors(expanded), expansion, family))


def _record(base: Base, expansion: Expansion, regenerated: Plan) -> Files:
    directory = base.checkpoint.directory
    files = {file.name: file for file in regenerated.files}
    found = {CONFIG: record_file((directory / CONFIG).read_bytes())}
    if base.checkpoint.index is not None:
        text = regenerated.index_text()
        found[INDEX] = record_file((directory / INDEX).read_bytes(), () if text is None else (text.encode(),))
    for shard in base.checkpoint.shards:
        name = shard.path.name
        ways = _ways(files[name]) if name in files else ()
        found[name] = record_file(file_header(shard.path), (way.text for way in ways))
    if base.previous is not None:
        earlier = previous_expansion(expansion, base.family)
        texts = (earlier.to_json().encode(),) if earlier else ()
        found[MANIFEST_NAME] = record_file((directory / MANIFEST_NAME).read_bytes(), texts)
    carried = {name: FileRecord(digest=file_digest(directory / name)) for name in carried_files(directory)}
    return found | carried


def restored_file(
    name: str, record: FileRecord, file: PlannedFile | None, tensors: Mapping[str, PlannedTensor]
) -> PlannedFile | None:
    """Return a recorded safetensors file as it was, but for its data; None where that cannot be.

    Args:
        name: what to call it.
        record: what is known of it.
        file: the file as it follows from the expanded checkpoint, if it does.
        tensors: every tensor there is, by name.
    """
    if record.text is None:
        ways = _ways(file) if file else iter(())
        return next((way for way in ways if digest_of(way.text) == record.digest), None)
    held = _listed(record.text, tensors)
    lies = digest_of(record.text.encode()) != record.digest
    return None if held is None or lies else WrittenFile(name, {}, held, record.text.encode())


def recorded_text(record: FileRecord | None, regenerated: str | None) -> tuple[str | None, bool]:
    """Return a file's text, and whether it is known to be as it was.

    Args:
        record: what is known of it.
        regenerated: its text as it follows from elsewhere, if it does.
    """
    for text in (record.text, regenerated) if record else ():
        if text is not None and record and digest_of(text.encode()) == record.digest:
            return text, True
    return regenerated, False


def _listed(text: str, tensors: Mapping[str, PlannedTensor]) -> tuple[PlannedTensor, ...] | None:
    """The tensors a header lists, in the order of their bytes; None where they are not these tensors."""
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        named = sorted(raw, key=lambda name: raw[name]["data_offsets"])
        held, end = tuple(tensors[name] for name in named), 0
        for tensor in held:
            begin, end = end, end + tensor.length
            wanted = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
            if raw[tensor.name] != wanted:
                return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return held
