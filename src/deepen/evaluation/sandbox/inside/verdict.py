"""What is said of a program: the verdict of its checks or, where they lost it, how it ended."""

import signal
from dataclasses import dataclass
from typing import Any

_KILLED = 128


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the program's process ended.

    Attributes:
        code: its exit code; negative, or above 128, a signal; None where it had to be ended.
        cpu_seconds: processor time it took.
        timed_out: whether it was ended because its time was up.
    """

    code: int | None
    cpu_seconds: float
    timed_out: bool


def settle(verdict: dict[str, Any] | None, ending: Ending, limits: dict[str, Any]) -> dict[str, Any]:
    """Return status, reason and value."""
    if ending.timed_out:
        return _said("timeout", f"ran for more than {limits['wall_seconds']:g} s")
    if verdict is None:
        # They are trusted, but compute with what the program returned.
        return _said("failed", "the checks met a limit, or crashed, on what the program returned")
    if verdict["status"] != "lost":
        return verdict
    return _said(*_ended(ending, limits))


def _said(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "value": None}


def _ended(ending: Ending, limits: dict[str, Any]) -> tuple[str, str]:
    if ending.code is None:
        return "failed", "stopped answering"
    number = -ending.code if ending.code < 0 else ending.code - _KILLED
    # Killed at the hard limit, having ignored the soft one. The kernel counts ticks there: hence half.
    overran = number == signal.SIGKILL and ending.cpu_seconds > 0.5 * limits["cpu_seconds"]
    if number == signal.SIGXCPU or overran:
        return "timeout", f"used more than {limits['cpu_seconds']:g} s of processor time"
    if number == signal.SIGKILL:
        return "memory", "killed by the kernel, most likely for the memory it used"
    if number == signal.SIGSYS:
        return "blocked", "made a system call that no program may make"
    if number == signal.SIGXFSZ:
        return "blocked", f"wrote a file of more than {limits['file_bytes']} bytes"
    if number > 0:
        return "failed", f"died of signal {_name(number)}"
    return "failed", f"ended before its checks did, with exit code {ending.code}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
