"""One way to write a page."""

import os
import tempfile
from pathlib import Path

from deepen.errors import OutputError


def write_page(path: Path, text: str) -> Path:
    """Write a page so that it appears whole or not at all; return its path.

    The atomic writer of `deepen.checkpoint` lies outside what a report may import.

    Raises:
        OutputError: it cannot be written.
    """
    partial: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "wb", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return path
