"""One sandbox: starts the program and its checks in processes of their own, watches them, ends them.

::

    deepen ── supervisor (never runs anything of others)
                ├── checks    knows what is expected; holds the only pipe for a verdict
                └── init      of the process namespace
                      └── program   the model's code; two pipes to the checks, one for its output

It reads two messages from its standard input: the job (limits, layers, paths, the program's source) and the
checks. The second is read by the process of the checks alone, so what is expected is never in the memory of
a process from which the program is forked. It writes one message, the outcome, to its standard output.
"""

import base64
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NoReturn

# Imported here though used by the forked processes: once the root has changed it may be out of reach.
from deepen.evaluation.sandbox.inside import checks, frames, kernel, namespaces, program
from deepen.evaluation.sandbox.inside.confine import NAMESPACES, confine
from deepen.evaluation.sandbox.inside.verdict import Ending, settle

_MOST_JOB = 1 << 28


def main() -> None:
    """Run the job on standard input and write its outcome to standard output."""
    kernel.die_with_parent()
    if kernel.LINUX:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    job = json.loads(frames.receive(0, _MOST_JOB))
    try:
        outcome = _run(job)
    except OSError as error:
        outcome = {"status": "error", "reason": f"the sandbox could not be set up: {error}"}
    frames.send(1, json.dumps(outcome).encode())


def _run(job: dict[str, Any]) -> dict[str, Any]:
    user = None
    if NAMESPACES in job["layers"]:
        user = namespaces.enter(job["stage"], job["read_only"], job["limits"]["scratch_bytes"])
    if kernel.LINUX:
        # Only now: the user map of a process that hides its memory cannot be written.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    requests, responses, verdicts, output, armed = (os.pipe() for _ in range(5))
    judge = _fork(
        lambda: _be_checks(job, user, responses[0], requests[1], verdicts[1], armed[1]),
        keep=(0, responses[0], requests[1], verdicts[1], armed[1]),
    )
    if NAMESPACES in job["layers"]:
        namespaces.separate_processes()
    runner = _fork(
        lambda: _be_program(job, user, requests[0], responses[1], output[1], armed[1]),
        keep=(requests[0], responses[1], output[1], armed[1]),
        init=NAMESPACES in job["layers"],
    )
    for descriptor in (*requests, *responses, verdicts[1], output[1], armed[1]):
        os.close(descriptor)
    if len(os.read(armed[0], 1) + os.read(armed[0], 1)) < 2:
        os.set_blocking(output[0], False)
        raise OSError(os.read(output[0], 500).decode(errors="replace").strip())
    return _watch(job, judge, runner, verdicts[0], output[0])


def _be_checks(
    job: dict[str, Any], user: int | None, responses: int, requests: int, verdicts: int, armed: int
) -> None:
    most = job["limits"]["message_bytes"]
    task = json.loads(frames.receive(0, _MOST_JOB))
    _redirect(os.open("/dev/null", os.O_RDWR), 0, 1, 2)
    confine(job, user=user, read_write=())
    _report_armed(armed)
    frames.send(verdicts, checks.judge(task, requests, responses, most))


def _be_program(
    job: dict[str, Any], user: int | None, requests: int, responses: int, output: int, armed: int
) -> None:
    _redirect(os.open("/dev/null", os.O_RDWR), 0)
    _redirect(output, 1, 2)
    # The first entries are the standard library's; this package is not for the program.
    sys.path += job["packages"]
    confine(job, user=user, read_write=[os.getcwd()])
    _report_armed(armed)
    program.serve(job, requests, responses)


def _report_armed(armed: int) -> None:
    """Say that the layers are on, once: after this the process runs what is not ours."""
    os.write(armed, b"1")
    os.close(armed)


def _redirect(source: int, *targets: int) -> None:
    for target in targets:
        os.dup2(source, target)
    if source not in targets:
        os.close(source)


