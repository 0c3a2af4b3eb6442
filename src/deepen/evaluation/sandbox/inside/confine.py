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
LAYERS: Final = (NAMESPACES, BUBBLEWRAP, LANDLOCK, SECCOMP)


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
    """Set the resource limits, hard ones with the soft, so that none can be raised again."""
    wanted = {
        # The kernel kills at the hard limit; at a lower soft one the program could catch its signal.
        "RLIMIT_CPU": math.ceil(limits["cpu_seconds"]),
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["open_files"],
        # Counted over all processes of the user: without a user namespace, over those of others too.
        "RLIMIT_NPROC": limits["threads"] + (0 if own_users else _THREADS_OF_OTHERS),
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_RTPRIO": 0,
    }
    for name, value in wanted.items():
        which = getattr(resource, name, None)
        if which is not None:
            _set_limit(which, value)


def _set_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # macOS takes no limit on address space; the self-test says so.
    with suppress(OSError, ValueError):
        resource.setrlimit(which, (value, value))
