"""What goes into the sandbox and what comes out of it."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

Status = Literal["passed", "failed", "timeout", "memory", "blocked", "error"]

MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Program:
    """Code that a model wrote, and how to tell whether it is right.

    The source runs in one process; setup and checks, which are trusted, in another, where each entry point is
    a function that calls the program's function of that name. Arguments and results cross as plain data
    (numbers, texts, bytes, None, and lists, tuples, sets, dicts, ranges and iterators of them), so a change
    that a function makes to its argument is not seen by the checks, and of any other object only its truth.

    Attributes:
        name: of the task, for the reader.
        source: what the model wrote.
        entry_points: names of the functions that the checks call.
        checks: statements that raise where the program is wrong, for example asserts; they may be empty.
        setup: statements that run before the checks: imports and functions that they use.
        answer: names of which the first that the program defines is its answer: the variable's value, or what
            the function returns when called without arguments.
        main: run the source as a script, with `__name__ == "__main__"`.
    """

    name: str
    source: str
    entry_points: tuple[str, ...] = ()
    checks: str = ""
    setup: str = ""
    answer: tuple[str, ...] = ()
    main: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Its checks get as much again, in their own process.

    Attributes:
        cpu_seconds: processor time, rounded up to whole seconds. The limit that slow code meets: it does not
            depend on what else the machine is doing.
        wall_seconds: time by the clock, checks included; for programs that wait.
        memory_bytes: address space of the process.
        file_bytes: the largest file it may write.
        scratch_bytes: all its files together, where there is a mount namespace or bubblewrap.
        open_files: descriptors.
        threads: threads, where there is a user namespace.
        output_bytes: what is kept of its output.
        message_bytes: the largest set of arguments, or result, of one call.
        site_packages: let it import this environment's packages (numpy and so on), read-only.
    """

    cpu_seconds: float = 10
    wall_seconds: float = 30
    memory_bytes: int = 1024 * MIB
    file_bytes: int = 16 * MIB
    scratch_bytes: int = 64 * MIB
    open_files: int = 64
    threads: int = 32
    output_bytes: int = 64 * 1024
    message_bytes: int = 16 * MIB
    site_packages: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program.

    Attributes:
        name: the program's.
        status: "passed": the source ran and no check raised. "failed": one did, or the program ended before
            the checks did. "timeout" and "memory": a limit met. "blocked": an attempt at what no program may
            do ended it. "error": the sandbox could not be set up; says nothing about the program.
        reason: one line; empty for "passed".
        stdout: the beginning of what it printed, errors included.
        value: the answer, as plain data, where one was asked for and found.
        cpu_seconds: processor time it used. Not part of equality, nor is the next.
        wall_seconds: time by the clock.
    """

    name: str
    status: Status
    reason: str = ""
    stdout: str = ""
    value: Any = None
    cpu_seconds: float = field(default=0.0, compare=False)
    wall_seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the program is right, as far as its checks tell."""
        return self.status == "passed"
