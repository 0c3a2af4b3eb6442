"""Training with everything a run puts round it: metrics, evaluation, checkpoints, resume, signals."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch

from deepen.data.batches import Batch, Mixture
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError, Interrupted
from deepen.evaluation.record import nats_per_token
from deepen.pipeline.directory import RunDirectory
from deepen.pipeline.memory import fit_memory
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.scoring import score_texts
from deepen.pipeline.trainee import Trainee
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from deepen.training.loop import Hooks, Settings, StepReport, train
from deepen.training.metrics import MetricsLog
from deepen.training.optimizer import build_optimizer
from deepen.training.signals import stop_on_signal
from deepen.training.sinks import open_sinks
from deepen.training.world import World


def train_to_the_end(
    plan: RunPlan,
    trainee: Trainee,
    mixture: Mixture,
    texts: Sequence[EvaluationText],
    base_loss: Mapping[str, float],
    directory: RunDirectory,
    world: World,
    reporter: Reporter,
) -> float:
    """Train from the newest valid checkpoint, or from the start; return the seconds it took in all.

    Every process of the run calls this; only the first one writes, and only it knows the seconds.

    Args:
        plan: the numbers.
        trainee: the model and what of it trains.
        mixture: where batches come from.
        texts: evaluated along the way.
        base_loss: task -> nats per token before the first step.
        directory: where metrics and checkpoints go.
        world: the processes of the run.
        reporter: told what goes on.

    Raises:
        TrainingError: the loss is not finite, or a checkpoint is another run's.
        DataError: the tokenizer is another model's.
        Interrupted: a signal came; a checkpoint was saved.
    """
    section = plan.recipe.train
    torch.manual_seed(section.seed)
    fit_memory(plan, trainee, world, reporter)
    optimizer = build_optimizer(
        trainee.parameters, betas=section.betas, weight_decay=section.weight_decay, kind=section.optimizer
    )
    shared = _identity(plan, mixture)
    first = _restore(plan, trainee, optimizer, shared, directory, world, reporter)
    reporter.stage("training")
    log = world.first_only(lambda: _Log(plan, directory, reporter, first))
    if log and not first:
        log.evaluation(0, base_loss)

    def evaluate(step: int) -> None:
        losses = score_texts(trainee.root, texts, world, autocast=trainee.autocast)
        if log:
            log.evaluation(step, nats_per_token(texts, losses))

    def save(step: int) -> None:
        if log:
            log.metrics.sync()
        where, keep = directory.checkpoints, section.keep_checkpoints
        save_checkpoint(where, step, trainee.parameters, optimizer, identity=shared, keep=keep, world=world)

    hooks = Hooks(log=log.step if log else _ignore, evaluate=evaluate, save=save, stop=bool)
    with closing(log) if log else nullcontext():
        _train(plan, trainee, mixture, optimizer, hooks, first, world)
    return log.seconds if log else 0.0


def _train(
    plan: RunPlan,
    trainee: Trainee,
    mixture: Mixture,
    optimizer: torch.optim.Optimizer,
    hooks: Hooks,
    first: int,
    world: World,
) -> None:
    """Run the loop, and leave it when a signal comes to any process."""
    with stop_on_signal(patient=world.control is not None) as asked:
        train(
            trainee.model,
            trainee.parameters,
            optimizer,
            _known(trainee, mixture),
            _settings(plan, trainee),
            replace(hooks, stop=asked),
            first_step=first,
            root=trainee.root,
            world=world,
        )
        if world.any(asked()):
            raise Interrupted(f"stopped after the last step, {plan.steps}; continue with --resume")


def _ignore(_: StepReport) -> None:
    """What all processes but the first do with a step's report."""


def _identity(plan: RunPlan, mixture: Mixture) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must share."""
    return {
        "base": plan.fingerprint,
        "data": mixture.digest,
        "steps": plan.steps,
        "windows": plan.windows,
    }


def _known(trainee: Trainee, mixture: Mixture) -> Callable[[int, int], Batch]:
    """Return the mixture's batches, in which every token has an embedding."""
    embeddings = int(trainee.model.get_input_embeddings().weight.shape[0])

    def batch_at(step: int, windows: int) -> Batch:
        batch = mixture.batch(step, windows)
        if (largest := int(batch.tokens.max())) >= embeddings:
            raise DataError(
                f"data: token id {largest} but the model has {embeddings} embeddings; "
                "its tokenizer is another model's"
            )
        return batch

    return batch_at


def _restore(
    plan: RunPlan,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    shared: Mapping[str, Any],
    directory: RunDirectory,
    world: World,
    reporter: Reporter,
) -> int:
    """Go back to the newest valid checkpoint; return its step, 0 where there is none."""
    saved, damaged = world.first(lambda: newest_checkpoint(directory.checkpoints))
    for line in damaged:
        reporter.note(line)
    if saved is None:
        return 0
    restore_checkpoint(saved, trainee.parameters, optimizer, identity=shared, world=world)
    reporter.note(f"continuing after step {saved.step} of {plan.steps}")
    return saved.step


def _settings(plan: RunPlan, trainee: Trainee) -> Settings:
    section = plan.recipe.train
    return Settings(
        steps=plan.steps,
        windows=plan.windows,
        micro_batch=plan.micro_batch,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup=section.warmup,
        final_learning_rate=section.final_learning_rate,
        clip=section.clip,
        autocast=trainee.autocast,
        evaluate_every=plan.evaluate_every,
        checkpoint_every=plan.checkpoint_every,
    )


class _Log:
    """Turns what the loop reports into metrics lines and the live line."""

    def __init__(self, plan: RunPlan, directory: RunDirectory, reporter: Reporter, first: int) -> None:
        self._plan, self._reporter = plan, reporter
        recipe = plan.recipe.model_dump(mode="json")
        self._stack = ExitStack()
        # First of all: a package that is not installed is said before anything is written.
        self._show = self._stack.enter_context(
            open_sinks(plan.recipe.train.log, directory.root, recipe, first)
        )
        self.metrics = metrics = MetricsLog(directory.metrics, resume_after=first or -1)
        self._stack.enter_context(closing(metrics))
        self._sources = [source.label for source in plan.recipe.data.sources]
        self._step_tokens = plan.windows * plan.recipe.data.sequence_length
        steps = [line for line in metrics.kept if "loss" in line]
        self.seconds: float = steps[-1]["seconds"] if steps else 0.0
        self._source_tokens: dict[str, int] = (
            steps[-1]["source_tokens"] if steps else dict.fromkeys(self._sources, 0)
        )

    def close(self) -> None:
        """Close the log and everything else that shows metrics."""
        self._stack.close()

    def step(self, report: StepReport) -> None:
        rate = self._step_tokens / report.seconds
        self.seconds += report.seconds
        for source, tokens in report.sources.items():
            self._source_tokens[self._sources[source]] += tokens
        self._write(
            {
                "step": report.step,
                "tokens": report.step * self._step_tokens,
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "gradient_norm": report.gradient_norm,
                "tokens_per_second": round(rate, 1),
                "seconds": round(self.seconds, 3),
                "source_tokens": self._source_tokens,
            }
        )
        detail = f"loss {report.loss:.3f}  {rate:,.0f} tokens/s"
        self._reporter.progress(report.step, self._plan.steps, detail)

    def evaluation(self, step: int, nats: Mapping[str, float]) -> None:
        self._write({"step": step, "tokens": step * self._step_tokens, "evaluation": dict(nats)})
        shown = "  ".join(f"{task} {value:.4f}" for task, value in nats.items())
        if shown:
            self._reporter.note(f"step {step}: {shown}")

    def _write(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        self._show(line)
