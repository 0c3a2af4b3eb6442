import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PACKAGES = ("deepen", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "lm_eval")


class Provenance(BaseModel):
    """Where a number comes from.

    Attributes:
        command: the command line that produced it.
        started: UTC time, ISO 8601.
        python: version of the interpreter.
        packages: name -> installed version.
        git: commit of the working directory and whether it had changes, or None outside a repository.
        hardware: processor, cores, memory, accelerators.
        seed: seed of every random draw.
        data: name of a text -> digest of its content.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    command: str
    started: str
    python: str
    packages: dict[str, str]
    git: str | None
    hardware: dict[str, str]
    seed: int | None = None
    data: dict[str, str] = {}


def capture_provenance(
    *, seed: int | None = None, data: Mapping[str, str] | None = None, accelerators: str = "none"
) -> Provenance:
    """Describe this process, machine and checkout, now."""
    return Provenance(
        command=shlex.join([*_program(), *sys.argv[1:]]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        packages={name: found for name in _PACKAGES if (found := _installed(name))},
        git=_git(),
        hardware={
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
            "accelerators": accelerators,
            "system": f"{platform.system()} {platform.machine()}",
        },
        seed=seed,
        data=dict(data or {}),
    )


def _program() -> list[str]:
    """How the running program is called from a shell."""
    path = Path(sys.argv[0])
    return ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> str | None:
    try:
        commit = _run("git", "rev-parse", "HEAD")
        return commit + (" with changes" if _run("git", "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
