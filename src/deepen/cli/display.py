"""What a run shows while it works: a live line on a terminal, plain lines elsewhere; all on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepen.pipeline.reporter import Reporter

_EVERY = 15.0  # seconds between lines where nothing can be redrawn


class _Live:
    """One bar a stage, redrawn; a finished stage leaves its line."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def stage(self, title: str) -> None:
        self._close()
        self._task = self._bar.add_task(title, total=None, detail="")

    def progress(self, done: int, total: int | None, detail: str = "") -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)

    def note(self, text: str) -> None:
        self._bar.console.print(f"  {text}", highlight=False, markup=False)

    def _close(self) -> None:
        if self._task is not None:
            task = self._bar.tasks[-1]
            self._bar.update(self._task, total=task.total or 1, completed=task.total or 1)
            self._bar.stop_task(self._task)


class _Plain:
    """A line a stage, and a line now and then while it lasts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title, self._said = "", 0.0
        self._first: tuple[float, int] | None = None

    def stage(self, title: str) -> None:
        self._title, self._said, self._first = title, time.monotonic(), None
        self._print(f"{title} …")

    def progress(self, done: int, total: int | None, detail: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        if now - self._said < _EVERY:
            return
        self._said = now
        begun, before = self._first
        # What was done before (a resumed run) took no time of this process.
        left = (
            f", {(now - begun) * (total - done) / (done - before):.0f} s left"
            if total and done > before
            else ""
        )
        share = f"{done}/{total}" if total else str(done)
        self._print(f"{self._title}: {share}{left}  {detail}".rstrip())

    def note(self, text: str) -> None:
        self._print(f"  {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def quiet_transformers() -> None:
    """Keep transformers' own bars off our stderr."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def display() -> Iterator[Reporter]:
    """Give the reporter that suits stderr; it begins with what takes seconds, the import of transformers."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _started(_Plain(console))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as bar:
        yield _started(_Live(bar))


def _started(reporter: Reporter) -> Reporter:
    reporter.stage("starting")
    quiet_transformers()
    return reporter
