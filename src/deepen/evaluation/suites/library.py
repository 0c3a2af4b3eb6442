"""Tasks loaded from the harness, from the user's files, and from local copies of datasets."""

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import datasets
import lm_eval.api.task as harness_task
import lm_eval.tasks._yaml_loader as harness_yaml
import yaml
from lm_eval.tasks import TaskManager

from deepen.errors import EvaluationError, in_a_line
from deepen.evaluation.suites.own_task import BUILDERS, dataset_builder, described_keys, harness_config
from deepen.evaluation.suites.spec import TaskSpec

_SPLITS: Final = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task or group of the harness, ready to be asked.

    Attributes:
        spec: what was asked for.
        content: the harness's own dict of `tasks` (leaves by name) and `groups`.
    """

    spec: TaskSpec
    content: Mapping[str, Any]

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The leaves by name: one, or those of a group."""
        held: Mapping[str, Any] = self.content["tasks"]
        return held

    @property
    def group(self) -> Any | None:
        """The group asked for; None for a single task or a tag."""
        groups = self.content.get("groups", {})
        return groups.get(Path(self.spec.name).stem if self.spec.is_file else self.spec.name)


class TaskLibrary:
    """Where tasks are found.

    In a directory of local copies, `NAME.yaml` describes the task NAME whole, and `NAME.jsonl` (or .json,
    .jsonl.gz, .csv, .parquet) or a directory `NAME/` with a file for each split (`train.jsonl`, `test.jsonl`)
    stands for the dataset of the harness's task NAME, in the same form as on the hub.
    """

    def __init__(self, local: Path | None = None) -> None:
        """Look below `local` first; without it, tasks load their datasets from the hub or its cache.

        Raises:
            EvaluationError: it is not a directory.
        """
        if local is not None and not local.is_dir():
            raise EvaluationError(f"{local}: no such directory of local datasets")
        self._local = local
        self._manager: Any = None

    def load(self, spec: TaskSpec) -> LoadedTask:
        """Load a task's datasets and set how it is asked.

        Raises:
            EvaluationError: there is no such task, or its data or its description cannot be read.
        """
        try:
            with quiet_harness():
                content = self._content(spec)
        except EvaluationError:
            raise
        except Exception as error:  # the harness raises whatever a task's own code and data lead it to
            raise EvaluationError(f"{spec.label}: cannot be loaded: {in_a_line(error, 300)}") from None
        for task in content["tasks"].values():
            _ask_as(task, spec)
        return LoadedTask(spec=spec, content=content)

    def _content(self, spec: TaskSpec) -> Mapping[str, Any]:
        path = Path(spec.name) if spec.is_file else self._described(spec.name)
        if path is None:
            return self._of_harness(spec.name)
        keys = described_keys(path)
        if not keys & {"task", "group", "include"}:
            return _loaded(TaskManager(include_defaults=False), harness_config(path))
        if "group" in keys:  # called as its file, its members beside it
            return _loaded(TaskManager(include_defaults=False, include_path=str(path.parent)), path.stem)
        with tempfile.TemporaryDirectory() as scratch:
            return _loaded(TaskManager(include_defaults=False), str(self._with_copy(path, Path(scratch))))

    def _described(self, name: str) -> Path | None:
        path = self._local / f"{name}.yaml" if self._local else None
        return path if path and path.is_file() else None

    def _of_harness(self, name: str) -> Mapping[str, Any]:
        # The harness reads thousands of files for its index: once.
        self._manager = self._manager or TaskManager()
        index = self._manager.task_index
        if name not in index:
            raise EvaluationError(f"{name}: no such task (lm_eval ls tasks lists them)")
        original = dict(index)
        with tempfile.TemporaryDirectory() as scratch:
            self._point_at_copies(name, index, Path(scratch))
            try:
                return _loaded(self._manager, name)
            finally:
                index.update(original)

    def _point_at_copies(self, name: str, index: dict[str, Any], scratch: Path) -> None:
        for leaf in _leaves(name, index):
            entry = index[leaf]
            if entry.cfg and entry.cfg.get("unsafe_code"):
                raise EvaluationError(
                    f"{leaf}: the harness would run what the model writes without a sandbox; use --suite code"
                )
            if files := self._copies(leaf):
                index[leaf] = replace(entry, yaml_path=_overlay(scratch, leaf, entry.yaml_path, files))

    def _with_copy(self, path: Path, scratch: Path) -> Path:
        files = self._copies(path.stem)
        return _overlay(scratch, path.stem, path, files) if files else path

    def _copies(self, name: str) -> dict[str, Path] | None:
        """Find a task's local data: split -> file, under `*` the one that serves all splits."""
        if self._local is None:
            return None
        for suffix in BUILDERS:
            if (file := self._local / f"{name}{suffix}").is_file():
                return {"*": file}
        if not (folder := self._local / name).is_dir():
            return None
        held = {f.name.split(".", 1)[0]: f for f in sorted(folder.iterdir()) if dataset_builder(f)}
        return held or None


