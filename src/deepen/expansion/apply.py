"""Executing a plan: bytes are copied by the kernel, filled with a constant, or means. No judgement."""

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import cache
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from typing import Any

from deepen.checkpoint import INDEX, ITEM_BYTES
from deepen.errors import CheckpointError, OutputError
from deepen.expansion.plan import Plan, PlannedFile, PlannedTensor
from deepen.expansion.sources import Copy, Mean

Progress = Callable[[int, int], None]

_STEP = 16 << 20  # copied between two calls of progress, and handed to the disk
_BEGIN_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_BUFFER = 4 << 20
_FILES_AT_ONCE = 4
# What kernels and network file systems answer where they cannot copy (EIO: CIFS). A true fault comes back
# from reading and writing.
_UNSUPPORTED = {
    *(errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF),
    *(errno.EPERM, errno.EACCES, errno.EIO, errno.ETXTBSY, errno.EOVERFLOW),
}


def write_weights(plan: Plan, directory: Path, progress: Progress | None = None) -> None:
    """Write the plan's weight files, and their index if they have one, into an existing directory.

    Several files are written at once; the first failure stops them all.

    Args:
        plan: what to write.
        directory: where.
        progress: called with (bytes done, bytes in all), never twice at once, from any thread; what it
            raises ends the work.

    Raises:
        CheckpointError: a source file cannot be read, or has shrunk since the plan was made.
    """
    stopped, count = Event(), _counter(plan.bytes_written, progress)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        try:
            tasks = [pool.submit(_write_until, stopped, file, directory, count) for file in plan.files]
            for task in as_completed(tasks):
                task.result()
        finally:  # also on Ctrl-C, which reaches this thread only
            stopped.set()
            pool.shutdown(cancel_futures=True)
    if (text := plan.index_text()) is not None:
        (directory / INDEX).write_text(text, "utf-8")


def check_space(directory: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        directory: where the output will stand; it need not exist.
        needed: bytes.

    Raises:
        OutputError: less is free.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))
    disk = os.statvfs(existing)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise OutputError(
            f"{directory}: needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on its disk"
        )


def fill_bytes(dtype: str, value: float) -> bytes:
    """Return one little-endian element that holds `value`."""
    if not value:
        return bytes(ITEM_BYTES[dtype])  # 8-bit floats too, for which Python has no packer
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds a number of bytes to what is done and tells `progress`."""
    lock, done = Lock(), 0

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if progress:
                progress(done, total)

    return count


def _write_until(stopped: Event, file: PlannedFile, directory: Path, count: Callable[[int], None]) -> None:
    for more in _write(file, directory / file.name):
        if stopped.is_set():
            return
        count(more)


def _write(file: PlannedFile, path: Path) -> Iterator[int]:
    """Write one file, yielding the number of bytes after each step."""
    with ExitStack() as stack:
        target = stack.enter_context(path.open("xb", buffering=0)).fileno()
        write_back = stack.enter_context(_writing_back(target))
        sources: dict[Path, int] = {}
        # The full length at once: whatever is then not written is a hole, which reads as zeros.
        os.truncate(target, file.size)
        _pwrite(target, file.header, 0)
        yield len(file.header)
        for tensor, position, length in _runs(file):
            if isinstance(tensor.source, Copy):
                source = tensor.source
                if source.file not in sources:
                    sources[source.file] = stack.enter_context(_open(source.file)).fileno()
                for count in _copy(sources[source.file], target, source, position, length):
                    write_back(position, count)
                    position += count
                    yield count
            elif isinstance(tensor.source, Mean):
                yield from _mean(target, tensor.source, position, length)
            else:
                _fill(target, fill_bytes(tensor.dtype, tensor.source.value), position, length)
                yield length


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _runs(file: PlannedFile) -> Iterator[tuple[PlannedTensor, int, int]]:
    """Join neighbours that are neighbours in their source too: (first tensor, position, length in bytes)."""
    first: PlannedTensor | None = None
    position, length = len(file.header), 0
    for tensor in file.tensors:
        if first is not None and _follows(first, length, tensor):
            length += tensor.length
            continue
        if first is not None:
            yield first, position, length
            position += length
        first, length = tensor, tensor.length
    if first is not None:
        yield first, position, length


def _follows(first: PlannedTensor, length: int, tensor: PlannedTensor) -> bool:
    a, b = first.source, tensor.source
    return isinstance(a, Copy) and isinstance(b, Copy) and a.file == b.file and a.offset + length == b.offset


def _copy(source: int, target: int, copy: Copy, position: int, length: int) -> Iterator[int]:
    """Copy by the fastest means the file system knows: in the kernel, or through 4 MiB of memory."""
    done = 0
    means = [_copy_file_range, _sendfile, _read_write]
    while done < length:
        try:
            count = means[0](source, target, copy.offset + done, position + done, length - done)
        except _ReadFailed as error:
            raise CheckpointError(f"{copy.file}: cannot be read: {error}") from None
        except OSError as error:
            if len(means) > 1 and error.errno in _UNSUPPORTED:
                del means[0]
                continue
            raise
        if count == 0 and len(means) > 1:
            del means[0]
        elif count == 0:
            raise CheckpointError(f"{copy.file}: ended early; the file has changed while it was read")
        done += count
        yield count


@contextmanager
def _writing_back(target: int) -> Iterator[Callable[[int, int], None]]:
    """Let the disk begin with what was written (position, count) while more is copied.

    In a thread of its own, as the call waits where the disk has enough to do. It is a hint: what was not
    begun with, on a system without such a call all of it, is left to the sync at the end.
    """
    with ThreadPoolExecutor(1) as disk:

        def begin(position: int, count: int) -> None:
            if call := _sync_file_range():
                disk.submit(call, target, ctypes.c_int64(position), ctypes.c_int64(count), _BEGIN_WRITE)

        try:
            yield begin
        finally:
            disk.shutdown(cancel_futures=True)


@cache
def _sync_file_range() -> Any:
    """Linux has it, Python does not offer it."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


class _ReadFailed(Exception):
    """The fault is the source's, not the target's."""


def _copy_file_range(source: int, target: int, offset: int, position: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "copy_file_range")
    return os.copy_file_range(source, target, min(count, _STEP), offset, position)


def _sendfile(source: int, target: int, offset: int, position: int, count: int) -> int:
    os.lseek(target, position, os.SEEK_SET)
    return os.sendfile(target, source, offset, min(count, _STEP))


def _read_write(source: int, target: int, offset: int, position: int, count: int) -> int:
    try:
        data = os.pread(source, min(count, _BUFFER), offset)
    except OSError as error:
        raise _ReadFailed(error.strerror) from None
    _pwrite(target, data, position)
    return len(data)


def _mean(target: int, source: Mean, position: int, length: int) -> Iterator[int]:
    from deepen.expansion.fusion import mean_reader

    with mean_reader(source) as read:
        for start in range(0, length, _STEP):
            count = min(_STEP, length - start)
            _pwrite(target, read(start, count), position + start)
            yield count


def _fill(target: int, element: bytes, position: int, length: int) -> None:
    if not any(element):
        return
    pattern = element * (_BUFFER // len(element))
    for start in range(0, length, len(pattern)):
        _pwrite(target, pattern[: length - start], position + start)


def _pwrite(target: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, position)
        view, position = view[count:], position + count
