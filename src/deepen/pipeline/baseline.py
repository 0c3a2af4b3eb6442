"""What the base scores on the texts of a run."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from deepen.checkpoint import write_file
from deepen.data.evaluation_text import EvaluationText
from deepen.model import bypass
from deepen.pipeline.directory import RunDirectory
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.scoring import score_texts
from deepen.pipeline.trainee import Trainee
from deepen.training.world import World

Losses = Mapping[str, NDArray[np.float64]]


def hand_on_losses(trained: RunDirectory, tuning: RunDirectory) -> None:
    """Let a tuning begin with what the training before it found of the base."""
    if trained.base_losses.exists() and not tuning.base_losses.exists():
        write_file(tuning.base_losses, trained.base_losses.read_text("utf-8"))


def base_losses(
    plan: RunPlan,
    trainee: Trainee,
    directory: RunDirectory,
    texts: Sequence[EvaluationText],
    world: World,
    reporter: Reporter,
) -> Losses:
    """Score the base, which the model is but for its new blocks, once; a resumed run reads what was found.

    Returns:
        task -> nats per window.
    """
    digests = {text.task: text.digest for text in texts}
    scored = {"base": plan.fingerprint, "quantise": plan.train.quantise, "texts": digests}
    held = world.first(lambda: _held_losses(directory, scored))
    if held is not None:
        return held
    reporter.stage("evaluating the base")
    with bypass(trainee.model) if plan.layout else nullcontext():
        losses = score_texts(
            trainee.root, texts, world, autocast=trainee.autocast, progress=reporter.progress
        )
    content = scored | {"nats": {task: values.tolist() for task, values in losses.items()}}
    world.first(lambda: write_file(directory.base_losses, json.dumps(content) + "\n"))
    return losses


def _held_losses(directory: RunDirectory, scored: Mapping[str, object]) -> Losses | None:
    if not directory.base_losses.exists():
        return None
    held = json.loads(directory.base_losses.read_text())
    if not held.items() >= scored.items():
        return None
    return {task: np.asarray(values, dtype=np.float64) for task, values in held["nats"].items()}
