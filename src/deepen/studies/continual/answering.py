"""What a model answers to the tests of tasks, and what it has kept of general text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepen.checkpoint import write_file
from deepen.config import ContinualRecipe, TextSet
from deepen.data.chat import ChatTemplate
from deepen.evaluation.answers import Answer, score_answers
from deepen.evaluation.chat.live import LiveChat
from deepen.evaluation.chat.messages import user
from deepen.pipeline.losses import score_subject
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.subject import Subject
from deepen.records import Metric, Role, TaskAnswers, read_record
from deepen.studies.continual.tasks import Task


def answer_tasks(
    subject: Subject,
    tasks: Sequence[Task],
    recipe: ContinualRecipe,
    tokenizer: Any,
    template: ChatTemplate,
    directory: Path,
    device: torch.device,
    reporter: Reporter,
) -> list[TaskAnswers]:
    """Answer and score each task's test, but those of which the answers lie in the directory already.

    Args:
        subject: the model; only its own side answers.
        tasks: with tests.
        recipe: of the study.
        tokenizer: of the base.
        template: how a prompt is put to the model.
        directory: where answers lie, a file a task.
        device: where the model answers.
        reporter: told what goes on.

    Raises:
        EvaluationError: a score needs a package that is not installed.
        OutputError: the directory cannot be written.
    """
    missing = [task for task in tasks if not _file(directory, task).exists()]
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.chat_template = template.source
        model = subject.model.load(device)
        for task in missing:
            reporter.stage(f"answering {task.name}")
            chat = LiveChat(
                lambda: model,
                tokenizer,
                subject.model.digest,
                max_new_tokens=task.answer_tokens,
                batch_size=recipe.answer_batch,
            )
            answers = _answer(task, chat, recipe)
            write_file(_file(directory, task), answers.model_dump_json(indent=1) + "\n")
    return [read_record(_file(directory, task), TaskAnswers) for task in tasks]


def general_losses(
    subject: Subject, recipe: ContinualRecipe, record: Path, device: torch.device, reporter: Reporter
) -> list[Metric]:
    """Return nats per token of the recipe's general texts, beside the base's; scored once.

    Raises:
        DeepenError: a text cannot be read.
    """
    texts: list[tuple[Role, TextSet]] = [("general", text) for text in recipe.general]
    found = score_subject(subject, texts, record, device, reporter, recipe.general_tokens)
    return [metric for metric in found if metric.metric == "nats_per_token"]


def _file(directory: Path, task: Task) -> Path:
    return directory / f"{task.name}.json"


def _answer(task: Task, chat: LiveChat, recipe: ContinualRecipe) -> TaskAnswers:
    given = chat.reply([[user(one.asked)] for one in task.tests])
    answered = [
        Answer(one.prompt, text or "", one.wanted) for one, text in zip(task.tests, given, strict=True)
    ]
    scores = score_answers(answered, task.metric, recipe.scoring)
    return TaskAnswers(task=task.name, answers=given, scores=scores)
