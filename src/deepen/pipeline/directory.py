"""The run directory: what lies in it says how far the run has come."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deepen.checkpoint import check_apart, write_file
from deepen.config import Recipe, dump_recipe, load_recipe
from deepen.errors import DeepenError, OutputError
from deepen.records import RunResult, read_record

# What may differ between a run and its continuation, on another machine for instance: it changes the result
# by rounding at most.
_HOW: Final = (
    *(("data", "cache"), ("data", "workers"), ("sft", "cache"), ("train", "prefix_cache")),
    *(
        (stage, key)
        for stage in ("train", "sft")
        for key in ("micro_batch", "device", "parallel", "compile", "checkpoint_every", "keep_checkpoints")
    ),
)


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
    def held(self) -> Path:
        """The last checkpoint within `train.max_general_loss`."""
        return self.checkpoints / "held"

    @property
    def evaluation(self) -> Path:
        """Evaluation records."""
        return self.root / "evaluation"

    @property
    def base_losses(self) -> Path:
        """Losses of the base by window, so that a resumed run need not load the base again."""
        return self.evaluation / "base-windows.json"

    @property
    def effects(self) -> Path:
        """What each new block does, where that was measured."""
        return self.evaluation / "effects.json"

    @property
    def switch(self) -> Path:
        """What a switch loses and keeps, where that was measured."""
        return self.evaluation / "switch.json"

    @property
    def findings(self) -> Path:
        """What the checks of the training text found: overlap with the evaluation texts, near-duplicates."""
        return self.root / "findings.json"

    @property
    def tuning(self) -> "RunDirectory":
        """The run that tunes what this one trained."""
        return RunDirectory(self.root / "sft")

    @property
    def stages(self) -> Path:
        """The page that compares the two."""
        return self.root / "stages.html"

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
        OutputError: it exists and is not this run, or is this run unfinished and `resume` was not asked for;
            or it overlaps the base or the pack.
    """
    directory = RunDirectory(Path(recipe.output))
    teacher = recipe.train.teacher if recipe.train else None
    named = (recipe.base, recipe.pack, teacher.model if teacher else None)
    check_apart(directory.root, tuple(Path(each) for each in named if each and os.path.isdir(each)))
    if not directory.root.exists():
        return None
    if not directory.recipe.exists():
        if directory.root.is_dir() and not any(_visible(directory.root)):
            return None
        raise OutputError(f"{directory.root}: exists and is not a run; choose another output")
    if overwrite:
        return None
    if difference := _difference(directory.recipe, recipe):
        raise OutputError(
            f"{directory.root}: holds a run of another recipe ({difference})\n"
            "choose another output, or start anew with --overwrite"
        )
    finished = directory.finished()
    if recipe.train and recipe.sft and directory.tuning.finished() is None:
        finished = None
    if finished is None and not resume:
        raise OutputError(
            f"{directory.root}: holds this run, unfinished; continue with --resume, or --overwrite it"
        )
    return finished


@contextmanager
def open_run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Iterator[RunDirectory]:
    """Create or reopen the run directory and hold it against other processes.

    Raises:
        OutputError: another process works in it, it cannot be written, or `check_run` refuses it by now.
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
        # Another process may have begun or ended a run here since it was last looked at.
        check_run(recipe, resume=resume, overwrite=overwrite)
        begins = overwrite or not directory.recipe.exists()
        if overwrite:
            _clear(directory)
        write_file(directory.recipe, dump_recipe(recipe))
        directory.evaluation.mkdir(exist_ok=True)
        try:
            yield directory
        except DeepenError as error:
            # What is wrong with the input showed before training: nothing is worth keeping or resuming.
            if begins and error.exit_code == DeepenError.exit_code and not directory.metrics.exists():
                _remove(directory)
            raise
    finally:
        os.close(handle)


def _visible(directory: Path) -> Iterator[Path]:
    """What lies in a directory but for hidden files, such as a kill leaves of the first file of a run."""
    return (path for path in directory.iterdir() if not path.name.startswith("."))


def _clear(directory: RunDirectory) -> None:
    """Remove an earlier run; nothing else that may lie there.

    What marks it finished goes first, then its checkpoints, and its recipe stays until the new one replaces
    it: cut short at any point, what is left is that run, unfinished.

    Raises:
        OutputError: something cannot be removed.
    """
    try:
        directory.result.unlink(missing_ok=True)
        for folder in ("sft", "checkpoints", "evaluation", "blocks", "model", "adapter", "tensorboard"):
            if (directory.root / folder).exists():
                shutil.rmtree(directory.root / folder)
        for name in (
            *("report.html", "stages.html", "README.md"),
            *("environment.json", "findings.json", "metrics.jsonl"),
        ):
            (directory.root / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed: {error.strerror}") from None


def _remove(directory: RunDirectory) -> None:
    """Remove a run, and its directory if nothing else lies in it."""
    _clear(directory)
    directory.recipe.unlink()
    with suppress(OSError):
        directory.root.rmdir()


def _difference(path: Path, recipe: Recipe) -> str | None:
    """Name the first key in which a run's recipe is not this one; how it is carried out does not count."""
    try:
        held = deciding(load_recipe(path))
    except DeepenError:
        return "its recipe.yaml cannot be read"
    return _first_difference(held, deciding(recipe), "")


def deciding(recipe: Recipe, *, defaults: bool = True) -> dict[str, Any]:
    """Return what of a recipe decides its result, as plain data: not where, nor how it is done.

    Args:
        recipe: any.
        defaults: also what stands at its default; without, a recipe stays the same when keys are added.
    """
    tree = recipe.model_dump(mode="json", exclude_defaults=not defaults)
    del tree["output"]
    for section, key in _HOW:
        (tree.get(section) or {}).pop(key, None)
    return tree


def _first_difference(held: object, asked: object, place: str) -> str | None:
    if isinstance(held, dict) and isinstance(asked, dict):
        for key in asked:
            found = _first_difference(held.get(key), asked[key], f"{place}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if held == asked else f"{place}: {json.dumps(held)[:60]} there, {json.dumps(asked)[:60]} here"
