"""Many programs, several at a time."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from deepen.evaluation.sandbox.launch import Running, launch
from deepen.evaluation.sandbox.layers import require_layers
from deepen.evaluation.sandbox.programs import Limits, Outcome, Program

_DEFAULT = Limits()


def run_programs(
    programs: Sequence[Program],
    limits: Limits = _DEFAULT,
    *,
    workers: int | None = None,
    on_result: Callable[[Program, Outcome], None] | None = None,
    allow_unprotected: str = "",
) -> list[Outcome]:
    """Run each program in a sandbox of its own and return the outcomes in the order of the programs.

    Equal programs have equal outcomes, whatever runs beside them, as far as they do not ask for the time.

    Args:
        programs: what to run.
        limits: of each program.
        workers: programs at a time; by default one for each processor this process may use.
        on_result: called here, in the calling thread, as each program ends.
        allow_unprotected: `UNPROTECTED`, word for word, to run where the kernel confines nothing.

    Raises:
        SandboxError: this machine cannot confine a program, or the sandbox fails its self-test.
    """
    layers = require_layers(allow_unprotected)
    running = Running()
    with ThreadPoolExecutor(workers or _processors()) as pool:
        futures = {pool.submit(launch, program, limits, layers, running): program for program in programs}
        try:
            _report(futures, on_result)
        except BaseException:
            # Ctrl-C, or a fault of `on_result`: the pool would wait for programs that nobody asks about.
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()
            raise
    return [future.result() for future in futures]


def _report(
    futures: dict[Future[Outcome], Program], on_result: Callable[[Program, Outcome], None] | None
) -> None:
    for future in as_completed(futures):
        outcome = future.result()
        if on_result is not None:
            on_result(futures[future], outcome)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
