"""A seccomp filter, written by hand: which system calls a program may make.

Calls are denied by name, and every number above the last one known here is denied too, so that what a newer
kernel adds stays shut. Denied are sockets, new processes, programs to execute, other processes, namespaces
and mounts, kernel keys, tracing, io_uring and administration; and, since Landlock does not know them, changes
to the mode, owner and times of files. Threads and signals to oneself remain.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Iterable, Sequence
from struct import pack

from deepen.evaluation.sandbox.inside import kernel
from deepen.evaluation.sandbox.inside.system_calls import ARCHITECTURES, FATAL, REFUSED, Architecture, number

_FILTER = 2
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Offsets in struct seccomp_data; an argument's low half comes first on both (little-endian) architectures.
_NUMBER, _ARCHITECTURE, _FIRST_LOW, _FIRST_HIGH = 0, 4, 16, 20
_CLONE_THREAD = 0x10000

Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def supported() -> bool:
    """Return whether there is a filter for this machine's architecture (x86_64 and aarch64)."""
    return kernel.LINUX and platform.machine() in ARCHITECTURES


def restrict() -> None:
    """Put the filter on this process, for good; raises OSError where the kernel refuses.

    Needs `kernel.forbid_new_privileges` first. The filter knows the process by its id: put it on after the
    last fork.
    """
    instructions = build(ARCHITECTURES[platform.machine()], os.getpid())
    code = b"".join(pack("HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    kernel.prctl(kernel.PR_SET_SECCOMP, _FILTER, ctypes.byref(program))


def build(architecture: Architecture, process: int) -> list[Instruction]:
    """Return the filter as (operation, jump if true, jump if false, constant)."""
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, architecture.last),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        *_deny(_numbers(FATAL, architecture), _KILL),
        *_deny(_numbers(REFUSED, architecture), _ERRNO | errno.EPERM),
        # glibc falls back to clone, whose flags a filter can read; those of clone3 lie in memory.
        *_deny(_numbers(["clone3", "memfd_create"], architecture), _ERRNO | errno.ENOSYS),
        *_only_first(number("clone", architecture), [(_ANY_BIT, 1, 0, _CLONE_THREAD)], high=False),
        *_only_first(number("kill", architecture), [(_EQUAL, 1, 0, process)]),
        *_only_first(number("tgkill", architecture), [(_EQUAL, 1, 0, process)]),
        *_only_first(number("prlimit64", architecture), [(_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, process)]),
        # The other way round: all options pass but this, by which a program could outlive its supervisor.
        *_only_first(number("prctl", architecture), [(_EQUAL, 0, 1, kernel.PR_SET_PDEATHSIG)], high=False),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _numbers(names: Iterable[str], architecture: Architecture) -> list[int]:
    found = (number(name, architecture) for name in names)
    return [value for value in found if value is not None]


def _deny(numbers: Sequence[int], action: int) -> list[Instruction]:
    return [
        instruction for denied in numbers for instruction in ((_EQUAL, 0, 1, denied), (_RETURN, 0, 0, action))
    ]


def _only_first(allowed: int | None, tests: Sequence[Instruction], *, high: bool = True) -> list[Instruction]:
    """Refuse a call unless one of the tests jumps past the refusal; `high`: its upper half must be zero too.

    The tests see the lower half of the call's first argument. The kernel ignores the upper half of a process
    id; refusing one is simpler to be sure of.
    """
    assert allowed is not None
    refusal = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    upper = [(_LOAD, 0, 0, _FIRST_HIGH), (_EQUAL, 1, 0, 0), refusal] if high else []
    body = [*upper, (_LOAD, 0, 0, _FIRST_LOW), *tests, refusal, (_LOAD, 0, 0, _NUMBER)]
    return [(_EQUAL, 0, len(body), allowed), *body]
