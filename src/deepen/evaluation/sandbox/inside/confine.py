"""What a process does to itself before it runs anything of others."""

import math
import os
import resource
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Final

from deepen.evaluation.sandbox.inside import kernel, landlock, namespaces, seccomp

NAMESPACES, LANDLOCK, SECCOMP, BUBBLEWRAP = "namespaces", "landlock", "seccomp", "bubblewrap"
_THREADS_OF_OTHERS: Final = 4096


def confine(job: dict[str, Any], *, user: int | None, read_write: Collection[str]) -> None:
    """Put the job's layers on this process, in the order in which each still may be put on.

    Raises OSError where one of them does not hold: better no result than one from an open sandbox.
    """
    with suppress(PermissionError):
        os.setsid()
    set_limits(job["limits"], own_users=NAMESPACES in job["layers"])
    if user is not None:
        namespaces.become(user)
    if kernel.LINUX:
        kernel.drop_capabilities()
        kernel.forbid_new_privileges()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        kernel.die_with_parent()
    if LANDLOCK in job["layers"]:
        landlock.restrict(job["read_only"], list(read_write))
    if SECCOMP in job["layers"]:
        seccomp.restrict()


def set_limits(limits: dict[str, Any], *, own_users: bool) -> None:
    """Set the resource limits, hard ones with the soft, so that none can be raised again.

    Of processor time the hard limit is a second later: the soft one's signal tells what ended the program,
    and a program that ignores it is killed.
    """
    wanted = {
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["open_files"],
        # Counted over all processes of the user: without a user namespace, over those of others too.
        "RLIMIT_NPROC": limits["threads"] + (0 if own_users else _THREADS_OF_OTHERS),
        # Not 0, at which Linux still calls a program that collects core dumps; none is as small as one byte.
        "RLIMIT_CORE": 1,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_RTPRIO": 0,
    }
    for name, value in wanted.items():
        which = getattr(resource, name, None)
        if which is not None:
            _set_limit(which, value, value)
    seconds = math.ceil(limits["cpu_seconds"])
    _set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)


def _set_limit(which: int, soft: int, hard: int) -> None:
    _, most = resource.getrlimit(which)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    # macOS takes no limit on address space; the self-test says so.
    with suppress(OSError, ValueError):
        resource.setrlimit(which, (soft, hard))
