"""The whole estimate of a job: what it takes, how long, what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from transformers import PreTrainedModel

from deepen.model.structure import blocks_of, family_of
from deepen.planner.anchored import anchor_of
from deepen.planner.devices import Device, device_table
from deepen.planner.ghost import Ghost, embody, file_bytes, meta_base, one_document, prepare_ghost
from deepen.planner.job import Job
from deepen.planner.memory import Memory, device_memory
from deepen.planner.speed import Span, Speed, step_seconds
from deepen.planner.step import Step, measure_ghost, run_step
from deepen.records import Parameters
from deepen.training.anchor import anchor_flops
from deepen.training.flops import TokenCost, count_flops
from deepen.training.parallel import Root
from deepen.training.recompute import MARGIN, BlockMemory, choose_blocks, recompute

_BITS: Final = {"4bit": 4, "8bit": 8}
_JOULES: Final = 3.6e6  # of a kWh
_HOUR: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs for each token.

    Attributes:
        forward: of one forward pass.
        backward: of gradients, and of blocks that are computed again.
        anchor: of holding the model to its base, for each token that is learned; 0 without an anchor.
        teacher: of the model whose predictions are learned; 0 without one.
        rates: of measuring unit rates, for each token that is learned.
        full_finetune: of training the whole base instead, nothing computed again.
    """

    forward: float
    backward: float
    anchor: float
    teacher: float
    rates: float
    full_finetune: float

    @property
    def step(self) -> float:
        """Those of the tokens that are learned."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """All."""
        return self.step + self.anchor + self.teacher + self.rates


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes on disk.

    Attributes:
        checkpoint: one checkpoint of the training: what trains and its optimiser.
        checkpoints: as many as there are at a time, the one being written included.
        output: what is saved in the end: a block pack, an adapter, or a model.
        merged: an ordinary checkpoint with the result in it.
    """

    checkpoint: int
    checkpoints: int
    output: int
    merged: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a token budget costs on some devices.

    Attributes:
        step: seconds of one optimiser step.
        tokens_per_second: of all devices together.
        seconds: of the whole budget; None without one, as the next ones.
        kilowatt_hours: of the devices alone.
        dollars: of renting them; None where no price is known.
    """

    step: Span
    tokens_per_second: Span
    seconds: Span | None
    kilowatt_hours: Span | None
    dollars: Span | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is found once of a job, for one device.

    Attributes:
        job: what is trained.
        parameters: counted on the model itself.
        step: on one device alone.
        other: the same with another micro-batch.
        turned: the same with every block computed again; with none where every block is already.
        cost: FLOPs with nothing computed again, and no anchor.
        anchor: FLOPs a token of the anchor, for each token that is learned.
        teacher: those of the teacher.
        full: FLOPs a token of training the whole base.
        blocks: what each block stores.
        again: blocks computed again.
        frozen_bytes: of the base's weights in each block, 0 for those in which something trains.
        largest_block: bytes of the largest block in the precision of compute.
        trained: number of parameters that train in each block.
        disk: sizes of files.
    """

    job: Job
    parameters: Parameters
    step: Step
    other: tuple[int, Step]
    turned: Step
    cost: TokenCost
    anchor: float
    teacher: float
    full: float
    blocks: tuple[BlockMemory, ...]
    again: tuple[int, ...]
    frozen_bytes: tuple[int, ...]
    trained: tuple[int, ...]
    largest_block: int
    disk: Disk

    @property
    def flops(self) -> Flops:
        """FLOPs for each token learned, what is computed again included."""
        again = sum(self.cost.blocks[index].again for index in self.again)
        forward = self.cost.forward
        backward = self.cost.total - forward + again
        return Flops(
            forward=forward,
            backward=backward,
            anchor=self.anchor,
            teacher=self.teacher,
            rates=self.job.train.measured_share(self.job.windows) * (forward + backward),
            full_finetune=self.full,
        )