def _loaded(manager: Any, spec: str | Mapping[str, Any]) -> Mapping[str, Any]:
    content: Mapping[str, Any] = manager.load([spec])
    return content


def _leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Name the tasks below a task, tag or group of the index."""
    entry = index.get(name)
    if entry is None:
        return
    members: Sequence[Any] = sorted(entry.tags) if entry.kind.name == "TAG" else ()
    if entry.kind.name == "GROUP":
        listed = entry.cfg.get("task") or []
        members = [listed] if isinstance(listed, str) else listed
    elif entry.kind.name != "TAG":
        yield name
    for member in members:
        named = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(named, str):
            yield from _leaves(named, index)


def _overlay(scratch: Path, name: str, original: Path, files: Mapping[str, Path]) -> Path:
    """Write the description of a task that is as `original` says but for where its data lies."""
    config = harness_yaml.load_yaml(original, resolve_func=False)
    wanted = {config[key] for key in _SPLITS if isinstance(config.get(key), str)}
    if fewshot := (config.get("fewshot_config") or {}).get("split"):
        wanted.add(fewshot)
    data = {split: str(files.get(split) or files.get("*") or "") for split in sorted(wanted)}
    if missing := [split for split, file in data.items() if not file]:
        held = ", ".join(str(file) for file in files.values())
        raise EvaluationError(f"{name}: its local copy has no split {missing[0]!r} (found: {held})")
    builders = {dataset_builder(Path(file)) for file in data.values()}
    if len(builders) > 1:
        raise EvaluationError(
            f"{name}: its local copy mixes kinds of files: {', '.join(sorted(data.values()))}"
        )
    overlay = {
        "include": str(original.resolve()),
        "task": name,
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data},
    }
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return path


def _ask_as(task: Any, spec: TaskSpec) -> None:
    """Set the shots and the sampling.

    Raises:
        EvaluationError: shots are asked of a task that is defined without.
    """
    held = task.get_config("num_fewshot")
    if held == 0 and spec.shots:
        raise EvaluationError(f"{spec.label}: the task is defined with 0 shots")
    if held is None or spec.shots is not None:
        task.set_config(key="num_fewshot", value=spec.shots or 0)
    if spec.samples > 1:
        sampled = {"do_sample": True, "temperature": spec.temperature or 1.0}
        task.set_config(key="generation_kwargs", value=sampled, update=True)
        task.set_config(key="repeats", value=spec.samples)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness off our stdout, and its bars and remarks off stderr; what matters is said by us."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    levels, bar = [logger.level for logger in loggers], harness_task.tqdm
    bars = datasets.utils.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        harness_task.tqdm = lambda items, **_: items
        datasets.utils.disable_progress_bars()
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        harness_task.tqdm = bar
        if bars:
            datasets.utils.enable_progress_bars()
