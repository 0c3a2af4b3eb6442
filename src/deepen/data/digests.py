"""Content digests of files, remembered so that many GB are hashed once, not at every start."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from deepen.checkpoint import write_file
from deepen.errors import DataError

_REMEMBERED = "digests.json"
# A file changed twice within the clock's tick keeps its stamp; one as young as this is hashed again.
_SETTLED_NS = 2_000_000_000

Stamp = tuple[int, int, int]


def file_stamp(path: Path) -> Stamp:
    """Return size, time of modification (ns) and inode.

    Raises:
        DataError: the file is gone.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def file_digests(files: Sequence[Path], cache: Path) -> tuple[str, ...]:
    """Return the SHA-256 of each file; one whose stamp is known from an earlier call is not read.

    Args:
        files: what to hash.
        cache: existing directory that remembers the digests.

    Raises:
        DataError: a file cannot be read.
        OutputError: the cache cannot be written.
    """
    known = _load(cache)
    fresh: dict[str, list[int | str]] = {}
    digests = []
    for path in files:
        stamp, name = file_stamp(path), os.path.realpath(path)
        entry = known.get(name)
        if entry is not None and entry[:3] == list(stamp):
            digests.append(str(entry[3]))
            continue
        digests.append(_hash(path))
        if time.time_ns() - stamp[1] > _SETTLED_NS and stamp == file_stamp(path):
            fresh[name] = [*stamp, digests[-1]]
    if fresh:
        # Two processes at once may lose each other's entries: that costs a hash, not a wrong answer.
        write_file(cache / _REMEMBERED, json.dumps(_load(cache) | fresh))
    return tuple(digests)


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _load(cache: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads((cache / _REMEMBERED).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
