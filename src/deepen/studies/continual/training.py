"""One task learned: its conversations, those replayed of earlier tasks, and the loop."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any, Final

import torch

from deepen.checkpoint import atomic_directory, write_file
from deepen.config import ContinualRecipe, SequenceMethod
from deepen.data.batches import Mixture
from deepen.data.conversation_build import mix_conversations
from deepen.data.conversation_corpus import ConversationCorpus
from deepen.data.document_masks import check_document_masks
from deepen.pipeline.plan import default_micro_batch
from deepen.pipeline.reporter import Reporter
from deepen.records import LearnedTask
from deepen.studies.continual.models import Learner
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from deepen.training.interface import Hooks, Settings, StepReport
from deepen.training.loop import train
from deepen.training.metrics import MetricsLog
from deepen.training.optimizer import build_optimizer
from deepen.training.signals import stop_on_signal

TRAINED: Final = "trained"
LEARNED: Final = "learned.json"
_CHECKPOINTS: Final = "checkpoints"


def mix_task(corpora: Sequence[ConversationCorpus], asked: SequenceMethod, length: int, seed: int) -> Mixture:
    """Mix the last of the corpora with the share of those before it that is replayed."""
    replayed = [(corpus, asked.replay) for corpus in corpora[:-1]] if asked.replay else []
    return mix_conversations([*replayed, (corpora[-1], 1.0)], length, seed)


def learn_task(
    learner: Learner,
    mixture: Mixture,
    epochs: float,
    recipe: ContinualRecipe,
    asked: SequenceMethod,
    directory: Path,
    seed: int,
    reporter: Reporter,
) -> LearnedTask:
    """Train on a task, from its newest checkpoint if it was cut short, and write `directory/trained`.

    Raises:
        TrainingError: the loss or a gradient is not finite, or the model cannot part packed conversations.
        Interrupted: a signal came; a checkpoint was saved.
        OutputError: the disk refuses it.
    """
    check_document_masks(learner.model)
    settings = _settings(recipe, asked, mixture, epochs, learner)
    torch.manual_seed(seed)
    optimizer = build_optimizer(learner.parameters, betas=recipe.betas, weight_decay=recipe.weight_decay)
    shared = {"data": mixture.digest, "steps": settings.steps, "windows": settings.windows}
    first = _restore(directory / _CHECKPOINTS, learner, optimizer, shared)
    begun, log = monotonic(), MetricsLog(directory / "metrics.jsonl", resume_after=first or -1)
    losses = [float(line["loss"]) for line in log.kept]

    def note(report: StepReport) -> None:
        losses.append(report.loss)
        line = {"step": report.step, "loss": report.loss, "learning_rate": report.learning_rate}
        seconds = round(report.seconds, 4)
        log.write({**line, "gradient_norm": report.gradient_norm, "seconds": seconds})
        reporter.progress(report.step, settings.steps, f"loss {report.loss:.3f}")

    def save(step: int) -> None:
        log.sync()
        save_checkpoint(
            directory / _CHECKPOINTS, step, learner.parameters, optimizer, identity=shared, keep=1
        )

    with closing(log), stop_on_signal() as stopped:
        hooks = Hooks(log=note, evaluate=lambda _: None, save=save, stop=stopped)
        train(learner.model, learner.parameters, optimizer, mixture.batch, settings, hooks, first_step=first)
    return _keep(learner, mixture, settings, losses, monotonic() - begun, directory)


def _keep(
    learner: Learner,
    mixture: Mixture,
    settings: Settings,
    losses: Sequence[float],
    seconds: float,
    directory: Path,
) -> LearnedTask:
    """Write the model and what was learned, whole; checkpoints are then of no use."""
    learned = LearnedTask(
        steps=settings.steps,
        tokens=settings.steps * settings.windows * mixture.sequence_length,
        trainable=sum(parameter.numel() for parameter in learner.parameters.values()),
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds=round(seconds, 2),
    )
    with atomic_directory(directory / TRAINED) as staged:
        learner.save(staged)
        write_file(staged / LEARNED, learned.model_dump_json(indent=1) + "\n")
    shutil.rmtree(directory / _CHECKPOINTS, ignore_errors=True)
    return learned


def _restore(
    root: Path, learner: Learner, optimizer: torch.optim.Optimizer, shared: Mapping[str, Any]
) -> int:
    saved, _ = newest_checkpoint(root)
    if saved is None:
        return 0
    restore_checkpoint(saved, learner.parameters, optimizer, identity=shared)
    return saved.step


def _settings(
    recipe: ContinualRecipe, asked: SequenceMethod, mixture: Mixture, epochs: float, learner: Learner
) -> Settings:
    windows = min(recipe.batch, mixture.windows_per_epoch)
    steps = mixture.steps(epochs, windows)
    micro = recipe.micro_batch or default_micro_batch(mixture.sequence_length)
    return Settings(
        steps=steps,
        windows=windows,
        micro_batch=min(micro, windows),
        learning_rate=asked.learning_rate,
        schedule=recipe.schedule,
        warmup=recipe.warmup,
        final_learning_rate=0.0,
        clip=recipe.clip,
        autocast=learner.autocast,
        evaluate_every=steps,
        checkpoint_every=max(1, steps // 4),
    )
