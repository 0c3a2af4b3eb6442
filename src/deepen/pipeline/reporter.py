from typing import Protocol


class Reporter(Protocol):
    """Where a run says what it is doing; the command line draws it, a library user may ignore it."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def progress(self, done: int, total: int | None, detail: str = "") -> None:
        """The current stage has come so far."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class Silent:
    """A reporter that says nothing."""

    def stage(self, title: str) -> None:
        """Say nothing."""

    def progress(self, done: int, total: int | None, detail: str = "") -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""
