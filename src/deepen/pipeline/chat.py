"""Conversations on a model and its base: graded questions and tasks solved with Python, kept as records."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from deepen.checkpoint import write_file
from deepen.errors import EvaluationError, OutputError, SandboxError
from deepen.evaluation.chat import (
    Journal,
    Judge,
    Responder,
    Scored,
    read_questions,
    read_tool_tasks,
    score_questions,
    score_tools,
)
from deepen.evaluation.chat.episodes import RunPrograms
from deepen.evaluation.chat.live import LiveChat
from deepen.evaluation.chat.messages import digest_of
from deepen.evaluation.sandbox import run_programs
from deepen.pipeline.backend import TRANSFORMERS, Backend, name_backend
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import Side, Subject
from deepen.pipeline.texts import load_tokenizer
from deepen.records import TaskRecord, capture_provenance

_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """What is asked in conversation.

    Attributes:
        questions: file of questions to be answered and judged.
        judge: who judges them.
        tools: file of tasks to be solved with Python.
        turns: largest budget of those.
        max_new_tokens: of one reply.
    """

    questions: Path | None = None
    judge: Judge | None = None
    tools: Path | None = None
    turns: int = 5
    max_new_tokens: int = 1024

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return self.questions is not None or self.tools is not None


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """A file that was read, and what its result depends on besides.

    Attributes:
        file: the questions or tasks.
        score: asks them, keeping what is finished in the directory given.
        about: what else the result depends on.
    """

    file: Path
    score: Callable[[Path, Responder, Responder | None], Scored]
    about: Mapping[str, str]

    @property
    def name(self) -> str:
        """Of the task in results."""
        return self.file.stem


def chat_jobs(settings: ChatSettings, allow_unprotected: str, reporter: Reporter) -> list[ChatJob]:
    """Read every file, before anything is loaded.

    Args:
        settings: what is asked.
        allow_unprotected: the sandbox's sentence, to run model-written programs where nothing confines them.
        reporter: told of replies and verdicts.

    Raises:
        EvaluationError: a file cannot be used, questions have no judge, or both files have one name.
    """
    jobs = []
    if settings.questions is not None:
        if settings.judge is None:
            raise EvaluationError(f"{settings.questions}: questions need a judge")
        jobs.append(_question_job(settings.questions, settings.judge, reporter))
    if settings.tools is not None:
        run = partial(run_programs, allow_unprotected=allow_unprotected)
        jobs.append(_tool_job(settings.tools, settings.turns, run, reporter))
    if len({job.name for job in jobs}) < len(jobs):
        raise EvaluationError(f"{jobs[0].file} and {jobs[1].file}: give the files names that differ")
    return jobs


def _question_job(file: Path, judge: Judge, reporter: Reporter) -> ChatJob:
    questions = read_questions(file)

    def score(kept: Path, model: Responder, base: Responder | None) -> Scored:
        return score_questions(
            questions,
            model,
            base,
            judge=judge,
            name=file.stem,
            answers=Journal(kept / f"{file.stem}-answers.jsonl"),
            verdicts=Journal(kept / f"{file.stem}-verdicts.jsonl"),
            progress=reporter.progress,
        )

    return ChatJob(file=file, score=score, about={"judge": judge.endpoint.model})


def _tool_job(file: Path, turns: int, run: RunPrograms, reporter: Reporter) -> ChatJob:
    tasks = read_tool_tasks(file)

    def score(kept: Path, model: Responder, base: Responder | None) -> Scored:
        return score_tools(
            tasks,
            model,
            base,
            turns=turns,
            name=file.stem,
            run=run,
            journal=Journal(kept / f"{file.stem}-episodes.jsonl"),
            progress=reporter.progress,
        )

    return ChatJob(file=file, score=score, about={"turns": str(turns)})


def score_chat(
    jobs: Sequence[ChatJob],
    subject: Subject,
    out: Path,
    reporter: Reporter,
    *,
    device: torch.device,
    max_new_tokens: int,
    batch_size: int | None = None,
    backend: Backend = TRANSFORMERS,
) -> tuple[list[TaskRecord], list[str]]:
    """Have a model and its base answer; write `task-NAME.json` and `items/NAME.jsonl`, NAME being the file's.

    Replies and verdicts are kept in `out/chat` as they come, so that a rerun asks for none of them again, and
    a model that has given all its replies is not loaded. A base that is a model of its own is loaded beside
    the model.

    Args:
        jobs: of `chat_jobs`.
        subject: who answers.
        out: directory of the results.
        reporter: told what is done.
        device: where the models compute.
        max_new_tokens: of one reply.
        batch_size: conversations in a forward pass.
        backend: who runs the models.

    Returns:
        The records, and why others failed.

    Raises:
        EvaluationError: the tokenizer has no chat template.
        OutputError: `out` cannot be written.
    """
    chat = partial(LiveChat, max_new_tokens=max_new_tokens, batch_size=batch_size or backend.rows or _BATCH)
    model, base = _responders(subject, backend, device, chat, reporter)
    records, failures = [], []
    for job in jobs:
        reporter.stage(job.name)
        begun = time.monotonic()
        try:
            scored = job.score(out / "chat", model, base)
        except (EvaluationError, SandboxError) as error:
            failures.append(f"{job.name}: {error}")
            reporter.note(f"failed: {failures[-1]}")
            continue
        if scored.left_out:
            reporter.note(f"{job.name}: the judge gave no verdict on {scored.left_out} questions")
        sides = [model.identity, base.identity if base else None]
        asked = digest_of(job.file.read_text("utf-8"), dict(job.about))
        digests = {"identity": digest_of(*sides, asked), "asked": asked}
        kept = replace(job, about={**job.about, **name_backend(backend)})
        records.append(_keep(out, kept, digests, subject, scored, time.monotonic() - begun))
    return records, failures


def _responders(
    subject: Subject,
    backend: Backend,
    device: torch.device,
    chat: Callable[..., LiveChat],
    reporter: Reporter,
) -> tuple[LiveChat, LiveChat | None]:
    def answering(side: Side) -> Callable[..., LiveChat]:
        @cache
        def loaded() -> Any:
            reporter.note(f"loading {side.name}")
            return backend.load(side, device)

        return partial(chat, loaded, load_tokenizer(side.tokenizer), _identity(side, backend))

    model = answering(subject.model)
    if subject.apart is not None:
        return model(), answering(subject.apart)()
    return model(), model(bypassed=True) if subject.base else None


def _identity(side: Side, backend: Backend) -> str:
    """Return the digest of what decides replies besides the template: weights, their end, who runs them."""
    files = (side.tokenizer / name for name in ("generation_config.json", "config.json"))
    read = [file.read_text("utf-8") for file in files if file.is_file()]
    return digest_of(side.digest, *read, *([backend.label] if backend.label else []))


def _keep(
    out: Path, job: ChatJob, digests: Mapping[str, str], subject: Subject, scored: Scored, seconds: float
) -> TaskRecord:
    """Write the items, then the record."""
    record = TaskRecord(
        task=job.name,
        identity=digests["identity"],
        asked=digests["asked"],
        model=subject.model.name,
        base=subject.base,
        limit=None,
        metrics=scored.metrics,
        scores=scored.scores,
        results=scored.results,
        base_results=scored.base_results,
        items=f"items/{job.name}.jsonl",
        seconds=round(seconds, 2),
        provenance=capture_provenance(data={job.name: digests["asked"], **job.about}),
    )
    try:
        (out / "items").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from None
    write_file(out / record.items, "".join(scored.lines))
    write_file(out / f"task-{job.name}.json", record.model_dump_json(indent=1) + "\n")
    return record
