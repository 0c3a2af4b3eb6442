"""Training with everything a run puts round it: metrics, evaluation, checkpoints, resume, signals."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from deepen.blocks import BLOCKS_NAME
from deepen.data.batches import Batch, Mixture
from deepen.data.evaluation_text import EvaluationText
from deepen.errors import DataError, Interrupted
from deepen.evaluation.record import nats_per_token
from deepen.model.structure import blocks_of, family_of
from deepen.pipeline.anchor import open_anchor
from deepen.pipeline.baseline import Losses
from deepen.pipeline.bound import Bound, take_back
from deepen.pipeline.curve import Curve
from deepen.pipeline.directory import RunDirectory
from deepen.pipeline.log import RunLog
from deepen.pipeline.memory import fit_memory
from deepen.pipeline.plan import RunPlan
from deepen.pipeline.prefix import open_prefix
from deepen.pipeline.rates import open_rates
from deepen.pipeline.reporter import Reporter
from deepen.pipeline.teacher import HeldTeacher, open_teacher
from deepen.pipeline.trainee import Trainee
from deepen.records import EarlyStop
from deepen.training.anchor import Anchor, anchor_flops, anchor_loss
from deepen.training.checkpoints import newest_checkpoint, restore_checkpoint, save_checkpoint
from deepen.training.flops import Gauge, attained, calibration_flops, count_flops
from deepen.training.interface import Hooks, Settings, StepReport
from deepen.training.liger import liger_loss
from deepen.training.loop import train
from deepen.training.loss import Loss, summed_loss
from deepen.training.optimizer import build_optimizer
from deepen.training.parallel import Root
from deepen.training.penalty import penalised
from deepen.training.prefix import PrefixCache
from deepen.training.rates import UnitRates
from deepen.training.signals import stop_on_signal
from deepen.training.world import World

# The run is at least so many times the work of the calibration, or there is none.
_CALIBRATION_SHARE: Final = 50


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What became of a run's training.

    Attributes:
        seconds: it took in all; 0 in all processes but the first.
        stopped: what ended it before its time, and where the weights are from; None: nothing did.
        losses: task -> nats per window of the model as it will be saved.
    """

    seconds: float
    stopped: EarlyStop | None
    losses: Losses


def train_to_the_end(
    plan: RunPlan,
    trainee: Trainee,
    mixture: Mixture,
    texts: Sequence[EvaluationText],
    base: Losses,
    directory: RunDirectory,
    world: World,
    reporter: Reporter,
    anchored: Mixture | None = None,
) -> Trained:
    """Train from the newest valid checkpoint, or from the start, to the end, and evaluate what came of it.

    Every process calls this; only the first one writes and knows the seconds. Weights end as they are saved.

    Args:
        plan: the numbers.
        trainee: the model and what of it trains.
        mixture: where batches come from.
        texts: evaluated along the way and at the end.
        base: task -> nats per window of the base, which without a pack is the model at first.
        directory: where metrics and checkpoints go.
        world: the processes of the run.
        reporter: told what goes on.
        anchored: the windows of `train.anchor`.

    Raises:
        TrainingError: the loss is not finite, or a checkpoint is another run's.
        DataError: the tokenizer is another model's.
        Interrupted: a signal came; a checkpoint was saved.
    """
    torch.manual_seed(plan.train.seed)
    prefix = open_prefix(plan, trainee, mixture, world, reporter)
    anchor = open_anchor(plan, trainee, anchored, reporter)
    teacher = open_teacher(plan, trainee, reporter)
    fit_memory(plan, trainee, world, reporter)
    optimizer = _optimizer(plan, trainee)
    shared = _identity(plan, mixture, anchored, teacher)
    first = _restore(plan, trainee, optimizer, shared, directory, world, reporter)
    gauge = _gauge(plan, trainee, anchor, teacher, world)
    reporter.stage("training")
    log = world.first_only(lambda: RunLog(plan, mixture, prefix, directory, reporter, first, gauge))

    def save(step: int, where: Path = directory.checkpoints, keep: int = plan.train.keep_checkpoints) -> None:
        if log:
            log.metrics.sync()
        save_checkpoint(where, step, trainee.parameters, optimizer, identity=shared, keep=keep, world=world)

    bound = _bound(plan, texts, base, partial(save, where=directory.held, keep=1))
    curve = Curve(plan=plan, trainee=trainee, texts=texts, log=log, bound=bound, world=world)
    if not first:
        curve.begin(base)
    settings, hooks = _settings(plan, trainee, teacher), _hooks(plan, mixture, curve, save)
    with closing(log) if log else nullcontext(), closing(prefix) if prefix else nullcontext():
        rates = open_rates(plan, anchored)
        _train(trainee, mixture, optimizer, settings, hooks, first, world, prefix, anchor, rates)
        found = None if bound.enough() else curve.end(reporter)
    stopped = take_back(bound, directory.held, trainee, optimizer, shared, world, reporter)
    losses = curve.score_saved(reporter) if found is None or stopped else found
    return Trained(seconds=log.seconds if log else 0.0, stopped=stopped, losses=losses)


