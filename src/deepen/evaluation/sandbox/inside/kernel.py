"""System calls that Python 3.11 has no name for, through libc."""

import ctypes
import os
import sys
from typing import Any

LINUX = sys.platform == "linux"

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """Call a libc function that returns -1 on failure; raises OSError."""
    ctypes.set_errno(0)
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def system_call(number: int, *arguments: Any) -> int:
    """Make a system call by its number, whole numbers as C longs; raises OSError."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return call("syscall", ctypes.c_long(number), *wide)


def prctl(option: int, value: Any = 0, third: Any = 0) -> int:
    """Call prctl; raises OSError."""
    wide = [ctypes.c_ulong(item) if isinstance(item, int) else item for item in (value, third, 0, 0)]
    return call("prctl", ctypes.c_int(option), *wide)


def die_with_parent() -> None:
    """Ask to be killed when the parent ends, on Linux."""
    if LINUX:
        prctl(PR_SET_PDEATHSIG, 9)


def drop_capabilities() -> None:
    """Give up every capability, for good: root without them is an ordinary user who owns root's files."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # not one this kernel has, or no right to drop: there is nothing to lose then
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def forbid_new_privileges() -> None:
    """Make set-uid files and file capabilities void for this process and all that come of it."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def ulong(value: int) -> ctypes.c_ulong:
    """Return a number as C's unsigned long."""
    return ctypes.c_ulong(value)
