import json
import os
from pathlib import Path
from typing import Any

from deepen.checkpoint import write_file
from deepen.errors import OutputError


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended and flushed, cut back on resume.

    A line torn by a kill is dropped when the log is opened again.

    Attributes:
        kept: the lines that were kept on opening.
    """

    def __init__(self, path: Path, *, resume_after: int = -1) -> None:
        """Open the log, keeping only the lines of steps up to `resume_after`."""
        self.kept = [line for line in _complete_lines(path) if line["step"] <= resume_after]
        write_file(path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            OutputError: the disk refuses it.
        """
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._file.name}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Put on the disk what was written: lines up to a checkpoint cannot be computed again after it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    read = []
    for line in lines:
        try:
            read.append(json.loads(line))
        except ValueError:
            break
    return read
