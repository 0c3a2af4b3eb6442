"""`deepen evaluate`: benchmarks, held-out loss and conversations of a model beside its base."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from deepen.checkpoint import write_file
from deepen.config import EvaluateSection, Recipe, TextSet
from deepen.errors import EvaluationError, OutputError
from deepen.evaluation.suites import TaskSpec, task_specs
from deepen.evaluation.suites.programs import program_scorers
from deepen.pipeline.backend import Backend, find_backends
from deepen.pipeline.chat import ChatJob, ChatSettings, chat_jobs, score_chat
from deepen.pipeline.losses import load_text_sets, score_subject
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.subject import Subject, find_subject, open_run_recipe
from deepen.pipeline.switched import load_switched, measure_switch
from deepen.records import EvaluationRecord, Metric, Role, SwitchEvaluation, read_record


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate, and how.

    Attributes:
        target: a run, a block pack, an adapter or a checkpoint.
        base: where its base is, or what to compare a plain checkpoint with.
        tasks: of the harness, or described by files.
        texts: whose held-out loss is measured, and must be kept.
        domain_texts: the same of texts whose loss must fall.
        switch: `auto`, or the directory of a switch, to be measured on the texts; None: none.
        chat: questions and tasks asked in conversation.
        local: directory of local copies of datasets.
        limit: documents of each task; None: all.
        batch_size: sequences in a forward pass; None: found, and 8 conversations.
        device: `auto`, `cpu`, `cuda` …
        backend: `transformers`, or `vllm` for what is generated.
        engine: arguments of vLLM's engine, such as `tensor_parallel_size`.
        allow_unprotected: the sandbox's sentence, to run model-written programs where nothing confines them.
        out: where results are kept; None: a run's own `evaluation/`, otherwise nowhere.
    """

    target: str
    base: str | None = None
    tasks: tuple[TaskSpec, ...] = ()
    texts: tuple[TextSet, ...] = ()
    domain_texts: tuple[TextSet, ...] = ()
    switch: str | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)
    local: Path | None = None
    limit: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    backend: str = "transformers"
    engine: Mapping[str, Any] = field(default_factory=dict)
    allow_unprotected: str = ""
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came of it.

    Attributes:
        subject: what was evaluated.
        metrics: of held-out texts, then of tasks in the order asked for.
        failures: tasks that could not be evaluated, with the reason.
        out: where results lie; None where they were not kept.
        switch: what came of the switch.
    """

    subject: Subject
    metrics: list[Metric]
    failures: list[str]
    out: Path | None
    switch: SwitchEvaluation | None = None


def evaluate_model(request: Request, reporter: Reporter | None = None) -> Evaluation:
    """Evaluate a model beside its base; what is finished already is not done again.

    Raises:
        DeepenError: the model, its base, a text or the output cannot be used, or nothing is asked. A task
            that fails is in the result's `failures` instead.
    """
    reporter = reporter or Silent()
    request, held = _of_run(request)
    if not (_asks(request) or held):
        raise EvaluationError("nothing to evaluate: give --suite, --task, --text, --chat or --tools")
    jobs = chat_jobs(request.chat, request.allow_unprotected, reporter)
    _refuse_same_names(request, jobs, held)
    found = find_subject(request.target, request.base)
    backends, subject = find_backends(request.backend, request.engine, found)
    device = choose_device(request.device)
    with _kept(request.out) as out:
        metrics = [*held, *score_subject(subject, _with_roles(request), out / "texts.json", device, reporter)]
        switched = _switched(request, subject, out, device, reporter)
        failures: list[str] = []
        if request.tasks:
            scored, failures = _task_metrics(subject, request, backends, out, reporter)
            metrics += scored
        if jobs:
            records, failed = score_chat(
                jobs,
                subject,
                out,
                reporter,
                device=device,
                max_new_tokens=request.chat.max_new_tokens,
                batch_size=request.batch_size,
                backend=backends[0],
            )
            metrics += [metric for record in records for metric in record.metrics]
            failures += failed
    return Evaluation(subject=subject, metrics=metrics, failures=failures, out=request.out, switch=switched)


def _switched(
    request: Request, subject: Subject, out: Path, device: torch.device, reporter: Reporter
) -> SwitchEvaluation | None:
    """Measure the switch on the texts that are asked for, or on those of a run's recipe."""
    if request.switch is None:
        return None
    asked = _with_roles(request) or _recipe_texts(request.target)
    if not asked:
        raise EvaluationError("--switch: no text to decide on; give --text and --domain-text")
    texts = load_text_sets(subject.model.tokenizer, asked, EvaluateSection().max_tokens)
    reporter.stage("loading the model with its switch")
    model = load_switched(request.target, subject, request.switch, device)
    names = (subject.model.name, subject.base or subject.model.name, request.switch)
    found = measure_switch(model, texts, reporter, names=names)
    write_file(out / "switch.json", found.model_dump_json(indent=1) + "\n")
    return found