def _bound(
    plan: RunPlan,
    texts: Sequence[EvaluationText],
    base: Losses,
    hold: Callable[[int], None],
) -> Bound:
    general = [text.task for text in texts if text.role == "general"]
    limit, nats = plan.train.max_general_loss, nats_per_token(texts, base)
    return Bound(limit=limit, base=nats, general=general, hold=hold)


def _hooks(plan: RunPlan, mixture: Mixture, curve: Curve, save: Callable[[int], None]) -> Hooks:
    return Hooks(
        log=curve.log.step if curve.log else _ignore,
        evaluate=curve.go_on,
        save=save,
        stop=bool,
        name_window=_window_names(plan, mixture),
        enough=curve.bound.enough,
    )


def _optimizer(plan: RunPlan, trainee: Trainee) -> torch.optim.Optimizer:
    train = plan.train
    return build_optimizer(
        trainee.parameters, betas=train.betas, weight_decay=train.weight_decay, kind=train.optimizer
    )


def _train(
    trainee: Trainee,
    mixture: Mixture,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    hooks: Hooks,
    first: int,
    world: World,
    prefix: PrefixCache | None,
    anchor: Anchor | None,
    rates: UnitRates | None,
) -> None:
    """Run the loop, and leave it when a signal comes to any process."""
    with stop_on_signal(patient=world.control is not None) as asked:
        train(
            trainee.model,
            trainee.parameters,
            optimizer,
            _known(trainee, mixture),
            settings,
            replace(hooks, stop=asked),
            first_step=first,
            root=trainee.root,
            world=world,
            prefix=prefix,
            anchor=anchor,
            rates=rates,
        )
        if world.any(asked()):
            raise Interrupted(f"stopped after the last step, {settings.steps}; continue with --resume")


def _ignore(_: StepReport) -> None:
    """What all processes but the first do with a step's report."""


def _window_names(plan: RunPlan, mixture: Mixture) -> Callable[[int, int], str]:
    """Return what calls a window of a step by its source and its number there."""

    def name(step: int, row: int) -> str:
        source, index = mixture.places(step, plan.windows)[row]
        return f"window {index} of {plan.labels[source]}"

    return name


def _gauge(
    plan: RunPlan, trainee: Trainee, anchor: Anchor | None, teacher: HeldTeacher | None, world: World
) -> Gauge:
    """Count what a step computes, and measure what the devices attain where the run is long enough for it."""
    device = trainee.model.device
    blocks = list(blocks_of(trainee.model, plan.base.family))
    model = (trainee.root, trainee.model, blocks, plan.length)
    with torch.autocast(device.type, dtype=trainee.autocast) if trainee.autocast else nullcontext():
        cost = count_flops(*model)
        beside = anchor_flops(*model, anchor) * anchor.windows / plan.windows if anchor else 0.0
        if teacher:
            theirs = list(blocks_of(teacher.model, family_of(teacher.model)))
            beside += count_flops(Root(teacher.model), teacher.model, theirs, plan.length).total
    beside += plan.train.measured_share(plan.windows) * cost.total
    cost = replace(cost, rest=cost.rest + beside)
    worth = cost.total * plan.tokens > _CALIBRATION_SHARE * world.size * calibration_flops(device)
    world.any(False)  # processes that share a processor measure at one time
    found = world.gather(attained(device, trainee.autocast or torch.float32)) if worth else []
    return Gauge(cost=cost, attained=sum(found) or None)


def _identity(
    plan: RunPlan, mixture: Mixture, anchored: Mixture | None, teacher: HeldTeacher | None
) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must share."""
    shared = {
        "base": plan.fingerprint,
        "data": mixture.digest,
        "steps": plan.steps,
        "windows": plan.windows,
        **({"pack": _digest(plan.pack / BLOCKS_NAME)} if plan.pack else {}),
    }
    beside = {"anchor": anchored, "teacher": teacher}
    return shared | {name: each.digest for name, each in beside.items() if each}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _settings(plan: RunPlan, trainee: Trainee, teacher: HeldTeacher | None) -> Settings:
    section = plan.train
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
        loss=_loss(plan, trainee, teacher),
    )


def _loss(plan: RunPlan, trainee: Trainee, teacher: HeldTeacher | None) -> Loss:
    section = plan.train
    loss = liger_loss(trainee.model, trainee.autocast) if section.loss == "liger" else summed_loss
    if teacher and section.teacher:
        loss = anchor_loss(lambda _: nullcontext(teacher.model), likelihood=section.teacher.cross_entropy)
    if section.drift_penalty and plan.layout:
        return penalised(loss, section.drift_penalty, plan.layout.new_indices)
    return loss
