"""TRACE's three deltas of a method's last model: general ability, instruction following and safety.

Each is the mean over its tasks of R^G_T − R^G_0 (TRACE, arXiv 2310.06762): what the model scores after the
whole sequence less what the base scores, on the same items. General ability is by benchmarks, the other two
by a judge who compares both models' answers. They are cells of their own, so a finished sequence is not
learned anew for them.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Final

from deepen.config import ContinualRecipe, DeltasSection
from deepen.errors import RecipeError, StudyError
from deepen.evaluation.chat import Endpoint, Judge
from deepen.evaluation.suites import task_specs
from deepen.pipeline.chat import ChatSettings, chat_jobs
from deepen.pipeline.evaluate import Request, evaluate_model
from deepen.pipeline.reporter import Reporter, Silent
from deepen.records import Metric, TraceDelta, capture_provenance
from deepen.studies.cells import Cell, Computed
from deepen.studies.continual.models import saved_model

GENERAL, INSTRUCTIONS, SAFETY = KINDS = ("general ability", "instruction following", "safety")
# Raised when a change of deepen changes what equal inputs give.
_VERSION: Final = 1


def check_deltas(asked: DeltasSection, tokenizer: Any) -> None:
    """Refuse before anything is learned what could not be measured in the end.

    Raises:
        EvaluationError: a task or a file of questions cannot be used.
        RecipeError: questions are asked of a model without a chat template.
    """
    task_specs((), asked.general)
    for settings in _chats(asked).values():
        chat_jobs(settings, "", Silent())
        if not getattr(tokenizer, "chat_template", None):
            raise RecipeError("deltas: the base's tokenizer has no chat template to ask questions by")


def delta_cell(recipe: ContinualRecipe, learned: Cell, trained: Path, base: Path) -> Cell:
    """Return the cell of the deltas of a method that has learned the sequence.

    Args:
        recipe: of the study.
        learned: the method's own cell, finished.
        trained: where it saved what it learned last.
        base: directory of the base.
    """
    asked = recipe.deltas
    files = [settings.questions for settings in _chats(asked).values() if settings.questions]
    return Cell(
        name=f"{learned.name}-deltas",
        inputs={
            "kind": "deltas",
            "version": _VERSION,
            "of": learned.key,
            "asked": asked.model_dump(mode="json", exclude_defaults=True),
            "questions": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        },
        compute=partial(_measure, recipe, trained, base),
    )


def read_deltas(result: Sequence[Any]) -> list[TraceDelta]:
    """Return all three, those that a finished cell does not hold without a value."""
    held = {each.name: each for each in map(TraceDelta.model_validate, result)}
    return [held.get(name, TraceDelta(name=name)) for name in KINDS]


def _measure(
    recipe: ContinualRecipe, trained: Path, base: Path, directory: Path, reporter: Reporter
) -> Computed:
    if not trained.is_dir():
        raise StudyError(f"{trained}: is no longer there, so nothing more can be measured of it")
    model = saved_model(trained)
    found = []
    for name, request in _requests(recipe, model, base, directory).items():
        evaluation = evaluate_model(request, reporter)
        if evaluation.failures:
            raise StudyError(f"{name}: {'; '.join(evaluation.failures)}")
        found.append(summarise(name, evaluation.metrics).model_dump(mode="json"))
    return Computed(result={"deltas": found}, provenance=capture_provenance())


def _requests(recipe: ContinualRecipe, model: Path, base: Path, directory: Path) -> dict[str, Request]:
    asked = recipe.deltas
    beside = partial(Request, target=str(model), base=str(base), device=recipe.device)
    found = {
        name: beside(chat=settings, out=directory / name.split()[0])
        for name, settings in _chats(asked).items()
    }
    if not asked.general:
        return found
    general = beside(
        tasks=task_specs((), asked.general),
        local=Path(asked.local) if asked.local else None,
        limit=asked.limit,
        out=directory / GENERAL.split()[0],
    )
    return {GENERAL: general, **found}


def _chats(asked: DeltasSection) -> dict[str, ChatSettings]:
    if asked.judge is None:
        return {}
    judge = Judge(endpoint=Endpoint(url=asked.judge.url, model=asked.judge.model))
    files = {INSTRUCTIONS: asked.instructions, SAFETY: asked.safety}
    return {
        name: ChatSettings(questions=Path(file), judge=judge, max_new_tokens=asked.max_new_tokens)
        for name, file in files.items()
        if file
    }


def summarise(name: str, metrics: Sequence[Metric]) -> TraceDelta:
    """Return a delta of its metrics: of each task the first compared with the base, or the preference.

    Raises:
        StudyError: there is none such.
    """
    wanted = [each for each in metrics if each.delta is not None]
    if name != GENERAL:
        wanted = [each for each in wanted if each.metric == "preference"]
    first = {each.task: each for each in reversed(wanted)}
    parts = [first[task] for task in dict.fromkeys(each.task for each in wanted)]
    if not parts:
        raise StudyError(f"{name}: nothing that was asked can be compared with the base")
    gains = [(each.delta or 0.0) * (1 if each.higher_is_better else -1) for each in parts]
    value = sum(gains) / len(gains)
    widths = [
        (each.ci_high - each.ci_low) / 2
        for each in parts
        if each.ci_low is not None and each.ci_high is not None
    ]
    if len(widths) < len(parts):
        return TraceDelta(name=name, value=value, parts=parts)
    # The tasks' items are independent samples.
    width = sqrt(sum(each**2 for each in widths)) / len(parts)
    return TraceDelta(name=name, value=value, low=value - width, high=value + width, parts=parts)
