"""Landlock (Linux 5.13): which files a process may touch, and more with each version of its interface."""

import ctypes
import os
from collections.abc import Sequence

from deepen.evaluation.sandbox.inside import kernel

# The same numbers on every architecture but alpha, which takes 110 more.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_QUERY_VERSION = 1
_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
# Rights over files that versions 1, 2, 3 and 5 know: 13, then REFER, TRUNCATE and IOCTL_DEV.
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_REFER, _IOCTL_DEV = 1 << 13, 1 << 15
# Device nodes, sockets and pipes: a scratch directory needs none.
_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11
_CONNECT_AND_BIND_TCP = 3
_ABSTRACT_SOCKETS_AND_SIGNALS = 3


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """Return the version of the kernel's interface; 0 where it has none or it is switched off."""
    try:
        return kernel.system_call(_CREATE_RULESET, None, 0, _QUERY_VERSION) if kernel.LINUX else 0
    except OSError:
        return 0


def restrict(read_only: Sequence[str], read_write: Sequence[str]) -> None:
    """Confine this process for good: nothing outside these paths can be opened, and nothing executed.

    From version 4 on it can neither bind nor connect TCP either, and from version 6 on neither signal a
    process outside nor connect to its abstract sockets. Raises OSError where the kernel refuses.
    """
    known = version()
    files = _FILES[max(least for least in _FILES if least <= known)]
    ruleset = _Ruleset(files, _CONNECT_AND_BIND_TCP, _ABSTRACT_SOCKETS_AND_SIGNALS)
    size = 8 if known < 4 else 16 if known < 6 else 24
    handle = kernel.system_call(_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    for path in read_only:
        _allow(handle, path, _READ_FILE | _READ_DIR)
    for path in read_write:
        _allow(handle, path, files & ~(_EXECUTE | _SPECIAL | _REFER | _IOCTL_DEV))
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        _allow(handle, device, _READ_FILE | (_WRITE_FILE if device == "/dev/null" else 0))
    kernel.system_call(_RESTRICT_SELF, handle, 0)
    os.close(handle)


def _allow(handle: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE
        rule = _Beneath(rights, place)
        kernel.system_call(_ADD_RULE, handle, _BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(place)
