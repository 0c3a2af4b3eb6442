"""Output that appears whole or not at all.

A directory is written as a sibling `.NAME.partial-…`, synced, and renamed. The writer holds a lock (flock) on
the sibling, so that the next writer of the same target can tell the leftovers of a dead process, which it
removes, from the work of a living one, which it leaves alone.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepen.checkpoint.rename import exchange, rename_new
from deepen.errors import OutputError

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextmanager
def atomic_directory(
    target: Path, *, overwrite: bool = False, inside: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Give a fresh directory to write into; it becomes `target` when the block ends without an exception.

    At every instant `target` is absent, the complete old directory, or the complete new one. (Where the
    system cannot exchange two names in one step, see `deepen.checkpoint.rename`, a directory being
    replaced is absent for an instant; the next writer puts it back.) Everything is synced before the rename.

    Args:
        target: the directory to create; missing parents are created.
        overwrite: replace an existing directory.
        inside: input directories that the target must neither lie in nor contain.

    Raises:
        OutputError: the target exists, overlaps an input, or the disk refuses it.
    """
    target = Path(os.path.realpath(target))
    check_apart(target, inside)
    check_free(target, overwrite=overwrite)
    made = _make_parents(target)
    try:
        _recover(target)
        with _locked_partial(target, directory=True) as (partial, _):
            try:
                yield partial
                sync_tree(partial)
                _publish(partial, target, overwrite)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        _unmake(made)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise OutputError(f"{target}: {error.strerror}; nothing was left behind") from error
        raise
    _sync_directories({target.parent, *(path.parent for path in made)})


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: after a crash it holds its old content or the new one.

    It gets the umask's mode and is synced. Text is written as UTF-8.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give an empty file to write into; it becomes `path` when the block ends without an exception.

    After a crash `path` holds its old content or the new one, synced, with the umask's mode.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        with _locked_partial(path, directory=False) as (partial, descriptor):
            try:
                yield partial
                os.fsync(descriptor)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        _sync_directories({path.parent})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def check_free(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a target that exists, so that a long computation fails before it starts.

    Raises:
        OutputError: it exists and `overwrite` is false, is not a directory, or holds the working directory.
    """
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise OutputError(f"{target}: exists and is not a directory; choose another output")
    if not overwrite:
        raise OutputError(f"{target}: exists already; choose another output or say --overwrite")
    if Path.cwd().is_relative_to(os.path.realpath(target)):
        raise OutputError(f"{target}: holds the working directory and will not be overwritten")


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below `directory`, itself included, to the disk."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def check_apart(target: Path, inputs: tuple[Path, ...]) -> None:
    """Refuse a target that lies inside an input or holds one.

    Raises:
        OutputError: it does.
    """
    target = Path(os.path.realpath(target))
    for directory in inputs:
        real = Path(os.path.realpath(directory))
        if target.is_relative_to(real):
            raise OutputError(
                f"{target}: the output lies inside the input {directory}; choose a place outside it"
            )
        if real.is_relative_to(target):
            raise OutputError(f"{target}: the output holds the input {directory}; choose another place")


def _make_parents(target: Path) -> list[Path]:
    """Create missing parents; return those created, outermost first."""
    missing = [parent for parent in target.parents if not os.path.exists(parent)][::-1]
    made: list[Path] = []
    try:
        for parent in missing:
            parent.mkdir(exist_ok=True)
            made.append(parent)
        if not target.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent))
    except OSError as error:
        _unmake(made)
        raise OutputError(f"{target}: cannot be created: {error.strerror} ({error.filename})") from error
    return made


def _unmake(made: list[Path]) -> None:
    with suppress(OSError):
        for parent in reversed(made):
            parent.rmdir()


@contextmanager
def _locked_partial(target: Path, *, directory: bool) -> Iterator[tuple[Path, int]]:
    """Create and lock a temporary sibling of `target`, after removing those of dead processes."""
    try:
        _remove_leftovers(target)
        partial, descriptor = _create_locked(target, directory)
    except OSError as error:
        raise OutputError(f"{target}: cannot be created: {error.strerror} ({error.filename})") from error
    try:
        yield partial, descriptor
    finally:
        os.close(descriptor)


def _create_locked(target: Path, directory: bool) -> tuple[Path, int]:
    while True:
        partial = target.parent / f".{target.name}.partial-{secrets.token_hex(6)}"
        if directory:
            partial.mkdir()
        # Between the creation and the lock another process may take it for a dead one's; then try again.
        flags = os.O_RDONLY if directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(partial, flags, 0o666)
        except FileNotFoundError:
            continue
        if _lock(descriptor) is not False and _is_at(descriptor, partial):
            return partial, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Return whether the lock was free; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _siblings(target: Path, kind: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{target.name}.{kind}-") + "[0-9a-f]{12}")
    return [target.parent / name for name in os.listdir(target.parent) if pattern.fullmatch(name)]


def _remove_leftovers(target: Path) -> None:
    for path in _siblings(target, "partial"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _lock(descriptor):
                    _remove(path)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _recover(target: Path) -> None:
    """Put back what a process without atomic exchange had moved aside when it died."""
    for path in _siblings(target, "replaced"):
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`; a replaced directory is left under the name of `partial`."""
    try:
        rename_new(partial, target)
    except FileExistsError:
        check_free(target, overwrite=overwrite)
        if not exchange(partial, target):
            aside = target.parent / f".{target.name}.replaced-{secrets.token_hex(6)}"
            target.rename(aside)
            partial.rename(target)
            shutil.rmtree(aside, ignore_errors=True)


def _sync_directories(directories: set[Path]) -> None:
    for directory in directories:
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
