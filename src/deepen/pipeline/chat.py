"""Conversations on a model and its base: graded questions and tasks solved with Python, kept as records."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deepen.checkpoint import write_file
from deepen.errors import EvaluationError, OutputError
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
from deepen.evaluation.chat.live import LiveChat
from deepen.evaluation.chat.messages import digest_of
from deepen.evaluation.sandbox import run_programs
from deepen.pipeline.evaluate import choose_device
from deepen.pipeline.reporter import Reporter, Silent
from deepen.pipeline.subject import Subject, find_subject
from deepen.pipeline.texts import load_tokenizer
from deepen.records import TaskRecord, capture_provenance


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What to ask, and how.

    Attributes:
        target: a run, a block pack, an adapter or a checkpoint.
        out: directory of records, items and what is kept for a rerun.
        base: where its base is, or what to compare a plain checkpoint with.
        questions: file of questions to be answered and judged.
        judge: who judges them.
        tools: file of tasks to be solved with Python.
        turns: largest budget of those.
        max_new_tokens: of one reply.
        batch_size: conversations in a forward pass.
        device: `auto`, `cpu`, `cuda` …
        allow_unprotected: the sandbox's sentence, to run model-written programs where nothing confines them.
    """

    target: str
    out: Path
    base: str | None = None
    questions: Path | None = None
    judge: Judge | None = None
    tools: Path | None = None
    turns: int = 5
    max_new_tokens: int = 1024
    batch_size: int = 8
    device: str = "auto"
    allow_unprotected: str = ""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A file, what scores it, and what else its result depends on."""

    file: Path
    score: Callable[[Responder, Responder | None], Scored]
    about: dict[str, str]

    @property
    def name(self) -> str:
        return self.file.stem


def evaluate_chat(request: ChatRequest, reporter: Reporter | None = None) -> list[TaskRecord]:
    """Have a model and its base answer; write `task-NAME.json` and `items/NAME.jsonl`, NAME being the file's.

    Replies and verdicts are kept in `out/chat` as they come, so that a rerun asks for none of them again. A
    base that is a model of its own is loaded beside the model.

    Raises:
        DeepenError: the model, a file, the judge or the sandbox cannot be used.
    """
    reporter = reporter or Silent()
    jobs = _jobs(request, reporter)
    subject = find_subject(request.target, request.base)
    reporter.stage("loading the model")
    model, base = _responders(subject, request)
    records = []
    for job in jobs:
        reporter.stage(job.name)
        begun = time.monotonic()
        scored = job.score(model, base)
        if scored.left_out:
            reporter.note(f"{job.name}: the judge gave no verdict on {scored.left_out} questions")
        sides = [model.identity, base.identity if base else None]
        asked = digest_of(job.file.read_text("utf-8"), job.about)
        digests = {"identity": digest_of(*sides, asked), "asked": asked}
        records.append(_keep(request.out, job, digests, subject, scored, time.monotonic() - begun))
    return records


def _jobs(request: ChatRequest, reporter: Reporter) -> list[_Job]:
    """Read every file before anything is loaded."""
    jobs = []
    if request.questions is not None:
        if request.judge is None:
            raise EvaluationError(f"{request.questions}: questions need a judge")
        jobs.append(_question_job(request.questions, request.judge, request.out / "chat", reporter))
    if request.tools is not None:
        jobs.append(_tool_job(request.tools, request, reporter))
    if not jobs:
        raise EvaluationError("nothing to ask: give questions or tools")
    if len({job.name for job in jobs}) < len(jobs):
        raise EvaluationError(f"{jobs[0].file} and {jobs[1].file}: give the files names that differ")
    return jobs


def _question_job(file: Path, judge: Judge, kept: Path, reporter: Reporter) -> _Job:
    score = partial(
        score_questions,
        read_questions(file),
        judge=judge,
        name=file.stem,
        answers=Journal(kept / f"{file.stem}-answers.jsonl"),
        verdicts=Journal(kept / f"{file.stem}-verdicts.jsonl"),
        progress=reporter.progress,
    )
    return _Job(file=file, score=score, about={"judge": judge.endpoint.model})


def _tool_job(file: Path, request: ChatRequest, reporter: Reporter) -> _Job:
    score = partial(
        score_tools,
        read_tool_tasks(file),
        turns=request.turns,
        name=file.stem,
        run=partial(run_programs, allow_unprotected=request.allow_unprotected),
        journal=Journal(request.out / "chat" / f"{file.stem}-episodes.jsonl"),
        progress=reporter.progress,
    )
    return _Job(file=file, score=score, about={"turns": str(request.turns)})


def _responders(subject: Subject, request: ChatRequest) -> tuple[LiveChat, LiveChat | None]:
    device = choose_device(request.device)
    model = subject.model.load(device)
    chat = partial(LiveChat, max_new_tokens=request.max_new_tokens, batch_size=request.batch_size)
    tokenizer = load_tokenizer(subject.model.tokenizer)
    answering = chat(model, tokenizer, subject.model.digest)
    if subject.apart is not None:
        side = subject.apart
        return answering, chat(side.load(device), load_tokenizer(side.tokenizer), side.digest)
    base = chat(model, tokenizer, subject.model.digest, bypassed=True) if subject.base else None
    return answering, base


def _keep(
    out: Path, job: _Job, digests: Mapping[str, str], subject: Subject, scored: Scored, seconds: float
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
