import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(*, patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request: yields a function that says whether one came.

    The second one acts as it would have without us, so a stuck program can still be stopped. A signal that
    was ignored (a shell's background job ignores SIGINT) stays so. Outside the main thread, where Python
    allows no handlers, nothing is caught.

    Args:
        patient: take further signals for the same request. A launcher passes on a signal that the process
            may have been sent itself, and kills it after a while in any case.
    """
    asked: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object] | int] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if not patient:
            put_back()

    def put_back() -> None:
        for caught, handler in before.items():
            signal.signal(caught, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                # None: a handler that was not installed from Python, and cannot be put back from it.
                before[number] = signal.signal(number, ask) or signal.SIG_DFL
    except ValueError:
        pass
    try:
        yield lambda: bool(asked)
    finally:
        put_back()
