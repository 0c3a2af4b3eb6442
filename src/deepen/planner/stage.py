"""A job's model of which only some blocks have values: little of a large one can be trained for real."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from deepen.model.structure import blocks_of, depth_config, family_of, install_blocks, reordered_config
from deepen.planner.anchored import base_of, loss_of
from deepen.planner.devices import Device
from deepen.planner.ghost import Ghost, embody, give_values, meta_base, prepare_ghost
from deepen.planner.job import Job
from deepen.planner.memory import device_memory
from deepen.planner.step import run_step
from deepen.planner.timing import autocast_of, new_optimizer, real_anchor, time_training
from deepen.training.liger import liger_loss
from deepen.training.loss import Loss, summed_loss
from deepen.training.penalty import penalised
from deepen.training.recompute import recompute


class _Blocks:
    """The blocks of a whole model, of which it has only some for the time being."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self._family = model, family_of(model)
        self.all = tuple(blocks_of(model, self._family))
        self._config = depth_config(model, self._family)
        self._shown: Sequence[int] = range(len(self.all))

    def show(self, positions: Sequence[int]) -> None:
        """Make the blocks at some positions the model's own."""
        config = reordered_config(self.model, self._family, self._config, positions)
        install_blocks(self.model, self._family, [self.all[index] for index in positions], config)
        self._shown = positions

    @contextmanager
    def without(self, positions: frozenset[int]) -> Iterator[PreTrainedModel]:
        """Take some blocks out for a while."""
        shown = self._shown
        self.show([index for index in shown if index not in positions])
        try:
            yield self.model
        finally:
            self.show(shown)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model of which some blocks can be trained.

    Attributes:
        job: what is trained, on one device.
        ghost: the model, with fake tensors in these blocks or with real ones.
        blocks: all its blocks.
        reference: those of the copy of the base, where there is one.
        optimizer: over all that trains in blocks with values; None: nothing has values yet.
    """

    job: Job
    ghost: Ghost
    blocks: _Blocks
    reference: _Blocks | None
    optimizer: torch.optim.Optimizer | None = None

    def needed(self, device: Device) -> int:
        """Return the bytes that training these blocks likely takes."""
        return device_memory(run_step(self.ghost, self.job, self.job.micro_batch), self.job, device).expected

    def with_values(self, device: Device) -> "Stage":
        """Give these blocks, and all outside the blocks, values on a device."""
        asked = self.job.train.device
        where = asked if asked.startswith(device.kind) else device.kind
        ghost = give_values(self.ghost, torch.device(where))
        return replace(self, ghost=ghost, optimizer=new_optimizer(self.job, ghost.parameters))

    def show(self, positions: Sequence[int]) -> dict[str, nn.Parameter]:
        """Give the model, and the copy of its base, the blocks at some positions; return what trains."""
        self.blocks.show(positions)
        if self.reference:
            base = [self.job.layout.base_block(at) if self.job.layout else at for at in positions]
            self.reference.show([index for index in base if index is not None])
        trained = {id(parameter) for parameter in self.ghost.parameters.values()}
        return {name: p for name, p in self.ghost.model.named_parameters() if id(p) in trained}

    def train(self, positions: Sequence[int], passes: int, anchored: int, steps: int) -> list[float]:
        """Train with the blocks at some positions; return the seconds of each step.

        Args:
            positions: of blocks with values.
            passes: of whole micro-batches in a step.
            anchored: windows of the anchor in a step.
            steps: how many.
        """
        job, model, parameters = self.job, self.ghost.model, self.show(positions)
        assert self.optimizer is not None
        return time_training(
            model,
            parameters,
            self.optimizer,
            job,
            windows=passes * job.micro_batch,
            steps=steps,
            anchor=real_anchor(job, model, base_of(self.ghost, job), anchored) if anchored else None,
            loss=self._loss(positions),
        )

    def _loss(self, positions: Sequence[int]) -> Loss:
        job, model = self.job, self.ghost.model
        loss = loss_of(job, self.ghost.teacher)
        if loss is summed_loss and job.train.loss == "liger":
            loss = liger_loss(model, autocast_of(job, model))
        if not (job.train.drift_penalty and job.layout):
            return loss
        new = [index for index, at in enumerate(positions) if at in job.layout.new_indices]
        return penalised(loss, job.train.drift_penalty, new)


def set_stage(job: Job, device: Device, positions: Sequence[int], again: Sequence[int]) -> Stage:
    """Prepare a job's model with fake tensors, as a run prepares it, and leave it some of its blocks.

    Args:
        job: what is trained.
        device: on what.
        positions: of the blocks that stay.
        again: blocks that are computed again in the backward pass.

    Raises:
        LayoutError: the config has no words for so few blocks.
    """
    precision = job.precision(device.kind)
    job = replace(job, windows=min(job.windows, 2 * job.micro_batch), devices=1)
    ghost = prepare_ghost(job, meta_base(job, precision), precision)
    blocks = _Blocks(ghost.model)
    recompute([blocks.all[index] for index in again])
    if job.layout and job.train.method == "blocks":
        new = job.layout.new_indices
        ghost = replace(ghost, base_of=lambda _: blocks.without(new))
    reference = _Blocks(ghost.reference) if ghost.reference else None
    stage = Stage(job=job, ghost=ghost, blocks=blocks, reference=reference)
    held = stage.show(positions)
    return replace(stage, ghost=embody(replace(ghost, parameters=held), None))