def _fork(work: Callable[[], None], *, keep: Collection[int], init: bool = False) -> int:
    """Run `work` in a child that holds no descriptor but those to keep; with `init`, in a child of that."""
    child = os.fork()
    if child:
        return child
    kernel.die_with_parent()
    if init:
        grandchild = os.fork()
        if grandchild:
            _close_all_but(())
            _wait_as_init(grandchild)
    _close_all_but(keep)
    try:
        work()
    except frames.Closed:
        os._exit(0)
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(70)
    os._exit(0)


def _close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor but those; the numbers 0 to 2 come back as the null device."""
    low = 0
    for descriptor in sorted(keep):
        if descriptor > low:  # closerange(0, 0) closes everything
            os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, max(os.sysconf("SC_OPEN_MAX"), 1024) if not kernel.LINUX else 1 << 20)
    for descriptor in range(3):
        if descriptor not in keep:
            # The lowest free number is taken, so each lands where it belongs.
            os.open("/dev/null", os.O_RDWR)


def _wait_as_init(program_process: int) -> NoReturn:
    """Reap what is left behind until the program ends, then end with it, and with us the whole namespace."""
    while True:
        process, status = os.wait()
        if process == program_process:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _watch(job: dict[str, Any], judge: int, runner: int, verdicts: int, output: int) -> dict[str, Any]:
    limits = job["limits"]
    started = time.monotonic()
    verdict, text, timed_out = _listen(verdicts, output, limits, started + limits["wall_seconds"])
    wall = time.monotonic() - started
    # A program that ended by itself is waited for a moment: how it ended is the reason to report.
    code, used = _end(runner, patience=0.0 if timed_out or not _is_lost(verdict) else 1.0)
    _drain(output, text, limits["output_bytes"])
    _end(judge, patience=0.0)
    _end_descendants()
    cpu = used.ru_utime + used.ru_stime
    ending = Ending(code=code, cpu_seconds=cpu, timed_out=timed_out)
    outcome = settle(None if verdict is None else json.loads(verdict), ending, limits)
    return {**outcome, "stdout": base64.b64encode(text).decode(), "wall_seconds": wall, "cpu_seconds": cpu}


def _is_lost(verdict: bytes | None) -> bool:
    return verdict is None or json.loads(verdict)["status"] == "lost"


def _listen(
    verdicts: int, output: int, limits: dict[str, Any], deadline: float
) -> tuple[bytes | None, bytearray, bool]:
    """Return the verdict (None: the checks ended without one), the output, and whether time ran out."""
    poll, verdict, text = select.poll(), bytearray(), bytearray()
    for descriptor in (verdicts, output):
        poll.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            chunk = os.read(descriptor, 1 << 16)
            if descriptor == output:
                # What is too much is read all the same: a full pipe would stop the program where it is.
                text += chunk[: limits["output_bytes"] - len(text)]
                if not chunk:
                    poll.unregister(output)
                continue
            verdict += chunk
            whole = frames.complete(verdict)
            if whole is not None or not chunk:
                return whole, text, False
    return None, text, True


def _drain(output: int, text: bytearray, most: int) -> None:
    os.set_blocking(output, False)
    with suppress(BlockingIOError):
        while chunk := os.read(output, 1 << 16):
            text += chunk[: most - len(text)]


def _end(process: int, patience: float) -> tuple[int | None, Any]:
    """Give a child a moment to end, then kill it and its group.

    Returns its exit code (None where it was killed) and its use of resources. The init of a process namespace
    takes everything in it along.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        ended, status, used = os.wait4(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used
        time.sleep(0.005)
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(process, signal.SIGKILL)
    return None, os.wait4(process, 0)[2]


def _end_descendants() -> None:
    """Kill what the program left behind, where no process namespace did: orphans become our children."""
    while children := _children():
        for process in children:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _children() -> list[int]:
    """Return the children of this process; none without /proc, where a namespace ends with us."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as text:
            return [int(word) for word in text.read().split()]
    except OSError:
        return []
