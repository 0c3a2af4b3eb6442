"""What a directory of prepared text says of itself."""

import json
from pathlib import Path
from typing import Any

from deepen.errors import DataError


def read_meta(path: Path, format_version: int) -> dict[str, Any]:
    """Read the JSON file that describes a directory of prepared text.

    Raises:
        DataError: it cannot be read, or is of another format version.
    """
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove the directory to build it anew") from error
    if meta.get("format_version") != format_version:
        raise DataError(
            f"{path}: format_version {meta.get('format_version')}; this deepen reads {format_version}"
        )
    return dict(meta)
