"""User, mount, network, IPC, UTS and process namespaces: a machine with nothing on it but the interpreter."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from deepen.evaluation.sandbox.inside import kernel

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
_NEW_PROCESSES, _NEW_NETWORK = 0x20000000, 0x40000000

_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_DETACH = 2
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
# Flags that a mount may not lose; statvfs reports them by the same numbers.
_KEPT = _NO_SUID | _NO_DEVICES | _NO_EXEC | 1024

SCRATCH = "/scratch"
NOBODY = 65534


def enter(stage: str, read_only: Sequence[str], scratch_bytes: int) -> int:
    """Move this process into new namespaces, but for that of processes; return the user to become in them.

    `stage` is an empty directory on which the new root is built. The root is read-only and holds the paths of
    `read_only`, three devices and `SCRATCH`, a memory file system of `scratch_bytes`. Raises OSError where
    the kernel refuses any of it.
    """
    with _mapped_users():
        kernel.call("unshare", _NEW_USER | _NEW_MOUNTS | _NEW_NETWORK | _NEW_IPC | _NEW_UTS)
    user = _inner_user()
    name = b"sandbox"
    kernel.call("sethostname", name, len(name))
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _build_root(stage, read_only)
    scratch = stage + SCRATCH
    os.mkdir(scratch)
    flags = _NO_SUID | _NO_DEVICES | _NO_EXEC
    _mount("tmpfs", scratch, "tmpfs", flags, f"size={scratch_bytes},nr_inodes=4096,mode=700")
    os.chown(scratch, user, user if user == NOBODY else -1)
    _mount(None, stage, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.chdir(stage)
    kernel.call("pivot_root", b".", b".")
    kernel.call("umount2", b".", _DETACH)
    os.chdir(SCRATCH)
    return user


def separate_processes() -> None:
    """Give the children of this process a process namespace of their own; the first is its init."""
    kernel.call("unshare", _NEW_PROCESSES)


def become(user: int) -> None:
    """Become an ordinary user of the namespace."""
    if os.getuid() != user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


@contextmanager
def _mapped_users() -> Iterator[None]:
    """Fill in the user map after the block, from a child that stayed outside.

    Only a process outside may map more than itself, which root needs: a program that runs as root, even one
    without capabilities, owns root's files and escapes the limit on processes.
    """
    user, group = os.geteuid(), os.getegid()
    ready, signal_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(signal_ready)
        os.read(ready, 1)
        os._exit(_write_maps(os.getppid(), user, group))
    os.close(ready)
    try:
        yield
    finally:
        os.close(signal_ready)
        _, status = os.waitpid(child, 0)
    if status:
        raise PermissionError("the kernel lets no user be mapped")


def _write_maps(process: int, user: int, group: int) -> int:
    alone = (f"{user} {user} 1", f"{group} {group} 1", b"deny")
    choices = [alone]
    if user == 0:
        choices.insert(0, (f"0 0 1\n{NOBODY} {NOBODY} 1", f"0 0 1\n{NOBODY} {NOBODY} 1", b"allow"))
    for users, groups, setgroups in choices:
        with suppress(OSError):
            _write(f"/proc/{process}/uid_map", users.encode())
            _write(f"/proc/{process}/setgroups", setgroups)
            _write(f"/proc/{process}/gid_map", groups.encode())
            return 0
    return 1


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _inner_user() -> int:
    with open("/proc/self/uid_map") as lines:
        return NOBODY if len(lines.readlines()) > 1 else os.getuid()


def _build_root(stage: str, read_only: Sequence[str]) -> None:
    _mount("tmpfs", stage, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    for path in read_only:
        os.makedirs(stage + path, exist_ok=True)
        _bind(path, stage + path)
    os.mkdir(f"{stage}/dev")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        os.close(os.open(stage + device, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(device, stage + device, None, _BIND)


def _bind(source: str, target: str) -> None:
    """Show a directory, and what is mounted below it, read-only."""
    _mount(source, target, None, _BIND | _RECURSIVE)
    attributes = _READ_ONLY | _NO_SUID | _NO_DEVICES
    packed = attributes.to_bytes(8, "little") + bytes(24)
    try:
        kernel.system_call(_MOUNT_SETATTR, -100, target.encode(), _AT_RECURSIVE, packed, len(packed))
    except OSError:
        # Before Linux 5.12: the directory's own mount only, and with the flags that it may not lose.
        kept = os.statvfs(target).f_flag & _KEPT
        _mount(None, target, None, _REMOUNT | _BIND | attributes | kept)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    kernel.call("mount", encoded[0], encoded[1], encoded[2], kernel.ulong(flags), encoded[3])