def _recipe_texts(target: str) -> list[tuple[Role, TextSet]]:
    recipe = open_run_recipe(Path(target)) if Path(target).is_dir() else None
    if recipe is None:
        return []
    general: list[tuple[Role, TextSet]] = [("general", text) for text in recipe.evaluate.general]
    return general + [("domain", text) for text in recipe.evaluate.domain]


def _refuse_same_names(request: Request, jobs: list[ChatJob], held: list[Metric]) -> None:
    """Refuse what would hide, or be hidden by, another result of its name."""
    if twice := {job.name for job in jobs} & {spec.label for spec in request.tasks}:
        raise EvaluationError(f"{', '.join(sorted(twice))}: a task is called so too; rename the file")
    texts = {text.label for _, text in _with_roles(request)}
    if twice := texts & {metric.task for metric in held}:
        raise EvaluationError(
            f"{', '.join(sorted(twice))}: the run was evaluated on a text of this name already;\n"
            "leave it out, or rename the file if it is another text"
        )


def _asks(request: Request) -> bool:
    texts = request.texts or request.domain_texts or request.switch
    return bool(request.tasks or texts or request.chat)


def _with_roles(request: Request) -> list[tuple[Role, TextSet]]:
    general: list[tuple[Role, TextSet]] = [("general", text) for text in request.texts]
    return general + [("domain", text) for text in request.domain_texts]


def evaluate_run(output: Path, recipe: Recipe, out: Path, device: torch.device, reporter: Reporter) -> None:
    """Evaluate the tasks of a recipe on what its run has saved; a task that fails is only noted."""
    section = recipe.evaluate
    request = Request(
        target=str(output),
        base=recipe.base,
        tasks=task_specs(section.suites, section.tasks),
        local=Path(section.local) if section.local else None,
        limit=section.limit,
        device=str(device),
        allow_unprotected=section.allow_unprotected,
        out=out,
    )
    if request.tasks:
        evaluate_model(request, reporter)


def _of_run(request: Request) -> tuple[Request, list[Metric]]:
    """Complete what is asked of a run by its recipe; return also the held-out losses it has."""
    directory = Path(request.target)
    recipe = open_run_recipe(directory) if directory.is_dir() else None
    if recipe is None:
        return request, []
    section, heldout = recipe.evaluate, directory / "evaluation" / "heldout.json"
    given = _asks(request)
    request = replace(
        request,
        tasks=request.tasks if given else task_specs(section.suites, section.tasks),
        local=request.local or (Path(section.local) if section.local else None),
        limit=request.limit or (None if given else section.limit),
        allow_unprotected=request.allow_unprotected or section.allow_unprotected,
        out=request.out or directory / "evaluation",
    )
    return request, read_record(heldout, EvaluationRecord).metrics if heldout.is_file() else []


def _task_metrics(
    subject: Subject, request: Request, backends: list[Backend], out: Path, reporter: Reporter
) -> tuple[list[Metric], list[str]]:
    # The harness takes seconds to import, and is an extra.
    from deepen.pipeline.tasks import TaskEvaluation, TaskSettings

    settings = TaskSettings(
        local=request.local,
        limit=request.limit,
        batch_size=request.batch_size,
        device=choose_device(request.device),
        backends=backends,
    )
    tasks = TaskEvaluation(subject, settings, out, reporter, program_scorers(request.allow_unprotected))
    records, failures = tasks.run(list(request.tasks))
    return [metric for record in records for metric in record.metrics], failures


@contextmanager
def _kept(out: Path | None) -> Iterator[Path]:
    """Give the directory results are written to; one that does not last where none was named."""
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from None
    yield out


def choose_device(name: str) -> torch.device:
    """Return the device named; `auto` is a GPU where there is one.

    Raises:
        EvaluationError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"device {name}: cannot be used ({str(error).splitlines()[0]})") from None
    return device
