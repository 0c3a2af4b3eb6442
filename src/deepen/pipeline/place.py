"""Where a run computes: the device of each process, and how the model lies over all of them."""

from dataclasses import dataclass

import torch

from deepen.errors import TrainingError
from deepen.pipeline.plan import RunPlan
from deepen.planner.memory import TRAINED_BYTES, lies_whole
from deepen.training.parallel import Parallel
from deepen.training.world import World


@dataclass(frozen=True)
class Place:
    """Where a model trains: this process's device, and how it lies over the devices of all."""

    device: torch.device
    parallel: Parallel


def choose_place(plan: RunPlan, world: World) -> Place:
    """Choose the device of this process, and between replicas and shards as `train.parallel` says.

    Raises:
        TrainingError: the device cannot be used.
    """
    device = _device(plan.train.device, world)
    asked = plan.train.parallel
    if world.control is None:
        return Place(device, "ddp")
    if asked == "auto":
        return Place(device, world.first(lambda: _fitting(plan, device)))
    return Place(device, asked)


def _fitting(plan: RunPlan, device: torch.device) -> Parallel:
    train = plan.train
    whole = train.quantise != "none" or train.optimizer == "adamw_8bit"
    tables = train.method == "rows" or train.new_rows or train.lora.modules_to_save
    if device.type != "cuda" or whole or tables:
        return "ddp"
    if train.held_beside or train.unit_rates:  # that model is not cut, nor are units
        return "ddp"
    counts = plan.parameters
    trainable = counts.trainable or 0  # adapters are small
    frozen = counts.base + counts.new - trainable
    width = 4 if compute_precision(plan, device) == "fp32" else 2
    needed = frozen * width + trainable * TRAINED_BYTES
    room = torch.cuda.get_device_properties(device).total_memory
    return "ddp" if lies_whole(needed, room) else "fsdp"


def _device(name: str, world: World) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    elif world.size > 1 and name not in ("cpu", f"cuda:{world.local_rank}"):
        raise TrainingError(f"train.device: {name} cannot serve {world.size} processes; say auto or cuda")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"train.device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def compute_precision(plan: RunPlan, device: torch.device) -> str:
    """Return `bf16` or `fp32`."""
    asked = plan.train.precision
    if asked == "auto":
        return "fp32" if device.type == "cpu" else "bf16"
    return asked
