"""The run directory: what lies in it says how far the run has come."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from deepen.checkpoint import write_file
from deepen.config import Recipe, dump_recipe, parse_recipe
from deepen.errors import DeepenError, OutputError
from deepen.records import RunResult, read_record


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved, complete recipe."""
        return self.root / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Provenance of the run."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """One line a step and an evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints."""
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Evaluation records."""
        return self.root / "evaluation"

    @property
    def base_losses(self) -> Path:
        """Losses of the base by window, so that a resumed run need not load the base again."""
        return self.evaluation / "base-windows.json"

    @property
    def result(self) -> Path:
        """Written last: with it, the run is finished."""
        return self.root / "result.json"

    def finished(self) -> RunResult | None:
        """Return the result of a finished run."""
        return read_record(self.result, RunResult) if self.result.exists() else None


def check_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> RunResult | None:
    """Look at the output a recipe names, without changing it; return its result if it is this run, finished.

    Raises:
        OutputError: it exists and is not this run, or is this run unfinished and `resume` was not asked for.
    """
    directory = RunDirectory(Path(recipe.output))
    if overwrite or not directory.root.exists():
        return None
    if not directory.recipe.exists():
        if directory.root.is_dir() and not any(directory.root.iterdir()):
            return None
        raise OutputError(f"{directory.root}: exists and is not a run; choose another output")
    if difference := _difference(directory.recipe, recipe):
        raise OutputError(
            f"{directory.root}: holds a run of another recipe ({difference})\n"
            "choose another output, or start anew with --overwrite"
        )
    finished = directory.finished()
    if finished is None and not resume:
        raise OutputError(
            f"{directory.root}: holds this run, unfinished; continue with --resume, or --overwrite it"
        )
    return finished


@contextmanager
def open_run(recipe: Recipe, *, overwrite: bool) -> Iterator[RunDirectory]:
    """Create or reopen the run directory and hold it against other processes.

    Raises:
        OutputError: another process works in it, or it cannot be written.
    """
    directory = RunDirectory(Path(recipe.output))
    try:
        directory.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory.root, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{directory.root}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise OutputError(f"{directory.root}: another process is working in it") from None
    try:
        if overwrite:
            _clear(directory)
        directory.evaluation.mkdir(exist_ok=True)
        write_file(directory.recipe, dump_recipe(recipe))
        yield directory
    finally:
        os.close(handle)


def _clear(directory: RunDirectory) -> None:
    """Remove an earlier run, what marks it finished first; nothing else that may lie there."""
    known = ("result.json", "report.html", "README.md", "environment.json", "metrics.jsonl")
    for name in known:
        (directory.root / name).unlink(missing_ok=True)
    for folder in ("checkpoints", "evaluation", "blocks", "model"):
        shutil.rmtree(directory.root / folder, ignore_errors=True)


def _difference(path: Path, recipe: Recipe) -> str | None:
    """Name the first key in which a run's recipe is not this one; how it is carried out does not count."""
    try:
        held = parse_recipe(path.read_text(), where=str(path)).model_dump(mode="json")
    except (DeepenError, OSError, yaml.YAMLError):
        return "its recipe.yaml cannot be read"
    asked = recipe.model_dump(mode="json")
    for tree in (held, asked):
        del tree["output"]
    return _first_difference(held, asked, "")


def _first_difference(held: object, asked: object, place: str) -> str | None:
    if isinstance(held, dict) and isinstance(asked, dict):
        for key in asked:
            found = _first_difference(held.get(key), asked[key], f"{place}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if held == asked else f"{place}: {json.dumps(held)[:60]} there, {json.dumps(asked)[:60]} here"
