"""Success rates of tasks solved with a tool, the model beside its base, by budget of turns."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from deepen.errors import EvaluationError
from deepen.evaluation.chat.episodes import RunPrograms, opening, play_tasks
from deepen.evaluation.chat.journal import Journal
from deepen.evaluation.chat.messages import Responder, digest_of
from deepen.evaluation.chat.questions import Progress
from deepen.evaluation.chat.scored import Scored, figures, task_scores
from deepen.evaluation.chat.tool_tasks import ToolTask
from deepen.evaluation.paired import PairedItems, compare_items
from deepen.evaluation.sandbox import run_programs

_BATCH: Final = 16
Played = dict[int, list[dict[str, Any]]]


def score_tools(
    tasks: Sequence[ToolTask],
    model: Responder,
    base: Responder | None,
    *,
    turns: int = 5,
    name: str = "tools",
    run: RunPrograms = run_programs,
    journal: Journal | None = None,
    progress: Progress = lambda done, total: None,
) -> Scored:
    """Play tasks with each budget of 1 to `turns` turns; `sr@k` is the share solved with a budget of k.

    Args:
        tasks: to be solved.
        model: who solves them.
        base: the base on the same tasks.
        turns: largest budget.
        name: of the task in results.
        run: where the model's code is run.
        journal: where finished episodes are kept.
        progress: called with (done, all), of each budget and side.

    Raises:
        SandboxError: this machine cannot confine a program.
        EvaluationError: the sandbox failed; or no turns are asked for.
    """
    if turns < 1:
        raise EvaluationError(f"{name}: {turns} turns; must be 1 or more")
    kept = journal or Journal()
    played: dict[str, Played] = {
        side: {k: _play(tasks, who, k, run, kept, side, progress) for k in range(1, turns + 1)}
        for side, who in (("model", model), ("base", base))
        if who is not None
    }
    solved = {side: _solved(by_budget) for side, by_budget in played.items()}
    others = solved.get("base", {})
    items = [
        PairedItems(task=name, metric=metric, values=values, base=others.get(metric))
        for metric, values in solved["model"].items()
    ]
    categories = [task.category for task in tasks]
    return Scored(
        scores=[task_scores(each) for each in items],
        metrics=compare_items(items),
        results=figures(name, categories, solved["model"]),
        base_results=figures(name, categories, others) if others else {},
        left_out=0,
        lines=_lines(played),
    )


def _solved(played: Played) -> dict[str, Any]:
    return {f"sr@{k}": np.array([float(each["solved"]) for each in found]) for k, found in played.items()}


def _lines(played: dict[str, Played]) -> list[str]:
    return [
        json.dumps({"by": side, "budget": k, **episode}, ensure_ascii=False) + "\n"
        for side, by_budget in played.items()
        for k, found in by_budget.items()
        for episode in found
    ]


def _play(
    tasks: Sequence[ToolTask],
    responder: Responder,
    budget: int,
    run: RunPrograms,
    journal: Journal,
    side: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    keys = [
        digest_of("episode", responder.identity, opening(task, budget), task.model_dump(mode="json"))
        for task in tasks
    ]
    missing = [at for at, key in enumerate(keys) if journal.get(key) is None]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        episodes = play_tasks([tasks[at] for at in batch], responder, budget, run)
        for at, episode in zip(batch, episodes, strict=True):
            journal.put(keys[at], asdict(episode), by=side, budget=budget)
        progress(len(tasks) - len(missing) + start + len(batch), len(tasks))
    return [journal.get(key) for key in keys]