def measure(job: Job, device: Device) -> Measured:
    """Build the job's model without values and run its step.

    Raises:
        CheckpointError: transformers makes no model of the config.
        FamilyError: deepen does not know its blocks.
        TrainingError: the method or the checkpointing does not work on it.
    """
    precision = job.precision(device.kind)
    base = meta_base(job, precision)
    with one_document():
        full = _count(base, job).total
        ghost = prepare_ghost(job, base, precision)
        cost, anchor = _count(ghost.model, job), _count_anchor(ghost, job)
        teacher = _count_teacher(ghost, job)
    sizes = _block_sizes(ghost)
    disk = _disk(ghost, job)
    counted = Parameters(base=ghost.base, new=_new(ghost, job), trainable=ghost.trainable)
    ghost = embody(ghost, _BITS.get(job.train.quantise))
    stored, again = _choose(ghost, job, device)
    second = 2 if job.micro_batch == 1 else 1
    step, other = (run_step(ghost, job, micro) for micro in (job.micro_batch, second))
    return Measured(
        job=job,
        parameters=counted,
        step=step,
        other=(second, other),
        turned=_turned(ghost, job, stored, again),
        cost=cost,
        anchor=anchor,
        teacher=teacher,
        full=full,
        blocks=tuple(stored),
        again=again,
        frozen_bytes=tuple(frozen for frozen, _, _ in sizes),
        trained=tuple(trained for _, trained, _ in sizes),
        largest_block=max(whole for _, _, whole in sizes),
        disk=disk,
    )


def count_training(job: Job) -> tuple[int, float]:
    """Return how many parameters train, and the FLOPs of each token with no block computed again.

    Raises:
        DeepenError: as `measure`.
    """
    with one_document():
        ghost = prepare_ghost(job, meta_base(job, "fp32"), "fp32")
        learned = _count(ghost.model, job).total * (1 + job.train.measured_share(job.windows))
        return ghost.trainable, learned + _count_anchor(ghost, job) + _count_teacher(ghost, job)


def least_memory(job: Job, device: Device) -> Memory:
    """Return what one device must have to run a step; quicker than `measure`.

    Raises:
        DeepenError: as `measure`.
    """
    precision = job.precision(device.kind)
    ghost = prepare_ghost(job, meta_base(job, precision), precision)
    largest = max(whole for _, _, whole in _block_sizes(ghost))
    ghost = embody(ghost, _BITS.get(job.train.quantise))
    _choose(ghost, job, device)
    return device_memory(run_step(ghost, job, job.micro_batch), job, device, largest_block=largest)


def memory_of(found: Measured, device: Device) -> Memory:
    """Return what one device of the job must have."""
    return device_memory(found.step, found.job, device, largest_block=found.largest_block)


