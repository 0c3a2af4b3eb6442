"""Opening a file that a user named."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepen.errors import CheckpointError


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Give (descriptor, size in bytes) of a regular file opened for reading.

    Raises:
        CheckpointError: absent, unreadable, or a directory, device or pipe.
    """
    try:
        # Asked before opening: opening a pipe that nobody writes would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {said}") from None
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def read_at(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    """Read exactly `length` bytes; one call of the system reads 2 GB at most, so ask for less.

    Raises:
        CheckpointError: the file ends before, or the disk fails.
    """
    try:
        data = os.pread(descriptor, length, offset)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) != length:
        raise CheckpointError(f"{path}: ends at byte {offset + len(data)}; it has shrunk while being read")
    return data
