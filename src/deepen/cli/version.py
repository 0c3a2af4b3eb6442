import subprocess
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parents[3]


def describe_version() -> str:
    """Return the installed version and, where the code is a git checkout, the commit it is at.

    An editable installation keeps the version of the day it was made, while the code under it moves on.
    """
    commit = _commit() if (_ROOT / ".git").exists() else None
    return version("deepen") + (f" (checkout at {commit})" if commit else "")


def _commit() -> str | None:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--tags"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
