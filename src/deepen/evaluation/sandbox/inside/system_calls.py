"""Names and numbers of the system calls that the filter speaks of."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

# Name, x86_64, aarch64; "-" where an architecture has no such call.
_FATAL = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
kcmp 312 272, process_mrelease 448 448, move_pages 279 239, migrate_pages 256 238, pidfd_getfd 438 438,
mount 165 40, umount2 166 39, mount_setattr 442 442, move_mount 429 429, open_tree 428 428,
fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, pivot_root 155 41, chroot 161 51,
unshare 272 97, setns 308 268, keyctl 250 219, add_key 248 217, request_key 249 218, bpf 321 280,
perf_event_open 298 241, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
userfaultfd 323 282, init_module 175 105, finit_module 313 273, delete_module 176 106,
kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225,
open_by_handle_at 304 265, name_to_handle_at 303 264, quotactl 179 60, quotactl_fd 443 443, acct 163 89,
syslog 103 116, sethostname 170 161, setdomainname 171 162, ioperm 173 -, iopl 172 -, modify_ldt 154 -,
fanotify_init 300 262, lookup_dcookie 212 18, nfsservctl 180 42, vhangup 153 58, memfd_secret 447 447
"""
_REFUSED = """
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242, fork 57 -,
vfork 58 -, execve 59 221, execveat 322 281, tkill 200 130, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, pidfd_open 434 434, pidfd_send_signal 424 424, personality 135 92,
settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, mknod 133 -,
mknodat 259 33, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, shmget 29 194, shmat 30 196,
shmctl 31 195, semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192, mq_open 240 180,
chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15,
fremovexattr 199 16, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45
"""
_WEIGHED = """
clone 56 220, clone3 435 435, memfd_create 319 279, kill 62 129, tgkill 234 131, prlimit64 302 261,
prctl 157 167
"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a filter must know of a machine.

    Attributes:
        audit: the kernel's number for it (AUDIT_ARCH_…).
        last: the highest system call considered here (Linux 6.2); later ones are denied unseen.
        column: of its numbers in the tables.
    """

    audit: int
    last: int
    column: int


ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        # `last` also denies the x32 calls of x86_64, whose numbers begin at 2³⁰.
        "x86_64": Architecture(audit=0xC000003E, last=450, column=0),
        "aarch64": Architecture(audit=0xC00000B7, last=450, column=1),
    }
)


def _read(table: str) -> dict[str, tuple[str, str]]:
    rows = (entry.split() for entry in table.split(","))
    return {name: (first, second) for name, first, second in rows}


FATAL: Final = tuple(_read(_FATAL))
REFUSED: Final = tuple(_read(_REFUSED))
NUMBERS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    _read(_FATAL) | _read(_REFUSED) | _read(_WEIGHED)
)


def number(name: str, architecture: Architecture) -> int | None:
    """Return a call's number; None where the architecture has no such call."""
    text = NUMBERS[name][architecture.column]
    return None if text == "-" else int(text)
