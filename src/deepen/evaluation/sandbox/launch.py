"""One program in one sandbox: the supervisor's process, what it is told and what it answers."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

from deepen.evaluation.sandbox.inside import codec, frames
from deepen.evaluation.sandbox.inside.confine import BUBBLEWRAP, NAMESPACES
from deepen.evaluation.sandbox.inside.namespaces import SCRATCH
from deepen.evaluation.sandbox.programs import Limits, Outcome, Program

_INSIDE: Final = Path(codec.__file__).parent
# What the supervisor may need beyond the wall limit, on a busy machine, to start and to end its processes.
_GRACE_SECONDS: Final = 60


class Running:
    """The supervisors at work, to be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def add(self, process: "subprocess.Popen[bytes]") -> None:
        """Take a supervisor in; one that comes after the end is killed at once."""
        with self._lock:
            self._processes.add(process)
            if self._ended:
                _kill(process)

    def discard(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill a supervisor that is still at work, and forget it."""
        with self._lock:
            _kill(process)
            self._processes.discard(process)

    def end(self) -> None:
        """Kill all, and those that are still to come."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    # Its children die with it.
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def launch(program: Program, limits: Limits, layers: Collection[str], running: Running) -> Outcome:
    """Run one program behind the given layers; never raises for what the program does.

    `running` holds the supervisor's process meanwhile: killing it ends the sandbox.
    """
    with _directory() as directory:
        stage, scratch = Path(directory, "stage"), Path(directory, "scratch")
        stage.mkdir()
        scratch.mkdir(mode=0o700)
        job = _write_job(program, limits, layers, stage)
        answer, errors = _converse(
            _command(limits, layers), _write_input(job, program), limits, layers, scratch, running
        )
    return _read_outcome(program, answer, errors)


@contextmanager
def _directory() -> Iterator[str]:
    """An empty directory, removed afterwards whatever a program built in it."""
    directory = mkdtemp(prefix="sandbox-")
    try:
        yield directory
    finally:
        with suppress(RecursionError):
            shutil.rmtree(directory, ignore_errors=True)
        if os.path.lexists(directory):
            # Directories too deep for Python, or closed to their owner.
            for command in (["chmod", "-R", "u+rwx", directory], ["rm", "-rf", directory]):
                subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def readable_paths(limits: Limits) -> list[str]:
    """Return the directories a program may read: the interpreter's library and those it links to."""
    # Not sysconfig's platstdlib: in a virtual environment that is where its packages are.
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    paths = [f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64")]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
    if limits.site_packages:
        paths += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = sorted({path for path in paths if os.path.isdir(path)})
    # A directory inside another of the list is there already.
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def _write_job(program: Program, limits: Limits, layers: Collection[str], stage: Path) -> dict[str, Any]:
    return {
        "source": program.source,
        "module": "__main__" if program.main else "program",
        "limits": asdict(limits),
        "layers": list(layers),
        "stage": str(stage),
        "read_only": readable_paths(limits),
        "packages": [sysconfig.get_path("purelib")] if limits.site_packages else [],
    }


def _write_input(job: dict[str, Any], program: Program) -> bytes:
    checks = {
        "setup": program.setup,
        "checks": program.checks,
        "entry_points": program.entry_points,
        "answer": program.answer,
    }
    return b"".join(frames.pack(json.dumps(part).encode()) for part in (job, checks))


def _command(limits: Limits, layers: Collection[str]) -> list[str]:
    # Not -I: it would ignore PYTHONHASHSEED. The environment holds nothing but what is set here anyway.
    interpreter = os.path.realpath(sys.executable)
    python = [interpreter, "-P", "-s", "-S", "-W", "ignore", "-X", "utf8", str(_INSIDE / "boot.py")]
    return [*_bubblewrap(limits, interpreter), *python] if BUBBLEWRAP in layers else python


def _bubblewrap(limits: Limits, interpreter: str) -> list[str]:
    found = shutil.which("bwrap")
    assert found is not None
    shown = [*readable_paths(limits), str(_INSIDE), interpreter]
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    return [
        *(found, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "sandbox"),
        *(word for path in shown for word in ("--ro-bind", path, path)),
        *(word for device in devices for word in ("--dev-bind", device, device)),
        *("--perms", "0700", "--size", str(limits.scratch_bytes), "--tmpfs", SCRATCH, "--chdir", SCRATCH),
        *("--remount-ro", "/", "--"),
    ]


def _environment(home: str) -> dict[str, str]:
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = {"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin"}
    return {**places, **single, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"}


def _converse(
    command: list[str],
    message: bytes,
    limits: Limits,
    layers: Collection[str],
    scratch: Path,
    running: Running,
) -> tuple[bytes, bytes]:
    """Start the supervisor, tell it everything, and return what it answers and complains."""
    home = SCRATCH if {NAMESPACES, BUBBLEWRAP} & {*layers} else str(scratch)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=scratch,
        env=_environment(home),
        start_new_session=True,
    ) as process:
        running.add(process)
        try:
            return process.communicate(message, timeout=limits.wall_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return b"", b"the supervisor did not end in time"
        finally:
            running.discard(process)


def _read_outcome(program: Program, answer: bytes, errors: bytes) -> Outcome:
    message = frames.complete(answer)
    if message is None:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no answer"]
        return Outcome(name=program.name, status="error", reason=f"the sandbox broke: {lines[-1][:300]}")
    fields = json.loads(message)
    status, reason, value = fields["status"], fields["reason"], fields.get("value")
    try:
        value = None if value is None else codec.decode(value)
    except ValueError as error:
        status, reason, value = "failed", f"its answer cannot be read: {error}", None
    return Outcome(
        name=program.name,
        status=status,
        reason=reason,
        stdout=base64.b64decode(fields.get("stdout", "")).decode(errors="replace"),
        value=value,
        cpu_seconds=fields.get("cpu_seconds", 0.0),
        wall_seconds=fields.get("wall_seconds", 0.0),
    )
