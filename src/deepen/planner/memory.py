"""From what PyTorch allocates to what a device must have, and how it lies over several."""

from dataclasses import dataclass
from typing import Final

from deepen.planner.devices import Device
from deepen.planner.job import Job
from deepen.planner.step import Step

# What a trained parameter takes: its fp32 weight, its gradient and AdamW's two moments.
TRAINED_BYTES: Final = 16
# How much of a device `parallel: auto` gives to them; the rest is for activations.
_DEVICE_SHARE: Final = 0.6
# Beside what PyTorch allocates: factor of what its allocator wastes, and bytes of context and kernels. Seen
# on GPUs; a CPU's allocator wastes little. Low, expected, high.
_OVERHEAD: Final = {
    "cuda": ((1.0, 0.3e9), (1.03, 0.8e9), (1.12, 1.5e9)),
    "cpu": ((0.98, 0.0), (1.02, 0.1e9), (1.15, 0.5e9)),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device at the peak of a step.

    Attributes:
        weights: parameters and buffers.
        gradients: of what trains.
        optimizer: its state.
        activations: what autograd stores, and what passes.
        total: all that PyTorch allocates, at once.
        low: least the device must have.
        expected: what it likely must have.
        high: enough, very likely.
        device: what it has.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int
    low: int
    expected: int
    high: int
    device: int

    @property
    def fits(self) -> bool | None:
        """Whether it fits: True very likely, None perhaps, False certainly not."""
        if self.low > self.device:
            return False
        return True if self.high <= self.device else None


def device_memory(step: Step, job: Job, device: Device, *, largest_block: int = 0) -> Memory:
    """Return what one device of a job must have.

    Args:
        step: on one device alone.
        job: how many there are.
        device: of which kind.
        largest_block: bytes of one block as it is gathered, where the model is cut over the devices.
    """
    cut = is_cut(step, job, device)
    parts = [step.weights, step.gradients, step.optimizer]
    held = [-(-part // job.devices) if cut else part for part in parts]
    activations = step.activations + (2 * largest_block if cut else 0)
    return _memory(held, activations, device)


def is_cut(step: Step, job: Job, device: Device) -> bool:
    """Return whether `train.parallel` cuts the model over the devices of a job."""
    if job.devices == 1 or job.train.parallel == "ddp":
        return False
    if job.train.parallel == "fsdp":
        return True
    if device.kind != "cuda" or job.train.quantise != "none" or job.train.optimizer == "adamw_8bit":
        return False
    return not lies_whole(step.weights + step.gradients + step.optimizer, device.memory)


def lies_whole(held: float, memory: float) -> bool:
    """Return whether `parallel: auto` lays so many bytes of weights and optimiser whole on one device."""
    return held <= _DEVICE_SHARE * memory


def _memory(held: list[int], activations: int, device: Device) -> Memory:
    total = sum(held) + activations
    low, expected, high = (int(factor * total + rest) for factor, rest in _OVERHEAD[device.kind])
    weights, gradients, optimizer = held
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        total=total,
        low=low,
        expected=expected,
        high=high,
        device=device.memory,
    )
