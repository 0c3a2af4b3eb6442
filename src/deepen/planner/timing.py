"""Training steps made for real, by deepen's own loop on random tokens, and their seconds."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from deepen.errors import TrainingError
from deepen.methods import build_method
from deepen.methods.base import base_inside
from deepen.model.structure import blocks_of, family_of
from deepen.planner.anchored import loss_of
from deepen.planner.ghost import trained_model, untrained_base, untrained_teacher
from deepen.planner.job import Job
from deepen.training.anchor import Anchor, BaseOf
from deepen.training.interface import Hooks, Settings
from deepen.training.loop import train
from deepen.training.loss import Loss, summed_loss
from deepen.training.optimizer import build_optimizer
from deepen.training.prefix import Prefix, find_prefix
from deepen.training.recompute import recompute

_WARM: Final = 1


@dataclass(frozen=True)
class _Batch:
    """A batch of random tokens, as `deepen.training.interface.Batch`."""

    tokens: NDArray[np.int64]
    sources: NDArray[np.int64]
    positions: NDArray[np.int64] | None = None
    trained: None = None
    numbers: None = None

    @property
    def trained_tokens(self) -> NDArray[np.int64]:
        """All of them count."""
        return np.full(len(self.tokens), self.tokens.shape[1] - 1)


def time_steps(job: Job, device: torch.device, steps: int) -> list[float]:
    """Train for real on random tokens; return the seconds of each step but the first.

    Args:
        job: what is trained; its base begins as random numbers.
        device: of this machine.
        steps: how many.
    """
    model, parameters = trained_model(job, job.precision(device.type), device)
    if job.train.recompute == "full":
        recompute(list(blocks_of(model, family_of(model))))
    optimizer = new_optimizer(job, parameters)
    anchor = real_anchor(job, model, _base_of(job, model), job.anchor_windows) if job.train.anchor else None
    loss = loss_of(job, untrained_teacher(job, job.precision(device.type), device))
    found = time_training(
        model, parameters, optimizer, job, windows=job.windows, steps=steps, anchor=anchor, loss=loss
    )
    return found[_WARM:]


def time_training(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    job: Job,
    *,
    windows: int,
    steps: int,
    anchor: Anchor | None = None,
    loss: Loss = summed_loss,
) -> list[float]:
    """Train a model in hand on random tokens; return the seconds of each step.

    Args:
        model: with values, on the device.
        parameters: what trains, by name.
        optimizer: over these, or more.
        job: says how; the windows of a step may be others.
        windows: in one step.
        steps: how many.
        anchor: what holds the model to its base.
        loss: what is made small.
    """
    seconds: list[float] = []
    hooks = Hooks(
        log=lambda report: seconds.append(report.seconds), evaluate=_nothing, save=_nothing, stop=bool
    )
    settings = Settings(
        steps=steps,
        windows=windows,
        micro_batch=job.micro_batch,
        learning_rate=1e-4,
        schedule="constant",
        warmup=0.0,
        final_learning_rate=1.0,
        clip=1.0,
        autocast=autocast_of(job, model),
        evaluate_every=steps,
        checkpoint_every=steps,
        loss=loss,
    )
    train(model, parameters, optimizer, _batches(job, model, windows), settings, hooks, anchor=anchor)
    return seconds


def new_optimizer(job: Job, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the job's optimiser over what trains."""
    return build_optimizer(parameters, betas=(0.9, 0.95), weight_decay=0.1, kind=job.train.optimizer)


def real_anchor(job: Job, model: PreTrainedModel, base: BaseOf, windows: int) -> Anchor:
    """Return what holds a model to its base on so many windows of random tokens; the job has an anchor."""
    assert job.train.anchor is not None
    return Anchor(
        batch_at=_batches(job, model, windows),
        windows=windows,
        weight=job.train.anchor.weight,
        base=base,
        prefix=None if job.train.copies_base else _prefix(model, autocast_of(job, model)),
    )


def autocast_of(job: Job, model: PreTrainedModel) -> torch.dtype | None:
    """Return the dtype that a job computes in where its model lies; None: that of the weights."""
    return torch.bfloat16 if job.precision(model.device.type) == "bf16" else None


def _base_of(job: Job, model: PreTrainedModel) -> BaseOf:
    if inside := base_inside(build_method(job.train)):
        return inside
    wide = job.precision(model.device.type) == "fp32"
    copy = untrained_base(job, wide, model.device).requires_grad_(False)
    return lambda _: nullcontext(copy)


def _prefix(model: PreTrainedModel, autocast: torch.dtype | None) -> Prefix | None:
    try:
        return find_prefix(model, autocast)
    except TrainingError:
        return None


def _batches(job: Job, model: PreTrainedModel, windows: int) -> Callable[[int, int], Any]:
    words = int(model.get_input_embeddings().weight.shape[0])
    tokens = np.random.default_rng(0).integers(0, words, (windows, job.length + 1))
    # Two documents in each window, where the job parts them: it is the mask that takes time.
    places = np.tile(np.arange(job.length) % max(1, job.length // 2), (windows, 1))
    batch = _Batch(tokens, np.zeros(windows, dtype=np.int64), places if job.document_masks else None)
    return lambda step, count: batch


def _nothing(_: int) -> None:
    """What is done when an evaluation or a checkpoint is due."""
