"""What each lever would change, in closed form from what was measured of the job as it is.

Of another layout a block is taken to store and cost what those of its kind do on average, what is no
block's to stay as it is, and an anchor to cost the same share of a step; `tests/test_planner.py` holds this
to running the step of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from deepen.expansion import Layout, plan_layout
from deepen.planner.devices import Device
from deepen.planner.estimate import Measured, memory_of
from deepen.planner.memory import Memory, device_memory
from deepen.planner.step import Step

Kind = Literal["below", "frozen", "trains"]


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One change of the job.

    Attributes:
        name: what is changed, in words.
        setting: how to say it on the command line.
        memory: of one device afterwards.
        time: of a step, as a multiple of the job's; None where it cannot be said.
        note: what else it changes.
    """

    name: str
    setting: str
    memory: Memory
    time: float | None
    note: str = ""


def list_levers(found: Measured, device: Device) -> list[Lever]:
    """Return the levers that a job has left, those of the layout first."""
    return [*_layouts(found, device), *_checkpointing(found, device), *_packing(found, device)]


def _layouts(found: Measured, device: Device) -> Iterator[Lever]:
    layout = found.job.layout
    if layout is None:
        return
    count = len(layout.new_blocks)
    choices = [
        (layout.base_blocks, count // 2, _placement(layout), "half as many new blocks"),
        (layout.base_blocks, count, "suffix", "all new blocks at the top"),
    ]
    for depth, blocks, placement, name in choices:
        if blocks < 1 or (chosen := _try_layout(depth, blocks, placement)) in (None, layout):
            continue
        assert chosen is not None
        step, flops = _with_layout(found, chosen)
        memory = device_memory(step, found.job, device, largest_block=found.largest_block)
        note = "learns less" if blocks < count else "another layout: does it learn as much?"
        yield Lever(
            name=name,
            setting=f"--blocks {blocks} --placement {placement}",
            memory=memory,
            time=flops / found.flops.step,
            note=note,
        )


def _placement(layout: Layout) -> str:
    for name in ("interleaved", "suffix", "prefix"):
        if _try_layout(layout.base_blocks, len(layout.new_blocks), name) == layout:
            return name
    return "interleaved"


def _try_layout(depth: int, blocks: int, placement: str) -> Layout | None:
    from deepen.errors import LayoutError

    try:
        return plan_layout(depth, blocks=blocks, placement=placement)  # type: ignore[arg-type]
    except LayoutError:
        return None


def _with_layout(found: Measured, layout: Layout) -> tuple[Step, float]:
    """Return step and FLOPs a token of the job in another layout, computed again as much as it is."""
    kinds = _kinds(layout)
    again = bool(found.again)
    stored = _stored([_like(found, kind) for kind in kinds], again)
    change = len(layout.new_blocks) - len(found.job.layout.new_blocks if found.job.layout else ())
    trained = round(change * fmean(count for count in found.trained if count))
    step = replace(
        found.step,
        weights=found.step.weights + 4 * trained,
        gradients=found.step.gradients + 4 * trained,
        optimizer=round(found.step.optimizer * (1 + trained / max(1, sum(found.trained)))),
    )
    activations = found.step.activations + stored - _stored_now(found)
    held = step.weights + step.gradients + step.optimizer
    return replace(step, peak=held + max(0, activations)), _layout_flops(found, kinds, again)


def _layout_flops(found: Measured, kinds: Sequence[Kind], again: bool) -> float:
    forward = fmean(block.forward for block in found.cost.blocks)
    attention = fmean(block.attention for block in found.cost.blocks)
    cost = {
        "below": forward + attention,
        "frozen": 2 * forward + 3.5 * attention,
        "trains": 3 * forward + 3.5 * attention,
    }
    repeated = fmean(block.again for block in found.cost.blocks) if again else 0.0
    return sum(cost[kind] + (repeated if kind != "below" else 0) for kind in kinds) + 2 * found.cost.outside


def _kinds(layout: Layout) -> list[Kind]:
    first = min(layout.new_indices)
    return [
        "trains" if index in layout.new_indices else "below" if index < first else "frozen"
        for index in range(layout.depth)
    ]


def _like(found: Measured, kind: Kind) -> tuple[float, float]:
    """Return what a block of a kind stores, and what it keeps when it is computed again."""
    if kind == "below":
        return 0.0, 0.0
    storing = [block for block in found.blocks if block.saved]
    alike = [block for block in storing if block.frozen == (kind == "frozen")] or storing
    return fmean(block.saved for block in alike), fmean(block.kept for block in alike)


def _stored(blocks: Sequence[tuple[float, float]], again: bool) -> int:
    if not again:
        return round(sum(saved for saved, _ in blocks))
    return round(sum(kept for _, kept in blocks) + max((saved for saved, _ in blocks), default=0.0))


def _stored_now(found: Measured) -> int:
    held = sum(b.kept if i in found.again else b.saved for i, b in enumerate(found.blocks))
    return held + max((found.blocks[index].saved for index in found.again), default=0)


def _checkpointing(found: Measured, device: Device) -> Iterator[Lever]:
    storing = tuple(index for index, block in enumerate(found.blocks) if block.saved)
    if not storing:
        return
    every = found.again == storing
    repeated = 0.0 if every else sum(found.cost.blocks[index].again for index in storing)
    yield Lever(
        name="no block computed again" if every else "all blocks computed again",
        setting=f"--checkpointing {'none' if every else 'full'}",
        memory=_memory(found, device, found.turned),
        time=(found.cost.total + repeated) / found.flops.step,
        note="same result",
    )


def _packing(found: Measured, device: Device) -> Iterator[Lever]:
    job, step = found.job, found.step
    frozen = sum(found.frozen_bytes)
    if job.train.quantise == "none" and job.train.method in ("blocks", "lora", "prompt") and frozen:
        width = 2 if job.precision(device.kind) == "bf16" else 4
        saved = round(frozen * (1 - 0.516 / width))
        smaller = replace(step, weights=step.weights - saved, peak=step.peak - saved)
        memory = _memory(found, device, smaller)
        note = "the base rounded; slower by 2-50%"
        yield Lever(name="4-bit base", setting="--quantise 4bit", memory=memory, time=None, note=note)
    if job.train.optimizer == "adamw":
        saved = round(step.optimizer * (1 - (2 + 8 / 256) / 8))
        smaller = replace(step, optimizer=step.optimizer - saved, peak=step.peak - saved)
        memory = _memory(found, device, smaller)
        yield Lever(name="8-bit Adam", setting="--optimizer adamw_8bit", memory=memory, time=None)
    if job.windows >= 2 * job.devices:
        more = replace(job, devices=2 * job.devices)
        memory = device_memory(step, more, device, largest_block=found.largest_block)
        yield Lever(
            name=f"{more.devices} devices",
            setting=f"--devices {more.devices}",
            memory=memory,
            time=0.5 / 0.92 if job.devices == 1 else 0.5,
            note="same result",
        )


def _memory(found: Measured, device: Device, step: Step) -> Memory:
    return memory_of(replace(found, step=step), device)