def largest_micro_batch(found: Measured, device: Device) -> int:
    """Return the most windows of a forward pass that likely fit a device; 0: not even one does.

    What is computed again stays the same; bytes are taken to grow evenly from the two micro-batches run.
    """
    few, other = found.job.micro_batch, found.other
    first, second = sorted([(few, found.step.peak), (other[0], other[1].peak)])
    each = (second[1] - first[1]) / (second[0] - first[0])
    if each <= 0:
        return found.job.windows
    beside = memory_of(found, device).expected
    more = memory_of(replace(found, step=replace(found.step, peak=round(found.step.peak + each))), device)
    fitting = few + int((device.memory - beside) // (more.expected - beside))
    return max(0, min(fitting, -(-found.job.windows // found.job.devices)))


def cost_of(found: Measured, device: Device, speed: Speed | Span | None, dollars: float | None) -> Cost:
    """Return what the job's tokens cost on its devices.

    Args:
        found: from `measure`.
        device: on which it runs.
        speed: the calibration of this machine, or a step's seconds as they were measured on it.
        dollars: for an hour of one device; None: there is no price.
    """
    job = found.job
    tokens = job.windows * job.length
    step = step_seconds(found.step, found.flops.total * tokens / job.devices, job, device, speed)
    rate = Span(low=tokens / step.high, expected=tokens / step.expected, high=tokens / step.low)
    steps = job.optimiser_steps
    seconds = step * steps if steps else None
    busy = seconds * job.devices if seconds else None
    return Cost(
        step=step,
        tokens_per_second=rate,
        seconds=seconds,
        kilowatt_hours=busy * (device.watts / _JOULES) if busy else None,
        dollars=busy * (dollars / _HOUR) if busy and dollars is not None else None,
    )


def on_others(found: Measured, device: Device) -> list[tuple[Device, Memory, Cost]]:
    """Return memory and cost of the same job on the accelerators of the table.

    Of a job that was measured for a CPU there are none: it computes in another precision.
    """
    rows = [row for row in device_table().values() if row.kind == device.kind == "cuda"]
    return [
        (device, memory_of(found, device), cost_of(found, device, None, device.dollars)) for device in rows
    ]


def _count(model: PreTrainedModel, job: Job) -> TokenCost:
    return count_flops(Root(model), model, list(blocks_of(model, family_of(model))), job.length)


def _count_anchor(ghost: Ghost, job: Job) -> float:
    """Return the FLOPs of the anchor for each token that is learned."""

    def run() -> None:
        tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
        ghost.model.base_model(input_ids=tokens, use_cache=False)

    anchor = anchor_of(ghost, job, run)
    if anchor is None:
        return 0.0
    flops = anchor_flops(Root(ghost.model), ghost.model, ghost.blocks, job.length, anchor)
    return flops * anchor.windows / job.windows


def _count_teacher(ghost: Ghost, job: Job) -> float:
    return _count(ghost.teacher, job).total if ghost.teacher else 0.0


def _choose(ghost: Ghost, job: Job, device: Device) -> tuple[list[BlockMemory], tuple[int, ...]]:
    """Set which blocks are computed again; return what each stores, and those."""
    stored = measure_ghost(ghost, job, job.micro_batch)
    again = choose_blocks(stored, job.train.recompute, _budget(ghost, device))
    recompute([ghost.blocks[index] for index in again])
    return stored, again


def _turned(ghost: Ghost, job: Job, stored: Sequence[BlockMemory], again: Sequence[int]) -> Step:
    """Run the step with every block computed again, or with none where every block is."""
    every = choose_blocks(stored, "full", 0)
    for block in ghost.blocks:
        if hasattr(block, "gradient_checkpointing"):
            setattr(block, "gradient_checkpointing", False)  # noqa: B010 - nn.Module declares no such attribute
    if tuple(again) != every:
        recompute([ghost.blocks[index] for index in every])
    return run_step(ghost, job, job.micro_batch)


def _budget(ghost: Ghost, device: Device) -> int:
    """Return what all blocks together may store, as `deepen.pipeline.memory` has it."""
    return int((device.memory - ghost.weight_bytes) * (1 - MARGIN)) - 12 * ghost.trainable


def _new(ghost: Ghost, job: Job) -> int:
    return ghost.trainable if job.layout else 0


def _block_sizes(ghost: Ghost) -> list[tuple[int, int, int]]:
    """Return of each block: bytes that are frozen, parameters that train, bytes in compute's precision."""
    width = ghost.compute.itemsize if ghost.compute else 4
    sizes = []
    for block in ghost.blocks:
        held = list(block.parameters())
        trained = sum(p.numel() for p in held if p.requires_grad)
        frozen = 0 if trained else sum(p.numel() * p.element_size() for p in held)
        sizes.append((frozen, trained, width * sum(p.numel() for p in held)))
    return sizes


def _disk(ghost: Ghost, job: Job) -> Disk:
    """Return the sizes of what a run writes: as `Outline.bytes_needed` has them."""
    bytes_each, train = file_bytes(job.source), job.train
    moments = 2 if train.optimizer == "adamw_8bit" else 8
    checkpoint = (4 + moments) * ghost.trainable
    whole = bytes_each * (ghost.base + _new(ghost, job))
    output = {"blocks": bytes_each * ghost.trainable, "lora": 4 * ghost.trainable}
    adapters = {"prompt": 4 * ghost.trainable, "scale": 4 * ghost.trainable}
    return Disk(
        checkpoint=checkpoint,
        checkpoints=(train.keep_checkpoints + 1) * checkpoint,
        output=(output | adapters).get(train.method, whole),
        merged=whole,
    )
