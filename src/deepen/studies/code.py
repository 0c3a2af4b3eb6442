"""Which code computes: results of changed, uncommitted code could not be traced and are not made."""

import subprocess
from pathlib import Path

import deepen
from deepen.errors import StudyError


def traceable_code() -> str | None:
    """Return the commit of deepen's own source; None where it is no checkout but an installed release.

    Raises:
        StudyError: the source has changes that are not committed.
    """
    package = Path(deepen.__file__).parent
    if not _git(package, "ls-files", "--", "__init__.py"):
        return None
    if changed := _git(package, "status", "--porcelain", "--", "."):
        first = changed.splitlines()[0].split()[-1]
        raise StudyError(
            f"{package}: has changes that are not committed ({first}): what it computes could not be traced\n"
            "commit them; cells that are finished already stay"
        )
    return _git(package, "rev-parse", "HEAD")


def _git(directory: Path, *words: str) -> str:
    """Return what git says; nothing where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *words], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
