"""Benchmark tasks on a model and its base: task by task, each kept as soon as it is finished."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from deepen.checkpoint import write_file
from deepen.errors import DataError, EvaluationError
from deepen.evaluation.memory import collect_memory
from deepen.evaluation.suites.bridge import LiveModel
from deepen.evaluation.suites.comparing import compare_tasks
from deepen.evaluation.suites.library import LoadedTask, TaskLibrary, quiet_harness
from deepen.evaluation.suites.pairing import item_lines, pair_task
from deepen.evaluation.suites.scoring import Scorer, build_requests, score_task
from deepen.evaluation.suites.spec import TaskSpec
from deepen.model import bypass
from deepen.pipeline.backend import TRANSFORMERS, Backend, name_backend
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import Side, Subject, task_identity
from deepen.pipeline.texts import load_tokenizer
from deepen.records import ScoredTask, TaskRecord, capture_provenance, read_record


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How tasks are asked.

    Attributes:
        local: directory of local copies of datasets.
        limit: documents of each leaf task; None: all.
        batch_size: sequences in a forward pass; None: found.
        device: where the model computes.
        backends: who may run the models; a task goes to the first that takes its kinds of requests.
    """

    local: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    device: torch.device
    backends: Sequence[Backend] = (TRANSFORMERS,)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A task ready to be asked, who asks it, the digest of its requests, and that of the models as well."""

    task: LoadedTask
    backend: Backend
    requests: str
    identity: str


class TaskEvaluation:
    """The tasks of one evaluation: what is finished lies in `out`, one record and one file of items each.

    A base that is a model of its own is loaded after the model has answered everything; until then the
    model's answers wait in `out/waiting`. Each backend has its turn with all of its tasks.
    """

    def __init__(
        self,
        subject: Subject,
        settings: TaskSettings,
        out: Path,
        reporter: Reporter,
        scorers: Mapping[str, Scorer],
    ) -> None:
        """Load nothing yet."""
        self._subject, self._settings, self._out, self._reporter = subject, settings, out, reporter
        self._library, self._scorers = TaskLibrary(settings.local), scorers
        self._live: LiveModel | None = None
        self._seconds: dict[str, float] = {}

    def run(self, specs: list[TaskSpec]) -> tuple[list[TaskRecord], list[str]]:
        """Evaluate every task that is not finished; return the records, and why others failed."""
        records: dict[str, TaskRecord] = {}
        failures: dict[str, str] = {}
        turns = product((self._model_answers, self._base_answers), self._settings.backends)
        for work, backend in turns:
            for spec in specs:
                if spec.label in records or spec.label in failures:
                    continue
                try:
                    if record := work(spec, backend):
                        records[spec.label] = record
                except EvaluationError as error:
                    said = str(error)
                    failures[spec.label] = said if said.startswith(spec.label) else f"{spec.label}: {said}"
                    self._reporter.note(f"failed: {failures[spec.label]}")
            self._unload()
            backend.release()
        finished = [spec for spec in specs if spec.label in records]
        compared = compare_tasks([records[spec.label] for spec in finished])
        for spec, record in zip(finished, compared, strict=True):
            if record != records[spec.label]:
                self._write(spec, record)
        return compared, list(failures.values())

    def _model_answers(self, spec: TaskSpec, backend: Backend) -> TaskRecord | None:
        asked = self._prepare(spec)
        if asked.backend is not backend:
            return None
        if record := self._finished(spec, asked.identity):
            self._reporter.note("finished before; not rerun")
            return record
        if self._subject.apart is not None and self._waiting(spec, asked.identity):
            return None
        live = self._loaded(self._subject.model, backend)
        model = self._score(asked.task, live, "")
        if self._subject.apart is not None:
            content = {"identity": asked.identity, "scored": model.model_dump(mode="json")}
            self._waiting_file(spec).parent.mkdir(parents=True, exist_ok=True)
            write_file(self._waiting_file(spec), json.dumps(content))
            return None
        base = None
        if self._subject.base is not None:
            with bypass(live.model):
                base = self._score(asked.task, live, "base")
        return self._keep(asked, model, base)

    def _base_answers(self, spec: TaskSpec, backend: Backend) -> TaskRecord | None:
        assert self._subject.apart is not None
        asked = self._prepare(spec)
        if asked.backend is not backend:
            return None
        model = self._waiting(spec, asked.identity)
        if model is None:
            raise EvaluationError(f"{spec.label}: what is asked changed while it was evaluated")
        base = self._score(asked.task, self._loaded(self._subject.apart, backend), "base")
        record = self._keep(asked, model, base)
        self._waiting_file(spec).unlink()
        with suppress(OSError):
            self._waiting_file(spec).parent.rmdir()
        return record

    def _prepare(self, spec: TaskSpec) -> _Asked:
        self._reporter.stage(spec.label)
        loaded = self._library.load(spec)
        requests = build_requests(loaded, self._settings.limit)
        kinds = {request.request_type for task in loaded.tasks.values() for request in task.instances}
        backend = next(each for each in self._settings.backends if each.takes(kinds))
        label = f"{spec.label} {' '.join(spec.metrics)}" + (f" {backend.label}" if backend.label else "")
        identity = task_identity(self._subject, requests, label)
        return _Asked(task=loaded, backend=backend, requests=requests, identity=identity)

    def _loaded(self, side: Side, backend: Backend) -> LiveModel:
        if self._live is None:
            model = backend.load(side, self._settings.device)
            tokenizer = load_tokenizer(side.tokenizer)
            rows = self._settings.batch_size or backend.rows
            with quiet_harness():
                self._live = LiveModel(model, tokenizer, batch_size=rows)
        return self._live

    def _unload(self) -> None:
        if self._live is None:
            return
        self._live = None
        collect_memory()

    def _score(self, loaded: LoadedTask, live: LiveModel, detail: str) -> ScoredTask:
        begun = time.monotonic()
        live.progress = lambda done, total: self._reporter.progress(done, total, detail)
        scored = score_task(loaded, live, self._settings.limit, self._scorers)
        label = loaded.spec.label
        self._seconds[label] = self._seconds.get(label, 0.0) + time.monotonic() - begun
        return scored

    def _keep(self, asked: _Asked, model: ScoredTask, base: ScoredTask | None) -> TaskRecord:
        """Write the items, then the record: with it, the task is finished."""
        spec = asked.task.spec
        if model.cut:
            self._reporter.note(f"{model.cut} requests were longer than the context and lost their beginning")
        paired = pair_task(asked.task, model, base)
        record = TaskRecord(
            task=spec.label,
            identity=asked.identity,
            asked=asked.requests,
            model=self._subject.model.name,
            base=self._subject.base,
            limit=self._settings.limit,
            metrics=paired.metrics,
            scores=paired.scores,
            results=model.results,
            base_results=base.results if base else {},
            cut=model.cut,
            items=f"items/{spec.slug}.jsonl",
            seconds=round(self._seconds.get(spec.label, 0.0), 2),
            provenance=capture_provenance(data={spec.label: asked.requests} | name_backend(asked.backend)),
        )
        (self._out / "items").mkdir(parents=True, exist_ok=True)
        write_file(self._out / record.items, "".join(item_lines(model, base)))
        self._write(spec, record)
        return record

    def _write(self, spec: TaskSpec, record: TaskRecord) -> None:
        write_file(self._record_file(spec), record.model_dump_json(indent=1) + "\n")

    def _finished(self, spec: TaskSpec, identity: str) -> TaskRecord | None:
        if not self._record_file(spec).exists():
            return None
        try:
            record = read_record(self._record_file(spec), TaskRecord)
        except DataError:
            return None
        return record if record.identity == identity else None

    def _waiting(self, spec: TaskSpec, identity: str) -> ScoredTask | None:
        try:
            held: dict[str, Any] = json.loads(self._waiting_file(spec).read_bytes())
            return ScoredTask.model_validate(held["scored"]) if held["identity"] == identity else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def _record_file(self, spec: TaskSpec) -> Path:
        return self._out / f"task-{spec.slug}.json"

    def _waiting_file(self, spec: TaskSpec) -> Path:
        return self._out / "waiting" / f"{spec.slug}.json"
