"""What is done already, one JSON object a line, so that what was interrupted goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from deepen.errors import EvaluationError, OutputError


class Journal:
    """Results by the digest of all they depend on; appended and synced one by one, never rewritten.

    Since the key says everything, a result that no longer applies is only a line that nobody asks for. A line
    cut off at the end, by a crash, is removed.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what is there; without a path, nothing is kept on disk.

        Raises:
            EvaluationError: the file holds something else.
            OutputError: it cannot be read or cut.
        """
        self._path = path
        self._held: dict[str, Any] = {}
        if path is None:
            return
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), start=1):
                key, value = _parse(line, path, number)
                self._held[key] = value
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        except OSError as error:
            raise OutputError(f"{path}: cannot be used ({error.strerror})") from None

    def get(self, key: str) -> Any:
        """Return the result of a key; None where there is none."""
        return self._held.get(key)

    def put(self, key: str, value: Any, **about: Any) -> None:
        """Keep a result; `about` is for the reader of the file.

        Raises:
            OutputError: it cannot be written.
        """
        self._held[key] = value
        if self._path is None:
            return
        line = json.dumps({"key": key, **about, "value": value}, ensure_ascii=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror})") from None


def _parse(line: bytes, path: Path, number: int) -> tuple[str, Any]:
    try:
        held = json.loads(line)
        return str(held["key"]), held["value"]
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(f"{path}:{number}: not a line of kept results; move the file away") from None
